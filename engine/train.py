"""The training loop of both stages."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine import checkpoint
from engine.batches import Batches
from engine.compilation import Compilation
from engine.distributed import World, join, seed_process
from engine.errors import UserError
from engine.evaluation import Evaluation
from engine.hardware import matmul_rate
from engine.logs import Logs
from engine.metrics import Sums, Window
from engine.optimizer import switch_on_checkpointing, wrap
from engine.progress import Progress, restore
from engine.recipe import EngineConfig, save_recipe
from engine.schedule import learning_rate, set_learning_rate
from engine.signals import StopRequest
from engine.task import DataLog, Task
from engine.verdict import Verdict, read_attempt, record_failure, write_text, write_verdict
from engine.watchdog import Watchdog
from engine.zero_state import Partition


def train(task: Task, config: EngineConfig, run: Path | str, *, continue_as: str | None = None) -> Verdict:
    """Train until `config.updates`, a signal, or a failure; resumes from RUN if it holds a checkpoint.

    Runs alone or under torchrun, one call per process. All ranks return the same verdict, which rank 0 has
    also written to RUN/verdict.json.

    Args:
        task: model, data, evaluation and export.
        config: the engine's part of the recipe.
        run: run folder, on a file system all ranks see.
        continue_as: open a new segment under this name where the recipe or the data have changed.

    Raises:
        UserError: only damaged checkpoints, another architecture, or a changed recipe without `continue_as`.
    """
    run = Path(run)
    world = join(config)
    with StopRequest() as stop:
        attempt = _open_run(run, world)
        with Watchdog(run, config.hang_minutes, attempt) as watchdog:
            try:
                verdict = _train(task, config, run, world, stop, watchdog, attempt, continue_as)
            except UserError:
                raise
            except Exception as error:
                record_failure(run, error, watchdog.update)
                raise
        if world.rank == 0:
            write_verdict(run, verdict)
        world.barrier()
    return verdict


def _train(
    task: Task,
    config: EngineConfig,
    run: Path,
    world: World,
    stop: StopRequest,
    watchdog: Watchdog,
    attempt: int,
    continue_as: str | None,
) -> Verdict:
    warnings: list[str] = []
    found = checkpoint.newest(run, world, warnings.append)
    progress = restore(task, found, continue_as)
    if world.rank == 0:
        save_recipe(task.recipe(), run / "recipe.yaml")
    frozen = {
        f"{n}|frozen": p.detach().clone() for n, p in task.model.named_parameters() if not p.requires_grad
    }
    if config.activation_checkpointing:
        switch_on_checkpointing(task.model)
    compilation = Compilation(task.model, config, world.device)
    engine, partition = wrap(task, config, world)
    if found is not None:
        found.load_moments(partition)
    partition.set_steps(progress.update)
    with Logs(run, world, config, attempt=attempt, start=progress.update, recipe=task.recipe()) as logs:
        for warning in warnings:
            logs.say(warning)
        logs.event(
            "start", attempt=attempt, world=world.size, update=progress.update, position=progress.position
        )
        if found is not None:
            logs.say(f"resumed from {found.folder.name}")
        data: DataLog | None = getattr(task, "data", None)
        for line in data.describe().splitlines() if data else ():
            logs.say(line)
        logs.say(compilation.text)
        loop = _Loop(
            task, config, run, world, engine, partition, compilation, logs, attempt, progress, frozen
        )
        return loop.run_until_done(stop, watchdog)


class _Loop:
    """The state one update hands to the next."""

    def __init__(
        self,
        task: Task,
        config: EngineConfig,
        run: Path,
        world: World,
        engine: Any,
        partition: Partition,
        compilation: Compilation,
        logs: Logs,
        attempt: int,
        progress: Progress,
        frozen: Mapping[str, Tensor],
    ) -> None:
        self.task, self.config, self.run, self.world = task, config, run, world
        self.engine, self.partition, self.logs, self.attempt = engine, partition, logs, attempt
        self.compilation, self.progress, self.frozen = compilation, progress, frozen
        self.evaluation = Evaluation(task, config, world, engine, logs, compilation)
        self.data: DataLog | None = getattr(task, "data", None)
        self.micro_steps = task.micro_steps(world.size)
        self.metric_names: list[str] = []
        self.window = Window(task.samples_per_update, getattr(task, "flops_per_update", 0) / world.size)
        self.matmul_rate = self._measure_matmul() if self.window.flops else 0.0
        self.saved_at: tuple[int, int] | None = (
            (progress.update, progress.position) if progress.position else None
        )

    def run_until_done(self, stop: StopRequest, watchdog: Watchdog) -> Verdict:
        progress, config = self.progress, self.config
        source = self.task.batches(progress.position, self.world.rank, self.world.size)
        batches = Batches(source, self.world.device)
        self.engine.train()
        asked = False
        while progress.update < config.updates and not asked:
            applied, asked = self._update(batches, stop)
            watchdog.beat(progress.update)
            if progress.bad_in_a_row >= config.max_bad_updates:
                where = f"the last at position {progress.position - 1}"
                text = f"{progress.bad_in_a_row} updates in a row were not finite, {where}"
                text += "; lower engine.lr or look at the data there"
                return Verdict("failed", progress.update, self.attempt, text)
            last = progress.update == config.updates
            if not applied or (asked and not last):
                continue
            # Saved first: what goes wrong in an evaluation costs no update.
            if last or (config.checkpoint_every and progress.update % config.checkpoint_every == 0):
                self._save()
            self.evaluation.run_if_due(progress.update)
        self._save()
        if progress.update >= config.updates:
            return Verdict("finished", progress.update, self.attempt)
        why = stop.name or "a signal to another rank"
        return Verdict(
            "preempted", progress.update, self.attempt, f"stopped by {why} and saved; start again to go on"
        )

    def _update(self, batches: Batches, stop: StopRequest) -> tuple[bool, bool]:
        """One update: returns whether it was applied, and whether any rank was asked to stop.

        The host waits for the device once, in `_sum_over_ranks`.
        """
        progress, config, world = self.progress, self.config, self.world
        began = time.perf_counter()
        seed_process(config.seed * 1_000_003 + progress.position)
        lr = learning_rate(progress.update, config)
        set_learning_rate(self.partition.adam.param_groups, lr)
        losses, sums = [], Sums(world.device)
        for micro_step in range(self.micro_steps):
            self.engine.set_gradient_accumulation_boundary(micro_step == self.micro_steps - 1)
            loss, metrics = self.engine(batches.take())
            # DeepSpeed averages over ranks; the loss is a share of the whole update's: shares are summed.
            self.engine.backward(loss * world.size, scale_wrt_gas=False)
            losses.append(loss.detach())
            sums.add(metrics)
            batches.look_ahead()
        squared = _squared_norm(self.partition.gradients(), world.device)
        head: list[Tensor | float] = [
            torch.stack(losses).double().sum(),
            squared,
            float(stop.asked),
            batches.seconds_waited(),
        ]
        (total_loss, square, stopping, waited), counts, metric_sums = self._sum_over_ranks(head, sums)
        norm = math.sqrt(square) if square >= 0 else math.nan
        progress.position += 1
        applied = math.isfinite(total_loss) and math.isfinite(norm)
        if applied:
            self.partition.apply(min(1.0, config.clip / (norm + 1e-6)) if config.clip else 1.0)
            progress.update += 1
            progress.bad_in_a_row = 0
        else:
            self.partition.drop()
            progress.skipped += 1
            progress.bad_in_a_row += 1
            self.logs.say(
                f"update skipped: loss {total_loss}, gradient norm {norm} at position {progress.position - 1}"
            )
        seconds = time.perf_counter() - began
        self.window.add(total_loss, norm, seconds, waited / world.size, metric_sums, applied)
        if applied and (progress.update % config.log_every == 0 or progress.update == config.updates):
            self._log(lr, counts)
        else:
            self.logs.advance(progress.update)
        return applied, stopping > 0

    def _sum_over_ranks(
        self, head: list[Tensor | float], sums: Sums
    ) -> tuple[list[float], dict[str, float], dict[str, tuple[float, float]]]:
        """`head`, the data's counts and the metrics, each summed over ranks, in one reduction and one read.

        Ranks may meet different metrics. They agree on the names when one comes up for the first time, which
        costs a second round.
        """
        counts = self.data.counts() if self.data else {}
        unknown = float(any(name not in self.metric_names for name in sums.totals))
        known: list[Tensor | float] = [unknown, *head, *counts.values()]
        reduced = self.world.sum([*known, *sums.values(self.metric_names)])
        if reduced[0]:
            every = self.world.gather(sorted(sums.totals))
            self.metric_names = sorted({*self.metric_names, *(name for names in every for name in names)})
            reduced = reduced[: len(known)] + self.world.sum(sums.values(self.metric_names))
        metrics = iter(reduced[len(known) :])
        return (
            reduced[1 : len(head) + 1],
            dict(zip(counts, reduced[len(head) + 1 : len(known)], strict=True)),
            dict(zip(self.metric_names, zip(metrics, metrics, strict=True), strict=True)),
        )

    def _log(self, lr: float, counts: Mapping[str, float]) -> None:
        values = self.window.take()
        if self.matmul_rate:
            values["rate/mfu"] = values["rate/tflops"] * 1e12 / self.matmul_rate
        values |= {
            "optim/lr": lr,
            "optim/skipped": float(self.progress.skipped),
            "data/position": float(self.progress.position),
        }
        self.logs.scalars(self.progress.update, values | {f"data/{name}": n for name, n in counts.items()})
        if warning := self.compilation.warning():
            self.logs.say(warning)
        if self.data:
            for notice in self.data.notices():
                self.logs.event("data", text=notice)
            if counts:
                self.data.check(counts)

    def _measure_matmul(self) -> float:
        """Operations a second of matrix products: the mean of the ranks, which may share a machine and so
        measure at the same time."""
        dtype = torch.bfloat16 if self.config.precision == "bf16" else torch.float32
        self.world.barrier()
        rate = self.world.sum([matmul_rate(self.world.device, dtype)])[0] / self.world.size
        self.logs.scalars(self.progress.update, {"rate/matmul_tflops": rate / 1e12}, show=False)
        name = str(dtype).removeprefix("torch.")
        self.logs.say(f"matrix products in {name} reach {rate / 1e12:.3g} Tflop/s on each rank")
        return rate

    def _save(self) -> None:
        if self.saved_at == (self.progress.update, self.progress.position):
            return
        began = time.perf_counter()
        buffers = {f"{n}|buffer": b for n, b in _persistent_buffers(self.task)}
        state = {
            **dataclasses.asdict(self.progress),
            "samples": self.progress.position * self.task.samples_per_update,
            "schedule": {
                "next_lr": learning_rate(self.progress.update, self.config),
                "updates": self.config.updates,
            },
        }
        folder = checkpoint.save(
            self.run,
            self.world,
            self.attempt,
            self.partition,
            state,
            {**self.frozen, **buffers},
            self.task.export,
        )
        if self.world.rank == 0:
            checkpoint.prune(self.run, folder, self.config.keep_last, self.config.keep_every)
        self.saved_at = (self.progress.update, self.progress.position)
        self.logs.event("checkpoint", name=folder.name, seconds=round(time.perf_counter() - began, 3))


def _open_run(run: Path, world: World) -> int:
    """Take the next attempt number and clear half-written checkpoints."""
    if world.rank == 0:
        run.mkdir(parents=True, exist_ok=True)
        attempt = read_attempt(run) + 1
        write_text(run / "attempt", f"{attempt}\n")
        checkpoint.tidy(run)
    return int(world.from_first(attempt if world.rank == 0 else None))


def _persistent_buffers(task: Task) -> Iterator[tuple[str, Tensor]]:
    kept = task.model.state_dict().keys()
    return ((name, buffer) for name, buffer in task.model.named_buffers() if name in kept)


def _squared_norm(gradients: list[Tensor], device: torch.device) -> Tensor:
    """Squared length of this rank's part of the gradient, float64, not finite where any element is not."""
    if not gradients:
        return torch.zeros((), dtype=torch.float64, device=device)
    return torch.stack(torch._foreach_norm(gradients)).double().square().sum()
