"""Signals that ask for a saved end, and the one that asks for nothing: the death of the launcher.

The handler sets a flag; the ranks agree on it at the next update. A launcher starts its workers with these
signals blocked, so that one that comes before Python could listen is not lost but waits.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import sys
from types import FrameType
from typing import ClassVar

ASKED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
STACKS = signal.SIGUSR2
"""Has a worker write the stacks of its threads; see `engine.watchdog`."""

PARENT = "MEDFM_PARENT"
"""In the environment: the process whose death ends this one."""

LOADER_GRACE = 60.0
"""Seconds a loader process lives on after SIGTERM, so that the update under way gets its data."""

_PR_SET_PDEATHSIG = 1


class Stopped(BaseException):
    """A signal asked for the end before there was anything to save."""


class StopRequest:
    """Context that turns SIGTERM, SIGUSR1 and SIGINT into `asked`; a second SIGINT interrupts at once.

    Contexts nest: the inner one also knows what the outer one has heard. Loader processes forked inside pass
    the signal on to their owner and live on, since a scheduler signals every process of a job and the update
    that ends in the save still needs its data.

    Args:
        at_once: the first signal raises `Stopped`: while a process starts there is nothing to save.
    """

    _current: ClassVar[StopRequest | None] = None

    def __init__(self, at_once: bool = False) -> None:
        self.name = ""
        self._at_once = at_once
        self._owner = os.getpid()
        self._listening = mmap.mmap(-1, 1)  # shared with the processes forked inside
        self._outer: StopRequest | None = None
        self._before: dict[signal.Signals, object] = {}

    @property
    def asked(self) -> bool:
        """True once a signal has come."""
        return bool(self.name)

    def __enter__(self) -> StopRequest:
        self._outer, StopRequest._current = StopRequest._current, self
        if self._outer is not None:
            self.name = self._outer.name
        self._listening[0] = 1
        for number in ASKED:
            self._before[number] = signal.signal(number, self._note)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ASKED)
        return self

    def __exit__(self, *_: object) -> None:
        self._listening[0] = 0
        StopRequest._current = self._outer
        if self._outer is not None and not self._outer.name:
            self._outer.name = self.name
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _note(self, number: int, _: FrameType | None) -> None:
        if os.getpid() != self._owner:
            self._pass_on(number)
            return
        again = self.asked
        self.name = self.name or signal.Signals(number).name
        if again and number == signal.SIGINT:
            raise KeyboardInterrupt
        if self._at_once and not again:
            raise Stopped(self.name)

    def _pass_on(self, number: int) -> None:
        """In a forked process: tell the owner, who alone decides."""
        if number == signal.SIGINT:
            return  # the terminal has sent it to the owner, too
        if self._listening[0] and os.getppid() == self._owner:
            os.kill(self._owner, number)
        if number == signal.SIGTERM and not any(signal.getitimer(signal.ITIMER_REAL)):
            signal.setitimer(signal.ITIMER_REAL, LOADER_GRACE)


def die_with_parent() -> None:
    """Ask the kernel for SIGKILL when the process dies that started this one (Linux): none trains on alone.

    Only below a launcher or torchrun. The wish is tied to the thread that started this process.
    """
    parent = os.environ.get(PARENT)
    if sys.platform != "linux" or (parent is None and "TORCHELASTIC_RUN_ID" not in os.environ):
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    orphan = os.getppid() == 1 if parent is None else os.getppid() != int(parent)
    if orphan:  # it had died before the wish was made
        os.kill(os.getpid(), signal.SIGKILL)
