"""Ends a run that has stopped moving, so that it can be started again, and leaves its threads' stacks."""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import threading
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from engine.signals import STACKS
from engine.verdict import EXIT_CODES, Verdict, tell_launcher, write_verdict

LEAVE_SECONDS = 5.0
"""Between the stacks and the end: the other ranks, which noticed at about the same time, write theirs."""
BACKSTOP_SECONDS = 60.0


class Watchdog:
    """A thread that, after `minutes` without a beat, writes every thread's stack to
    RUN/logs/rank-000.stacks.txt, gives the verdict `hung` and ends the process.

    The file is opened at the start, since a storage that hangs may be the cause. Time in which this process
    was itself stopped does not count, up to `minutes` and one more at a time. SIGUSR2 has the stacks written
    at any time, from whatever the process is stuck in; so does a thread of the C library where Python cannot
    run at all, which then ends the process.

    Args:
        run: run folder.
        minutes: patience; 0 never ends the process.
        attempt: number of this launch.
        rank: of this process, names its file.
    """

    def __init__(self, run: Path, minutes: float, attempt: int, rank: int = 0) -> None:
        self.run, self.seconds, self.attempt = run, minutes * 60.0, attempt
        self.update = 0
        self._file = run / "logs" / f"rank-{rank:03d}.stacks.txt"
        self._stacks: TextIO = sys.stderr
        self._quiet = 0.0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            self._stacks = open(self._file, "a", buffering=1, encoding="utf-8")
        except OSError as error:
            with suppress(OSError):  # that output may lie on the same disk
                print(f"medfm: stacks go to the error output: {error}", file=sys.stderr, flush=True)
        faulthandler.register(STACKS, file=self._stacks, all_threads=True)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {STACKS})
        if self.seconds > 0:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()
        faulthandler.cancel_dump_traceback_later()
        faulthandler.unregister(STACKS)
        signal.signal(STACKS, signal.SIG_IGN)  # one that comes late must not end the process
        if self._stacks is not sys.stderr:
            self._stacks.close()

    def beat(self, update: int | None = None) -> None:
        """The run has moved; `update` where another update is done."""
        self._quiet = 0.0
        if update is not None:
            self.update = update

    def write_stacks(self, why: str, error: BaseException | None = None) -> None:
        """Write the stacks of all threads, and the traceback of `error`, to this rank's own file."""
        try:
            when = time.strftime("%Y-%m-%d %H:%M:%S")
            self._stacks.write(f"\n{when} attempt {self.attempt} update {self.update}: {why}\n")
            if error is not None:
                self._stacks.write("".join(traceback.format_exception(error)))
            faulthandler.dump_traceback(file=self._stacks, all_threads=True)
        except (OSError, ValueError):
            faulthandler.dump_traceback(file=sys.stderr, all_threads=True)

    def _watch(self) -> None:
        step = min(5.0, self.seconds / 4)
        while not self._over.is_set():
            faulthandler.dump_traceback_later(self.seconds + BACKSTOP_SECONDS, exit=True, file=self._stacks)
            before = time.monotonic()
            if self._over.wait(step):
                return
            self._quiet += min(time.monotonic() - before, 2 * step)
            if self._quiet > self.seconds:
                self._leave()

    def _leave(self) -> None:
        text = f"no update for {self.seconds / 60:g} minutes; stacks are in {self._file}"
        verdict = Verdict("hung", self.update, self.attempt, text)
        tell_launcher(verdict)
        # In a thread: where the storage hangs, the process ends all the same.
        threading.Thread(target=self._last_words, args=(verdict,), daemon=True).start()
        time.sleep(LEAVE_SECONDS)
        os._exit(EXIT_CODES["hung"])

    def _last_words(self, verdict: Verdict) -> None:
        self.write_stacks(verdict.message)
        write_verdict(self.run, verdict)
