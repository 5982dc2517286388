"""Ends a run that has stopped moving, so that it can be started again."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from pathlib import Path

from engine.verdict import EXIT_CODES, Verdict, write_verdict


class Watchdog:
    """A thread that, after `minutes` without a beat, prints every thread's stack, writes the verdict `hung`
    and ends the process.

    Args:
        run: run folder for the verdict.
        minutes: patience; 0 switches the watchdog off.
        attempt: number of this launch.
    """

    def __init__(self, run: Path, minutes: float, attempt: int) -> None:
        self.run, self.seconds, self.attempt = run, minutes * 60.0, attempt
        self.update, self._last = 0, time.monotonic()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        if self.seconds > 0:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()

    def beat(self, update: int) -> None:
        """The run has moved."""
        self.update, self._last = update, time.monotonic()

    def _watch(self) -> None:
        while not self._over.wait(min(5.0, self.seconds / 4)):
            if time.monotonic() - self._last > self.seconds:
                faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
                text = f"no update for {self.seconds / 60:g} minutes; its stacks are in the error output"
                write_verdict(self.run, Verdict("hung", self.update, self.attempt, text))
                os._exit(EXIT_CODES["hung"])
