"""Batches on their way to the device."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor


class Batches:
    """A task's batches on the device; on CUDA the next one is copied while the device computes.

    On the CPU batches pass through as they are. On CUDA `look_ahead`, called once the work of a micro-step
    is queued, draws the next batch, pins it and queues its copy on a stream of its own; `take` lets the
    device, not the host, wait for that copy.
    """

    def __init__(self, source: Iterator[Any], device: torch.device) -> None:
        self.source, self.device = source, device
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._ahead: list[Any] = []
        self._waited = 0.0

    def take(self) -> Any:
        """The next batch."""
        if self._copies is None:
            return self._draw()
        if not self._ahead:
            self.look_ahead()
        batch = self._ahead.pop()
        compute = torch.cuda.current_stream(self.device)
        compute.wait_stream(self._copies)
        # The memory belongs to the copying stream: it may be used again only after what is queued here.
        map_tensors(lambda t: t.record_stream(compute), batch)
        return batch

    def look_ahead(self) -> None:
        """Fetch the next batch and begin to copy it; nothing on the CPU."""
        if self._copies is None:
            return
        pinned = map_tensors(Tensor.pin_memory, self._draw())
        with torch.cuda.stream(self._copies):
            self._ahead.append(map_tensors(lambda t: t.to(self.device, non_blocking=True), pinned))

    def seconds_waited(self) -> float:
        """Seconds the host has waited for the source since the last call."""
        waited, self._waited = self._waited, 0.0
        return waited

    def close(self) -> None:
        """End the source and its workers; batches that were drawn ahead are forgotten."""
        self._ahead.clear()
        close = getattr(self.source, "close", None)
        if callable(close):
            close()

    def _draw(self) -> Any:
        asked = time.perf_counter()
        batch = next(self.source)
        self._waited += time.perf_counter() - asked
        return batch


def map_tensors(function: Callable[[Tensor], Any], batch: Any) -> Any:
    """The batch with every tensor replaced by `function(tensor)`; a batch is a tensor, a mapping, a sequence,
    a named tuple or a dataclass of such, and whatever else it holds stays."""
    if isinstance(batch, Tensor):
        return function(batch)
    if isinstance(batch, Mapping):
        return {key: map_tensors(function, value) for key, value in batch.items()}
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        fields = [f.name for f in dataclasses.fields(batch) if f.init]
        return dataclasses.replace(
            batch, **{name: map_tensors(function, getattr(batch, name)) for name in fields}
        )
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(map_tensors(function, value) for value in batch))
    if isinstance(batch, list | tuple):
        return type(batch)(map_tensors(function, value) for value in batch)
    return batch
