"""What an update measured, summed over micro-steps, ranks and updates."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from engine import memory
from engine.task import Metrics

GIB = 2**30


class Sums:
    """One rank's metrics summed over the micro-steps of an update, without waiting for the device.

    Attributes:
        totals: name -> [sum, count]; each a 0-d float64 tensor on the device, or a number known to the host.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.totals: dict[str, list[Tensor | float]] = {}

    def add(self, metrics: Metrics) -> None:
        """Take in the `name: (sum, count)` pairs of one micro-step."""
        for name, pair in metrics.items():
            total = self.totals.setdefault(name, [0.0, 0.0])
            for place, value in enumerate(pair):
                total[place] = total[place] + self._entry(value)

    def values(self, names: list[str]) -> list[Tensor | float]:
        """Sum and count of each name in turn; zeros for a name this rank did not meet."""
        return [value for name in names for value in self.totals.get(name, (0.0, 0.0))]

    def _entry(self, value: Tensor | float) -> Tensor | float:
        if isinstance(value, Tensor) and value.device == self.device:
            return value.detach().double().reshape(())
        return float(value)


class Stopwatch:
    """Seconds that a device spends on marked stretches, without waiting for it."""

    def __init__(self, device: torch.device) -> None:
        self._on_device = device.type == "cuda"
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._stretches, self._seconds = 0, 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Marks one stretch."""
        if not self._on_device:
            began = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - began
            return
        if self._stretches == len(self._events):
            self._events.append((torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)))
        begin, end = self._events[self._stretches]
        self._stretches += 1
        begin.record()
        yield
        end.record()

    def take(self) -> float:
        """Seconds since the last call. On CUDA: once the host has waited for the device."""
        if self._on_device:
            spans = self._events[: self._stretches]
            self._seconds = sum(begin.elapsed_time(end) for begin, end in spans) / 1000.0
        seconds, self._seconds, self._stretches = self._seconds, 0.0, 0
        return seconds


class Window:
    """What is logged is the mean over the updates since the last log line.

    Args:
        samples: crops an update.
        flops: operations of an update on each rank; 0 where they are not known.
        tokens: token slots an update; 0 where they are not known.
    """

    def __init__(self, samples: int, flops: float = 0.0, tokens: int = 0) -> None:
        self.samples, self.flops, self.tokens = samples, flops, tokens
        self._reset()

    def _reset(self) -> None:
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.seconds = self.waited = 0.0
        self.updates = 0
        self.metrics: dict[str, list[float]] = {}

    def add(
        self,
        loss: float,
        norm: float,
        seconds: float,
        waited: float,
        metrics: Mapping[str, tuple[float, float]],
        applied: bool,
    ) -> None:
        """Take in one update; a skipped one counts for time, not for loss."""
        self.updates += 1
        self.seconds += seconds
        self.waited += waited
        if applied:
            self.losses.append(loss)
            self.norms.append(norm)
            for name, (value, count) in metrics.items():
                total = self.metrics.setdefault(name, [0.0, 0.0])
                total[0] += value
                total[1] += count

    def take(self) -> dict[str, float]:
        """Scalars to log; starts a new window."""
        seconds = max(self.seconds, 1e-9)
        values = {"loss": sum(self.losses) / len(self.losses)}
        values |= {name: s / n for name, (s, n) in sorted(self.metrics.items()) if n > 0}
        values |= {
            "optim/grad_norm": sum(self.norms) / len(self.norms),
            "rate/crops_per_s": self.updates * self.samples / seconds,
            "rate/data_wait": self.waited / seconds,
        }
        if self.tokens:
            values["rate/tokens_per_s"] = self.updates * self.tokens / seconds
        if self.flops:
            values["rate/tflops"] = self.updates * self.flops / seconds / 1e12
        self._reset()
        return values


def memory_figures(device: torch.device) -> dict[str, float]:
    """What this process and its GPU hold now, and the most they have held, in GiB."""
    figures = {"memory/host_now_gib": memory.host_now(), "memory/host_peak_gib": memory.host_peak()}
    if device.type == "cuda":
        figures |= {
            "memory/device_now_gib": memory.now(device),
            "memory/device_peak_gib": memory.peak(device),
        }
    return {name: bytes_ / GIB for name, bytes_ in figures.items()}
