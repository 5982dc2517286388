"""Where a run stands, and where it is taken up again."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from engine import checkpoint
from engine.checkpoint import Checkpoint
from engine.distributed import World
from engine.errors import UserError
from engine.recipe import EngineConfig, difference, identity_of
from engine.schedule import agree_until
from engine.task import Task


@dataclasses.dataclass
class Progress:
    """Where a run stands; all of it is in `state.json`, numbers exactly.

    Attributes:
        update: optimizer updates applied; the schedule and the checkpoint names follow it.
        position: updates' worth of data drawn (the next batch is that of position); ahead of `update` by what
            was skipped and what was lost by going back.
        skipped: updates dropped, because they were not finite or their loss was a spike.
        bad_in_a_row: how many of those came last.
        losses: of the last updates that were applied, against which a spike is told.
        rollbacks: how often the run went back to a checkpoint.
        back_in_a_row: how many of those came since the run last got further than ever and saved there.
        back_from: the highest update it went back from in this row.
        back_to: the update it last went back to.
        segments: stretches of the run with one recipe and one dataset: name, position, identity of the
            recipe and of the data.
    """

    update: int = 0
    position: int = 0
    skipped: int = 0
    bad_in_a_row: int = 0
    losses: list[float] = dataclasses.field(default_factory=list)
    rollbacks: int = 0
    back_in_a_row: int = 0
    back_from: int = 0
    back_to: int = 0
    segments: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    @classmethod
    def read(cls, state: Mapping[str, Any]) -> Progress:
        """From the content of `state.json`; what an older version did not write begins at its default."""
        return cls(**{f.name: state[f.name] for f in dataclasses.fields(cls) if f.name in state})

    def apply(self, loss: float, window: int) -> None:
        """An update was applied; the last `window` losses are kept."""
        self.position += 1
        self.update += 1
        self.bad_in_a_row = 0
        self.losses = [*self.losses, loss][-window:]

    def skip(self) -> None:
        """An update was drawn and dropped."""
        self.position += 1
        self.skipped += 1
        self.bad_in_a_row += 1

    def go_back(self, then: Progress) -> None:
        """Take the state of an earlier checkpoint, but draw no data again."""
        self.rollbacks += 1
        self.back_from = max(self.update, self.back_from if self.back_in_a_row else 0)
        self.back_in_a_row += 1
        self.update = self.back_to = then.update
        self.bad_in_a_row = 0
        # Losses of other data, or of another recipe, say nothing about these.
        self.losses = then.losses if then.segments == self.segments else []

    def saved_on_time(self) -> None:
        """A checkpoint was due here: once the run is further than ever, going back begins a new row."""
        if self.update > self.back_from:
            self.back_in_a_row = 0


@dataclasses.dataclass(frozen=True)
class Start:
    """Where a launch begins.

    Attributes:
        progress: counts and segments; a new segment is in it.
        found: the checkpoint to load, or None at the start of a run.
        aside: what the checkpoints newer than that are called from now on.
    """

    progress: Progress
    found: Checkpoint | None = None
    aside: str = ""


def find_start(
    task: Task, run: Path, world: World, continue_as: str | None, warn: Callable[[str], None]
) -> Start:
    """The newest good checkpoint, and a new segment where `continue_as` names one.

    Where a segment gives a wsd schedule another end, it begins at the newest checkpoint up to which both
    recipes give the same learning rates.

    Raises:
        UserError: damaged checkpoints only; another architecture; another recipe or other data without
            `continue_as`; a schedule with another end, and no checkpoint from before its decay.
    """
    if continue_as is not None and not re.fullmatch(r"[\w.-]+", continue_as):
        raise UserError(f"--continue-as {continue_as!r}: take a name of letters, digits, `_`, `-` and `.`")
    now = {"recipe": identity_of(task.recipe()), "data": task.data_identity()}
    found = checkpoint.newest(run, world, warn)
    if found is None:
        return Start(Progress(segments=[{"name": continue_as or "first", "position": 0, **now}]))
    before, aside = Progress.read(found.state).segments[-1], "damaged"
    changed = "; ".join(filter(None, (difference(before.get(p, {}), now[p]) for p in ("recipe", "data"))))
    if changed and not continue_as:
        raise UserError(
            f"{found.folder}: the recipe or the data differ from the run's in what changes the result "
            f"({changed}); use another run folder, or --continue-as NAME to go on with the change"
        )
    agree = _extends(before.get("recipe", {}), now["recipe"]) if changed else None
    if agree is not None and found.state["update"] > agree:
        found, aside = _from_before(run, world, warn, agree), before["name"]
    _check_architecture(task.model, found)
    progress = Progress.read(found.state)
    if continue_as and (changed or continue_as != before["name"]):
        progress.segments.append({"name": continue_as, "position": progress.position, **now})
        if changed and agree is None:
            progress.losses = []
    return Start(progress, found, aside)


def _extends(before: Mapping[str, Any], now: Mapping[str, Any]) -> int | None:
    """Updates up to which two wsd recipes give the same learning rates; None where they are none, or differ
    from the start."""
    if "engine" not in before or "engine" not in now:
        return None
    old, new = (EngineConfig.model_validate(recipe["engine"]) for recipe in (before, now))
    if not old.schedule == new.schedule == "wsd":
        return None
    agree = agree_until(old, new)
    return agree if agree > max(old.warmup, new.warmup) else None


def _from_before(run: Path, world: World, warn: Callable[[str], None], update: int) -> Checkpoint:
    found = checkpoint.newest(run, world, warn, at_most=update)
    if found is None:
        raise UserError(
            f"{run / 'checkpoints'}: no checkpoint of update {update} or before, where the schedules part; "
            "use another run folder"
        )
    return found


def load_frozen(model: nn.Module, found: Checkpoint) -> None:
    """Load the parameters that are not trained, which no later step changes, while the model is whole."""
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            flat = found.read(f"{name}|frozen", 0, parameter.numel())
            parameter.data.copy_(flat.view_as(parameter))


def _check_architecture(model: nn.Module, found: Checkpoint) -> None:
    here = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    there = found.shapes
    missing, extra = sorted(here.keys() - there.keys()), sorted(there.keys() - here.keys())
    shapes = [name for name in here if name in there and here[name] != there[name]]
    if not (missing or extra or shapes):
        return
    if shapes:
        example = f"{shapes[0]}: {there[shapes[0]]} there, {here[shapes[0]]} here"
    else:
        example = f"{(missing or extra)[0]} is {'not there' if missing else 'not in this model'}"
    wrong = len(missing) + len(extra) + len(shapes)
    raise UserError(
        f"{found.folder}: checkpoint of another architecture ({wrong} tensors differ, e.g. {example})"
    )
