"""Signals that ask for a saved end. The handler sets a flag; the ranks agree on it at the next update."""

from __future__ import annotations

import signal
from types import FrameType

ASKED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopRequest:
    """Context that turns SIGTERM, SIGUSR1 and SIGINT into `asked`; a second SIGINT interrupts at once.

    Loader processes forked inside the context inherit a handler that only sets their own flag, so a signal sent to the whole
    process group does not take the data away from under the save.
    """

    def __init__(self) -> None:
        self.name = ""
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
        if self.name and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.name = signal.Signals(number).name
