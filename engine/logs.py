"""What a run says: lines for people and programs, figures for trackers, the console of rank 0.

    RUN/logs/rank-000.jsonl   what each rank did: a line for every update, for every event, and every ten
                              seconds one that says that the process is alive
    RUN/metrics.jsonl         figures of updates, means over all ranks since the last line
    RUN/tensorboard, ...      the same for people to look at (`engine.trackers`)

All of it is written by threads. A disk that is full, slow or gone, a server that does not answer, a terminal
that is stopped: none of them makes training wait or fail. `medfm status` reads the files again.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil
import torch
from pydantic import BaseModel

from engine.background import Appended, Background, deliver_lines
from engine.console import Console, Shown
from engine.distributed import World
from engine.recipe import EngineConfig
from engine.task import Writer
from engine.trackers import Trackers, check_installed
from engine.verdict import write_text

ALIVE_SECONDS = 10.0  # between lines of a process that say so
MOST_WAITING = 32 << 20  # bytes of lines kept in memory for a disk that does not take them
CLOSE_SECONDS = 5.0  # for the last lines of each file at the end


class SilentWriter:
    """Stands in for the trackers on the other ranks."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
        """Nothing."""

    def add_image(self, tag: str, img_tensor: Any, global_step: int, *, dataformats: str = "CHW") -> None:
        """Nothing."""

    def add_figure(self, tag: str, figure: Any, global_step: int) -> None:
        """Nothing."""


class Logs:
    """The logs of one rank: a context that writes from entry to exit; what is given before waits for it.

    Args:
        run: run folder, which must exist.
        world: this process among all.
        config: total of updates and trackers.
        attempt: number of the launch.
        start: update it begins at; figures of later ones are of launches that got further without saving.
        rollbacks: how often the run has gone back before.
        recipe: shown by trackers.

    Attributes:
        writer: trackers on rank 0, silent elsewhere.

    Raises:
        UserError: the package of a tracker is missing.
    """

    def __init__(
        self,
        run: Path,
        world: World,
        config: EngineConfig,
        *,
        attempt: int = 0,
        start: int = 0,
        rollbacks: int = 0,
        recipe: BaseModel | None = None,
    ) -> None:
        check_installed(config.trackers)
        self.run, self.world, self.attempt, self.update = run, world, attempt, start
        self.writer: Writer = SilentWriter()
        self._process = psutil.Process()
        self._alive_due = 0.0
        self._troubled: set[str] = set()
        self._lock = threading.Lock()
        file = Appended(run / "logs" / f"rank-{world.rank:03d}.jsonl")
        self._append = deliver_lines(file)
        self._lines = Background(str(file.path), self._deliver, self._tell, len, MOST_WAITING, file.close)
        self._first: _First | None = None
        if world.rank == 0:
            fields = recipe.model_dump(mode="json") if recipe is not None else {}
            self._first = _First(run, config, start, fields, self._tell)
            self.writer = self._first.trackers
            self.back_to(start, rollbacks=rollbacks)

    def __enter__(self) -> Logs:
        for thread in self._threads():
            thread.start()
        return self

    def __exit__(self, error: type[BaseException] | None, *_: BaseException | TracebackType | None) -> None:
        if self._first is not None:
            for name in self._first.trackers.close(failed=error is not None):
                self.say(f"{name} did not take its last entries; they are lost")
            for thread in (self._first.metrics, self._first.records):
                if not thread.close(CLOSE_SECONDS):
                    self.say(f"{thread.name}: the last lines could not be written and are lost")
        whole = self._lines.close(CLOSE_SECONDS)
        if self._first is not None:
            if not whole:
                self._first.console.put(f"{self._lines.name}: the last lines are lost")
            self._first.console.close(CLOSE_SECONDS)

    def event(self, kind: str, **fields: Any) -> None:
        """One line in this rank's own log."""
        self._lines.put(_line({"time": round(time.time(), 3), "event": kind, **fields}))

    def step(
        self,
        update: int,
        position: int,
        seconds: float,
        *,
        own: float = 0.0,
        waited: float = 0.0,
        stall: float = 0.0,
        applied: bool = True,
    ) -> None:
        """One update, on every rank.

        Args:
            update: updates applied, this one included.
            position: whose data it took.
            seconds: of the whole update on this rank.
            own: of these, in which it cannot have waited for another rank: data and forward passes.
            waited: of these, for data.
            stall: of these, for a checkpoint.
            applied: False where it was skipped.
        """
        self.update = update
        fields: dict[str, Any] = {"update": update, "position": position}
        times = {"seconds": seconds, "own": own, "waited": waited, "stall": stall}
        fields |= {name: round(value, 4) for name, value in times.items() if value or name == "seconds"}
        self.event("step", **fields, **({} if applied else {"skipped": True}))
        if self._first is not None:
            self._first.console.put(Shown(update))

    def say(self, text: str) -> None:
        """One line for people, from rank 0, and an event on every rank."""
        self.event("message", text=text)
        if self._first is not None:
            self._first.console.put(text)

    def scalars(self, update: int, values: Mapping[str, float], show: bool = True) -> None:
        """Figures of one update to RUN/metrics.jsonl and the trackers; `show` puts the main ones on the
        console. Only rank 0's count."""
        if self._first is None:
            return
        values = dict(values)
        self._first.metrics.put(_line({"update": update, **values}))
        self._first.trackers.scalars(values, update)
        if show:
            self._first.console.put(Shown(update, values))

    def record(self, name: str, row: Mapping[str, Any]) -> None:
        """One JSON line, with the time, to RUN/`name`; from rank 0."""
        if self._first is not None:
            self._first.records.put((name, _line({"time": round(time.time(), 3), **row})))

    def back_to(self, update: int, undone: int = 0, rollbacks: int = 0) -> None:
        """The run goes on from here: figures of later updates are forgotten, since they are made again.

        undone: the last update that a rollback undid, of `rollbacks` so far; 0 where a launch repeats updates
        of the one before. Trackers that cannot forget tell later figures from undone ones by these.
        """
        self.update = update
        if self._first is not None:
            self._first.metrics.put(update)
            self._first.trackers.back_to(update, undone, rollbacks)

    def flush(self, seconds: float) -> bool:
        """Wait, at most so long, until what was logged is on disk; says whether it is."""
        end = time.monotonic() + seconds
        remote = ("wandb", "mlflow")
        files = [thread for thread in self._threads() if thread.name not in remote]
        flushed = [file.flush(max(0.0, end - time.monotonic())) for file in files]
        return all(flushed)

    def _threads(self) -> list[Background[Any]]:
        return [self._lines, *(self._first.threads() if self._first is not None else ())]

    def _deliver(self, pending: deque[bytes]) -> None:
        """The lines, and now and then one that says that this process is alive, even where training hangs."""
        if time.monotonic() >= self._alive_due:
            self._alive_due = time.monotonic() + ALIVE_SECONDS
            pending.append(_line(self._alive()))
        self._append(pending)

    def _tell(self, name: str, trouble: str) -> None:
        """Say it when the first of the logs cannot be written, and when all can be again."""
        with self._lock:
            before = bool(self._troubled)
            (self._troubled.add if trouble else self._troubled.discard)(name)
            after = bool(self._troubled)
        if after and not before:
            self.say(f"{name} cannot be written ({trouble}); training goes on, and it is tried again")
        elif before and not after:
            lost = sum(thread.lost for thread in self._threads())
            self.say("logs are written again" + (f"; {lost} entries did not fit in memory" if lost else ""))

    def _alive(self) -> dict[str, Any]:
        memory = {"host_mib": self._process.memory_info().rss >> 20}
        if self.world.device.type == "cuda":
            memory["device_mib"] = torch.cuda.memory_allocated(self.world.device) >> 20
            memory["device_peak_mib"] = torch.cuda.max_memory_allocated(self.world.device) >> 20
        return {
            "time": round(time.time(), 3),
            "event": "alive",
            "attempt": self.attempt,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "born": round(self._process.create_time(), 2),
            "world": self.world.size,
            "update": self.update,
            **memory,
        }


_Row = bytes | int


class _First:
    """What rank 0 alone writes."""

    def __init__(
        self,
        run: Path,
        config: EngineConfig,
        start: int,
        recipe: Mapping[str, Any],
        tell: Callable[[str, str], None],
    ) -> None:
        file, console = MetricsFile(run / "metrics.jsonl"), Console(config.updates, start)
        self.metrics: Background[_Row] = Background(
            str(file.path), file.deliver, tell, _weigh_row, MOST_WAITING, file.close
        )
        self.records: Background[tuple[str, bytes]] = Background(
            f"{run}", _RecordFiles(run).deliver, tell, lambda item: len(item[1]), MOST_WAITING
        )
        self.console: Background[str | Shown] = Background(
            "console", console.deliver, lambda *_: None, lambda _: 200, MOST_WAITING, console.close
        )
        self.trackers = Trackers(config.trackers, run, config.tracker_project, recipe, tell)

    def threads(self) -> list[Background[Any]]:
        return [self.metrics, self.records, self.console, *self.trackers.threads.values()]


class _RecordFiles:
    """Lines for files in a folder, by name."""

    def __init__(self, run: Path) -> None:
        self._run = run
        self._files: dict[str, Appended] = {}

    def deliver(self, pending: deque[tuple[str, bytes]]) -> None:
        while pending:
            name, line = pending[0]
            self._files.setdefault(name, Appended(self._run / name)).write(line)
            pending.popleft()


class MetricsFile:
    """RUN/metrics.jsonl: takes lines, and the number of an update after which all lines are to go."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = Appended(path)
        self.close: Callable[[], None] = self._file.close

    def deliver(self, pending: deque[_Row]) -> None:
        """For `Background`."""
        while pending:
            row = pending[0]
            if isinstance(row, bytes):
                self._file.write(row)
            else:
                self._cut(row)
            pending.popleft()

    def _cut(self, update: int) -> None:
        if self.path.exists():
            rows = self.path.read_text(encoding="utf-8", errors="replace").splitlines()
            kept = [row for row in rows if _update_of(row) <= update]
            if len(kept) < len(rows):
                write_text(self.path, "".join(f"{row}\n" for row in kept))


def _line(fields: Mapping[str, Any]) -> bytes:
    return json.dumps(fields, separators=(",", ":"), default=str).encode() + b"\n"


def _weigh_row(row: _Row) -> int:
    return len(row) if isinstance(row, bytes) else 8


def _update_of(row: str) -> float:
    try:
        return float(json.loads(row)["update"])
    except (ValueError, KeyError, TypeError):
        return float("inf")  # a line cut off by a kill
