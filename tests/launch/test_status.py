"""`medfm status` on runs that go on, hang, are over or are half there."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from engine.distributed import World
from engine.errors import UserError
from engine.logs import Logs
from engine.recipe import EngineConfig
from engine.verdict import Verdict, write_verdict
from launch.cli import main
from launch.run_state import ago
from launch.status import Status, read_status
from launch.status_text import describe, trend

HERE = socket.gethostname()
FORK = multiprocessing.get_context("fork")


def rank_process(run: Path, rank: int, updates: int) -> None:
    """What a rank of two leaves behind, and lives on; the second waits for its data."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    world = World(rank, 2, rank, torch.device("cpu"))
    with Logs(run, world, EngineConfig(updates=100, trackers=()), attempt=1) as log:
        log.event("start", attempt=1, world=2, update=0, position=0)
        for update in range(1, updates + 1):
            log.step(update, update - 1, 0.4, own=0.3 if rank else 0.1, waited=0.25 if rank else 0.01)
            if update == 20:
                log.scalars(update, {"checkpoint/stall_s": 0.5}, show=False)
            log.scalars(update, {"loss": 3.0 / update, "loss/CT": 1.0 / update, "rate/mfu": 0.25}, show=False)
        log.say("all said")
        log.flush(60)
        (run / f"ready-{rank}").touch()
        signal.pause()


@pytest.fixture
def ranks(tmp_path: Path) -> Iterator[list[Any]]:
    """Two live processes of a run in `tmp_path / "run"` at update 30, saved at update 20."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "attempt").write_text("1\n")
    (run / "recipe.yaml").write_text("engine: {updates: 100, hang_minutes: 2}\nobjective: {}\n")
    checkpoint(run, 20)
    children = [FORK.Process(target=rank_process, args=(run, rank, 30)) for rank in range(2)]
    for child in children:
        child.start()
    wait_for(lambda: all((run / f"ready-{rank}").exists() for rank in range(2)))
    yield children
    for child in children:
        child.kill()
        child.join()


@pytest.fixture
def stopped_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """No time passes between what a test writes and what is read of it."""
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now)


def wait_for(what: Callable[[], Any]) -> None:
    end = time.monotonic() + 60
    while not what():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.02)


def checkpoint(run: Path, update: int) -> Path:
    """A folder as `engine.checkpoint` makes it."""
    folder = run / "checkpoints" / f"update-{update:08d}"
    folder.mkdir(parents=True)
    (folder / "state.json").write_text("{}")
    (folder / "complete.json").write_text(json.dumps({"files": {"state.json": {"size": 2}}}))
    return folder


def write_log(run: Path, rank: int, *rows: dict[str, Any]) -> None:
    """A rank's log."""
    (run / "logs").mkdir(parents=True, exist_ok=True)
    file = run / "logs" / f"rank-{rank:03d}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def alive(seconds_ago: float, **fields: Any) -> dict[str, Any]:
    """The line of this very process."""
    me = psutil.Process()
    line = {"time": time.time() - seconds_ago, "event": "alive", "attempt": 1, "host": HERE, "world": 1}
    return {**line, "pid": me.pid, "born": round(me.create_time(), 2), **fields}


def step(update: int, seconds_ago: float, seconds: float = 0.5) -> dict[str, Any]:
    fields = {"update": update, "position": update - 1, "seconds": seconds}
    return {"time": time.time() - seconds_ago, "event": "step", **fields}


def test_a_run_in_progress_then_stopped_then_killed(ranks: list[Any], tmp_path: Path) -> None:
    run = tmp_path / "run"
    status = read_status(run)
    assert (status.state, status.update, status.total, status.world) == ("running", 30, 100, 2)
    assert (status.position, status.seconds_per_update) == (30, 0.4)
    assert status.left is not None
    assert status.checkpoint["name"] == "update-00000020"
    assert status.losses["loss/CT"] == [1.0 / update for update in range(1, 31)]
    assert status.said[-1]["text"] == "all said"
    assert [row["rank"] for row in status.stragglers] == [1]
    text = describe(status)
    for part in ("30 of 100 (30.0%)", "0.4 s each", "2 processes", "MFU", "25.0%", "wait for a save, s"):
        assert part in text
    assert (
        f"rank 1 ({HERE}): 0.3 s of its own in an update, others 0.1 s, 0.25 s of it waiting for data" in text
    )

    second = psutil.Process(ranks[1].pid)
    second.suspend()
    wait_for(lambda: second.status() == psutil.STATUS_STOPPED)
    status = read_status(run)
    assert status.state == "still"
    assert f"rank 1 ({HERE}, process {second.pid}) is stopped by a signal" in status.summary
    assert "ends it after 2 minutes" in status.advice

    ranks[1].kill()
    ranks[1].join()
    status = read_status(run)
    assert status.state == "still"
    assert "is gone, and the others wait, at update 30" in status.summary

    ranks[0].kill()
    ranks[0].join()
    status = read_status(run)
    assert status.state == "dead"
    assert "died without a word at update 30, 20" in status.summary
    assert "SIGKILL" in status.summary
    assert "update-00000020 is kept, 10 updates are lost" in status.summary
    folder = str(run)
    assert status.advice == (
        f"`medfm launch local {folder}/recipe.yaml --run {folder} --processes 2` goes on from update 20"
    )
    assert status.over


def test_the_command_answers_without_torch_and_in_json(tmp_path: Path) -> None:
    write_log(tmp_path, 0, alive(0), step(7, 0))
    program = (
        "import sys\nfrom launch.cli import main\ntry:\n    main(sys.argv[1:])\nfinally:\n"
        "    print([m for m in ('torch', 'numpy', 'deepspeed') if m in sys.modules], file=sys.stderr)"
    )
    words = [sys.executable, "-c", program, "status", str(tmp_path), "--json"]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"
    assert json.loads(done.stdout)["update"] == 7


@pytest.mark.parametrize(
    ("words", "summary", "advice"),
    [
        (("finished", 9, 1), "finished at update 9", "medfm export"),
        (
            ("preempted", 9, 1, "stopped by SIGTERM and saved"),
            "by SIGTERM and saved",
            "goes on from update 5",
        ),
        (("hung", 9, 1, "no update for 15 min"), "because it hung at update 9", "stacks.txt show where"),
        (("out_of_memory", 9, 1, "set rows 2"), "ran out of memory at update 9: set rows 2", "change what"),
        (("failed", 9, 1, "ValueError: x"), "failed at update 9: ValueError: x", "mend what"),
        (("failed", 9, 1, "rank 1 was killed by SIGKILL"), "killed by SIGKILL", "start the same command"),
        (("failed", 0, 1, "unknown key", "user"), "not started: unknown key", "correct that"),
        (("preempted", 9, 1, "stopped", "unsaved"), "ended: stopped", "goes on from update 5"),
    ],
)
def test_a_run_that_said_how_it_ended(
    tmp_path: Path, words: tuple[Any, ...], summary: str, advice: str
) -> None:
    verdict = Verdict(*words)
    write_log(tmp_path, 0, alive(90, pid=2**22 + 1), step(9, 80))
    checkpoint(tmp_path, 5)
    write_verdict(tmp_path, verdict)
    status = read_status(tmp_path)
    assert status.state == verdict.state
    assert summary in status.summary
    assert advice in status.advice
    assert status.over
    if verdict.state == "failed" and not verdict.kind:
        (tmp_path / "report.json").write_text("{}")
        named = "report.json lists" in read_status(tmp_path).advice
        assert named == ("SIGKILL" not in verdict.message)


@pytest.mark.usefixtures("stopped_clock")
def test_alive_without_an_update_is_told_from_an_evaluation(tmp_path: Path) -> None:
    write_log(tmp_path, 0, alive(200), step(4, 100), alive(1))
    status = read_status(tmp_path)
    assert (status.state, status.left) == ("still", None)
    assert "alive, but no update for 1 min 40 s, at update 4" in status.summary
    assert "ends it after 15 minutes, in 13 min" in status.advice
    write_log(
        tmp_path, 0, alive(200), step(4, 100), {"time": time.time() - 99, "event": "evaluate"}, alive(1)
    )
    status = read_status(tmp_path)
    assert (status.state, status.summary) == ("running", "evaluating for 1 min 39 s")
    saving = {"time": time.time() - 80, "event": "last_save"}
    tried = {"time": time.time() - 70, "event": "message", "text": "not saved"}
    write_log(tmp_path, 0, alive(200), step(4, 100), saving, tried, alive(1))
    assert read_status(tmp_path).summary == "saving before it ends, for 1 min 20 s"
    write_log(tmp_path, 0, alive(200), step(4, 100, seconds=60.0), alive(1))
    assert read_status(tmp_path).state == "running"


def test_a_process_of_another_host_is_judged_by_its_last_line(tmp_path: Path) -> None:
    for silent, state in ((10, "running"), (100, "dead")):
        write_log(tmp_path, 0, alive(silent, host="elsewhere"), step(4, silent))
        (tmp_path / "attempt").write_text("1")
        assert read_status(tmp_path).state == state


def test_a_number_that_is_another_process_by_now(tmp_path: Path) -> None:
    write_log(tmp_path, 0, alive(1, born=1.0), step(4, 1))
    assert read_status(tmp_path).state == "dead"


def launch_line(seconds_ago: float, attempt: int, pid: int, **fields: Any) -> dict[str, Any]:
    line = {
        "time": time.time() - seconds_ago,
        "event": "launch",
        "attempt": attempt,
        "host": HERE,
        "pid": pid,
    }
    return {**line, "command": "medfm launch local r.yaml", **fields}


def end_line(seconds_ago: float, attempt: int, verdict: Verdict, again: bool) -> dict[str, Any]:
    line = {"time": time.time() - seconds_ago, "event": "end", "attempt": attempt, "host": HERE}
    return {**line, "verdict": asdict(verdict), "again": again}


@pytest.mark.usefixtures("stopped_clock")
def test_what_the_launcher_wrote(tmp_path: Path) -> None:
    book, me, nobody = tmp_path / "launches.jsonl", os.getpid(), 2**22 + 1
    verdict = Verdict("failed", 4, 1, "ValueError: x")

    def state(*rows: dict[str, Any]) -> Status:
        book.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return read_status(tmp_path)

    assert state(launch_line(0, 1, me)).state == "starting"
    assert state(launch_line(0, 1, nobody)).state == "dead"
    write_log(tmp_path, 0, alive(0.3, pid=nobody), step(4, 0.2))
    assert state(launch_line(1, 1, me)).state == "ending"
    first = [launch_line(1, 1, me), end_line(0.1, 1, verdict, True)]
    assert state(*first).state == "restarting"
    assert state(*first, launch_line(0, 2, me)).state == "starting"
    first[0]["pid"] = nobody
    assert state(*first).state == "failed"
    status = state(*first, launch_line(0, 2, nobody), end_line(0, 2, verdict, False))
    assert status.state == "failed"
    assert status.advice == "mend what the message names; then `medfm launch local r.yaml` begins anew"
    assert "1: failed at update 4 after 0 s: ValueError: x" in describe(status)
    write_log(tmp_path, 0, alive(0, attempt=3), step(4, 0))  # started by torchrun itself
    assert state(*first).state == "running"


def test_what_is_no_run_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "notes.txt").touch()
    for folder, words in (("nowhere", "no such folder"), (".", "no logs, checkpoints or verdict in it")):
        with pytest.raises(SystemExit) as ended:
            main(["status", str(tmp_path / folder)])
        assert ended.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert words in line
    (tmp_path / "a" / "attempt").write_text("1")
    with pytest.raises(UserError, match="runs in it: a"):
        read_status(tmp_path)


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a file system is not permitted here")
    try:
        write_log(tmp_path, 0, alive(0), step(4, 0))
        status = read_status(tmp_path)
        (warning,) = status.warnings
        assert "is full" in warning
        assert "the run goes on by itself" in warning
        assert f"warning: {warning}" in describe(status)
    finally:
        subprocess.run(["umount", "--lazy", str(tmp_path)], check=True)


GARBAGE = (b"", b"\xff\xfe{", b"[]", b"null", b"{}", b"7", b'{"files": 3}', b'{"time": 1}\n{"time')


@pytest.mark.parametrize("garbage", GARBAGE)
def test_half_a_run_folder_gives_an_answer(tmp_path: Path, garbage: bytes) -> None:
    files = [
        "attempt",
        "verdict.json",
        "recipe.yaml",
        "launches.jsonl",
        "metrics.jsonl",
        "bad_updates.jsonl",
        "logs/rank-000.jsonl",
        "checkpoints/update-00000004/complete.json",
    ]
    for broken in (*files, None):
        run = tmp_path / f"run-{files.index(broken) if broken else 'all'}"
        write_log(run, 0, alive(0), step(5, 0))
        checkpoint(run, 4)
        write_verdict(run, Verdict("preempted", 5, 1, "saved"))
        (run / "attempt").write_text("1")
        for name in files if broken is None else [broken]:
            (run / name).write_bytes(garbage)
        text = describe(read_status(run))
        assert text.startswith(f"{run}: ")
        if broken == "checkpoints/update-00000004/complete.json":
            assert "damaged checkpoint update-00000004" in text


def test_a_checkpoint_that_lacks_a_file_is_left_out(tmp_path: Path) -> None:
    checkpoint(tmp_path, 2)
    newer = checkpoint(tmp_path, 4)
    (newer / "state.json").write_text("{} ")
    status = read_status(tmp_path)
    assert status.checkpoint["name"] == "update-00000002"
    assert status.warnings == [
        "damaged checkpoint update-00000004: state.json has another size than was written"
    ]


def test_the_trend_of_a_long_run_spans_all_of_it(tmp_path: Path) -> None:
    rows = ({"update": u, "loss": float(60_000 - u)} for u in range(10, 60_001, 10))
    text = "".join(json.dumps(row) + " " * 400 + "\n" for row in rows)
    (tmp_path / "metrics.jsonl").write_text(text)
    losses = read_status(tmp_path).losses["loss"]
    assert len(losses) < 400
    assert losses[0] > 59_000
    assert losses[-1] == 0.0
    assert losses == sorted(losses, reverse=True)


def test_following_ends_with_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    child = FORK.Process(target=signal.pause)
    child.start()
    born = round(psutil.Process(child.pid).create_time(), 2)
    write_log(tmp_path, 0, alive(0, pid=child.pid, born=born), step(4, 0))
    follower = FORK.Process(target=follow, args=(tmp_path,))
    follower.start()
    wait_for(
        lambda: "running" in (tmp_path / "followed").read_text() if (tmp_path / "followed").exists() else ""
    )
    child.kill()
    child.join()
    follower.join(60)
    assert follower.exitcode == 0
    assert "dead" in (tmp_path / "followed").read_text()


def follow(run: Path) -> None:
    with open(run / "followed", "w", buffering=1) as sys.stdout:
        main(["status", str(run), "--follow", "--poll", "0.05"])


@pytest.mark.parametrize(
    ("values", "course"),
    [
        ([], ""),
        ([1.0], ""),
        ([0.0, 7.0], "▁█"),
        ([3.0, 3.0], "▁▁"),
        ([float("nan"), 7.0, 0.0, float("inf")], "█▁"),
    ],
)
def test_trend(values: list[float], course: str) -> None:
    assert trend(values) == course
    assert len(trend([float(n) for n in range(1000)])) == 24


def test_ago() -> None:
    words = [ago(s) for s in (0.4, 59, 60, 3600 + 125, 90_000)]
    assert words == ["0 s", "59 s", "1 min 0 s", "1 h 2 min", "1 d 1 h"]
