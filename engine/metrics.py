"""What an update measured, summed over micro-steps, ranks and updates."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from engine.task import Metrics


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


class Window:
    """What is logged is the mean over the updates since the last log line.

    Args:
        samples: crops an update.
        flops: operations of an update on each rank; 0 where they are not known.
    """

    def __init__(self, samples: int, flops: float) -> None:
        self.samples, self.flops = samples, flops
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
        if self.flops:
            values["rate/tflops"] = self.updates * self.flops / seconds / 1e12
        self._reset()
        return values
