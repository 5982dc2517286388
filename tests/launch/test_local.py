"""What the launcher makes of how workers end; the workers here load no library."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.verdict import LAUNCHED, Verdict, out_of_memory, read_verdict, write_verdict
from engine.worker import run_worker
from launch import local, workers
from launch.local import _memory, run_local
from launch.plan import Place, plan_run
from launch.workers import Workers

HERE = Path(__file__).parent
ENV = {"PYTHONPATH": f"{HERE}{os.pathsep}{HERE.parents[1]}", "OMP_NUM_THREADS": "1"}


def go(run: Path, *words: str, processes: int = 1, restarts: int | None = None) -> int:
    return run_local("stand_in", None, words, processes, run=run, env=ENV, restarts=restarts)


def launches(run: Path) -> list[dict]:
    """The lines at the end of each launch."""
    rows = [json.loads(line) for line in (run / "launches.jsonl").read_text().splitlines()]
    assert [row["event"] for row in rows] == ["launch", "end"] * (len(rows) // 2)
    return rows[1::2]


def test_a_killed_worker_is_started_again_three_times_by_default(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert go(tmp_path, "--fault", "SIGKILL") == 3
    ends = launches(tmp_path)
    assert [end["again"] for end in ends] == [True, True, True, False]
    assert [end["attempt"] for end in ends] == [1, 2, 3, 4]
    assert {end["verdict"]["message"] for end in ends} == {"rank 0 was killed by SIGKILL"}
    assert "3 restarts without a new checkpoint" in capsys.readouterr().err
    verdict = read_verdict(tmp_path)
    assert verdict == Verdict("failed", 0, 4, "rank 0 was killed by SIGKILL")


def test_the_same_failure_at_the_same_update_is_not_tried_a_third_time(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert go(tmp_path, "--fault", "error") == 3
    assert len(launches(tmp_path)) == 2
    said = capfd.readouterr().err
    assert "the same failure twice at update 3" in said
    assert "ValueError: no such thing" in said


def test_out_of_memory_is_its_own_verdict_and_not_tried_again(tmp_path: Path) -> None:
    assert go(tmp_path, "--fault", "out of memory") == 5
    (end,) = launches(tmp_path)
    assert (end["verdict"]["state"], end["again"]) == ("out_of_memory", False)


def test_real_failures_for_lack_of_memory_are_known_as_such() -> None:
    with pytest.raises(RuntimeError) as of_torch:
        torch.empty(1 << 50, dtype=torch.uint8)
    with pytest.raises(MemoryError) as of_numpy:
        np.empty(1 << 50, np.uint8)
    assert out_of_memory(of_torch.value)
    assert out_of_memory(of_numpy.value)
    assert not out_of_memory(RuntimeError("shape mismatch"))


def test_a_finished_run_that_aborts_at_exit_is_finished(tmp_path: Path) -> None:
    assert go(tmp_path, "--abort", processes=2) == 0
    assert [end["verdict"]["state"] for end in launches(tmp_path)] == ["finished"]


def test_a_rank_that_dies_takes_the_others_along_and_the_run_goes_on(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert go(tmp_path, "--fault", "SIGSEGV", "--once", "--loader", processes=2) == 0
    first, second = launches(tmp_path)
    assert (first["verdict"]["message"], first["again"]) == ("rank 1 was killed by SIGSEGV", True)
    assert second["verdict"]["state"] == "finished"
    assert "Traceback" not in capfd.readouterr().err  # of those that lost rank 1


def test_a_launch_names_the_one_it_takes_over_from(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    row = {"time": time.time(), "event": "launch", "attempt": 1, "host": socket.gethostname()}
    for pid in (os.getppid(), 2**22 + 1):
        (tmp_path / "launches.jsonl").write_text(json.dumps({**row, "pid": pid}) + "\n")
        assert go(tmp_path) == 0
        assert ("this one takes over" in capfd.readouterr().err) == (pid == os.getppid())


@pytest.mark.slow
def test_a_stopped_rank_is_noticed_by_itself_or_the_others_and_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The live rank waits for it, writes its stacks and ends; torchrun alone would wait much longer."""
    monkeypatch.setattr(local, "FAILED_SECONDS", 5.0)
    words = ("--fault", "SIGSTOP", "--once", "--hang", "3", "--updates", "12")
    began = time.monotonic()
    assert go(tmp_path, *words, processes=2) == 0
    assert time.monotonic() - began < 60
    first, second = launches(tmp_path)
    assert first["verdict"]["state"] == "hung"
    assert second["verdict"]["state"] == "finished"
    assert "stand_in.py" in (tmp_path / "logs" / "rank-000.stacks.txt").read_text()


def test_a_signal_before_training_began_is_a_preemption(tmp_path: Path) -> None:
    def stop() -> None:
        while not (tmp_path / "launches.jsonl").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop, daemon=True).start()
    assert go(tmp_path, "--start", "60") == 75
    verdict = read_verdict(tmp_path)
    assert verdict is not None
    assert (verdict.state, verdict.kind) == ("preempted", "unsaved")


def test_a_verdict_arrives_although_the_run_folder_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").write_text("a file where the folder was")
    monkeypatch.setenv(LAUNCHED, str(tmp_path / "words"))
    monkeypatch.setenv("RANK", "3")
    write_verdict(tmp_path / "run", Verdict("failed", 5, 1, "no disk"))
    line = json.loads((tmp_path / "words").read_text())
    assert (line["rank"], line["verdict"]["message"]) == (3, "no disk")
    assert "cannot be written" in capsys.readouterr().err


def test_no_process_outlives_a_launch_whatever_session_it_is_in(tmp_path: Path) -> None:
    code = f"""
import subprocess
other = subprocess.Popen(["sleep", "1000"], start_new_session=True)
open({str(tmp_path / "out")!r}, "w").write(str(other.pid))
"""
    with Workers([sys.executable, "-c", code], dict(os.environ)) as started:
        while started.running:
            time.sleep(0.01)
        pid = int((tmp_path / "out").read_text())
        os.kill(pid, 0)
        assert not started.said()
    while Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text():
        time.sleep(0.01)


def test_the_kernels_count_of_kills_for_memory_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = tmp_path / "memory.events"
    events.write_text("low 0\noom 3\noom_kill 2\noom_group_kill 0\n")
    monkeypatch.setattr(workers, "_control_group", lambda: iter([tmp_path / "absent", events]))
    assert workers.oom_kills() == 2


def test_what_the_kernel_killed_is_explained_from_the_log(tmp_path: Path) -> None:
    fields = {"device": "cpu", "parts": {"weights": 8 << 30}, "host": {}, "ranks": 2}
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "rank-000.jsonl").write_text(
        json.dumps({"time": 1, "event": "memory", **fields}) + "\n"
    )
    assert "weights 8.00 GiB" in _memory(tmp_path)
    assert _memory(tmp_path / "absent").startswith("out of memory")


def test_a_process_ends_with_its_output_written_and_what_is_registered_for_its_end_done(
    tmp_path: Path,
) -> None:
    code = f"""
import atexit, pathlib, sys, threading, time
from engine.worker import end_process
atexit.register(pathlib.Path({str(tmp_path / "done")!r}).touch)
threading.Thread(target=time.sleep, args=(1000,)).start()
print("not flushed yet")
end_process(7)
"""
    buffered = {**os.environ, "PYTHONUNBUFFERED": ""}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=buffered,
        cwd=HERE.parents[1],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout, done.stderr) == (7, "not flushed yet\n", "")
    assert (tmp_path / "done").exists()


@pytest.mark.parametrize(("rank", "launched"), [("0", False), ("0", True), ("1", True)])
def test_wrong_input_met_by_any_rank_ends_as_wrong_input_and_is_said_once(
    rank: str, launched: bool, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    from engine.errors import UserError

    def body() -> Verdict:
        raise UserError("shard 3 is\nmissing")

    monkeypatch.setenv("RANK", rank)
    monkeypatch.delenv(LAUNCHED, raising=False)
    if launched:
        monkeypatch.setenv(LAUNCHED, str(tmp_path / "words"))
    assert run_worker(body, tmp_path) == 2
    verdict = read_verdict(tmp_path)
    assert verdict is not None
    assert (verdict.exit_code, verdict.message) == (2, "shard 3 is missing")
    assert capsys.readouterr().err == ("" if launched else "medfm: error: shard 3 is missing\n")


def test_a_plan_renders_torchruns_words_and_those_of_each_host(tmp_path: Path) -> None:
    plan = plan_run(
        "pretrain", None, ["--engine.min_nodes", "1"], 4,
        run=tmp_path, nodes=2, node_rank=1, rendezvous="a:29400", segment="more",
    )  # fmt: skip
    assert (plan.min_nodes, plan.restarts, plan.meeting_point) == (1, 3, ("a", 29400))
    worker = ["--run", str(tmp_path), "--engine.min_nodes", "1", "--continue-as", "more"]
    assert plan.worker_words() == worker
    one, two = plan.torchrun_words(Place()), plan.torchrun_words(Place(1, 2, "10.0.0.1", 5000))
    assert "--standalone" in one
    assert "--standalone" not in two
    assert two[-2 - len(worker) - 8 : -2 - len(worker)] == [
        "--nnodes", "2", "--node-rank", "1", "--master-addr", "10.0.0.1", "--master-port", "5000",
    ]  # fmt: skip
    assert two[-2 - len(worker) :] == ["-m", "pretrain", *worker]
    assert plan.host_words(0)[-4:] == ["--node-rank", "0", "--rendezvous", "a:29400"]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"processes": 0}, "at least one process"),
        ({"nodes": 0}, "at least one host"),
        ({"rendezvous": "a:1"}, "give --nodes N"),
        ({"nodes": 2, "rendezvous": "a:65536"}, "HOST:PORT"),
        ({"run": __file__}, "is a file"),
        ({"nodes": 2, "node_rank": 2, "rendezvous": "a:1"}, "from 0 to 1"),
        ({"nodes": 2}, "HOST:PORT"),
        ({"nodes": 2, "rendezvous": "a"}, "HOST:PORT"),
        ({"nodes": 2, "rendezvous": "a:1", "overrides": ["--engine.min_nodes", "3"]}, "min_nodes"),
        ({"overrides": ["--engine.updats", "2"]}, "did you mean `engine.updates`"),
        ({"run": None}, "no run folder"),
    ],
)
def test_a_plan_that_cannot_be_is_one_line(
    given: dict, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_local("stand_in", None, **{"run": tmp_path, "overrides": [], **given}) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("medfm: error: ")
    assert words in line


def test_a_line_of_another_kind_in_the_launchers_file_is_left_out(tmp_path: Path) -> None:
    with Workers(["sleep", "0"], dict(os.environ)) as started:
        file = started._file
        file.write_text('{"rank": 1, "code": -9}\nnonsense\n{"rank": 0, "verdict": {"state": "hung"}}\n')
        assert [(one.rank, one.code) for one in started.said()] == [(1, -9), (0, 0)]
