"""Score the checkpoints that a run keeps, while it trains or afterwards, in a process of its own.

The run is only read. What is found goes to RUN/probe.jsonl, a line a checkpoint, and to TensorBoard under
RUN/tensorboard/probe, by the names the run itself uses. A checkpoint is known by the hashes of its files, so
one that has been scored is not scored again, however often this is started; a line cut off by a kill is.
"""

from __future__ import annotations

import fcntl
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

import torch

from data_pipeline.manifest import Manifest
from engine.errors import UserError
from engine.trackers import tag
from engine.verdict import Verdict, read_attempt, read_verdict, write_text
from pretrain.pictures import save
from pretrain.quality import Quality
from pretrain.recipe import PretrainRecipe
from pretrain.stored import Gone, fingerprint, kept, read_network, recipe_of, update_of

MAY_GO_ON = ("preempted", "hung")  # verdicts after which a run is started again


class Record:
    """RUN/probe.jsonl, held by one process at a time; a context manager.

    Attributes: `rows`, the lines in it.
    """

    def __init__(self, run: Path) -> None:
        self.path = run / "probe.jsonl"
        self.rows: list[dict[str, Any]] = []
        self._file: TextIO | None = None

    def __enter__(self) -> Record:
        self._lock = open(self.path.with_name(".probe.lock"), "w", encoding="utf-8")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.close()
            raise UserError(f"{self.path.parent}: another `medfm probe --follow` scores this run") from None
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
        self.rows = [row for row in map(_row, lines) if row]
        if len(self.rows) < len(lines):
            write_text(self.path, "".join(f"{json.dumps(row)}\n" for row in self.rows))
        self._file = open(self.path, "a", encoding="utf-8")
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        if self._file is not None:
            self._file.close()
        self._lock.close()

    def add(self, row: dict[str, Any]) -> None:
        """Append one line; it is there whole when this returns."""
        assert self._file is not None
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        self.rows.append(row)


def _row(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
        return row if {"update", "complete", "labelled", "scores"} <= row.keys() else None
    except (ValueError, AttributeError):
        return None  # cut off by a kill


class Follower:
    """Scores one run's checkpoints.

    Args:
        run: run folder.
        labelled: labelled shard dataset of the probes in place of the recipe's; "" takes the recipe's.
        device: where the network runs.
        say: takes each line for people; prints it where not given.
    """

    def __init__(
        self, run: Path, labelled: str = "", device: str = "cpu", say: Callable[[str], None] | None = None
    ) -> None:
        self.run, self.labelled, self.device = run, labelled, torch.device(device)
        self.say = say or partial(print, flush=True)
        self.scored = 0
        self._recipe: PretrainRecipe | None = None
        self._quality: Quality | None = None
        self._writer: Any = None
        self._settled: set[str] = set()  # fingerprints that need no further look: scored, or told of
        self._waiting: dict[str, str] = {}  # name and fingerprint of checkpoints seen and not yet scored
        self._said = ""

    def follow(self, poll: float = 10.0) -> Verdict:
        """Score what is kept and what is still to come; returns the run's verdict once it is final.

        poll: seconds between looks at the folder. Ctrl-C may come at any time.

        Raises:
            UserError: no pretraining run there, or it cannot be scored with its recipe.
        """
        with Record(self.run) as record:
            try:
                while True:
                    # Before the folder is listed: all that was saved before the verdict is then seen.
                    verdict = read_verdict(self.run)
                    last = verdict is not None and self._final(verdict)
                    while self._score_oldest(record):
                        pass
                    if verdict is not None and last:
                        return verdict
                    self._say_once(self._state(verdict))
                    time.sleep(poll)
            finally:
                if self._writer is not None:
                    self._writer.close()

    def _final(self, verdict: Verdict) -> bool:
        """Whether it is of the last launch and nobody will start the run again by itself."""
        return verdict.attempt == read_attempt(self.run) and verdict.state not in MAY_GO_ON

    def _state(self, verdict: Verdict | None) -> str:
        if verdict is not None and verdict.attempt == read_attempt(self.run):
            what = f"the run is {verdict.state} at update {verdict.update} and may be started again"
        else:
            what = "the run goes on"
        return f"{what}; waiting for its next checkpoint (Ctrl-C ends this)"

    def _say_once(self, text: str) -> None:
        if text != self._said:
            self._said = text
            self.say(text)

    def _score_oldest(self, record: Record) -> bool:
        """Score the oldest checkpoint that is new; False where there is none."""
        found = {}
        for folder in kept(self.run):
            try:
                if (mark := fingerprint(folder)) not in self._settled:
                    found[folder] = mark
            except Gone:
                continue
        for name, mark in self._waiting.items():
            if mark not in found.values() and mark not in self._settled:
                self._settle(mark, f"{name} was deleted before it was scored; engine.keep_every keeps some")
        self._waiting = {folder.name: mark for folder, mark in found.items()}
        if not found:
            return False
        if self._recipe is None:  # which is there before any checkpoint is
            self._recipe = with_labelled(recipe_of(self.run), self.labelled, self.say)
        folder, mark = next(iter(found.items()))
        done = [row for row in record.rows if row["labelled"] == self._recipe.probes.data]
        if any(row["complete"] == mark for row in done):
            self._settled.add(mark)
            return True
        quality = self._measured(self._recipe)
        try:
            self._score(folder, mark, quality, record, done)
        except Gone:
            self._settle(mark, f"{folder.name} was deleted while it was read; engine.keep_every keeps some")
        except UserError as error:
            self._settle(mark, f"left out: {error}")
        return True

    def _settle(self, mark: str, text: str) -> None:
        self._settled.add(mark)
        self.say(text)

    def _measured(self, recipe: PretrainRecipe) -> Quality:
        """What is measured; opened for the first checkpoint to score."""
        if self._quality is None:
            if recipe.engine.threads:
                torch.set_num_threads(recipe.engine.threads)
            self._quality = Quality(recipe, Manifest.open(recipe.data.root))
            self.say(self._quality.describe())
        return self._quality

    def _score(
        self, folder: Path, mark: str, quality: Quality, record: Record, done: list[dict[str, Any]]
    ) -> None:
        began, update = time.monotonic(), update_of(folder)
        scores = quality.score_alone(read_network(folder, quality.recipe, self.device))
        before = sorted((row for row in done if row["update"] < update), key=lambda row: row["update"])
        seconds = time.monotonic() - began
        self.say(
            f"{folder.name}, {seconds:.1f} s\n{quality.report(scores, [row['scores'] for row in before])}"
        )
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self.run / "tensorboard" / "probe"))
        for name, value in scores.items():
            self._writer.add_scalar(tag(f"evaluate/{name}"), value, update)
        save(quality.pictures, update, self._writer)
        self._writer.flush()
        record.add(
            {
                "update": update, "checkpoint": folder.name, "complete": mark,
                "labelled": quality.recipe.probes.data, "seconds": round(seconds, 2), "scores": scores,
            }
        )  # fmt: skip
        self._settled.add(mark)
        self.scored += 1


def with_labelled(recipe: PretrainRecipe, labelled: str, say: Callable[[str], None]) -> PretrainRecipe:
    """The recipe with another labelled dataset for its probes; "" leaves it as it is.

    Where that lacks a source or class that the recipe names, all of its own are taken, which is said.
    """
    if not labelled:
        return recipe
    probes, manifest = recipe.probes, Manifest.open(labelled)
    there = {*manifest.column("source"), *manifest.info.get("labels", {}).values()}
    changes: dict[str, object] = {"data": labelled}
    if missing := [name for name in (*probes.sources, *probes.classes) if name not in there]:
        say(f"{labelled}: holds no {missing[0]!r} of probes.*; all its sources and classes are probed")
        changes |= {"sources": (), "classes": ()}
    return recipe.model_copy(update={"probes": probes.model_copy(update=changes)})
