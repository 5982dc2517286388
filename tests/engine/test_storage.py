"""Storage that fails while a checkpoint is saved: full, read-only, gone, stuck; and kills at any moment."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from saving import Notes, Part, begin_launch, kept, ranks, saver, state, store, turn

from engine import checkpoint
from engine import saver as module
from engine.saver import Saver
from engine.verdict import LAUNCHED, Verdict, write_verdict

HERE = Path(__file__).parent
ENV = {
    **os.environ,
    "PYTHONPATH": f"{HERE}{os.pathsep}{HERE.parents[1]}",
    "OMP_NUM_THREADS": "1",
}
MEGABYTE = 1 << 20
WIDE = MEGABYTE // 12  # elements of a parameter whose masters and moments take a megabyte


def newest_update(run: Path) -> int:
    found = checkpoint.newest(run, ranks(1)[0], pytest.fail)
    assert found is not None
    return int(found.state["update"])


def train_until_saved(one: Saver, update: int, repair: Any) -> int:
    """Updates go on from a failed save until one is saved, after `repair`; returns how many there were."""
    for step in range(100):
        if step == 3:
            repair()
        if one.wanted:
            assert one.begin(state(update + step))
        if one._work is not None:
            assert one._work.ended.wait(30)
        turn(one)
        if one.last is not None and one.last[0] > update:
            return step
    pytest.fail("never saved")


def test_a_full_disk(small_disk: Path) -> None:
    run = small_disk / "run"
    run.mkdir()
    begin_launch(run)
    one = saver(run, Part(wide=WIDE), keep_last=1)
    assert one.settle(state(10)) == ""
    other = small_disk / "other"
    other.write_bytes(b"x" * int(3.6 * MEGABYTE))
    one.begin(state(20))
    assert train_until_saved(one, 20, other.unlink) >= module.FIRST_RETRY
    notes = one.logs
    assert isinstance(notes, Notes)
    assert "update-00000020 was not saved: rank 0: OSError: [Errno 28] No space left" in notes.said[0]
    assert kept(run) == [f"update-{newest_update(run):08d}"]
    # Full again at the end of the launch: what is there stays good, and what failed leaves no litter.
    before = kept(run)
    other.write_bytes(b"x" * int(3.6 * MEGABYTE))
    assert "[Errno 28]" in one.settle(state(99))
    assert kept(run) == before
    assert newest_update(run) < 99


def test_a_disk_that_becomes_read_only(small_disk: Path) -> None:
    run = small_disk / "run"
    run.mkdir()
    begin_launch(run)
    one = saver(run)
    assert one.settle(state(10)) == ""

    def remount(how: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{how}", small_disk], check=True)

    remount("ro")
    one.begin(state(20))
    try:
        train_until_saved(one, 20, lambda: remount("rw"))
    finally:
        remount("rw")
    assert "[Errno 30] Read-only file system" in one.logs.said[0]  # type: ignore[attr-defined]
    assert newest_update(run) > 20


@pytest.mark.parametrize("what", ["checkpoints", "."])
def test_folders_deleted_under_a_save(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without its checkpoint folder a run makes it again; without the run folder it may not begin another."""
    run = tmp_path / "run"
    run.mkdir()
    begin_launch(run)
    one = saver(run)
    written, deleted = threading.Event(), threading.Event()
    seal = checkpoint.seal

    def slow_seal(*arguments: Any) -> None:
        written.set()
        assert deleted.wait(30)
        seal(*arguments)

    monkeypatch.setattr(checkpoint, "seal", slow_seal)
    one.begin(state(10))
    while not written.is_set():
        turn(one)
    shutil.rmtree(run / what)
    deleted.set()
    if what == ".":
        assert one.wait() == ""
        assert "No such file or directory" in one.settle(state(20))
        assert not run.exists()
    else:
        train_until_saved(one, 10, lambda: None)
        assert newest_update(run) > 10


STUCK = """
import os, sys
from pathlib import Path
from saving import begin_launch, saver, state
from engine import saver as module

run = Path(sys.argv[1])
module.LEAST_PATIENCE = 0.2
begin_launch(run)
scratch = run / "checkpoints" / ".tmp-update-00000010-a1-1"
scratch.mkdir(parents=True)
os.mkfifo(scratch / "rank-00000.safetensors")  # nobody reads from it: opening it waits for ever
print(saver(run).settle(state(10)))
"""


def test_a_stuck_writer_does_not_keep_the_process(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", STUCK, tmp_path], env=ENV, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    assert "the storage took nothing of update 10" in done.stdout
    assert begin_launch(tmp_path) == 2
    store(tmp_path, 10, attempt=2)
    assert kept(tmp_path) == ["update-00000010"]


KILLED = '''
import os, signal, sys
from pathlib import Path

import pytest
from engine import checkpoint
from saving import begin_launch, kept, ranks, saver, state, store

CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir"}
changes, limit = 0, None


def change():
    global changes
    if limit is not None:
        if changes == limit:
            os.kill(os.getpid(), signal.SIGKILL)
        changes += 1


def audit(event, args):
    writes = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
    if event in CHANGES or writes:
        change()


sys.addaudithook(audit)
os.fsync = lambda handle: change()  # a kill loses nothing that was written


def killed(run, attempt, update, at):
    """Whether a fork that saves comes to change number `at`, where it is killed."""
    global limit
    pid = os.fork()
    if pid == 0:
        one = saver(run, attempt=attempt)
        limit = at
        os._exit(0 if one.settle(state(update)) == "" else 1)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code in (0, -signal.SIGKILL), code
    return code != 0


for update in (30, 20):
    at = 0
    while True:
        run = Path(sys.argv[1]) / f"{update}-{at}"
        run.mkdir()
        for earlier in (10, 20):
            attempt = begin_launch(run)
            store(run, earlier, attempt)
        if not killed(run, begin_launch(run), update, at):
            break
        attempt = begin_launch(run)
        found = checkpoint.newest(run, ranks(1)[0], pytest.fail).state["update"]
        assert found in (20, update), (at, found)
        store(run, update, attempt)
        assert checkpoint.newest(run, ranks(1)[0], pytest.fail).state["update"] == update
        last_two = sorted({10, 20, update})[-2:]
        assert kept(run) == [f"update-{u:08d}" for u in last_two], (at, kept(run))
        at += 1
    print(at, flush=True)
os._exit(0)
'''


def test_killed_at_any_change(tmp_path: Path) -> None:
    """Every change of the file system: of a new update, which also deletes the oldest, and of one that is
    saved again."""
    done = subprocess.run(
        [sys.executable, "-c", KILLED, tmp_path], env=ENV, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    changes = [int(number) for number in done.stdout.split()]
    assert len(changes) == 2
    assert min(changes) >= 15


GROUP = """
import os, socket, sys
from pathlib import Path
from saving import Part, begin_launch, saver, state
from engine import checkpoint
from engine.distributed import join
from engine.recipe import EngineConfig
from engine.verdict import write_text
from engine.worker import end_process


def save(rank):
    os.environ["RANK"] = str(rank)
    world = join(EngineConfig(device="cpu", hang_minutes=1))
    one = saver(run, Part(0, 5) if rank == 0 else Part(5, 12), world)
    one.begin(state(10))  # rank 1 has a full disk
    while not one.wanted:
        one.hear(world.sum(one.progress()))
    assert "rank 1: OSError: [Errno 28]" in one.failure, one.failure
    assert one.settle(state(20)) == ""
    assert checkpoint.newest(run, world, print).state["update"] == 20
    world.barrier()
    if rank == 0:
        write_text(run / "attempt", "2\\n")
    world.barrier()
    assert "taken over" in one.settle(state(30))


run = Path(sys.argv[1])
with socket.create_server(("127.0.0.1", 0)) as free:
    os.environ.update(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free.getsockname()[1]))
children = []
for rank in range(2):
    pid = os.fork()
    if pid == 0:
        save(rank)
        end_process(0)
    children.append(pid)
while children:
    pid, status = os.wait()
    children.remove(pid)
    if status:
        for other in children:
            os.kill(other, 9)
        os._exit(1)
os._exit(0)
"""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
def test_two_processes_agree_where_the_disk_of_one_is_full(tmp_path: Path) -> None:
    begin_launch(tmp_path)
    scratch = tmp_path / "checkpoints" / ".tmp-update-00000010-a1-1"
    scratch.mkdir(parents=True)
    (scratch / "rank-00001.safetensors").symlink_to("/dev/full")
    done = subprocess.run(
        [sys.executable, "-c", GROUP, tmp_path], env=ENV, stderr=subprocess.PIPE, timeout=100
    )
    assert done.returncode == 0, done.stderr.decode()
    assert kept(tmp_path) == ["update-00000020"]


GONE = """
import os, sys
from pathlib import Path
from engine.loop import Loop
from engine.recipe import EngineConfig
from engine import train, watchdog
from engine.verdict import Verdict, tell_launcher
from toy_worker import ToyRecipe, ToyTask

run = Path(sys.argv[1])
config = EngineConfig(device="cpu", hang_minutes=1)


watchdog.LEAVE_SECONDS = 1.0


def end(loop):
    def tell(verdict):
        tell_launcher(verdict)
        loop.watchdog.beat()
        loop.watchdog.seconds = 1.0  # not before: a busy machine takes as long to get here

    train.tell_launcher = tell
    (run / "attempt").unlink()
    os.mkfifo(run / "attempt")  # nobody writes to it: opening it waits for ever
    return Verdict("failed", 7, 1, "the last save failed")


Loop.run_until_done = end
train.train(ToyTask(ToyRecipe(engine=config), run), config, run)
"""


def test_a_storage_that_hangs_at_the_end_neither_hides_the_verdict_nor_keeps_the_process(
    tmp_path: Path,
) -> None:
    words = tmp_path / "words"
    env = {**ENV, LAUNCHED: str(words)}
    done = subprocess.run([sys.executable, "-c", GONE, tmp_path / "run"], env=env, timeout=100)
    assert done.returncode == 4
    states = [json.loads(line)["verdict"]["state"] for line in words.read_text().splitlines()]
    assert states[:2] == ["failed", "hung"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
def test_a_verdict_needs_no_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither for the run folder nor for what is said about it."""
    (tmp_path / "file").touch()
    full = open("/dev/full", "w", buffering=1)  # noqa: SIM115 - closing it fails
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", full)
        write_verdict(tmp_path / "file" / "run", Verdict("failed"))
    with suppress(OSError):
        full.close()
