"""What the end of a launch means, and whether another follows: pure functions of what processes said."""

from __future__ import annotations

import re
import signal
from collections.abc import Sequence
from dataclasses import dataclass

from engine.verdict import LOST_ANOTHER, Verdict


@dataclass(frozen=True)
class Said:
    """A worker's verdict, or the exit code of one that failed (negative: the signal that killed it)."""

    rank: int
    verdict: Verdict | None = None
    code: int = 0


@dataclass(frozen=True)
class Launch:
    """One launch of a run.

    Attributes:
        verdict: how it ended.
        saved: the newest checkpoint when it had ended; "" for none.
        told: whether a signal to the launcher asked for the end.
    """

    verdict: Verdict
    saved: str = ""
    told: bool = False


def conclude(
    said: Sequence[Said], *, told: bool = False, oom_killed: bool = False, lost: str = ""
) -> Verdict:
    """One verdict for a launch from what its workers, on all hosts, have said.

    Args:
        said: in the order in which it was said on each host.
        told: a signal to the launcher asked for the end.
        oom_killed: the kernel has killed a process for lack of memory meanwhile.
        lost: what happened to another host, if anything.
    """
    verdicts = [one.verdict for one in said if one.verdict is not None]
    update = max((verdict.update for verdict in verdicts), default=0)
    # Every rank says these two after the last save: what goes wrong later, such as an abort at exit, is
    # nothing to do again.
    for state in ("finished", "preempted"):
        for verdict in verdicts:
            if verdict.state == state and verdict.kind != "unsaved":
                return verdict
    for verdict in verdicts:
        if verdict.kind == "user":
            return verdict
    for verdict in verdicts:
        if verdict.state == "out_of_memory":
            return verdict
    died = [one for one in said if one.code and -one.code not in _POLITE and not _spoke(one, said)]
    # torchrun ends the others with SIGTERM, then SIGKILL, once one has failed: that one comes first.
    killed = next((one for one in died if one.code == -signal.SIGKILL), None)
    loader = any("loader worker was killed" in v.message for v in verdicts)
    if oom_killed and (killed or loader):
        who = f"rank {killed.rank}" if killed else "a loader worker"
        text = f"{who} was killed by the kernel because the machine ran out of memory"
        return Verdict("out_of_memory", update, message=text)
    trouble = [v for v in verdicts if v.state in ("failed", "hung")]
    causes = [v for v in trouble if v.state == "hung" or not LOST_ANOTHER.search(v.message)]
    if causes:
        return causes[0]
    early = [v for v in verdicts if v.kind == "unsaved"]
    if told:
        text = "stopped before it could save; start again to go on from what was saved before"
        return early[0] if early else Verdict("preempted", update, message=text, kind="unsaved")
    if lost:
        return Verdict("failed", update, message=lost)
    if died:
        return Verdict("failed", update, message="; ".join(_death(one) for one in died[:1]))
    # A rank that a signal ends while it starts breaks the others' collectives; one whose collective broke has
    # the others ended by torchrun's signal: whichever was said first is the cause.
    for verdict in verdicts:
        if verdict in trouble or verdict in early:
            return verdict
    if any(-one.code in _POLITE for one in said):
        text = "stopped by a signal before it had begun; start again to go on"
        return Verdict("preempted", message=text, kind="unsaved")
    return Verdict("failed", update, message="the workers ended without a word; see their output")


def again(launches: Sequence[Launch], restarts: int, saved_before: str = "") -> tuple[bool, str]:
    """Whether another launch follows, and why, in words for a person ("" where the verdict says it all).

    Args:
        launches: all so far, oldest first.
        restarts: how often in a row without a new checkpoint.
        saved_before: the newest checkpoint before the first of them.
    """
    last = launches[-1]
    verdict = last.verdict
    if last.told or verdict.state in ("finished", "preempted") or verdict.kind == "user":
        return False, ""
    if verdict.state == "out_of_memory":
        return False, "not started again, since it would run out of memory again"
    if any(_same(verdict, earlier.verdict) for earlier in launches[:-1]):
        return False, f"not started again: the same failure twice at update {verdict.update}"
    saved = [saved_before, *(launch.saved for launch in launches)]
    in_vain = 0  # restarts, thus without the first launch
    while in_vain < len(launches) - 1 and saved[-1 - in_vain] == saved[-2 - in_vain]:
        in_vain += 1
    if in_vain >= restarts:
        return False, f"not started again: {restarts} restarts without a new checkpoint"
    return True, f"starting again ({in_vain + 1} of {restarts} without a new checkpoint)"


def _same(a: Verdict, b: Verdict) -> bool:
    """Whether it is the same failure: a kill from outside never is; ports and addresses do not count."""
    if _OUTSIDE.search(a.message):
        return False
    return (a.state, a.update, _numberless(a)) == (b.state, b.update, _numberless(b))


def _numberless(verdict: Verdict) -> str:
    return re.sub(r"0x[0-9a-f]+|\d+", "#", verdict.message)


def _spoke(one: Said, said: Sequence[Said]) -> bool:
    return any(other.verdict is not None and other.rank == one.rank for other in said)


def _death(one: Said) -> str:
    if one.code > 0:
        return f"rank {one.rank} ended without a word (exit code {one.code}); see its output"
    try:
        name = signal.Signals(-one.code).name
    except ValueError:
        name = f"signal {-one.code}"
    return f"rank {one.rank} was killed by {name}"


_POLITE = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_OUTSIDE = re.compile(r"killed by SIGKILL|loader worker was killed|^host ")
