"""One update: forward and backward passes, one reduction over ranks, a judgement, the step or none."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from engine.batches import Batches
from engine.distributed import World, seed_process
from engine.judge import objection
from engine.metrics import Stopwatch, Sums
from engine.progress import Progress
from engine.recipe import EngineConfig
from engine.schedule import learning_rate, set_learning_rate
from engine.task import DataLog, Task
from engine.zero_state import Partition


@dataclass(frozen=True)
class Outcome:
    """What an update was; the same on every rank, but for `seconds`, `own` and `waited`.

    Attributes:
        position: whose data it took.
        loss, norm: of the update, over all ranks; the norm before clipping.
        objection: why it was dropped, or an empty string where it was applied.
        lr: learning rate it was made with.
        metrics: name -> (sum, count) over ranks.
        counts: what the data log counts, summed over ranks.
        along: the numbers that came along in the reduction, summed over ranks.
        seconds: on this rank.
        own: of these, in which it cannot have waited for another rank.
        waited: of these, for data.
        mean_waited: the mean of `waited` over ranks.
    """

    position: int
    loss: float
    norm: float
    objection: str
    lr: float
    metrics: Mapping[str, tuple[float, float]]
    counts: Mapping[str, float]
    along: list[float]
    seconds: float
    own: float
    waited: float
    mean_waited: float


class Updates:
    """Makes the updates of one launch."""

    def __init__(
        self, task: Task, config: EngineConfig, world: World, engine: Any, partition: Partition
    ) -> None:
        self.config, self.world, self.engine, self.partition = config, world, engine, partition
        self.micro_steps = task.micro_steps(world.size)
        self.data: DataLog | None = getattr(task, "data", None)
        self._forward = Stopwatch(world.device)
        self._metric_names: list[str] = []

    def make(self, progress: Progress, batches: Batches, along: Callable[[], list[float]]) -> Outcome:
        """Draw an update's data, and apply it or drop it; `progress` counts it.

        `along` gives numbers to be summed over ranks by the way. The host waits for the device once, in
        `_sum_over_ranks`.
        """
        config, world = self.config, self.world
        began, position = time.perf_counter(), progress.position
        seed_process(config.seed * 1_000_003 + position)
        lr = learning_rate(progress.update, config)
        set_learning_rate(self.partition.adam.param_groups, lr)
        losses, sums = [], Sums(world.device)
        for micro_step in range(self.micro_steps):
            self.engine.set_gradient_accumulation_boundary(micro_step == self.micro_steps - 1)
            batch = batches.take()
            with self._forward.running():
                loss, metrics = self.engine(batch)
            # DeepSpeed averages over ranks; the loss is a share of the whole update's: shares are summed.
            self.engine.backward(loss * world.size, scale_wrt_gas=False)
            losses.append(loss.detach())
            sums.add(metrics)
            batches.look_ahead()
        waited = batches.seconds_waited()
        head: list[Tensor | float] = [
            torch.stack(losses).double().sum(),
            _squared_norm(self.partition.gradients(), world.device),
            waited,
            *along(),
        ]
        (total, square, all_waited, *summed), counts, named = self._sum_over_ranks(head, sums)
        norm = math.sqrt(square) if square >= 0 else math.nan
        if against := objection(total, norm, progress.losses, config):
            self.partition.drop()
            progress.skip()
        else:
            self.partition.apply(min(1.0, config.clip / (norm + 1e-6)) if config.clip else 1.0)
            progress.apply(total, config.spike_window)
        forward = self._forward.take()
        # At ZeRO 3 a forward pass gathers weights, and so waits for the other ranks.
        own = waited + (forward if self.engine.zero_optimization_stage() < 3 else 0.0)
        seconds = time.perf_counter() - began
        return Outcome(
            position, total, norm, against, lr, named, counts, summed, seconds, own, waited,
            all_waited / world.size,
        )  # fmt: skip

    def _sum_over_ranks(
        self, head: list[Tensor | float], sums: Sums
    ) -> tuple[list[float], dict[str, float], dict[str, tuple[float, float]]]:
        """`head`, the data's counts and the metrics, each summed over ranks, in one reduction and one read.

        Ranks may meet different metrics. They agree on the names when one comes up for the first time, which
        costs a second round.
        """
        counts = self.data.counts() if self.data else {}
        unknown = float(any(name not in self._metric_names for name in sums.totals))
        known: list[Tensor | float] = [unknown, *head, *counts.values()]
        reduced = self.world.sum([*known, *sums.values(self._metric_names)])
        if reduced[0]:
            every = self.world.gather(sorted(sums.totals))
            self._metric_names = sorted({*self._metric_names, *(name for names in every for name in names)})
            reduced = reduced[: len(known)] + self.world.sum(sums.values(self._metric_names))
        metrics = iter(reduced[len(known) :])
        return (
            reduced[1 : len(head) + 1],
            dict(zip(counts, reduced[len(head) + 1 : len(known)], strict=True)),
            dict(zip(self._metric_names, zip(metrics, metrics, strict=True), strict=True)),
        )


def _squared_norm(gradients: list[Tensor], device: torch.device) -> Tensor:
    """Squared length of this rank's part of the gradient, float64, not finite where any element is not."""
    if not gradients:
        return torch.zeros((), dtype=torch.float64, device=device)
    return torch.stack(torch._foreach_norm(gradients)).double().square().sum()
