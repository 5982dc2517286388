"""What the launcher makes of workers that end without a verdict; the workers here load no library."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from engine.verdict import LAUNCHED, read_verdict, run_worker
from launch.local import run_local


def worker(folder: Path, body: str) -> dict[str, str]:
    """Environment in which `python -m stand_in` runs `body`."""
    (folder / "stand_in.py").write_text(f"import os, pathlib, signal, sys, time\n{body}\n")
    return {"PYTHONPATH": str(folder)}


def test_a_killed_run_that_may_not_restart_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    env = worker(tmp_path, "os.kill(os.getpid(), signal.SIGKILL)")
    assert run_local("stand_in", None, [], 1, run=tmp_path / "run", env=env) == 3
    assert "without a word" in capsys.readouterr().err
    verdict = read_verdict(tmp_path / "run")
    assert verdict is not None
    assert verdict.state == "failed"


def test_a_failed_run_is_started_again_as_often_as_allowed(tmp_path: Path) -> None:
    env = worker(tmp_path, f"open({str(tmp_path / 'starts')!r}, 'a').write('x'); sys.exit(9)")
    assert run_local("stand_in", None, [], 1, run=tmp_path / "run", env=env, restarts=2) == 3
    assert (tmp_path / "starts").read_text() == "xxx"


def test_a_signal_before_training_began_is_a_preemption(tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    env = worker(tmp_path, f"pathlib.Path({str(ready)!r}).touch(); time.sleep(60)")

    def stop() -> None:
        while not ready.exists():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop, daemon=True).start()
    assert run_local("stand_in", None, [], 1, run=tmp_path / "run", env=env, restarts=3) == 75
    verdict = read_verdict(tmp_path / "run")
    assert verdict is not None
    assert verdict.state == "preempted"


@pytest.mark.parametrize(("rank", "launched"), [("0", False), ("0", True), ("1", True)])
def test_wrong_input_met_by_any_rank_ends_as_wrong_input_and_is_said_once(
    rank: str, launched: bool, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    from engine.errors import UserError
    from engine.verdict import Verdict

    def body() -> Verdict:
        raise UserError("shard 3 is\nmissing")

    monkeypatch.setenv("RANK", rank)
    monkeypatch.delenv(LAUNCHED, raising=False)
    if launched:
        monkeypatch.setenv(LAUNCHED, "1")
    assert run_worker(body, tmp_path) == 2
    verdict = read_verdict(tmp_path)
    assert verdict is not None
    assert (verdict.exit_code, verdict.message) == (2, "shard 3 is missing")
    assert capsys.readouterr().err == ("" if launched else "medfm: error: shard 3 is missing\n")
