"""What a run says: TensorBoard, JSON lines, and progress on the console of rank 0."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from engine.distributed import World
from engine.verdict import write_text


class SilentWriter:
    """Stands in for TensorBoard on the other ranks."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *_, **__: None


class Logs:
    """Opens every log of a rank on entry and closes them on exit.

    Attributes:
        writer: TensorBoard's `SummaryWriter` in RUN/tensorboard on rank 0, silent elsewhere.
    """

    def __init__(self, run: Path, world: World, total: int, start: int) -> None:
        self.run, self.world, self.total, self.start = run, world, total, start
        self.writer: Any = SilentWriter()
        self._begun = time.monotonic()
        self._progress: Any = None
        self._metrics: TextIO | None = None

    def __enter__(self) -> Logs:
        (self.run / "logs").mkdir(parents=True, exist_ok=True)
        self._events = open(self.run / "logs" / f"rank-{self.world.rank:03d}.jsonl", "a", encoding="utf-8")
        if self.world.rank == 0:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(self.run / "tensorboard"), purge_step=self.start + 1)
            self._metrics = _open_metrics(self.run / "metrics.jsonl", self.start)
            self._open_progress()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        if self._progress is not None:
            self._progress.stop()
        if self.world.rank == 0:
            self.writer.close()
        if self._metrics is not None:
            self._metrics.close()
        self._events.close()

    def event(self, kind: str, **fields: Any) -> None:
        """One line in this rank's own log."""
        self._events.write(json.dumps({"time": round(time.time(), 3), "event": kind, **fields}) + "\n")
        self._events.flush()

    def say(self, text: str) -> None:
        """One line for people, from rank 0, and an event on every rank."""
        self.event("message", text=text)
        if self.world.rank == 0:
            if self._progress is not None:
                self._progress.console.print(text, highlight=False, markup=False)
            else:
                print(text, flush=True)

    def advance(self, update: int) -> None:
        """Move the progress bar."""
        if self._progress is not None:
            self._progress.update(self._bar, completed=update)

    def scalars(self, update: int, values: Mapping[str, float], show: bool = True) -> None:
        """Scalars of one update to TensorBoard and RUN/metrics.jsonl; `show` puts the main ones on the
        console."""
        if self.world.rank != 0 or self._metrics is None:
            return
        for name, value in values.items():
            self.writer.add_scalar(tag(name), value, update)
        self._metrics.write(json.dumps({"update": update, **values}) + "\n")
        self._metrics.flush()
        if not show:
            return
        if self._progress is not None:
            self._progress.update(self._bar, completed=update, text=_short(values))
        else:
            left = (time.monotonic() - self._begun) / max(1, update - self.start) * (self.total - update)
            print(f"update {update}/{self.total}  {_short(values)}  {_clock(left)} left", flush=True)

    def _open_progress(self) -> None:
        if not sys.stdout.isatty():
            return
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[text]}"),
            TimeRemainingColumn(),
        )
        self._progress = Progress(*columns, refresh_per_second=2)
        self._bar = self._progress.add_task("updates", total=self.total, completed=self.start, text="")
        self._progress.start()


def tag(name: str) -> str:
    """A scalar's name in TensorBoard, which groups by what stands before the first slash.

    `evaluate/val/CT` is `val/CT` there: with several groups of figures an evaluation would be a hundred cards
    in one group.
    """
    own = name.removeprefix("evaluate/")
    return own if "/" in own else name


def _open_metrics(path: Path, start: int) -> TextIO:
    """Open the file for appending without the updates after `start`: a resumed run makes those again."""
    if path.exists():
        rows = path.read_text(encoding="utf-8").splitlines()
        write_text(path, "".join(f"{row}\n" for row in rows if _update_of(row) <= start))
    return open(path, "a", encoding="utf-8")


def _update_of(row: str) -> float:
    try:
        return float(json.loads(row)["update"])
    except (ValueError, KeyError, TypeError):
        return float("inf")  # a line cut off by a kill


def _short(values: Mapping[str, float]) -> str:
    losses = [name for name in values if name.startswith("loss")][:5]
    rates = [name for name in values if name.startswith(("rate/", "optim/lr"))]
    return "  ".join(f"{name.rpartition('/')[2]} {values[name]:.4g}" for name in losses + rates)


def _clock(seconds: float) -> str:
    minutes, second = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{second:02d}" if minutes >= 60 else f"{minutes}:{second:02d}"
