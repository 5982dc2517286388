"""The progress of a build: a bar with scans/s, MB/s and refusals on a terminal, else a line now and then."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any

EVERY_S = 30.0  # between two lines where there is no terminal


class Progress:
    """Shows one stage after another. Nothing is shown with `shown` False."""

    def __init__(self, shown: bool) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bars

        columns = (
            TextColumn("{task.description}"), BarColumn(16), MofNCompleteColumn(), TimeRemainingColumn(),
            TextColumn("{task.fields[rate]}"),
        )  # fmt: skip
        self._live = shown and sys.stdout.isatty()
        self._lines = shown and not self._live

        self._bars = Bars(*columns, disable=not self._live, transient=False)
        self._task: Any = None
        self._total: int | None = None

    def __enter__(self) -> Progress:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def stage(self, title: str, total: int | None = None, done: int = 0) -> None:
        """Begin a stage; `done` of its `total` steps were done by an earlier call."""
        if self._task is not None and self._total is None:
            self._bars.remove_task(self._task)
        self._task = self._bars.add_task(title, total=total, completed=done, rate="")
        self._title, self._total, self._start = title, total, done
        self._done, self._bytes, self._refused = done, 0, 0
        self._began = self._told = time.monotonic()
        if self._lines and total is None:
            print(f"{title} ...", flush=True)
        elif self._lines and done:
            print(f"{title}: {done}/{total} were done before", flush=True)

    def read(self, size: int, codes: Sequence[str]) -> None:
        """One scan of `size` bytes was read; `codes` of refusals."""
        self._done, self._bytes = self._done + 1, self._bytes + size
        self._refused += bool(codes)
        seconds = max(time.monotonic() - self._began, 1e-9)
        rate = (
            f"{(self._done - self._start) / seconds:.2f} scans/s {self._bytes / seconds / 1e6:.1f} MB/s "
            f"{self._refused} refused"
        )
        self._bars.update(self._task, completed=self._done, rate=rate)
        self._tell(rate)

    def count(self, done: int, total: int) -> None:
        """`done` of `total` steps."""
        self._done, self._total = done, total
        self._bars.update(self._task, completed=done, total=total)
        self._tell("")

    def _tell(self, rate: str) -> None:
        now = time.monotonic()
        if self._lines and (now - self._told > EVERY_S or self._done == self._total):
            self._told = now
            print(f"{self._title}: {self._done}/{self._total} {rate}".rstrip(), flush=True)
