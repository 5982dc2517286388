"""Saving in the background: what is copied when, ranks that fail alone, tries again, launches that
overlap."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from saving import (
    Notes,
    Part,
    begin_launch,
    kept,
    ranks,
    saver,
    settle_all,
    state,
    store,
    together,
    turn,
)
from torch import Tensor

from engine import checkpoint
from engine import saver as module
from engine.checkpoint import TakenOver
from engine.saver import FIRST_RETRY, Saver
from engine.snapshot import Snapshot
from engine.verdict import write_text


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(module, "FIRST_PAUSE", 0.01)
    begin_launch(tmp_path)
    return tmp_path


class Disk:
    """A storage that takes nothing while it is held: every flush of a background thread waits."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.free, self.reached = threading.Event(), threading.Event()
        self.free.set()
        flush = os.fsync

        def wait(handle: int) -> None:
            if threading.current_thread().name == "saver" and not self.free.is_set():
                self.reached.set()
                assert self.free.wait(60)
            flush(handle)

        patch.setattr(os, "fsync", wait)

    def hold(self) -> None:
        self.reached.clear()
        self.free.clear()

    def let_go(self) -> None:
        self.free.set()


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    held = Disk(monkeypatch)
    yield held
    held.let_go()


def newest(run: Path) -> checkpoint.Checkpoint:
    found = checkpoint.newest(run, ranks(1)[0], pytest.fail)
    assert found is not None
    return found


def notes(saver: Saver) -> Notes:
    assert isinstance(saver.logs, Notes)
    return saver.logs


def test_training_goes_on_while_the_storage_takes_nothing(run: Path, disk: Disk) -> None:
    part = Part()
    one = saver(run, part)
    progress: dict[str, Any] = {**state(10), "segments": [{"name": "first"}]}
    disk.hold()
    assert one.begin(progress)
    assert disk.reached.wait(20)
    progress["segments"].append({"name": "later"})
    for update in range(11, 30):  # with other weights, and a save that is due meanwhile
        part.train()
        turn(one)
        if update in (20, 25):
            assert not one.begin(state(update))
        assert not one.wanted
    assert one.last is None
    disk.let_go()
    assert one.wait() == ""
    assert one.last == (10, 11)
    saved = newest(run)
    assert float(saved.model_state()["gate"]) == 0.0
    assert saved.state["segments"] == [{"name": "first"}]
    assert [text for text in notes(one).said if "put off" in text] == [
        "the checkpoint of update 20 is put off: that of update 10 is still being written after 0 s"
    ]
    assert one.wanted
    assert one.begin(state(30))
    assert not one.wanted
    assert one.wait() == ""
    assert float(newest(run).model_state()["gate"]) == 1900.0


def test_a_save_is_logged_with_what_it_cost(run: Path) -> None:
    one = saver(run)
    assert one.settle(state(4)) == ""
    ((kind, fields),) = notes(one).events
    assert (kind, fields["name"]) == ("checkpoint", "update-00000004")
    assert fields["seconds"] >= fields["stall"] > 0
    assert notes(one).scalars_of[4].keys() == {"checkpoint/seconds", "checkpoint/stall_s"}
    assert one.seconds_stalled() > 0
    assert one.seconds_stalled() == 0


def test_host_memory_is_taken_once(run: Path) -> None:
    one = saver(run)
    places = {key: tensor.data_ptr() for key, tensor in one._snapshot.tensors.items()}
    for update in (1, 2):
        assert one.settle(state(update)) == ""
    assert places == {key: tensor.data_ptr() for key, tensor in one._snapshot.tensors.items()}


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="needs /proc")
def test_all_is_on_the_disk_before_the_folder_gets_its_name(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    flush, rename = os.fsync, os.rename

    def note_flush(handle: int) -> None:
        flush(handle)
        done.append(os.readlink(f"/proc/self/fd/{handle}"))

    def note_rename(source: Any, target: Any, **options: Any) -> None:
        done.append(f"to {target}")
        rename(source, target, **options)

    def export(weights: Mapping[str, Tensor], folder: Path) -> None:
        (folder / "deep").mkdir()
        (folder / "deep" / "plan.json").write_text("{}")

    monkeypatch.setattr(os, "fsync", note_flush)
    monkeypatch.setattr(os, "rename", note_rename)
    assert saver(run, export=export).settle(state(10)) == ""
    folders = run / "checkpoints"
    scratch = folders / ".tmp-update-00000010-a1-1"
    named = done.index(f"to {folders / 'update-00000010'}")
    inside = (p.relative_to(folders / "update-00000010") for p in (folders / "update-00000010").rglob("*"))
    assert {str(run), str(scratch), *(str(scratch / name) for name in inside)} <= set(done[:named])
    assert done[named - 1] == str(scratch)
    assert done[named + 1 :] == [str(folders)]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_is_copied_in_its_own_time() -> None:
    """The copy is in its queue between two updates, into memory that the device can write by itself."""

    class Cuda(Part):
        def __init__(self) -> None:
            super().__init__(wide=1 << 22)
            self.whole = {n: [t.cuda() for t in tensors] for n, tensors in self.whole.items()}

    part: Any = Cuda()
    snapshot = Snapshot(part, {"mean|buffer": torch.ones(3, device="cuda")}, torch.device("cuda"))
    assert all(t.is_pinned() for t in snapshot.tensors.values() if t.numel())
    snapshot.take(part, {"mean|buffer": torch.ones(3, device="cuda")})
    part.train()
    assert snapshot.wait() > 0
    assert torch.equal(snapshot.tensors["wide|exp_avg"], torch.arange(1 << 22).float() + 0.25)


def test_the_thread_that_waits_for_a_copy_works_on_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread starts at GPU 0; what it asks there opens a context beside that of rank 0."""
    done: list[str] = []

    class Edge:
        def synchronize(self) -> None:
            done.append("wait")

        def elapsed_time(self, other: Edge) -> float:
            done.append("time")
            return 1500.0

    @contextmanager
    def on(device: torch.device) -> Iterator[None]:
        done.append(f"on {device}")
        yield
        done.append("off")

    part: Any = Part()
    snapshot = Snapshot(part, {}, torch.device("cpu"))
    snapshot.device, snapshot._edges = torch.device("cuda", 3), [Edge(), Edge()]  # type: ignore[list-item]
    monkeypatch.setattr(torch.cuda, "device", on)
    assert snapshot.wait() == 1.5
    assert done == ["on cuda:3", "wait", "time", "off"]


def pair(run: Path, **options: Any) -> list[Saver]:
    return [
        saver(run, Part(low, high), rank, **options)
        for (low, high), rank in zip(((0, 5), (5, 12)), ranks(2), strict=True)
    ]


def test_two_ranks_make_one_checkpoint(run: Path) -> None:
    savers = pair(run)
    assert settle_all(savers, 10) == ["", ""]
    assert [s.last for s in savers] == [(10, 11)] * 2
    assert torch.equal(newest(run).read("stem.weight|exp_avg_sq", 0, 15), torch.arange(15) + 0.5)


def break_one(run: Path, update: int, rank: int, number: int) -> None:
    """The disk of one rank is full when it writes try `number`: its file is a way to `/dev/full`."""
    scratch = run / "checkpoints" / f".tmp-update-{update:08d}-a1-{number}"
    scratch.mkdir(parents=True)
    (scratch / f"rank-{rank:05d}.safetensors").symlink_to("/dev/full")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
@pytest.mark.parametrize("rank", [0, 1])
def test_a_full_disk_of_one_rank_is_every_ranks_failure(run: Path, rank: int) -> None:
    store(run, 5)
    break_one(run, 10, rank, 1)
    break_one(run, 20, rank, 2)
    savers = pair(run)

    def train(one: Saver) -> list[int]:
        """Updates at which a save began."""
        begun: list[int] = []
        for update in range(10, 10 + 4 * FIRST_RETRY):
            if update == 10 or one.wanted:
                assert one.begin({**state(update), "update": 10 * (len(begun) + 1)})
                begun.append(update)
            if one._work is not None:
                assert one._work.ended.wait(20)
            turn(one)
        return begun

    begun = together([partial(train, one) for one in savers])
    # Each fails at its own update; the second comes FIRST_RETRY updates later, the third twice as many.
    assert begun == [[10, 11 + FIRST_RETRY, 12 + 3 * FIRST_RETRY]] * 2
    for one in savers:
        assert one.last == (30, 13 + 3 * FIRST_RETRY)
        assert one.failure == ""
        said = [t for t in notes(one).said if "was not saved" in t]
        assert f"rank {rank}: OSError: [Errno 28] No space left on device" in said[0]
        assert "2 times now" in said[1]
        assert "saved again after 2 failures" in notes(one).said[-1]
    assert kept(run) == ["update-00000005", "update-00000030"]


def test_a_failing_export_saves_nothing_and_leaves_nothing(run: Path) -> None:
    def fail(weights: Mapping[str, Tensor], folder: Path) -> None:
        (folder / "half.bin").write_bytes(b"half")
        raise OSError("no room for weights")

    store(run, 5)
    savers = pair(run, export=fail)
    why = "rank 0: OSError: no room for weights"
    assert settle_all(savers, 10) == [why, why]
    assert kept(run) == ["update-00000005"]


def test_a_failing_copy_does_not_leave_the_others_waiting(run: Path) -> None:
    savers = pair(run)
    savers[1].partition = None  # type: ignore[assignment]
    answers = settle_all(savers, 10)
    assert answers[0] == answers[1]
    assert answers[0].startswith("rank 1: AttributeError")


def test_the_last_save_is_tried_again_until_the_storage_is_back(run: Path) -> None:
    (run / "checkpoints").write_text("in the way")
    one = saver(run, save_minutes=1.0)

    def beat() -> None:
        if one.failure and (run / "checkpoints").is_file():
            (run / "checkpoints").unlink()

    assert one.settle(state(10), beat) == ""
    assert newest(run).state["update"] == 10
    assert "NotADirectoryError" in notes(one).said[0]
    assert notes(one).said.count("the last save is tried for 1 minutes (engine.save_minutes)") == 1


def test_the_last_save_gives_up_in_the_end_and_says_why(run: Path) -> None:
    (run / "checkpoints").write_text("in the way")
    one = saver(run, save_minutes=0.02)
    assert "NotADirectoryError" in one.settle(state(10))
    tries = [fields["failures"] for kind, fields in notes(one).events if kind == "not saved"]
    assert tries == list(range(1, len(tries) + 1))
    assert len(tries) >= 3
    assert len([t for t in notes(one).said if "was not saved" in t]) < len(tries)


def test_the_last_save_waits_for_the_one_on_its_way_and_saves_nothing_twice(run: Path, disk: Disk) -> None:
    part = Part()
    one = saver(run, part)
    disk.hold()
    one.begin(state(10))
    part.train()
    assert disk.reached.wait(20)
    assert one.settle(state(20), disk.let_go) == ""
    assert kept(run) == ["update-00000010", "update-00000020"]
    assert float(newest(run).model_state()["gate"]) == 100.0
    assert one.settle(state(20)) == ""
    assert len(notes(one).events) == 2


def test_a_storage_that_takes_nothing_ends_the_waiting(
    run: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what was stuck cannot become a checkpoint later."""
    monkeypatch.setattr(module, "LEAST_PATIENCE", 0.2)
    store(run, 5)
    savers = pair(run)
    disk.hold()
    answers = settle_all(savers, 10)
    assert answers[0] == answers[1]
    assert answers[0].startswith("the storage took nothing of update 10")
    disk.let_go()
    assert together([s.wait for s in savers]) == ["", ""]
    assert [s.last for s in savers] == [None, None]
    assert kept(run) == ["update-00000005"]
    monkeypatch.setattr(module, "LEAST_PATIENCE", 30.0)
    assert settle_all(savers, 10) == ["", ""]


def test_a_save_that_moves_is_waited_for(run: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    """One rank writes for ten times as long as a stuck storage is given."""
    monkeypatch.setattr(module, "LEAST_PATIENCE", 0.1)
    savers = pair(run)
    disk.hold()

    def beat() -> None:
        save = savers[1]._save
        if save is not None:
            save.moved += 1
            if time.monotonic() - save.began > 1:
                disk.let_go()

    settle = [partial(savers[0].settle, state(10)), partial(savers[1].settle, state(10), beat)]
    assert together(settle) == ["", ""]


def test_a_save_that_ends_as_patience_does_is_saved(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LEAST_PATIENCE", -1.0)
    one = saver(run)
    one.begin(state(10))
    assert one._work is not None
    assert one._work.ended.wait(20)
    turn(one)  # written
    assert one._work.ended.wait(20)
    assert one.wait() == ""
    assert one.last == (10, 11)
    assert one.begin(state(20))


def test_hosts_that_do_not_share_the_run_folder_are_told_so(run: Path) -> None:
    other = run / "other"
    other.mkdir()
    begin_launch(other)
    savers = pair(run)
    savers[1].run = other
    answers = settle_all(savers, 10)
    assert answers[0] == answers[1]
    assert answers[0].endswith("rank-00001.safetensors is not there; all hosts must see the same run folder")


def test_a_file_that_rank_0_sees_only_half_of_is_no_checkpoint(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seal = checkpoint.seal

    def late(scratch: Path, *rest: Any) -> None:
        os.truncate(scratch / "rank-00001.safetensors", 800)
        seal(scratch, *rest)

    monkeypatch.setattr(checkpoint, "seal", late)
    answers = settle_all(pair(run), 10)
    assert "rank-00001.safetensors has 800 bytes here instead of" in answers[0]
    assert kept(run) == []


def test_an_older_launch_may_not_finish(run: Path, disk: Disk) -> None:
    """Its writers were stuck while the next launch began, and wake up at any moment of that one's work."""
    store(run, 5)
    savers = pair(run)
    disk.hold()
    assert [s.begin(state(10)) for s in savers] == [True, True]
    assert disk.reached.wait(20)
    write_text(run / "attempt", "2\n")
    store_later = saver(run, Part(seed=7.0), attempt=2)
    disk.let_go()
    assert store_later.settle(state(10)) == ""
    ended = together([s.wait for s in savers])
    assert [type(error) for error in ended] == [TakenOver] * 2
    assert "launch 2 of this run has taken over from launch 1" in str(ended[1])
    assert kept(run) == ["update-00000005", "update-00000010"]
    assert float(newest(run).model_state()["gate"]) == 7.0
    assert "has taken over" in saver(run).settle(state(11))


def test_what_tidy_clears_cannot_be_finished(run: Path, disk: Disk) -> None:
    """The older launch has passed its check, then the next one clears the folder."""
    one = saver(run, Part())
    check = checkpoint.read_attempt

    def slow_check(folder: Path) -> int:
        number = check(folder)
        begin_launch(folder)
        return number

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "read_attempt", slow_check)
        assert "FileNotFoundError" in one.settle(state(10))
    assert not any((run / "checkpoints").iterdir())


def test_old_checkpoints_go_and_milestones_stay(run: Path) -> None:
    one = saver(run, keep=lambda update, newest: update == 3, keep_last=1, keep_every=4)
    for update in range(1, 7):
        assert one.settle(state(update)) == ""
    assert kept(run) == [f"update-{u:08d}" for u in (3, 4, 6)]


def test_no_room_to_delete_old_ones_is_said_but_is_no_failure(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError("read-only")

    monkeypatch.setattr(checkpoint, "prune", refuse)
    one = saver(run)
    assert one.settle(state(1)) == ""
    assert notes(one).said == ["old checkpoints could not be deleted: read-only"]
