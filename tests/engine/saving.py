"""What the tests of saving share: ranks that are threads of one process, and a rank's part of a small
model."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine import checkpoint
from engine.distributed import World
from engine.recipe import EngineConfig
from engine.saver import Saver
from engine.verdict import read_attempt, write_text
from engine.zero_state import Slice

SHAPES = {"stem.weight": (3, 5), "norm.bias": (7,), "gate": (), "empty": (0, 4)}
CPU = torch.device("cpu")


class Meeting:
    """Where the threads that stand for ranks exchange values; one that is missing is an error, not a hang."""

    def __init__(self, size: int) -> None:
        self.barrier, self.slots = threading.Barrier(size, timeout=30), [""] * size

    def exchange(self, rank: int, value: Any) -> list[Any]:
        self.slots[rank] = json.dumps(value)
        self.barrier.wait()
        found = [json.loads(slot) for slot in self.slots]
        self.barrier.wait()
        return found


@dataclass(frozen=True)
class Rank(World):
    """A `World` of threads; needs no process group."""

    meeting: Meeting

    def sum(self, values: Sequence[Tensor | float]) -> list[float]:
        found = self.meeting.exchange(self.rank, [float(v) for v in values])
        return [sum(column) for column in zip(*found, strict=True)]

    def gather(self, value: Any) -> list[Any]:
        return self.meeting.exchange(self.rank, value)


def ranks(size: int) -> list[Rank]:
    meeting = Meeting(size)
    return [Rank(rank, size, rank, CPU, meeting) for rank in range(size)]


class Part:
    """A partition that owns `[low, high)` of every parameter's flat elements, as shares of 12ths."""

    def __init__(self, low: int = 0, high: int = 12, seed: float = 0.0, wide: int = 0) -> None:
        self.shapes = {**SHAPES, **({"wide": (wide,)} if wide else {})}
        self.whole = {
            n: [torch.arange(torch.Size(s).numel()).float() + seed + k for k in (0.0, 0.25, 0.5)]
            for n, s in self.shapes.items()
        }
        self.low, self.high = low, high

    def slices(self) -> Iterator[Slice]:
        for name, shape in self.shapes.items():
            total = torch.Size(shape).numel()
            start, end = total * self.low // 12, total * self.high // 12
            if start < end or (total == 0 and self.low == 0):
                views = [t[start:end] for t in self.whole[name]]
                yield Slice(name, shape, start, end - start, *views)

    def train(self) -> None:
        """What an update does: other values in the same memory."""
        for tensors in self.whole.values():
            for tensor in tensors:
                tensor += 100


@dataclass
class Notes:
    """`Logs` that remembers."""

    said: list[str] = field(default_factory=list)
    events: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    scalars_of: dict[int, dict[str, float]] = field(default_factory=dict)

    def say(self, text: str) -> None:
        self.said.append(text)

    def event(self, kind: str, **fields: Any) -> None:
        self.events.append((kind, fields))

    def flush(self, seconds: float) -> bool:
        return True

    def scalars(self, update: int, values: Mapping[str, float], show: bool = True) -> None:
        self.scalars_of.setdefault(update, {}).update(values)


def write_plan(state: Mapping[str, Tensor], folder: Path) -> None:
    """An export for use."""
    (folder / "plan.json").write_text("{}")


def begin_launch(run: Path) -> int:
    """What the engine does when it opens a run folder; returns the number of the launch."""
    attempt = read_attempt(run) + 1
    write_text(run / "attempt", f"{attempt}\n")
    checkpoint.tidy(run)
    return attempt


def saver(
    run: Path,
    part: Part | None = None,
    rank: World | None = None,
    export: Callable[[Mapping[str, Tensor], Path], None] = write_plan,
    attempt: int = 1,
    keep: Callable[[int, int], bool] = lambda update, newest: False,
    **config: Any,
) -> Saver:
    mean = {"mean|buffer": torch.tensor([1.5, 2.5], dtype=torch.float64)}
    settings = EngineConfig(**{"save_minutes": 0.0, "keep_last": 2, **config})
    world = rank or ranks(1)[0]
    notes: Any = Notes()
    partition: Any = part or Part()
    return Saver(run, world, attempt, partition, lambda: mean, export, settings, notes, keep)


def state(update: int) -> dict[str, Any]:
    return {"update": update, "position": update + 1}


def turn(saver: Saver) -> None:
    """What an update does for the saver."""
    saver.hear(saver.world.sum(saver.progress()))


def store(run: Path, update: int, attempt: int = 1, seed: float = 0.0, **config: Any) -> Path:
    """A checkpoint of one rank; fails the test where it cannot be saved."""
    why = saver(run, Part(seed=seed), attempt=attempt, **config).settle(state(update))
    assert not why, why
    return checkpoint.folder_of(run, update)


def kept(run: Path) -> list[str]:
    """Everything in the checkpoint folder, by name."""
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def settle_all(savers: Sequence[Saver], update: int) -> list[Any]:
    """The last save of several ranks."""

    def work(one: Saver) -> Callable[[], str]:
        return lambda: one.settle(state(update))

    return together([work(one) for one in savers])


def together(work: Sequence[Callable[[], Any]]) -> list[Any]:
    """Do the work of every rank at once; returns what each gave, or the exception it ended with."""
    results: list[Any] = [None] * len(work)

    def run(rank: int) -> None:
        try:
            results[rank] = work[rank]()
        except BaseException as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(len(work))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return results
