"""Logs: what arrives on disk and in trackers, and that no disk, server or terminal stops training."""

from __future__ import annotations

import json
import os
import pty
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine import background, logs, trackers
from engine.background import Appended, Background, deliver_lines
from engine.console import Console, Shown, clock
from engine.distributed import World
from engine.errors import UserError
from engine.logs import Logs
from engine.recipe import EngineConfig, Frozen

FIRST, SECOND = (World(rank, 2, rank, torch.device("cpu")) for rank in (0, 1))


def config(*names: str) -> EngineConfig:
    return EngineConfig(updates=50, trackers=names)  # type: ignore[arg-type]


def rows(path: Path) -> list[dict[str, Any]]:
    """Every line of a file; each must be whole."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def updates(path: Path) -> list[int]:
    return [row["update"] for row in rows(path) if row["event"] == "step"]


def wait_for(what: Callable[[], Any]) -> None:
    end = time.monotonic() + 60
    while not what():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.02)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a file system is not permitted here")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def test_a_line_is_on_disk_soon_after_it_was_given_and_a_kill_loses_no_more(tmp_path: Path) -> None:
    program = f"""
import sys, torch
from pathlib import Path
from engine.distributed import World
from engine.logs import Logs
from engine.recipe import EngineConfig
with Logs(Path({str(tmp_path)!r}), World(0, 1, 0, torch.device("cpu")), EngineConfig(trackers=())) as logs:
    for update in range(1, 21):
        logs.step(update, update - 1, 0.1)
    logs.scalars(20, {{"loss": 1.5}})
    sys.stdin.read()  # from now on nothing of the program's own doing brings the lines to disk
"""
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE) as worker:
        wait_for(lambda: (tmp_path / "metrics.jsonl").exists() and (tmp_path / "metrics.jsonl").read_text())
        wait_for(lambda: updates(tmp_path / "logs" / "rank-000.jsonl") == list(range(1, 21)))
        worker.send_signal(signal.SIGKILL)
    assert rows(tmp_path / "metrics.jsonl") == [{"update": 20, "loss": 1.5}]
    alive = [row for row in rows(tmp_path / "logs" / "rank-000.jsonl") if row["event"] == "alive"]
    assert alive[0]["pid"] == worker.pid
    assert alive[0]["host"] == socket.gethostname()


def test_a_step_is_one_short_line_and_only_the_first_rank_writes_figures(tmp_path: Path) -> None:
    with Logs(tmp_path, SECOND, config("tensorboard")) as log:
        log.step(7, 9, 0.25, own=0.1, waited=0.05)
        log.step(7, 10, 0.25, stall=0.125, applied=False)
        log.scalars(7, {"loss": 1.0})
        log.record("bad_updates.jsonl", {"update": 7})
        log.writer.add_scalar("loss", 1.0, 7)
    lines = (tmp_path / "logs" / "rank-001.jsonl").read_text().splitlines()
    steps = [json.loads(line) for line in lines if '"step"' in line]
    for step in steps:
        step.pop("time")
    assert steps == [
        {"event": "step", "update": 7, "position": 9, "seconds": 0.25, "own": 0.1, "waited": 0.05},
        {"event": "step", "update": 7, "position": 10, "seconds": 0.25, "stall": 0.125, "skipped": True},
    ]
    assert max(len(line) for line in lines if '"step"' in line) < 130
    assert sorted(p.name for p in tmp_path.iterdir()) == ["logs"]


def test_what_a_kill_cut_off_stays_apart_and_later_figures_are_made_again(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "rank-000.jsonl").write_text('{"event":"step","upd')
    (tmp_path / "metrics.jsonl").write_text(
        '{"update": 1, "loss": 1}\n{"update": 3, "loss": 3}\n{"update": 3, "lo'
    )
    with Logs(tmp_path, FIRST, config("tensorboard"), start=2) as log:
        for update in range(3, 8):
            log.step(update, update, 0.1)
            log.scalars(update, {"loss": float(update)})
        log.back_to(4)
        log.scalars(5, {"loss": 50.0})
    first, *rest = (tmp_path / "logs" / "rank-000.jsonl").read_text().splitlines()
    assert first == '{"event":"step","upd'
    assert [json.loads(line)["update"] for line in rest if '"step"' in line] == [3, 4, 5, 6, 7]
    assert [(r["update"], r["loss"]) for r in rows(tmp_path / "metrics.jsonl")] == [
        (1, 1), (3, 3), (4, 4), (5, 50),
    ]  # fmt: skip
    assert scalars_of(tmp_path)["loss"] == [(3, 3.0), (4, 4.0), (5, 50.0)]


def scalars_of(run: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    shown = EventAccumulator(str(run / "tensorboard")).Reload()
    return {name: [(e.step, e.value) for e in shown.Scalars(name)] for name in shown.Tags()["scalars"]}


def test_a_full_disk_stops_nothing_is_said_once_and_nothing_is_lost_when_there_is_room(
    small_disk: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = small_disk
    with Logs(run, FIRST, config("tensorboard")) as log:
        log.step(1, 0, 0.1)
        assert log.flush(30)
        fill = run / "fill"
        with open(fill, "wb", buffering=0) as file, suppress(OSError):
            while file.write(bytes(1024)):
                pass
        for update in range(2, 400):
            log.step(update, update - 1, 0.1)
            log.scalars(update, {"loss": float(update)}, show=False)
        log.writer.add_image("pictures/noise", np.zeros((1, 4, 4), np.float32), 399)
        log.record("bad_updates.jsonl", {"update": 399})
        assert not log.flush(0.5)
        wait_for(lambda: "cannot be written" in capfd.readouterr().out)
        fill.unlink()
        assert log.flush(60)
    assert updates(run / "logs" / "rank-000.jsonl") == list(range(1, 400))
    assert [row["update"] for row in rows(run / "metrics.jsonl")] == list(range(2, 400))
    assert rows(run / "bad_updates.jsonl")[0]["update"] == 399
    assert scalars_of(run)["loss"] == [(n, float(n)) for n in range(2, 400)]
    assert (run / "pictures" / "update-00000399-noise.png").read_bytes().startswith(b"\x89PNG")
    said = capfd.readouterr()
    assert said.out.count("cannot be written") == 0
    assert said.out.count("written again") == 1
    assert "Traceback" not in said.err


def test_a_deleted_folder_comes_back_but_a_run_folder_that_is_gone_does_not(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    with Logs(run, FIRST, config("tensorboard")) as log:
        log.step(1, 0, 0.1)
        log.scalars(1, {"loss": 1.0})
        assert log.flush(30)
        for name in ("logs", "tensorboard"):
            shutil.rmtree(run / name)
        log.step(2, 1, 0.1)
        log.scalars(2, {"loss": 2.0})
        assert log.flush(30)
        assert updates(run / "logs" / "rank-000.jsonl") == [2]
        assert scalars_of(run) == {"loss": [(2, 2.0)]}
        shutil.rmtree(run)
        log.step(3, 2, 0.1)
        assert not log.flush(1)
    assert not run.exists()


def test_a_disk_and_a_server_that_hang_stop_neither_training_nor_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Opening a pipe that nobody reads hangs as a file on a lost NFS server does; a socket that takes
    connections and does not answer is such a server."""
    pytest.importorskip("mlflow")
    (tmp_path / "logs").mkdir()
    pipes = [tmp_path / "logs" / "rank-000.jsonl", tmp_path / "metrics.jsonl"]
    for pipe in pipes:
        os.mkfifo(pipe)
    blocked = os.open  # the engine opens for reading and writing, which a pipe does not make wait
    monkeypatch.setattr(background.os, "open", lambda p, f, *a: blocked(p, f & ~os.O_RDWR | os.O_WRONLY, *a))
    monkeypatch.setattr(logs, "CLOSE_SECONDS", 0.5)
    monkeypatch.setattr(trackers, "CLOSE_SECONDS", {"mlflow": 0.5, "tensorboard": 10.0, "pictures": 10.0})
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{server.getsockname()[1]}")
        with Logs(tmp_path, FIRST, config("tensorboard", "mlflow")) as log:
            for update in range(1, 1001):
                log.step(update, update - 1, 0.1)
                log.scalars(update, {"loss": 1.0}, show=False)
            assert not log.flush(0.1)
        monkeypatch.undo()
    said = capfd.readouterr()
    assert said.out.count("are lost") == 3
    assert "mlflow did not take its last entries" in said.out
    assert len(scalars_of(tmp_path)["loss"]) == 1000
    for pipe in pipes:
        os.close(os.open(pipe, os.O_RDONLY | os.O_NONBLOCK))  # lets the threads go


def test_what_does_not_fit_in_memory_is_counted() -> None:
    full = threading.Event()
    full.set()
    taken: list[bytes] = []
    told: list[str] = []

    def deliver(pending: deque[bytes]) -> None:
        if full.is_set() and pending:
            raise OSError(28, "No space left on device")
        while pending:
            taken.append(pending.popleft())

    thread = Background("file", deliver, lambda name, trouble: told.append(trouble), len, 10)
    thread.start()
    for number in range(12):
        thread.put(b"%d" % number)
    assert thread.lost == 2
    assert not thread.flush(1)
    full.clear()
    assert thread.flush(60)
    thread.put(b"x")
    assert thread.close(60)
    assert taken == [*(b"%d" % n for n in range(10)), b"x"]
    assert [bool(trouble) for trouble in told] == [True, False]
    assert "No space left" in told[0]


def test_a_line_that_a_disk_took_half_of_is_finished_later(small_disk: Path) -> None:
    file = Appended(small_disk / "lines")
    pending = deque(bytes([65 + n]) * 60_000 + b"\n" for n in range(6))
    expected = b"".join(pending)
    deliver = deliver_lines(file)
    fill = small_disk / "fill"
    fill.write_bytes(bytes(100_000))
    with pytest.raises(OSError, match="No space left"):
        deliver(pending)
    half = (small_disk / "lines").stat().st_size
    assert 0 < half % 60_001 < 60_000
    fill.unlink()
    with pytest.raises(OSError, match="No space left"):  # 360 kB do not fit in 256
        deliver(pending)
    assert (small_disk / "lines").read_bytes() == expected[: (small_disk / "lines").stat().st_size]
    file.close()


class SomeRecipe(Frozen):
    engine: EngineConfig = EngineConfig()


def log_all(run: Path, name: str, start: int = 0) -> None:
    """A launch that logs to one tracker."""
    with Logs(run, FIRST, config(name), start=start, recipe=SomeRecipe()) as log:
        log.scalars(start + 1, {"loss/CT": 0.5, "evaluate/val/CT": 0.25})
        log.writer.add_image("grey", torch.linspace(0, 1, 16).view(1, 4, 4), start + 1)
        figure(log, start + 1)


def figure(log: Logs, update: int) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    log.writer.add_figure("pictures/CT-0", pyplot.figure(figsize=(2, 1), dpi=50), update)
    assert not pyplot.get_fignums()


def test_tensorboard_shows_figures_and_pictures(tmp_path: Path) -> None:
    from PIL.Image import open as open_image
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log_all(tmp_path, "tensorboard")
    assert scalars_of(tmp_path) == {"loss/CT": [(1, 0.5)], "val/CT": [(1, 0.25)]}
    shown = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert sorted(shown.Tags()["images"]) == ["grey", "pictures/CT-0"]
    (grey,), (drawn,) = shown.Images("grey"), shown.Images("pictures/CT-0")
    assert (grey.width, grey.height, drawn.width, drawn.height) == (4, 4, 100, 50)
    (tmp_path / "grey.png").write_bytes(grey.encoded_image_string)
    with open_image(tmp_path / "grey.png") as image:
        assert image.getpixel((0, 0)) == (0, 0, 0)
        assert image.getpixel((3, 3)) == (255, 255, 255)


def leveldb_records(log: bytes) -> Iterator[bytes]:
    """The records of a file of W&B: LevelDB's log format after a header of 7 bytes, in blocks of 32 KiB, each
    piece with checksum, length and kind (1 whole, 2 first, 3 middle, 4 last)."""
    place, parts = 7, b""
    while place + 7 <= len(log):
        if (left := 32768 - place % 32768) < 7:
            place += left
            continue
        size, kind = int.from_bytes(log[place + 4 : place + 6], "little"), log[place + 6]
        parts = (b"" if kind in (1, 2) else parts) + log[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):
            yield parts


def test_weights_and_biases_keeps_one_run_over_launches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    from wandb.proto.wandb_internal_pb2 import Record

    monkeypatch.setenv("WANDB_MODE", "offline")
    identities, seen = set(), list[dict[str, Any]]()
    for start in (0, 1):
        log_all(tmp_path, "wandb", start)
        (file,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
        identities.add(file.name)
        for data in leveldb_records(file.read_bytes()):
            record = Record.FromString(data)
            if record.HasField("history"):
                items = record.history.item
                seen.append({(i.key or i.nested_key[0]): json.loads(i.value_json) for i in items})
            if record.HasField("run"):
                assert record.run.project == "medfm"
        shutil.rmtree(tmp_path / "wandb")
    assert identities == {f"run-{(tmp_path / 'wandb-id').read_text().strip()}.wandb"}
    losses = [(row["update"], row["loss/CT"], row["val/CT"]) for row in seen if "loss/CT" in row]
    assert losses == [(1, 0.5, 0.25), (2, 0.5, 0.25)]
    assert sorted(row["update"] for row in seen if "pictures/CT-0" in row) == [1, 2]


def test_mlflow_keeps_one_run_over_launches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    log_all(tmp_path, "mlflow")
    log_all(tmp_path, "mlflow", start=1)
    client = mlflow.MlflowClient(tracking_uri=(tmp_path / "mlruns").as_uri())
    identity = (tmp_path / "mlflow-id").read_text().strip()
    found = client.get_run(identity)
    assert found.info.status == "FINISHED"
    assert found.data.params["engine.updates"] == "1000"
    assert [(m.step, m.value) for m in client.get_metric_history(identity, "loss/CT")] == [(1, 0.5), (2, 0.5)]
    assert [m.value for m in client.get_metric_history(identity, "val/CT")] == [0.25, 0.25]
    assert len(list((tmp_path / "mlruns").rglob("*CT-0*.png"))) == 2


def test_a_tracker_that_is_not_installed_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(trackers.PACKAGES, "wandb", "no_such_package")
    for world in (FIRST, SECOND):
        with pytest.raises(
            UserError, match=r"wandb is not installed; pip install 'medfm\[wandb\]'"
        ) as caught:
            Logs(tmp_path, world, config("tensorboard", "wandb"))
        assert "\n" not in str(caught.value)


def test_a_tracker_that_refuses_is_said_and_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.setattr(trackers, "CLOSE_SECONDS", {"mlflow": 20.0, "pictures": 10.0})
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///nothing.db")  # the small package has no databases
    with Logs(tmp_path, FIRST, config("mlflow")) as log:
        log.scalars(1, {"loss": 1.0})
        wait_for(lambda: log._first is not None and log._troubled)
    said = capfd.readouterr()
    assert said.out.count("mlflow cannot be written") == 1
    assert "did not take its last entries" in said.out
    assert "Traceback" not in said.out + said.err


@pytest.mark.parametrize(
    ("image", "axes", "corner"),
    [
        (np.full((1, 2, 3), 0.5, np.float32), "CHW", 127),
        (torch.full((3, 2, 3), 2.0), "CHW", 255),
        (np.full((2, 3), 7, np.uint8), "HW", 7),
        (np.full((2, 3, 4), 9, np.uint8), "HWC", 9),
    ],
)
def test_pictures_of_every_kind_become_colours(image: Any, axes: str, corner: int) -> None:
    pixels = trackers.as_pixels(image, axes)
    assert pixels.shape == (2, 3, 3)
    assert (pixels == corner).all()


def test_a_terminal_shows_a_bar_with_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = pty.openpty()
    with os.fdopen(theirs, "w") as terminal:
        monkeypatch.setattr(sys, "stdout", terminal)
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setenv("COLUMNS", "120")
        console = Console(total=40, start=0)
        figures = {"loss": 0.25, "optim/lr": 1e-3}
        console.deliver(deque(["resumed", Shown(10, figures, 100.0), Shown(20, {}, 200.0)]))
        console.close()
    shown = os.read(ours, 1 << 16).decode()
    os.close(ours)
    for text in ("resumed", "20/40", "loss 0.25", "3:20 left"):
        assert text in shown


def test_an_output_that_takes_nothing_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader that has gone (`| head`), and a file on a full disk."""
    reader, writer = os.pipe()
    os.close(reader)
    for stream in (os.fdopen(writer, "w"), open("/dev/full", "w")):  # noqa: SIM115
        monkeypatch.setattr(sys, "stdout", stream)
        with Logs(tmp_path, FIRST, config()) as log:
            log.say("nobody hears this")
            log.scalars(1, {"loss": 1.0})
        monkeypatch.undo()
        stream.close()  # would raise if anything had stayed in its buffer
    said = [r["text"] for r in rows(tmp_path / "logs" / "rank-000.jsonl") if r["event"] == "message"]
    assert said == ["nobody hears this"] * 2


def test_clock() -> None:
    assert [clock(s) for s in (7, 125, 3600, 200_000)] == ["0:07", "2:05", "1:00:00", "2 days 7:33:20"]
