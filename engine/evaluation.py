"""Evaluations during training: when they run, and that training goes on as if they had not."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch.nn.modules.module import register_module_forward_pre_hook

from engine.compilation import Compilation
from engine.distributed import World, seed_process, untouched_generators
from engine.logs import Logs
from engine.optimizer import whole_model
from engine.recipe import EngineConfig
from engine.task import Task

MOST_SAID = 12  # figures in the line for people; a task with more shows them its own way


class Evaluation:
    """The evaluations and pictures of one launch, kept below `engine.evaluate_share` of its time.

    Their time and the run's are taken by rank 0's clock from the first update on; what the next one will
    take is what the last one took. So the first that is due always runs, unless the share is 0.
    """

    def __init__(
        self,
        task: Task,
        config: EngineConfig,
        world: World,
        engine: Any,
        logs: Logs,
        compilation: Compilation,
    ) -> None:
        self.task, self.config, self.world = task, config, world
        self.engine, self.logs, self.compilation = engine, logs, compilation
        self._began = time.monotonic()
        self._spent = self._last = 0.0

    def run_if_due(self, update: int, beat: Callable[[], None] = lambda: None) -> bool:
        """After update `update`: evaluate where that is due and affordable; the last update always is.

        beat: called before, after, and whenever a module computes, for the watchdog. Returns whether it
        evaluated.
        """
        config = self.config
        if update != config.updates:
            if not config.evaluate_every or update % config.evaluate_every or not config.evaluate_share:
                return False
            share = self.world.from_first(self._share_with_another())
            if share > config.evaluate_share:
                self.logs.say(
                    f"update {update}: evaluation put off; with it they would take {share:.1%} of the time "
                    f"(engine.evaluate_share {config.evaluate_share:g})"
                )
                return False
        beat()
        self.logs.event("evaluate", update=update)
        began = time.monotonic()
        moves = register_module_forward_pre_hook(lambda *_: beat())
        try:
            self._run(update)
        finally:
            moves.remove()
        self._last = time.monotonic() - began
        self._spent += self._last
        self.logs.event("evaluate", update=update, seconds=round(self._last, 3))
        if findings := getattr(self.task, "findings", None):
            for line in findings().splitlines():
                self.logs.say(line)
        beat()
        return True

    def done_before(self, update: int) -> bool:
        """Whether an earlier launch has logged the figures of this update's evaluation; asked of rank 0."""
        rows = []
        with suppress(OSError, ValueError):
            text = (self.logs.run / "metrics.jsonl").read_text(encoding="utf-8")
            rows = [json.loads(line) for line in text.splitlines() if '"evaluate/' in line]
        return bool(self.world.from_first(any(row.get("update") == update for row in rows)))

    def _share_with_another(self) -> float:
        """Share of the run's time after one more evaluation; 0 before the first."""
        return (self._spent + self._last) / (time.monotonic() - self._began + self._last)

    def _run(self, update: int) -> None:
        task, world, config = self.task, self.world, self.config
        was_training = task.model.training
        autocast = torch.autocast(world.device.type, torch.bfloat16, enabled=config.precision == "bf16")
        self.engine.eval()
        with (
            whole_model(self.engine),
            untouched_generators(world.device),
            self.compilation.paused(),
            torch.no_grad(),
            autocast,
        ):
            seed_process(config.seed)
            scores = task.evaluate(update, world.rank, world.size, self.logs.writer)
            task.pictures(update, world.rank, world.size, self.logs.writer)
            world.barrier()
        self.engine.train(was_training)
        if scores:
            named = {f"evaluate/{name}": float(value) for name, value in scores.items()}
            self.logs.scalars(update, named, show=False)
        if 0 < len(scores) <= MOST_SAID:
            figures = "  ".join(f"{name} {value:.4g}" for name, value in scores.items())
            self.logs.say(f"update {update}  {figures}")
        world.barrier()
