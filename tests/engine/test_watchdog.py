"""Real processes that stop moving: stacks in their own file, a verdict, an end; and one that only slept."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from engine.verdict import LAUNCHED

ENV = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}


def start(
    folder: Path, body: str, seconds: float = 1.0, run: str = "run", backstop: float = 60
) -> subprocess.Popen[str]:
    code = f"""
import ctypes, pathlib, time
from engine import watchdog
watchdog.LEAVE_SECONDS, watchdog.BACKSTOP_SECONDS = 0.5, {backstop}
with watchdog.Watchdog(pathlib.Path({str(folder / run)!r}), {seconds} / 60, 3, 1) as dog:
    dog.beat(7)
    pathlib.Path({str(folder / "ready")!r}).touch()
    {body}
"""
    env = {**ENV, LAUNCHED: str(folder / "words")}
    process = subprocess.Popen([sys.executable, "-c", code], env=env, stderr=subprocess.PIPE, text=True)
    wait_for((folder / "ready").exists)
    return process


def wait_for(what: Callable[[], object]) -> None:
    end = time.monotonic() + 60
    while not what():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.01)


def stacks(folder: Path) -> str:
    return (folder / "run" / "logs" / "rank-001.stacks.txt").read_text()


def test_a_process_that_stops_moving_leaves_stacks_and_a_verdict(tmp_path: Path) -> None:
    def_stuck = "stuck = lambda: time.sleep(1000); stuck()"
    assert start(tmp_path, def_stuck).wait(timeout=60) == 4
    assert "attempt 3 update 7: no update for" in stacks(tmp_path)
    assert "<lambda>" in stacks(tmp_path)
    verdict = json.loads((tmp_path / "words").read_text().splitlines()[0])["verdict"]
    assert (verdict["state"], verdict["update"], verdict["attempt"]) == ("hung", 7, 3)
    assert json.loads((tmp_path / "run" / "verdict.json").read_text()) == verdict


def test_it_ends_and_tells_the_launcher_although_the_run_folder_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    process = start(tmp_path, "time.sleep(1000)", run="file/run")
    assert process.wait(timeout=60) == 4
    assert process.stderr is not None
    assert "most recent call first" in process.stderr.read()
    assert '"hung"' in (tmp_path / "words").read_text()


def test_a_process_whose_python_cannot_run_is_ended_too(tmp_path: Path) -> None:
    """C code that never lets another thread run, such as a broken extension."""
    assert start(tmp_path, "ctypes.PyDLL(None).sleep(1000)", backstop=0.5).wait(timeout=60) == 1
    assert "most recent call first" in stacks(tmp_path)


def test_beats_keep_it_alive_and_an_end_ends_it(tmp_path: Path) -> None:
    body = "[(time.sleep(0.1), dog.beat()) for _ in range(20)]"
    assert start(tmp_path, body).wait(timeout=60) == 0
    assert stacks(tmp_path) == ""


@pytest.mark.skipif(sys.platform != "linux", reason="signals of Linux")
def test_time_in_which_the_process_was_stopped_does_not_count_and_stacks_may_be_asked_for(
    tmp_path: Path,
) -> None:
    process = start(tmp_path, "time.sleep(8)", seconds=5)
    process.send_signal(signal.SIGSTOP)
    time.sleep(6)  # the time itself is what is tested
    process.send_signal(signal.SIGCONT)
    process.send_signal(signal.SIGUSR2)
    assert process.wait(timeout=60) == 0
    assert "most recent call first" in stacks(tmp_path)
