"""Train on this machine, or do this machine's part of a run on several: start, watch, start again."""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from engine.errors import UserError
from engine.memory import Prediction, explain
from engine.room import check_room, has_half_written
from engine.verdict import USER_ERROR, Verdict, read_attempt, write_verdict
from launch.meeting import Guest, Lost, Meeting, interface
from launch.plan import Place, Plan, plan_run
from launch.policy import Launch, Said, again, conclude
from launch.run_files import launches_of
from launch.run_state import state_of
from launch.workers import Heard, Workers

FAILED_SECONDS = 10.0
"""What the rest of the workers, who notice by themselves, have to write their stacks and end."""
DONE_SECONDS = 120.0
"""What they have after finished or preempted, for trackers that still send."""
STACKS_SECONDS = 3.0
"""Before workers are killed they are asked for their stacks."""


def run_local(
    module: str,
    recipe: Path | str | None,
    overrides: Sequence[str] = (),
    processes: int = 1,
    *,
    run: Path | str | None = None,
    env: Mapping[str, str] | None = None,
    continue_as: str | None = None,
    restarts: int | None = None,
    nodes: int = 1,
    node_rank: int = 0,
    rendezvous: str = "",
) -> int:
    """Run `python -m MODULE RECIPE --run RUN [overrides]` in one or more processes until it is over.

    No process outlives this one. SIGINT, SIGTERM, SIGUSR1 and SIGHUP have the run save and end; a second
    SIGINT ends it at once.

    Args:
        module: "pretrain" or "finetune".
        recipe: YAML file.
        overrides: recipe fields as command-line words.
        processes: workers on this host; more than one start under torchrun.
        run: run folder; the recipe's `run` field where None.
        env: added to the environment of the workers.
        continue_as: name of a new segment.
        restarts: how often in a row a failed or hung run is started again without having saved anew; the
            recipe's `engine.restarts` where None.
        nodes: hosts that do this.
        node_rank: which of them this is.
        rendezvous: HOST:PORT of host 0.

    Returns:
        0 finished, 2 wrong input, 3 failed, 4 hung, 5 out of memory, 75 preempted and saved.
    """
    try:
        plan = plan_run(
            module, recipe, overrides, processes, run=run, segment=continue_as, nodes=nodes,
            node_rank=node_rank, rendezvous=rendezvous, restarts=restarts, environment=env,
        )  # fmt: skip
        verdict = launch(plan)
    except UserError as error:
        print(f"medfm: error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        return USER_ERROR
    if verdict.kind == "user":
        print(f"medfm: error: {verdict.message}", file=sys.stderr, flush=True)
    elif verdict.kind == "unsaved":  # by one that may not know the update
        _say(f"{verdict.state}: {verdict.message}")
    elif verdict.state != "finished":
        _say(f"{verdict.state} at update {verdict.update}: {verdict.message}")
    return verdict.exit_code


def launch(plan: Plan) -> Verdict:
    """Launch a plan, again and again as its policy says; returns the last verdict.

    Raises:
        UserError: the run folder cannot be made, its disk is full, or the rendezvous cannot be used.
    """
    try:
        plan.run.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"--run {plan.run}: this is a file, or lies in one; give a folder") from None
    except OSError as error:
        raise UserError(f"--run {plan.run}: this folder cannot be made ({error.strerror})") from None
    if not os.access(plan.run, os.W_OK | os.X_OK):
        raise UserError(f"--run {plan.run}: not writable; see who owns it and how its disk is mounted")
    if not has_half_written(plan.run):  # else the workers clear these away before they look
        check_room(plan.run)
    with Heard() as heard:
        try:
            if plan.node_rank == 0:
                with Meeting(plan) as meeting:
                    return _lead(plan, meeting, heard)
            with Guest(plan) as guest:
                return _follow(plan, guest, heard)
        except Lost as lost:
            return Verdict("failed", message=str(lost))


def _lead(plan: Plan, meeting: Meeting, heard: Heard) -> Verdict:
    """Host 0, or the only one: decides and keeps the book, RUN/launches.jsonl."""
    saved_before, launches = _newest(plan.run), list[Launch]()
    _name_another(plan.run)
    while True:
        place = meeting.gather(lambda: heard.stop)
        if place is None:
            verdict = _stopped(launches[-1].verdict if launches else None)
            if launches or not read_attempt(plan.run):  # else what an earlier launch came to stays
                write_verdict(plan.run, verdict)
            return verdict
        before = read_attempt(plan.run)
        with suppress(OSError):
            (plan.run / "verdict.json").unlink(missing_ok=True)
        book: dict[str, object] = {"host": socket.gethostname(), "nodes": place.nodes}
        book |= {"processes": plan.processes * place.nodes, "pid": os.getpid()}
        command = plan.command_line()
        _write_down(plan.run, event="launch", attempt=before + 1, **book, command=command)
        said, oom_killed = _do_part(plan, place, meeting, heard)
        others, oom_elsewhere, lost = meeting.reports()
        oom_killed |= oom_elsewhere
        verdict = conclude([*said, *others], told=heard.stop, oom_killed=oom_killed, lost=lost)
        attempt = max(before + 1, read_attempt(plan.run), verdict.attempt)
        verdict = replace(verdict, attempt=attempt)
        if verdict.state == "out_of_memory" and oom_killed:
            verdict = replace(verdict, message=f"{verdict.message}; {_memory(plan.run)}")
        launches.append(Launch(verdict, _newest(plan.run), heard.stop))
        more, why = again(launches, plan.restarts, saved_before)
        meeting.tell(verdict, more)
        write_verdict(plan.run, verdict)
        _write_down(plan.run, event="end", attempt=attempt, **book, verdict=asdict(verdict), again=more)
        if not more:
            if why:
                _say(why)
            return verdict
        _say(f"{verdict.state} at update {verdict.update} ({verdict.message}); {why}")


def _follow(plan: Plan, guest: Guest, heard: Heard) -> Verdict:
    """Another host: does its part and hears from host 0 what it came to."""
    verdict = None
    while (place := guest.gather(lambda: heard.stop)) is not None:
        said, oom_killed = _do_part(plan, place, guest, heard)
        try:
            verdict, more = guest.report(said, oom_killed)
        except Lost as lost:
            # Not a failure of the training: host 0, once it is heard again, says how it goes on.
            verdict = conclude(said, told=heard.stop, lost=str(lost))
            more = verdict.state in ("failed", "hung") and verdict.kind != "user"
            _say(f"{lost}{'; waiting for it' if more else ''}")
        if not more:
            return verdict
    return _stopped(verdict)


def _do_part(plan: Plan, place: Place, hosts: Meeting | Guest, heard: Heard) -> tuple[list[Said], bool]:
    """One launch's processes on this host: what they said, and whether the kernel ended one for lack of
    memory."""
    environment = plan.host_environment()
    # Left to itself gloo asks for this machine's name, which may lead to another interface or nowhere.
    if name := interface(place.address):
        environment.setdefault("GLOO_SOCKET_IFNAME", name)
    with Workers(plan.command(place), environment) as workers:
        asked, end, stacks = False, float("inf"), False
        while workers.running:
            time.sleep(0.1)
            if heard.now:
                workers.kill()
            elif heard.stop and not asked:
                asked, end = True, min(end, time.monotonic() + plan.patience)
                workers.stop()
                if sys.stderr.isatty():
                    print(file=sys.stderr)  # below the bar
                _say("saving, then ending; a second Ctrl-C ends at once, without a save")
            patience = _patience(workers, hosts)
            end = min(end, time.monotonic() + patience)
            if time.monotonic() > end - STACKS_SECONDS and not stacks:
                stacks = True
                workers.write_stacks()
            if time.monotonic() > end:
                workers.kill()
        return workers.said(), workers.oom_killed


def _patience(workers: Workers, hosts: Meeting | Guest) -> float:
    """Seconds that the processes still have: without end unless one of them, or another host, has ended."""
    said = workers.said()
    verdicts = [one.verdict for one in said if one.verdict is not None]
    if any(v.state in ("finished", "preempted") and v.kind != "unsaved" for v in verdicts):
        return DONE_SECONDS
    return FAILED_SECONDS if said or workers.one_gone() or hosts.trouble() else float("inf")


def _write_down(run: Path, **values: object) -> None:
    """Add a line to RUN/launches.jsonl. Only host 0 writes there: one line when a launch begins, one when it
    has ended."""
    try:
        with open(run / "launches.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps({"time": round(time.time(), 3), **values}) + "\n")
    except OSError as error:
        _say(f"{run / 'launches.jsonl'} cannot be written ({error})")


def _name_another(run: Path) -> None:
    """A launch takes the run over from one that still goes on; on this host that may be an oversight."""
    last: dict[str, Any] = next(reversed(launches_of(run)), {})
    if "end" not in last and last.get("host") == socket.gethostname() and state_of(last):
        pid = last["pid"]
        _say(f"process {pid} trains this run, too: this one takes over, that one ends at its next save")


def _memory(run: Path) -> str:
    """What rank 0 predicted, the limit, and what to set: a killed worker cannot say it."""
    predicted = None
    with suppress(OSError, ValueError, TypeError):
        for line in (run / "logs" / "rank-000.jsonl").read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            if row.get("event") == "memory":
                predicted = Prediction(**{k: v for k, v in row.items() if k not in ("time", "event")})
    return explain(predicted, None)


def _newest(run: Path) -> str:
    """Name of the newest whole checkpoint; "" for none, and where the run folder cannot be read."""
    with suppress(OSError):
        return max((p.parent.name for p in (run / "checkpoints").glob("update-*/complete.json")), default="")
    return ""


def _say(text: str) -> None:
    print(f"medfm: {text}", file=sys.stderr, flush=True)


def _stopped(last: Verdict | None) -> Verdict:
    """Of a signal before a launch; `last` is the verdict of the one before."""
    text = "stopped before it had begun; start again to go on"
    if last is None:
        return Verdict("preempted", message=text, kind="unsaved")
    return replace(last, state="preempted", message=f"{text} (before: {last.message})", kind="unsaved")
