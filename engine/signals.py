"""Signals that ask for a saved end. The handler sets a flag; the ranks agree on it at the next update."""

from __future__ import annotations

import os
import signal
from types import FrameType

LOADER_GRACE = (
    20.0  # seconds a loader process lives on after SIGTERM, so that the update under way gets its data
)
ASKED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopRequest:
    """Context that turns SIGTERM, SIGUSR1 and SIGINT into `asked`; a second SIGINT interrupts at once.

    Loader processes forked inside the context inherit the handler. A signal sent to the whole process group
    must not take the data away from under the update that ends in the save, so they ignore it, but for
    SIGTERM only a short while.
    """

    def __init__(self) -> None:
        self.name = ""
        self._owner = os.getpid()
        self._before: dict[signal.Signals, object] = {}

    @property
    def asked(self) -> bool:
        """True once a signal has come."""
        return bool(self.name)

    def __enter__(self) -> StopRequest:
        for number in ASKED:
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _note(self, number: int, _: FrameType | None) -> None:
        if os.getpid() != self._owner:
            if number == signal.SIGTERM:
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                signal.setitimer(signal.ITIMER_REAL, LOADER_GRACE)
            return
        if self.name and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.name = signal.Signals(number).name
