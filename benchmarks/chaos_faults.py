"""Faults that clusters meet: drawn from a seed, each at a random instant, and how each is done to a run."""

from __future__ import annotations

import ctypes
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from benchmarks.chaos_run import Run

STOPPED, STOPPED_KILLED = "SIGSTOP", "SIGSTOP, SIGKILL"
FLIP, CUT, FULL = "byte flip", "truncation", "full disk"
NEWEST = "newest checkpoint"
ASKS = ("SIGTERM", "SIGUSR1", "SIGINT")
"""After these the run must have saved: no update is lost, and the launcher returns 75."""

KINDS = (
    *(("SIGKILL", target) for target in ("rank 0", "rank 1", "data worker", "launcher", "torchrun")),
    *((ask, who) for ask in ("SIGTERM", "SIGUSR1")
      for who in ("rank 0", "rank 1", "data worker", "launcher", "torchrun", "every process")),
    ("SIGINT", "launcher"),
    *((STOPPED_KILLED, target) for target in ("rank 0", "rank 1", "data worker", "launcher")),
    (STOPPED, "rank 1"),
    (FLIP, NEWEST), (FLIP, NEWEST), (CUT, NEWEST),
    (FULL, "run folder"), (FULL, "run folder"),
)  # fmt: skip


@dataclass
class Fault:
    """One fault, and what came of it.

    Attributes:
        kind, target: what is done to whom.
        instant: start-up; update (the run has come so far); save (a checkpoint is on its way); end (its last
            updates, save, evaluation and exit).
        update: not before this one has been done.
        wait: seconds after that instant.
        hold: seconds until the stopped process is killed, or for which the disk is full.
        again: seconds after which the same signal comes a second time; 0 for never.
        fired: when it was done, by the clock of this machine's logs.
        code: of the launcher, where it ended.
        lost: updates that had to be done again.
        seconds: from the fault to the next update that is new to the launch.
        trouble: why it does not count as recovered.
    """

    kind: str
    target: str
    instant: str
    update: int = 0
    wait: float = 0.0
    hold: float = 0.0
    again: float = 0.0
    fired: float = 0.0
    at: int = 0
    launch: int = 0
    starts: int = 0
    exits: int = 0
    early: bool = False  # the launcher had no child yet
    damaged: str = ""  # name of the checkpoint
    code: int | None = None
    lost: int | None = None
    seconds: float | None = None
    recovered: bool = False
    trouble: str = ""

    @property
    def ends_launch(self) -> bool:
        """A full disk alone must end nothing."""
        return self.kind != FULL


def draw(count: int, seed: int, updates: int, start_seconds: float) -> list[Fault]:
    """`count` faults over a run of `updates`: every kind equally often, in random order at random instants.

    A fault in start-up follows one that ends a launch and hits the launch after it. The last ones come at the
    end of the run.
    """
    chance = random.Random(seed)
    kinds: list[tuple[str, str]] = []
    while len(kinds) < count:
        deck = list(KINDS)
        chance.shuffle(deck)
        kinds += deck
    late = max(1, count // 25)
    when = sorted(chance.uniform(0.03, 0.9) * updates for _ in range(count))
    faults: list[Fault] = []
    for number, (kind, target) in enumerate(kinds[:count]):
        fault = Fault(kind, target, "update", round(when[number]), chance.uniform(0.0, 0.3))
        roll = chance.random()
        after_end = not faults or faults[-1].ends_launch
        if number >= count - late:
            fault.instant, fault.wait = "end", chance.uniform(0.0, 2.0)
        elif roll < 0.3 and after_end and kind not in (FLIP, CUT, STOPPED):
            fault.instant, fault.wait = "start-up", chance.uniform(0.0, start_seconds)
        elif roll < 0.5:
            fault.instant, fault.wait = "save", chance.uniform(0.0, 0.05)
        fault.hold = chance.uniform(0.5, 4.0)
        fault.again = chance.uniform(0.01, 1.0) if kind in ("SIGTERM", "SIGUSR1") and roll > 0.7 else 0.0
        faults.append(fault)
    return faults


def find(run: Run, target: str) -> list[int]:
    """The processes meant, none where they do not exist (yet)."""
    if target == "launcher":
        return [run.launcher]
    if target == "torchrun":
        return [] if (process := run.torchrun()) is None else [process]
    if target == "data worker":
        return run.data_workers()[-1:]
    if target == "every process":
        return run.processes()
    return [run.ranks()[rank]] if (rank := int(target.split()[1])) in run.ranks() else []


def send(processes: list[int], number: signal.Signals) -> None:
    """A signal to those that still live."""
    for process in processes:
        with suppress(ProcessLookupError):
            os.kill(process, number)


def damage(checkpoint: Path, kind: str, chance: random.Random) -> str:
    """Flip a bit of one file of a checkpoint or cut it short; says what was done."""
    files = sorted(path for path in checkpoint.iterdir() if path.stat().st_size)
    file = chance.choice(files)
    position = chance.randrange(file.stat().st_size)
    if kind == CUT:
        os.truncate(file, position)
        return f"{file.name} cut to {position} bytes"
    with open(file, "r+b") as opened:
        opened.seek(position)
        byte = opened.read(1)[0]
        opened.seek(position)
        opened.write(bytes([byte ^ 1 << chance.randrange(8)]))
    return f"{file.name}: one bit of byte {position}"


class Disk:
    """A small file system in memory for RUN, which can be filled; RUN is a plain folder without root."""

    def __init__(self, folder: Path, mebibytes: int) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        command = ["mount", "-t", "tmpfs", "-o", f"size={mebibytes}m", "tmpfs", str(folder)]
        self.mounted = (
            sys.platform == "linux" and os.geteuid() == 0
            and shutil.which("mount") is not None
            and subprocess.run(command, capture_output=True).returncode == 0
        )  # fmt: skip
        self._filler = folder / "filler"

    def fill(self, until: Callable[[], bool]) -> None:
        """Leave no byte free until told; what is freed meanwhile is taken, too."""
        with open(self._filler, "wb", buffering=0) as filler:
            while not until():
                with suppress(OSError):
                    while True:
                        filler.write(bytes(1 << 16))
                with suppress(OSError):
                    while True:
                        filler.write(bytes(512))

    def free(self) -> None:
        """Give the room back."""
        self._filler.unlink(missing_ok=True)

    def keep(self, to: Path) -> None:
        """Copy what is in it before it goes."""
        shutil.copytree(self.folder, to, dirs_exist_ok=True)

    def close(self) -> None:
        """Take it down."""
        if self.mounted:
            detach = 2  # MNT_DETACH: also while a process that ends still has a file open
            ctypes.CDLL(None).umount2(os.fsencode(self.folder), detach)
            self.mounted = False
