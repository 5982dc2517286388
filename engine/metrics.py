"""What an update measured, summed over micro-steps, ranks and updates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch


class Sums:
    """Sums and counts of one rank's metrics over the micro-steps of an update, read from the device once."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.totals: dict[str, list[tuple[Any, Any]]] = {}

    def add(self, metrics: Mapping[str, tuple[Any, Any]]) -> None:
        """Take in the `name: (sum, count)` pairs of one micro-step."""
        for name, (value, count) in metrics.items():
            self.totals.setdefault(name, []).append((value, count))

    def values(self, names: list[str]) -> list[float]:
        """Sum and count of each name in turn; zeros for a name this rank did not meet."""
        flat = [
            torch.as_tensor(x, dtype=torch.float64, device=self.device).detach().reshape(())
            for n in names
            for p in self.totals.get(n, ())
            for x in p
        ]
        numbers = iter(torch.stack(flat).tolist() if flat else [])
        out: list[float] = []
        for name in names:
            pairs = [(next(numbers), next(numbers)) for _ in self.totals.get(name, ())]
            out += [sum(p[0] for p in pairs), sum(p[1] for p in pairs)]
        return out


class Window:
    """What is logged is the mean over the updates since the last log line."""

    def __init__(self) -> None:
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

    def take(self, samples: int) -> dict[str, float]:
        """Scalars to log, with `samples` crops an update; starts a new window."""
        seconds = max(self.seconds, 1e-9)
        values = {"loss": sum(self.losses) / len(self.losses)}
        values |= {name: s / n for name, (s, n) in sorted(self.metrics.items()) if n > 0}
        values |= {
            "optim/grad_norm": sum(self.norms) / len(self.norms),
            "rate/crops_per_s": self.updates * samples / seconds,
            "rate/data_wait": self.waited / seconds,
        }
        self._reset()
        return values
