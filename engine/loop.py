"""The training loop: updates, checkpoints, evaluations, going back."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine import checkpoint
from engine.batches import Batches
from engine.checkpoint import Checkpoint
from engine.compilation import Compilation
from engine.distributed import World
from engine.evaluation import Evaluation
from engine.hardware import matmul_rate
from engine.logs import Logs
from engine.metrics import Window, memory_figures
from engine.progress import Progress
from engine.recipe import EngineConfig
from engine.rollback import BadUpdates, where_to
from engine.saver import Saver
from engine.schedule import decay_start, learning_rate
from engine.signals import StopRequest
from engine.task import DataLog, Task
from engine.update import Outcome, Updates
from engine.verdict import Verdict
from engine.watchdog import Watchdog
from engine.zero_state import Partition, persistent_buffers


class Loop:
    """The state that one update hands to the next."""

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
        stop: StopRequest,
        watchdog: Watchdog,
    ) -> None:
        self.task, self.config, self.run, self.world = task, config, run, world
        self.engine, self.partition, self.logs, self.attempt = engine, partition, logs, attempt
        self.compilation, self.progress, self.frozen = compilation, progress, frozen
        self.stop, self.watchdog = stop, watchdog
        self.updates = Updates(task, config, world, engine, partition)
        self.evaluation = Evaluation(task, config, world, engine, logs, compilation)
        self.evaluated = False  # the last update
        self.bad = BadUpdates(task, config, run, world, logs)
        self.saver = Saver(
            run, world, attempt, partition, self._whole, task.export, config, logs, self._must_stay
        )
        self.data: DataLog | None = getattr(task, "data", None)
        flops, tokens = getattr(task, "flops_per_update", 0), getattr(task, "tokens_per_update", 0)
        self.window = Window(task.samples_per_update, flops / world.size, tokens)
        self.matmul_rate = self._measure_matmul() if flops else 0.0

    def stand_at(self, found: Checkpoint, aside: str) -> None:
        """The run is at this checkpoint; newer ones get the name `aside` in front of theirs."""
        self.saver.last = (found.state["update"], found.state["position"])
        if self.world.rank != 0:
            return
        try:
            for name in checkpoint.set_aside(self.run, found.state["update"], aside):
                self.logs.say(f"a newer checkpoint is not used any more: {name}")
        except OSError as error:
            self.logs.say(f"newer checkpoints could not be set aside ({error})")

    def run_until_done(self) -> Verdict:
        """Make updates until the last one, until any rank is asked to stop, or until the run gives up."""
        if self._asked():
            return self._end()
        self.engine.train()
        if self.progress.update >= self.config.updates:  # but for what an earlier launch did not come to
            if not self.evaluation.done_before(self.progress.update):
                self.evaluation.run_if_due(self.progress.update, self.watchdog.beat)
            self.evaluated = True
            return self._end()
        self.batches = self._open_data()
        try:
            failed = self._make_updates()
        finally:
            self.batches.close()
        return failed or self._end()

    def _make_updates(self) -> Verdict | None:
        progress, config = self.progress, self.config
        asked = False
        while progress.update < config.updates and not asked:
            outcome = self.updates.make(progress, self.batches, self._along)
            self.watchdog.beat(progress.update)
            stopping, *saving = outcome.along
            asked = stopping > 0
            self.saver.hear(saving)
            self._log(outcome)
            if outcome.objection:
                self.bad.note(progress.update, outcome)
                if progress.bad_in_a_row >= config.max_bad_updates:
                    if failed := self._go_back():
                        return failed
                    asked = asked or self._asked()
                continue
            if progress.update == config.updates:
                # Saved first: what goes wrong in an evaluation costs no update.
                if failed := self._save_all():
                    return failed
            elif self._due(progress.update) or self.saver.wanted:
                if self._due(progress.update):
                    progress.saved_on_time()
                if self._decay_begins(progress.update):
                    self.saver.wait(self.watchdog.beat)  # this one is not put off: runs are extended from it
                self.saver.begin(self._state())
            if not asked and self.evaluation.run_if_due(progress.update, self.watchdog.beat):
                self.evaluated = progress.update == config.updates
                asked = self._asked()
        return None

    def _end(self) -> Verdict:
        """`finished` and `preempted` promise that everything is saved."""
        progress = self.progress
        if failed := self._save_all():
            return failed
        if self.evaluated:
            return Verdict("finished", progress.update, self.attempt)
        why = self.stop.name or "a signal to another rank"
        return Verdict(
            "preempted", progress.update, self.attempt, f"stopped by {why} and saved; start again to go on"
        )

    def _save_all(self) -> Verdict | None:
        """Save what is not saved yet; a verdict where that fails."""
        progress = self.progress
        if progress.position and self.saver.last != (progress.update, progress.position):
            self.logs.event("last_save", update=progress.update)
        trouble = self.saver.settle(self._state(), self.watchdog.beat) if progress.position else ""
        if not trouble:
            return None
        return Verdict("failed", progress.update, self.attempt, f"the last save failed: {trouble}")

    def _go_back(self) -> Verdict | None:
        """Take up an earlier checkpoint with the data that come now; a verdict where the run gives up."""
        progress, config = self.progress, self.config
        if progress.back_in_a_row >= config.max_rollbacks:
            why = f"engine.max_rollbacks ({config.max_rollbacks}) is used up without getting further"
            return self.bad.give_up(progress, self.attempt, why)
        # None may appear later that is newer than the one chosen.
        if trouble := self.saver.wait(self.watchdog.beat):
            self.logs.say(f"a save is given up: {trouble}")
        found = where_to(self.run, self.world, self.logs.say, progress)
        if found is None:
            older = "older checkpoint" if progress.back_in_a_row else "checkpoint"
            return self.bad.give_up(progress, self.attempt, f"there is no {older} to go back to")
        self.batches.close()
        at, reason = progress.update, f"{progress.bad_in_a_row} updates in a row were skipped"
        self.partition.load(found)
        progress.go_back(Progress.read(found.state))
        self.stand_at(found, "bad")
        self.logs.back_to(progress.update, undone=at, rollbacks=progress.rollbacks)
        self.logs.event("rollback", update=at, to=progress.update, position=progress.position, reason=reason)
        self.logs.say(
            f"{reason}: back from update {at} to {progress.update}, and on with the data from position "
            f"{progress.position}"
        )
        self.watchdog.beat(progress.update)
        self.batches = self._open_data()
        return None

    def _open_data(self) -> Batches:
        source = self.task.batches(self.progress.position, self.world.rank, self.world.size)
        return Batches(source, self.world.device)

    def _asked(self) -> bool:
        """Whether any rank has been asked to stop."""
        return self.world.sum([float(self.stop.asked)])[0] > 0

    def _along(self) -> list[float]:
        """What goes into every update's reduction beside the update itself."""
        return [float(self.stop.asked), *self.saver.progress()]

    def _due(self, update: int) -> bool:
        every = self.config.checkpoint_every
        return (every > 0 and update % every == 0) or self._decay_begins(update)

    def _decay_begins(self, update: int) -> bool:
        return self.config.schedule == "wsd" and update == decay_start(self.config)

    def _must_stay(self, update: int, newest: int) -> bool:
        """Checkpoints that a run is extended from, and the due ones that it may go back to, however many
        stops have asked for others since."""
        recent = newest - self.config.keep_last * self.config.checkpoint_every
        return self._decay_begins(update) or (self._due(update) and update > recent)

    def _state(self) -> dict[str, Any]:
        """Content of `state.json`."""
        progress, config = self.progress, self.config
        return {
            **dataclasses.asdict(progress),
            "samples": progress.position * self.task.samples_per_update,
            "schedule": {"next_lr": learning_rate(progress.update, config), "updates": config.updates},
            "periodic": self._due(progress.update),
        }

    def _whole(self) -> dict[str, Tensor]:
        """What is saved as it is, by rank 0."""
        buffers = {f"{name}|buffer": buffer for name, buffer in persistent_buffers(self.task.model)}
        return {**self.frozen, **buffers}

    def _log(self, outcome: Outcome) -> None:
        progress, config = self.progress, self.config
        applied, stall = not outcome.objection, self.saver.seconds_stalled()
        seconds = outcome.seconds + stall
        self.logs.step(
            progress.update, outcome.position, seconds,
            own=outcome.own, waited=outcome.waited, stall=stall, applied=applied,
        )  # fmt: skip
        self.window.add(outcome.loss, outcome.norm, seconds, outcome.mean_waited, outcome.metrics, applied)
        if not applied or (progress.update % config.log_every and progress.update != config.updates):
            return
        values = self.window.take()
        if self.matmul_rate:
            values["rate/mfu"] = values["rate/tflops"] * 1e12 / self.matmul_rate
        values |= {
            "optim/lr": outcome.lr,
            "optim/skipped": float(progress.skipped),
            "optim/rollbacks": float(progress.rollbacks),
            "data/position": float(progress.position),
            **memory_figures(self.world.device),
        }
        values |= {f"data/{name}": count for name, count in outcome.counts.items()}
        self.logs.scalars(progress.update, values)
        if warning := self.compilation.warning():
            self.logs.say(warning)
        if self.data:
            for notice in self.data.notices():
                self.logs.event("data", text=notice)
            if outcome.counts:
                self.data.check(outcome.counts)

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
