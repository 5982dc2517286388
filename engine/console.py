"""What rank 0 says on the console: lines, and on a terminal a bar with the time left."""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TextIO

RECENT = 200  # updates whose pace tells the time left


@dataclass(frozen=True)
class Shown:
    """Update `update` is done; `values`, where there are any, are its main figures."""

    update: int
    values: Mapping[str, float] = field(default_factory=dict)
    time: float = field(default_factory=time.monotonic)


class Console:
    """Takes lines and `Shown`; called in a thread of its own, since a terminal may be stopped and a file that
    output goes to may lie on a full disk. What cannot be written is dropped: it stands in the logs."""

    def __init__(self, total: int, start: int) -> None:
        self.total = total
        self._pace: deque[tuple[float, int]] = deque(maxlen=RECENT)
        self._out = _Output(sys.stdout)
        self._bar: Any = None
        if self._out.isatty():
            self._open_bar(start)

    def deliver(self, pending: deque[str | Shown]) -> None:
        """For `Background`."""
        latest: Shown | None = None
        while pending:
            entry = pending.popleft()
            if isinstance(entry, str):
                self._line(entry)
                continue
            latest = entry
            self._pace.append((entry.time, entry.update))
            if entry.values:
                self._show(entry)
        if self._bar is not None and latest is not None:
            self._bar.update(self._task, completed=latest.update, left=self._left())
            self._bar.refresh()

    def close(self) -> None:
        """Leave the bar as it is."""
        if self._bar is not None:
            self._bar.stop()

    def _line(self, text: str) -> None:
        if self._bar is not None:
            self._bar.console.print(text, highlight=False, markup=False)
        else:
            self._out.write(text + "\n")

    def _show(self, entry: Shown) -> None:
        if self._bar is not None:
            self._bar.update(self._task, text=short(entry.values))
        else:
            figures = short(entry.values)
            self._line(f"update {entry.update}/{self.total}  {figures}  {self._left()} left")

    def _left(self) -> str:
        """Time to the end of the run at the pace of the last updates, whatever else they waited for."""
        (begun, first), (now, last) = self._pace[0], self._pace[-1]
        return clock((now - begun) / (last - first) * (self.total - last)) if last > first else "?"

    def _open_bar(self, start: int) -> None:
        from rich.console import Console as RichConsole
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        columns = (
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[text]}"),
            TextColumn("{task.fields[left]} left"),
        )
        # Redrawn by us alone: its own thread would hold a lock while a stopped terminal makes it wait.
        terminal = RichConsole(file=self._out)  # type: ignore[arg-type]
        self._bar = Progress(*columns, console=terminal, auto_refresh=False, redirect_stdout=False)
        self._task = self._bar.add_task("updates", total=self.total, completed=start, text="", left="?")
        self._bar.start()


class _Output:
    """Standard output without a buffer: text that a full disk refuses would be tried again, with a
    traceback, when the interpreter ends."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.encoding = stream.encoding or "utf-8"
        self._handle = -1
        with suppress(OSError, ValueError):  # a stream that is no file, as in a notebook
            self._handle = stream.fileno()

    def write(self, text: str) -> int:
        if self._handle < 0:
            return self._stream.write(text)
        data = memoryview(text.encode(self.encoding, "replace"))
        with suppress(OSError):
            while data:
                data = data[os.write(self._handle, data) :]
        return len(text)

    def flush(self) -> None:
        if self._handle < 0:
            self._stream.flush()

    def isatty(self) -> bool:
        return self._stream.isatty()

    def fileno(self) -> int:
        return self._stream.fileno()


def short(values: Mapping[str, float]) -> str:
    """The main figures of an update in a few words."""
    losses = [name for name in values if name.startswith("loss")][:5]
    rest = [name for name in ("optim/lr", "rate/crops_per_s", "rate/mfu", "rate/data_wait") if name in values]
    return "  ".join(f"{name.rpartition('/')[2]} {values[name]:.4g}" for name in losses + rest)


def clock(seconds: float) -> str:
    """`1:02:03`, or `2:03` below an hour; days in front where there are any."""
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours // 24} days {hours % 24}:{minute:02d}:{second:02d}"
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"
