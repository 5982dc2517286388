"""The processes of one launch on this host: started, told to end, ended, and what they have said."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

import psutil

from engine.signals import ASKED, PARENT, STACKS
from engine.verdict import LAUNCHED, Verdict
from launch.policy import Said

HEARD = (*ASKED, signal.SIGHUP)
KILL_SECONDS = 20.0


class Heard:
    """Context that takes this process's signals: `stop` asks for a saved end, `now` (a second Ctrl-C) for one
    at once."""

    def __init__(self) -> None:
        self.stop, self.now = False, False
        self._interrupts = 0

    def __enter__(self) -> Heard:
        taken = [n for n in HEARD if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]  # nohup
        self._before = {number: signal.signal(number, self._note) for number in taken}
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ASKED)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        self.stop = True
        self._interrupts += number == signal.SIGINT
        self.now = self._interrupts > 1


class Workers:
    """A command and every process below it. A context manager: none of them outlives it.

    Processes are known by their environment, which names this launch's own file, whatever session they have
    opened and whoever has adopted them.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="medfm-", ignore_cleanup_errors=True)
        self._file = Path(self._folder.name) / "verdicts.jsonl"
        self._file.touch()
        self._oom_kills = oom_kills()
        inherited = {**environment, LAUNCHED: str(self._file), PARENT: str(os.getpid())}
        # What starts with these signals blocked loses none before it can listen (engine.signals). A session
        # of its own: Ctrl-C in the terminal reaches the launcher alone.
        with _blocked():
            self._child = subprocess.Popen(command, env=inherited, start_new_session=True)
        self._single = "launch.elastic" not in command
        self._most, self._looked = 0, 0.0

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        with suppress(subprocess.TimeoutExpired):
            self._child.wait(timeout=KILL_SECONDS)
        self._folder.cleanup()

    @property
    def running(self) -> bool:
        """Whether the command runs; it ends after its workers."""
        return self._child.poll() is None

    @property
    def oom_killed(self) -> bool:
        """Whether the kernel has ended a process for lack of memory since the start."""
        return oom_kills() > self._oom_kills

    def said(self) -> list[Said]:
        """The verdicts and exit codes so far, oldest first."""
        found = []
        for line in self._file.read_text(encoding="utf-8").splitlines():
            with suppress(ValueError, TypeError, KeyError):
                found.append(said_from(json.loads(line)))
        if self._single and (code := self._child.poll()):
            found.append(Said(0, code=code))
        return found

    def one_gone(self) -> bool:
        """Whether a worker under torchrun has ended while others live; looks once a second."""
        if self._single or time.monotonic() - self._looked < 1.0:
            return False
        self._looked = time.monotonic()
        with suppress(psutil.NoSuchProcess):
            alive = [p for p in psutil.Process(self._child.pid).children() if _lives(p)]
            self._most = max(self._most, len(alive))
            return 0 < len(alive) < self._most
        return False

    def stop(self) -> None:
        """Ask for a saved end."""
        with suppress(ProcessLookupError):
            self._child.send_signal(signal.SIGTERM)

    def write_stacks(self) -> None:
        """Have every process write the stacks of its threads where it can."""
        self._send(STACKS)

    def kill(self) -> None:
        """End every process now, stopped ones too. One that waits for a vanished disk cannot end and is
        left."""
        end = time.monotonic() + KILL_SECONDS
        while self._send(signal.SIGKILL) and time.monotonic() < end:
            time.sleep(0.05)

    def _send(self, number: signal.Signals) -> int:
        marked = f"{LAUNCHED}={self._file}".encode()
        count = 0
        for entry in os.scandir("/proc"):
            if not entry.name.isdigit() or int(entry.name) == os.getpid():
                continue
            with suppress(OSError):
                if marked in Path(entry.path, "environ").read_bytes().split(b"\0"):
                    os.kill(int(entry.name), number)
                    count += 1
        return count


def said_from(line: Mapping[str, object]) -> Said:
    """A line of a launch's file. Raises ValueError, TypeError or KeyError for any other."""
    verdict = line.get("verdict")
    return Said(
        int(str(line["rank"])),
        Verdict(**verdict) if isinstance(verdict, dict) else None,
        int(str(line.get("code", 0))),
    )


def oom_kills() -> int:
    """Processes that the kernel has ended for lack of memory, in this control group or, where it does not
    say, on this machine."""
    for file in (*_control_group(), Path("/proc/vmstat")):
        with suppress(OSError, ValueError, IndexError):
            for line in file.read_text(encoding="ascii").splitlines():
                if line.startswith("oom_kill "):
                    return int(line.split()[1])
    return 0


def _control_group() -> Iterator[Path]:
    with suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers:
                yield Path(f"/sys/fs/cgroup{path}/memory.events")
            elif "memory" in controllers.split(","):
                yield Path(f"/sys/fs/cgroup/memory{path}/memory.oom_control")


@contextmanager
def _blocked() -> Iterator[None]:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {*ASKED, STACKS})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _lives(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    return False
