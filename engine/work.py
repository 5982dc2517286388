"""Work done in a thread beside training, on the processors that training leaves idle."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from contextlib import suppress

NICENESS = 10


class Work:
    """A function that runs in a thread of low priority, and how it ended.

    The thread does not keep the process alive: one that waits for a vanished storage never ends.

    Args:
        body: the function; None where there is nothing to run because of `error`.
        error: how it ended before it began.

    Attributes:
        error: what the function raised, None while it runs and where it ended well.
        ended: set once it has ended.
    """

    def __init__(self, body: Callable[[], None] | None, error: BaseException | None = None) -> None:
        self.error, self.ended = error, threading.Event()
        if body is not None:
            try:
                threading.Thread(target=self._run, args=(body,), name="saver", daemon=True).start()
                return
            except RuntimeError as refused:  # the system has no more threads
                self.error = refused
        self.ended.set()

    @property
    def running(self) -> bool:
        """Neither ended nor failed so far."""
        return not self.ended.is_set()

    def _run(self, body: Callable[[], None]) -> None:
        if sys.platform == "linux":  # where priority is a thread's, not the process's
            with suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
        try:
            body()
        except BaseException as error:
            self.error = error
        finally:
            self.ended.set()
