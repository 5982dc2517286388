"""Past bad data: the updates that were skipped, the checkpoint a run goes back to, the report where it gives
up."""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engine import checkpoint
from engine.checkpoint import Checkpoint
from engine.distributed import World
from engine.errors import UserError
from engine.logs import Logs
from engine.progress import Progress
from engine.recipe import EngineConfig
from engine.task import Task
from engine.update import Outcome
from engine.verdict import Verdict, write_text

MOST_SAID = 3  # sample keys in a line for people; all of them are in the files


class BadUpdates:
    """The skipped updates: RUN/bad_updates.jsonl, a line for people, and RUN/report.json at the end.

    Args:
        task: names an update's samples where it has the hook `sample_keys`.
        config: says how many a report can need.
    """

    def __init__(self, task: Task, config: EngineConfig, run: Path, world: World, logs: Logs) -> None:
        self.run, self.world, self.logs = run, world, logs
        self._keys: Callable[[int], list[str]] | None = getattr(task, "sample_keys", None)
        self._last: deque[dict[str, Any]] = deque(maxlen=config.max_bad_updates * (config.max_rollbacks + 1))

    def note(self, update: int, outcome: Outcome) -> None:
        """Say that an update was skipped; `update` is the number of those applied."""
        keys = self._keys(outcome.position) if self._keys else []
        row = {
            "update": update,
            "position": outcome.position,
            "loss": _number(outcome.loss),
            "norm": _number(outcome.norm),
            "reason": outcome.objection,
            "keys": keys,
        }
        self._last.append(row)
        self.logs.record("bad_updates.jsonl", row)
        self.logs.say(
            f"update skipped at position {outcome.position}: {outcome.objection} (loss {outcome.loss:.4g}, "
            f"gradient norm {outcome.norm:.4g}{f'; {_few(keys)}' if keys else ''})"
        )

    def give_up(self, progress: Progress, attempt: int, why: str) -> Verdict:
        """The verdict of a run that cannot go on; what it met is in RUN/report.json."""
        last = self._last[-1]
        text = (
            f"{progress.bad_in_a_row} updates in a row were bad, the last at position {last['position']} "
            f"({last['reason']}: loss {last['loss']}, gradient norm {last['norm']}), and {why}; lower "
            f"engine.lr or look at the samples that {self.run / 'report.json'} names"
        )
        verdict = Verdict("failed", progress.update, attempt, text)
        if self.world.rank == 0:
            report = {
                "state": verdict.state,
                "message": text,
                "update": progress.update,
                "attempt": attempt,
                "rollbacks": progress.rollbacks,
                "bad": list(self._last),
            }
            try:
                write_text(self.run / "report.json", json.dumps(report, indent=1) + "\n")
            except OSError as error:
                self.logs.say(f"{self.run / 'report.json'} cannot be written: {error}")
        return verdict


def where_to(run: Path, world: World, warn: Callable[[str], None], progress: Progress) -> Checkpoint | None:
    """The checkpoint a run goes back to: the newest good one, or one older than that of the last time where
    it has gone no further since.

    Checkpoints that were due come before those that a stop asked for, so that an interrupted run goes back to
    where it would have without the interruption.
    """
    at_most = progress.back_to - 1 if progress.back_in_a_row else progress.update
    forced = None
    while True:
        try:
            found = checkpoint.newest(run, world, warn, at_most=at_most)
        except UserError as error:  # those that are left are all damaged
            warn(str(error))
            return forced
        if found is None or found.state.get("periodic", True):
            return found or forced
        forced = forced or found
        at_most = found.state["update"] - 1


def _number(value: float) -> float | str:
    """JSON has no number that is not finite."""
    return value if math.isfinite(value) else str(value)


def _few(keys: list[str]) -> str:
    more = f" and {len(keys) - MOST_SAID} more" if len(keys) > MOST_SAID else ""
    return f"samples {', '.join(keys[:MOST_SAID])}{more}"
