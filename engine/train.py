"""Training, of both stages: opening a run, taking it up where it stood, ending it."""

from __future__ import annotations

import dataclasses
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from engine import checkpoint, memory
from engine.checkpoint import TakenOver
from engine.compilation import Compilation
from engine.distributed import World, join, stay
from engine.errors import UserError
from engine.logs import Logs
from engine.loop import Loop
from engine.optimizer import switch_on_checkpointing, wrap
from engine.progress import find_start, load_frozen
from engine.recipe import EngineConfig, save_recipe
from engine.room import check_room
from engine.signals import StopRequest
from engine.task import DataLog, Task
from engine.verdict import (
    Verdict,
    last_attempt,
    out_of_memory,
    read_attempt,
    record_failure,
    tell_launcher,
    write_text,
    write_verdict,
)
from engine.watchdog import Watchdog


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
        predicted = memory.predict(task, config, world, traced=world.device.type == "cuda")
        with Watchdog(run, config.hang_minutes, attempt, world.rank) as watchdog:
            try:
                verdict = _train(task, config, run, world, stop, watchdog, attempt, continue_as, predicted)
            except UserError:
                stay(world)
                raise
            except TakenOver as error:
                verdict = Verdict("failed", watchdog.update, attempt, str(error))
            except Exception as error:
                stay(world)
                watchdog.write_stacks(f"{type(error).__name__} ends this rank", error)
                advice = ""
                if out_of_memory(error):
                    with suppress(Exception):  # there may be too little left for it
                        if predicted.unknown == memory.POSTPONED:
                            predicted = memory.predict(task, config, world, host=predicted.host)
                    with suppress(Exception):  # a GPU that has failed may not even say how much it has
                        advice = memory.explain(predicted, world.device, error)
                record_failure(run, error, watchdog.update, advice)
                raise
            return _tell(run, world, verdict)


def _train(
    task: Task,
    config: EngineConfig,
    run: Path,
    world: World,
    stop: StopRequest,
    watchdog: Watchdog,
    attempt: int,
    continue_as: str | None,
    predicted: memory.Prediction,
) -> Verdict:
    warnings: list[str] = []
    start = find_start(task, run, world, continue_as, warnings.append)
    progress, found = start.progress, start.found
    if world.rank == 0:
        save_recipe(task.recipe(), run / "recipe.yaml")
    logs = Logs(
        run, world, config, attempt=attempt, start=progress.update, rollbacks=progress.rollbacks,
        recipe=task.recipe(),
    )  # fmt: skip
    if found is not None:
        load_frozen(task.model, found)
    frozen = _frozen(task.model) if world.rank == 0 else {}
    if config.activation_checkpointing:
        switch_on_checkpointing(task.model)
    compilation = Compilation(task.model, config, world.device)
    engine, partition = wrap(task, config, world)
    if found is not None:
        partition.load(found)
    watchdog.beat(progress.update)
    with logs:
        logs.event(
            "start", attempt=attempt, world=world.size, update=progress.update, position=progress.position
        )
        for warning in warnings:
            logs.say(warning)
        data: DataLog | None = getattr(task, "data", None)
        for line in data.describe().splitlines() if data else ():
            logs.say(line)
        logs.event("memory", **dataclasses.asdict(predicted))
        logs.say(f"memory predicted: {predicted.text()}")
        logs.say(compilation.text)
        loop = Loop(
            task, config, run, world, engine, partition, compilation, logs, attempt, progress, frozen, stop,
            watchdog,
        )  # fmt: skip
        if found is not None:
            loop.stand_at(found, start.aside)
            logs.say(f"resumed from {found.folder.name}")
        return loop.run_until_done()


def _tell(run: Path, world: World, verdict: Verdict) -> Verdict:
    """Write the verdict, all ranks together, and return it; still watched, since the storage may not answer
    any more."""
    if verdict.state == "failed":
        tell_launcher(verdict)  # it may be all that still arrives
    if taken_over := read_attempt(run) > verdict.attempt:
        # RUN/verdict.json is the later launch's; to start this one again would end that one.
        verdict = dataclasses.replace(verdict, kind="user")
    write_verdict(run, verdict, shared=world.rank == 0 and not taken_over)
    world.barrier()
    return verdict


def _open_run(run: Path, world: World) -> int:
    """Take the next attempt number and clear half-written checkpoints.

    Raises UserError where the run folder takes nothing.
    """
    if world.rank == 0:
        try:
            check_room(run)
        except UserError:
            checkpoint.tidy(run)  # it may be full of half-written checkpoints
            check_room(run)
        attempt = last_attempt(run) + 1
        write_text(run / "attempt", f"{attempt}\n")
        checkpoint.tidy(run)
    return int(world.from_first(attempt if world.rank == 0 else None))


def _frozen(model: torch.nn.Module) -> dict[str, Tensor]:
    """Parameters that are not trained, copied while the model is whole; rank 0 saves them."""
    named = model.named_parameters()
    return {f"{name}|frozen": p.detach().clone() for name, p in named if not p.requires_grad}
