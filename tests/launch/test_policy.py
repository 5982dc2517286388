"""What a launch's end means and whether another follows: pure functions, no process."""

from __future__ import annotations

import signal

import pytest

from engine.verdict import Verdict
from launch.policy import Launch, Said, again, conclude

GLOO = "RuntimeError: [/gloo/transport/tcp/pair.cc:545] Connection closed by peer [10.0.0.2]:4711"


def said(rank: int, state: str, message: str = "", kind: str = "", update: int = 7) -> Said:
    return Said(rank, Verdict(state, update, 1, message, kind))  # type: ignore[arg-type]


def failed(message: str = "it broke", update: int = 7, saved: str = "a", told: bool = False) -> Launch:
    return Launch(Verdict("failed", update, 1, message), saved, told)


KILLED = Said(1, code=-signal.SIGKILL)
ABORTED = Said(0, code=-signal.SIGABRT)
ENDED = Said(0, code=-signal.SIGTERM)


@pytest.mark.parametrize(
    ("words", "state", "part"),
    [
        ([said(0, "finished"), ABORTED], "finished", ""),
        ([said(0, "preempted", "saved"), KILLED], "preempted", "saved"),
        ([said(0, "failed", GLOO), said(1, "failed", "no shard", "user")], "failed", "no shard"),
        ([said(0, "failed", GLOO), said(1, "out_of_memory", "too big")], "out_of_memory", "too big"),
        ([said(0, "failed", GLOO), said(1, "failed", "ValueError: x")], "failed", "ValueError"),
        ([said(0, "failed", GLOO), KILLED], "failed", "rank 1 was killed by SIGKILL"),
        ([said(0, "failed", GLOO)], "failed", "Connection closed"),
        ([said(0, "hung", "no update"), KILLED], "hung", "no update"),
        ([said(0, "preempted", "early", "unsaved"), KILLED], "failed", "rank 1 was killed"),
        ([said(0, "preempted", "early", "unsaved"), ENDED], "preempted", "early"),
        ([said(0, "preempted", "early", "unsaved"), said(1, "failed", GLOO)], "preempted", "early"),
        ([said(1, "failed", GLOO), said(0, "preempted", "early", "unsaved")], "failed", "Connection"),
        ([ENDED], "preempted", "before it had begun"),
        ([Said(0, code=9)], "failed", "without a word (exit code 9)"),
        ([], "failed", "without a word"),
    ],
)  # fmt: skip
def test_the_cause_is_told_from_its_symptoms(words: list[Said], state: str, part: str) -> None:
    verdict = conclude(words)
    assert verdict.state == state
    assert part in verdict.message
    assert verdict.update == (7 if any(one.verdict for one in words) else 0)


def test_a_launch_that_was_told_to_stop_is_preempted_unless_it_failed_by_itself() -> None:
    assert conclude([KILLED], told=True).exit_code == 75
    assert conclude([said(0, "failed", GLOO)], told=True, lost="host 1 was lost").exit_code == 75
    assert conclude([said(0, "failed", "disk full")], told=True).message == "disk full"


def test_a_kill_by_the_kernel_for_lack_of_memory_is_told_from_other_kills() -> None:
    assert conclude([KILLED], oom_killed=True).state == "out_of_memory"
    assert conclude([said(0, "failed", "a loader worker was killed")], oom_killed=True).exit_code == 5
    assert conclude([said(0, "failed", "it broke")], oom_killed=True).state == "failed"


def test_a_lost_host_is_the_cause_of_what_the_others_met() -> None:
    assert conclude([said(0, "failed", GLOO)], lost="host 1 was lost").message == "host 1 was lost"
    assert conclude([said(0, "finished")], lost="host 1 was lost").state == "finished"


def test_three_restarts_without_a_new_checkpoint() -> None:
    launches = [failed(f"broke {'x' * n}", update=n) for n in range(4)]
    assert [again(launches[: n + 1], 3, "a")[0] for n in range(4)] == [True, True, True, False]
    assert "3 restarts without a new checkpoint" in again(launches, 3, "a")[1]
    assert not again([failed()], 0, "a")[0]


def test_a_new_checkpoint_starts_the_count_again() -> None:
    launches = [failed(f"broke {'x' * n}", update=n, saved="abbbb"[n]) for n in range(5)]
    answers = [again(launches[: n + 1], 3, "a") for n in range(5)]
    assert [more for more, _ in answers] == [True, True, True, True, False]
    assert "(1 of 3" in answers[1][1]


def test_the_same_failure_at_the_same_update_stops_the_second_time() -> None:
    first = failed("ValueError at 0x7f12 port 4711")
    second = failed("ValueError at 0x7f99 port 4812", saved="b")
    assert again([first, second], 3)[1] == "not started again: the same failure twice at update 7"
    assert again([first, failed("another"), second], 3) == again([first, second], 3)
    assert again([first, failed(update=8, saved="b")], 3)[0]
    kill = failed("rank 1 was killed by SIGKILL")
    assert again([kill, kill], 3)[0]


@pytest.mark.parametrize("state", ["finished", "preempted", "out_of_memory"])
def test_some_ends_are_final(state: str) -> None:
    assert not again([Launch(Verdict(state))], 3)[0]  # type: ignore[arg-type]


def test_wrong_input_and_a_wish_to_stop_are_final() -> None:
    assert again([Launch(Verdict("failed", kind="user"))], 3) == (False, "")
    assert again([failed(told=True)], 3) == (False, "")
