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
from engine.batches import to_device
from engine.distributed import World, join, seed_process, untouched_generators
from engine.errors import UserError
from engine.logs import Logs
from engine.metrics import Sums, Window
from engine.optimizer import whole_model, wrap
from engine.recipe import EngineConfig, difference, identity_of, save_recipe
from engine.schedule import learning_rate, set_learning_rate
from engine.signals import StopRequest
from engine.task import DataLog, Task
from engine.verdict import Verdict, read_attempt, record_failure, write_text, write_verdict
from engine.watchdog import Watchdog
from engine.zero_state import Partition


@dataclasses.dataclass
class Progress:
    """Where a run stands; all of it is in `state.json`.

    Attributes:
        update: optimizer updates applied; the schedule and the checkpoint names follow it.
        position: updates' worth of data drawn (the next batch is that of position); ahead of `update` by what
            was skipped.
        skipped: updates dropped because loss or gradient was not finite.
        bad_in_a_row: how many of those came last.
        segments: stretches of the run with one recipe and one dataset: name, position, identity of the
            recipe and of the data.
    """

    update: int = 0
    position: int = 0
    skipped: int = 0
    bad_in_a_row: int = 0
    segments: list[dict[str, Any]] = dataclasses.field(default_factory=list)


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
    progress = _restore(task, found, continue_as)
    if world.rank == 0:
        save_recipe(task.recipe(), run / "recipe.yaml")
    frozen = {
        f"{n}|frozen": p.detach().clone() for n, p in task.model.named_parameters() if not p.requires_grad
    }
    engine, partition = wrap(task, config, world)
    if found is not None:
        found.load_moments(partition)
    partition.set_steps(progress.update)
    with Logs(run, world, config.updates, progress.update) as logs:
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
        loop = _Loop(task, config, run, world, engine, partition, logs, attempt, progress, frozen)
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
        logs: Logs,
        attempt: int,
        progress: Progress,
        frozen: Mapping[str, Tensor],
    ) -> None:
        self.task, self.config, self.run, self.world = task, config, run, world
        self.engine, self.partition, self.logs, self.attempt = engine, partition, logs, attempt
        self.progress, self.frozen = progress, frozen
        self.data: DataLog | None = getattr(task, "data", None)
        self.micro_steps = task.micro_steps(world.size)
        self.metric_names: list[str] = []
        self.window = Window()
        self.saved_at: tuple[int, int] | None = (
            (progress.update, progress.position) if progress.position else None
        )

    def run_until_done(self, stop: StopRequest, watchdog: Watchdog) -> Verdict:
        progress, config = self.progress, self.config
        batches = self.task.batches(progress.position, self.world.rank, self.world.size)
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
            if last or (config.evaluate_every and progress.update % config.evaluate_every == 0):
                self._evaluate()
        self._save()
        if progress.update >= config.updates:
            return Verdict("finished", progress.update, self.attempt)
        why = stop.name or "a signal to another rank"
        return Verdict(
            "preempted", progress.update, self.attempt, f"stopped by {why} and saved; start again to go on"
        )

    def _update(self, batches: Iterator[Any], stop: StopRequest) -> tuple[bool, bool]:
        """One update: returns whether it was applied, and whether any rank was asked to stop."""
        progress, config, world = self.progress, self.config, self.world
        began, waited = time.perf_counter(), 0.0
        seed_process(config.seed * 1_000_003 + progress.position)
        lr = learning_rate(progress.update, config)
        set_learning_rate(self.partition.adam.param_groups, lr)
        losses, sums = [], Sums(world.device)
        for micro_step in range(self.micro_steps):
            self.engine.set_gradient_accumulation_boundary(micro_step == self.micro_steps - 1)
            asked_at = time.perf_counter()
            batch = to_device(next(batches), world.device)
            waited += time.perf_counter() - asked_at
            loss, metrics = self.engine(batch)
            # DeepSpeed averages over ranks; the loss is a share of the whole update's: shares are summed.
            self.engine.backward(loss * world.size, scale_wrt_gas=False)
            losses.append(loss.detach())
            sums.add(metrics)
        squared = _squared_norm(self.partition.gradients(), world.device)
        local = [float(v) for v in torch.stack([torch.stack(losses).double().sum(), squared]).tolist()]
        mine = sums.values(self.metric_names)
        unknown = float(any(name not in self.metric_names for name in sums.totals))
        spent = time.perf_counter() - began
        head = [*local, float(stop.asked), unknown, waited, spent]
        reduced = world.sum(head + mine)
        if reduced[3]:
            every = world.gather(sorted(sums.totals))
            self.metric_names = sorted({*self.metric_names, *(name for names in every for name in names)})
            reduced = reduced[: len(head)] + world.sum(sums.values(self.metric_names))
        total_loss, norm = reduced[0], math.sqrt(reduced[1]) if reduced[1] >= 0 else math.nan
        progress.position += 1
        if math.isfinite(total_loss) and math.isfinite(norm):
            self.partition.apply(min(1.0, config.clip / (norm + 1e-6)) if config.clip else 1.0)
            progress.update += 1
            progress.bad_in_a_row = 0
            applied = True
        else:
            self.partition.drop()
            progress.skipped += 1
            progress.bad_in_a_row += 1
            self.logs.say(
                f"update skipped: loss {total_loss}, gradient norm {norm} at position {progress.position - 1}"
            )
            applied = False
        pairs = dict(zip(self.metric_names, zip(reduced[6::2], reduced[7::2], strict=True), strict=True))
        self.window.add(
            total_loss, norm, time.perf_counter() - began, reduced[4] / world.size, pairs, applied
        )
        if applied and (progress.update % config.log_every == 0 or progress.update == config.updates):
            self._log(lr)
        else:
            self.logs.advance(progress.update)
        return applied, reduced[2] > 0

    def _log(self, lr: float) -> None:
        values = self.window.take(self.task.samples_per_update)
        values |= {
            "optim/lr": lr,
            "optim/skipped": float(self.progress.skipped),
            "data/position": float(self.progress.position),
        }
        sums = self._data_sums()
        self.logs.scalars(self.progress.update, values | {f"data/{name}": n for name, n in sums.items()})
        if self.data and sums:
            self.data.check(sums)

    def _data_sums(self) -> dict[str, float]:
        """Counts of the data over all ranks; what is new goes to the rank's log."""
        if self.data is None:
            return {}
        for notice in self.data.notices():
            self.logs.event("data", text=notice)
        counts = self.data.counts()
        return dict(zip(counts, self.world.sum(list(counts.values())), strict=True))

    def _evaluate(self) -> None:
        """Evaluation and pictures; training goes on as if they had not been."""
        task, update, world = self.task, self.progress.update, self.world
        was_training = task.model.training
        context = {
            "device_type": world.device.type,
            "dtype": torch.bfloat16,
            "enabled": self.config.precision == "bf16",
        }
        self.engine.eval()
        whole = whole_model(self.engine, self.config.zero_stage)
        with whole, untouched_generators(), torch.no_grad(), torch.autocast(**context):  # type: ignore[arg-type]
            seed_process(self.config.seed)
            scores = task.evaluate(update, world.rank, world.size, self.logs.writer)
            task.pictures(update, world.rank, world.size, self.logs.writer)
            world.barrier()
        self.engine.train(was_training)
        if scores:
            self.logs.scalars(
                update, {f"evaluate/{name}": float(value) for name, value in scores.items()}, show=False
            )
            self.logs.say(
                f"update {update}  " + "  ".join(f"{name} {value:.4g}" for name, value in scores.items())
            )
        world.barrier()

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


def _restore(task: Task, found: checkpoint.Checkpoint | None, continue_as: str | None) -> Progress:
    """Load the model's weights and counters, and open a segment where the recipe or the data are new."""
    now = {"recipe": identity_of(task.recipe()), "data": task.data_identity()}
    if found is None:
        return Progress(segments=[{"name": continue_as or "first", "position": 0, **now}])
    state = found.state
    progress = Progress(**{f.name: state[f.name] for f in dataclasses.fields(Progress)})
    before = progress.segments[-1]
    differences = [difference(before.get(part, {}), now[part]) for part in ("recipe", "data")]
    changed = "; ".join(filter(None, differences))
    if changed and not continue_as:
        raise UserError(
            f"{found.folder}: the recipe or the data differ from the run's in what changes the result "
            f"({changed}); use another run folder, or --continue-as NAME to go on with the change"
        )
    if continue_as and (changed or continue_as != before["name"]):
        progress.segments.append({"name": continue_as, "position": progress.position, **now})
    _load_weights(task, found)
    return progress


def _load_weights(task: Task, found: checkpoint.Checkpoint) -> None:
    saved, model = found.model_state(), task.model.state_dict()
    missing, extra = sorted(model.keys() - saved.keys()), sorted(saved.keys() - model.keys())
    shapes = [n for n in model if n in saved and model[n].shape != saved[n].shape]
    if missing or extra or shapes:
        example = (
            f"{shapes[0]}: {tuple(saved[shapes[0]].shape)} there, {tuple(model[shapes[0]].shape)} here"
            if shapes
            else ""
        )
        example = example or f"{(missing or extra)[0]} is {'not there' if missing else 'not in this model'}"
        wrong = len(missing) + len(extra) + len(shapes)
        raise UserError(
            f"{found.folder}: checkpoint of another architecture ({wrong} tensors differ, e.g. {example})"
        )
    task.model.load_state_dict(saved)


def _persistent_buffers(task: Task) -> Iterator[tuple[str, Tensor]]:
    kept = task.model.state_dict().keys()
    return ((name, buffer) for name, buffer in task.model.named_buffers() if name in kept)


def _squared_norm(gradients: list[Tensor], device: torch.device) -> Tensor:
    """Squared length of this rank's part of the gradient, float64, not finite where any element is not."""
    if not gradients:
        return torch.zeros((), dtype=torch.float64, device=device)
    return torch.stack(torch._foreach_norm(gradients)).double().square().sum()
