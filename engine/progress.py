"""Where a run stands, and taking it up again from a checkpoint."""

from __future__ import annotations

import dataclasses
from typing import Any

from engine.checkpoint import Checkpoint
from engine.errors import UserError
from engine.recipe import difference, identity_of
from engine.task import Task


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


def restore(task: Task, found: Checkpoint | None, continue_as: str | None) -> Progress:
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


def _load_weights(task: Task, found: Checkpoint) -> None:
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
