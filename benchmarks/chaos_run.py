"""A run that may be harmed: its command, its processes, how far it is, and what it has come to."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from engine import checkpoint

ROOT = Path(__file__).resolve().parents[1]
MARK = "MEDFM_CHAOS"  # in the environment of every process of a run


@dataclass(frozen=True)
class Start:
    """A launch that has begun to train: the update it went on from, and how many it had to do again."""

    time: float
    update: int
    lost: int


class Progress:
    """How far a run is, from the lines of its rank 0; only what is new is read each time."""

    def __init__(self, run: Path) -> None:
        self._file, self._read = run / "logs" / "rank-000.jsonl", 0
        self.starts: list[Start] = []
        self.update = 0  # of the last line
        self.stepped = 0.0  # time of the last update's line
        self.saved = 0.0  # time of the last checkpoint's line
        self.moved = time.monotonic()  # when this process last saw something new

    def look(self) -> None:
        """Read what has been added."""
        with suppress(FileNotFoundError), open(self._file, "rb") as file:
            file.seek(self._read)
            lines, newline, _ = file.read().rpartition(b"\n")
            self._read += len(lines) + len(newline)
            for line in lines.splitlines():
                with suppress(ValueError):  # cut off by a kill
                    self._take(json.loads(line))

    def _take(self, line: Mapping[str, object]) -> None:
        event, now, update = line.get("event"), float(str(line["time"])), int(str(line.get("update", -1)))
        if event == "start":
            self.starts.append(Start(now, update, max(0, self.update - update)))
            self.update = update
        elif event == "step":
            self.update, self.stepped = update, now
        elif event == "checkpoint":
            self.saved = now
        else:
            return
        self.moved = time.monotonic()


class Run:
    """A run on this machine, started, watched and started again with one command.

    Args:
        folder: RUN.
        command: of the launcher.
        console: file that takes what it prints.
    """

    def __init__(self, folder: Path, command: Sequence[str], console: Path) -> None:
        self.folder, self.command, self.console = folder, list(command), console
        self.progress = Progress(folder)
        self.launches = 0
        self.began = 0.0  # when the newest launch was started, by the launcher or by us
        self._process: subprocess.Popen[bytes] | None = None
        self._torchrun: int | None = None
        self._due = 0.0

    @property
    def launcher(self) -> int:
        """Its process."""
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        """As a user would."""
        environment = {**os.environ, MARK: str(self.folder), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
        with open(self.console, "ab") as output:
            output.write(f"--- {time.strftime('%H:%M:%S')} {' '.join(self.command)}\n".encode())
            output.flush()
            self._process = subprocess.Popen(
                self.command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=output,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        self._new_launch()

    def code(self) -> int | None:
        """Exit code of the launcher; None while it runs."""
        return self._process.poll() if self._process is not None else None

    def look(self) -> None:
        """Read the log, and notice a launch that the launcher began by itself."""
        self.progress.look()
        if time.monotonic() < self._due:  # it takes some milliseconds
            return
        self._due = time.monotonic() + 0.2
        now = self.torchrun()
        if now is not None and self._torchrun not in (None, now):
            self._new_launch()
        self._torchrun = now or self._torchrun

    def torchrun(self) -> int | None:
        """The launcher's child, or None where there is none."""
        for child in _children(self.launcher):
            if "launch.elastic" in _words(child):
                return child
        return None

    def ranks(self) -> dict[int, int]:
        """Rank -> process of each that lives."""
        found = {}
        if (parent := self.torchrun()) is not None:
            for child in _children(parent):
                with suppress(psutil.Error, KeyError):
                    found[int(psutil.Process(child).environ()["RANK"])] = child
        return found

    def data_workers(self) -> list[int]:
        """Processes that load data, those of rank 0 first."""
        return [
            child for _, rank in sorted(self.ranks().items()) for child in _children(rank)
            if _name(child) == "pt_data_worker"
        ]  # fmt: skip

    def processes(self) -> list[int]:
        """All that belong to the run, whoever has adopted them."""
        marked = f"{MARK}={self.folder}".encode()
        found = []
        for entry in os.scandir("/proc"):
            with suppress(OSError):
                if entry.name.isdigit() and marked in Path(entry.path, "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
        return found

    def checkpoints(self) -> list[Path]:
        """Whole ones, oldest first."""
        return sorted(p.parent for p in (self.folder / "checkpoints").glob("update-*/complete.json"))

    def saving(self) -> bool:
        """Whether a checkpoint is on its way."""
        return any((self.folder / "checkpoints").glob(".tmp-*"))

    def kill(self) -> None:
        """End every process of the run."""
        end = time.monotonic() + 10
        while (left := self.processes()) and time.monotonic() < end:
            for process in left:
                with suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            time.sleep(0.05)
        if self._process is not None:
            self._process.wait()

    def _new_launch(self) -> None:
        self.launches += 1
        self.began, self.progress.moved = time.time(), time.monotonic()
        self._torchrun = None


def _children(process: int) -> list[int]:
    """Living children, zombies left out."""
    found = []
    with suppress(psutil.Error):
        for child in psutil.Process(process).children():
            with suppress(psutil.Error):
                if child.status() != psutil.STATUS_ZOMBIE:
                    found.append(child.pid)
    return found


def _words(process: int) -> list[str]:
    with suppress(psutil.Error):
        return psutil.Process(process).cmdline()
    return []


def _name(process: int) -> str:
    with suppress(psutil.Error):
        return psutil.Process(process).name()
    return ""


def finish(run: Run) -> float:
    """Wait for the end of a run that nothing is done to; seconds from its start to the first update."""
    first = 0.0
    while run.code() is None:
        time.sleep(0.05)
        run.look()
        first = first or run.progress.stepped
    if run.code() != 0:
        raise RuntimeError(f"the run without faults ended with {run.code()}: {run.console}")
    return (first or time.time()) - run.began


def newest_update(run: Path) -> int:
    """Of the whole checkpoints; -1 where there is none."""
    whole = (run / "checkpoints").glob("update-*/complete.json")
    return max((checkpoint.update_of(path.parent) for path in whole), default=-1)


def differences(one: Path, other: Path) -> list[str]:
    """What differs between the last checkpoints of two runs: weights, both moments, buffers, every count and
    position, the weights for use; empty where they are the same, bit for bit."""
    folders = [checkpoint.folder_of(run, newest_update(run)) for run in (one, other)]
    if faults := [f"{folder}: {fault}" for folder in folders if (fault := checkpoint.fault(folder))]:
        return faults
    if folders[0].name != folders[1].name:
        return [f"{folders[0].name} and {folders[1].name}"]
    first, second = (checkpoint.Checkpoint(folder) for folder in folders)
    found = [
        f"state.json: {key}: {first.state.get(key)} and {second.state.get(key)}"[:300]
        for key in sorted(first.state.keys() | second.state.keys())
        if first.state.get(key) != second.state.get(key)
    ]
    keys = [set(_slices(folder)) for folder in folders]
    found += [f"{key} is in one of them only" for key in sorted(keys[0] ^ keys[1])]
    for key, size in sorted(_slices(folders[0]).items()):
        if key in keys[1]:
            a, b = (kept.read(key, 0, size).contiguous().view(torch.uint8) for kept in (first, second))
            if not torch.equal(a, b):
                found.append(f"{key}: {int((a != b).sum())} of {a.numel()} bytes differ")
    for name in sorted({path.name for folder in folders for path in folder.glob("*.safetensors")}):
        paths = [folder / name for folder in folders]
        if not name.startswith("rank-") and paths[0].read_bytes() != paths[1].read_bytes():
            found.append(f"{name} differs")
    return found


def _slices(folder: Path) -> dict[str, int]:
    """Key -> elements of the whole tensor, over all rank files."""
    from safetensors import safe_open

    found: dict[str, int] = {}
    for file in folder.glob("rank-*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            for key, where in json.loads(opened.metadata()["slices"]).items():
                found[key] = torch.Size(where["global_shape"]).numel()
    return found
