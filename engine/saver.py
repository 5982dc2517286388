"""Saves checkpoints while training goes on.

A save has two stages, each in a thread of its own: every rank writes what it owns from a copy in host memory;
then rank 0 adds what makes the files a checkpoint and gives the folder its name. No rank waits for another
there, and nothing polls the disk: how far the threads are travels in the one reduction that every update has
anyway, so that all ranks know the same and decide alike, one update later.

A save that fails anywhere is given up on every rank, its folder is cleared once no rank writes there any
more, and it is tried again later. Each try has a folder of its own, so that a thread which was stuck for
hours finds nothing it could spoil. Just before the folder gets its name, rank 0 checks that no later launch
of the run has begun.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from engine import checkpoint
from engine.checkpoint import TakenOver
from engine.distributed import World
from engine.logs import Logs
from engine.recipe import EngineConfig
from engine.snapshot import Snapshot
from engine.tensor_file import flush, write_tensors
from engine.work import Work
from engine.zero_state import Partition

FIRST_RETRY = 10  # updates after a failed save until it is tried again; doubled with every failure
LEAST_PATIENCE = 30.0  # seconds without a byte written before a save on its way counts as stuck
LOG_PATIENCE = 5.0  # seconds that a save waits for the lines logged before it
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 30.0  # seconds between tries of the last save of a launch


class Saver:
    """One rank's part in saving checkpoints. All ranks make the same calls in the same order.

    In the loop: `progress` into the update's reduction, its sums to `hear`, then, where a save is due or
    `wanted`, `begin`. At the end `settle`.

    Args:
        run: run folder, seen by all ranks.
        world: this process among all of them; its collectives are called from the calling thread only.
        attempt: number of this launch; a later launch takes the right to write away from it.
        partition: what this rank owns.
        whole: gives frozen parameters as `NAME|frozen` and buffers as `NAME|buffer`; rank 0's are written.
        export: writes the weights for use from the whole state dict, in a thread of rank 0.
        config: `keep_last`, `keep_every` and `save_minutes` of it are used.
        logs: told of every save.
        keep: given an update and the one just saved, whether the checkpoint of the first must stay.

    Attributes:
        last: (update, position) of the newest complete checkpoint; the loop sets it when it resumes or goes
            back.
        failure: why the last save failed, empty once one has succeeded.
    """

    def __init__(
        self,
        run: Path,
        world: World,
        attempt: int,
        partition: Partition,
        whole: Callable[[], Mapping[str, Tensor]],
        export: Callable[[Mapping[str, Tensor], Path], None],
        config: EngineConfig,
        logs: Logs,
        keep: Callable[[int, int], bool] = lambda update, newest: False,
    ) -> None:
        self.run, self.world, self.attempt, self.partition = run, world, attempt, partition
        self.export, self.config, self.logs, self.keep = export, config, logs, keep
        self.whole = whole if world.rank == 0 else dict
        self.last: tuple[int, int] | None = None
        self.failure = ""
        self._snapshot = Snapshot(partition, self.whole(), world.device)
        self._phase: Literal["idle", "writing", "finishing", "stopping", "clearing"] = "idle"
        self._save: _Save | None = None
        self._work: Work | None = None
        self._number = self._failures = self._heard = self._retry_at = 0
        self._put_off = False
        self._stalled = 0.0

    @property
    def wanted(self) -> bool:
        """A save that failed or was put off should be tried now; the same on every rank."""
        retry = self._failures > 0 and self._heard >= self._retry_at
        return self._phase == "idle" and (self._put_off or retry)

    def begin(self, state: Mapping[str, Any]) -> bool:
        """Copy this rank's slices and begin to write them; the step waits for the copy only.

        Args:
            state: content of `state.json`, with `update` and `position`; the same on every rank.

        Returns:
            False where the last save is still on its way: this one is put off, on every rank alike.
        """
        began = time.perf_counter()
        if self._save is not None:
            if not self._put_off:
                age = time.monotonic() - self._save.began
                self.logs.say(
                    f"the checkpoint of update {state['update']} is put off: that of update "
                    f"{self._save.update} is still being written after {age:.0f} s"
                )
            self._put_off = True
            return False
        self._put_off = False
        self._number += 1
        update = int(state["update"])
        # The state is turned into text at once: the loop goes on changing it.
        save = _Save(update, int(state["position"]), json.dumps(state), self._scratch(update))
        self._save, self._phase = save, "writing"
        try:
            self._snapshot.take(self.partition, self.whole())
        except Exception as error:
            # Told to the other ranks like any other failure; raised here they would wait for this one.
            self._work = Work(None, error)
        else:
            self._work = Work(lambda: self._write(save))
        self._count_stall(save, began)
        return True

    def progress(self) -> list[float]:
        """Whether this rank's thread runs, and whether it failed: summed over ranks for `hear`."""
        work = self._work
        return [0.0, 0.0] if work is None else [float(work.running), float(work.error is not None)]

    def hear(self, sums: Sequence[float]) -> None:
        """Go on to the next stage where the sums of `progress` say that all ranks have done this one.

        Raises:
            TakenOver: on every rank, where a later launch of this run has begun.
        """
        self._heard += 1
        running, failed = sums
        save = self._save
        if save is None:
            return
        began = time.perf_counter()
        if failed and self._phase in ("writing", "finishing"):
            self._give_up(save)
        elif running:
            return
        elif self._phase == "writing":
            entries = dict(self.world.gather([f"rank-{self.world.rank:05d}.safetensors", save.entry]))
            self._next("finishing", lambda: self._finish(save, entries))
        elif self._phase == "stopping":
            self._next("clearing", lambda: shutil.rmtree(save.scratch, ignore_errors=True))
        else:
            if self._phase == "finishing":
                self._complete(save)
            self._phase, self._save, self._work = "idle", None, None
        self._count_stall(save, began)

    def wait(self, beat: Callable[[], None] = lambda: None) -> str:
        """Until no save is on its way, on all ranks together; a save that fails is not tried again.

        Args:
            beat: called now and then while bytes are written, for the watchdog.

        Returns:
            Nothing, or why it does not end: no rank has written a byte for `save_minutes`. That save can no
            longer become a checkpoint in this process.

        Raises:
            TakenOver: on every rank, where a later launch of this run has begun.
        """
        patience = max(60.0 * self.config.save_minutes, LEAST_PATIENCE)
        seen, moved_at = None, time.monotonic()
        while (save := self._save) is not None:
            phase = self._phase
            if (now := (save, save.moved, phase)) != seen:
                seen, moved_at = now, time.monotonic()
            still = time.monotonic() - moved_at > patience
            *sums, unmoved = self.world.sum([*self.progress(), float(still)])
            self.hear(sums)
            if unmoved == self.world.size and (self._save, self._phase) == (save, phase):
                save.given_up, self._phase = True, "stopping"
                what = f"the storage took nothing of update {save.update} for {patience:.0f} s"
                self.failure = f"{what} ({self.failure})" if self.failure else what
                return self.failure
            beat()
            if self._work is not None:
                self._work.ended.wait(0.05)
        return ""

    def settle(self, state: Mapping[str, Any], beat: Callable[[], None] = lambda: None) -> str:
        """Save `state` unless it is saved, and wait for it, on all ranks together.

        The memory of these processes holds the only copy: where the storage fails it is tried again for
        `save_minutes`.

        Args:
            state: as for `begin`.
            beat: called now and then, for the watchdog.

        Returns:
            Nothing, or why it could not be saved.
        """
        wanted = (int(state["update"]), int(state["position"]))
        ends, pause = time.monotonic() + 60.0 * self.config.save_minutes, FIRST_PAUSE
        first = True
        try:
            while True:
                if stuck := self.wait(beat):
                    return stuck
                if self.last == wanted:
                    return ""
                if not first:
                    # Rank 0's clock decides for all.
                    over = self.world.rank == 0 and time.monotonic() + pause > ends
                    if self.world.sum([float(over)])[0]:
                        return self.failure
                    if pause == FIRST_PAUSE:
                        minutes = self.config.save_minutes
                        self.logs.say(f"the last save is tried for {minutes:g} minutes (engine.save_minutes)")
                    _rest(pause, beat)
                    pause = min(2 * pause, LONGEST_PAUSE)
                self.begin(state)
                first = False
        except TakenOver as error:
            return str(error)

    def seconds_stalled(self) -> float:
        """Seconds that training has waited for saves since the last call."""
        stalled, self._stalled = self._stalled, 0.0
        return stalled

    def _scratch(self, update: int) -> Path:
        final = checkpoint.folder_of(self.run, update)
        return final.with_name(f".tmp-{final.name}-a{self.attempt}-{self._number}")

    def _next(self, phase: Literal["finishing", "clearing"], work: Callable[[], None]) -> None:
        """Rank 0 has work in this stage, the others wait for its end."""
        self._phase = phase
        self._work = Work(work) if self.world.rank == 0 else None

    def _write(self, save: _Save) -> None:
        """In a thread of every rank."""
        save.copied = self._snapshot.wait()
        folder = save.scratch.parent
        if not folder.exists():  # RUN itself is not made: where it is gone, so is the storage
            folder.mkdir(exist_ok=True)
            flush(self.run)
        save.scratch.mkdir(exist_ok=True)
        file = save.scratch / f"rank-{self.world.rank:05d}.safetensors"
        save.entry = write_tensors(file, self._snapshot.tensors, self._snapshot.metadata, save.note)

    def _finish(self, save: _Save, entries: Mapping[str, Mapping[str, Any]]) -> None:
        """In a thread of rank 0."""
        checkpoint.seal(save.scratch, entries, json.loads(save.state), self.export)
        # What was logged up to this update is not made again by a run that resumes from it.
        self.logs.flush(LOG_PATIENCE)
        save.note(save.moved)
        final = checkpoint.put_in_place(self.run, self.attempt, save.scratch, save.update)
        try:
            last, every = self.config.keep_last, self.config.keep_every
            checkpoint.prune(self.run, final, last, every, lambda update: self.keep(update, save.update))
        except OSError as error:
            save.notice = f"old checkpoints could not be deleted: {error}"

    def _complete(self, save: _Save) -> None:
        self.last = (save.update, save.position)
        if self._failures:
            self.logs.say(f"saved again after {self._failures} failures: {save.name}")
        self._failures, self.failure = 0, ""
        self._stalled += save.copied
        seconds, stall = time.monotonic() - save.began, save.stall + save.copied
        self.logs.event("checkpoint", name=save.name, seconds=round(seconds, 3), stall=round(stall, 4))
        self.logs.scalars(
            save.update, {"checkpoint/seconds": seconds, "checkpoint/stall_s": stall}, show=False
        )
        if save.notice:
            self.logs.say(save.notice)

    def _give_up(self, save: _Save) -> None:
        """On every rank, since one of them failed: no thread of this save does any more than it must."""
        save.given_up = True
        self._phase = "stopping"
        error = self._work.error if self._work is not None else None
        text = "" if error is None else f"rank {self.world.rank}: {type(error).__name__}: {error}"
        found = self.world.gather([text, str(error) if isinstance(error, TakenOver) else ""])
        self.failure = next(text for text, _ in found if text)
        self._failures += 1
        wait = FIRST_RETRY * 2 ** (self._failures - 1)
        self._retry_at = self._heard + wait
        if taken_over := next((words for _, words in found if words), ""):
            raise TakenOver(taken_over)
        self.logs.event("not saved", name=save.name, why=self.failure, failures=self._failures)
        if self._failures & (self._failures - 1) == 0:  # the 1st, 2nd, 4th, 8th …
            times = f", {self._failures} times now" if self._failures > 1 else ""
            self.logs.say(f"{save.name} was not saved{times}: {self.failure}; it is tried again")

    def _count_stall(self, save: _Save, began: float) -> None:
        seconds = time.perf_counter() - began
        save.stall += seconds
        self._stalled += seconds


@dataclass(eq=False)
class _Save:
    """One try to save one update."""

    update: int
    position: int
    state: str  # JSON
    scratch: Path
    began: float = field(default_factory=time.monotonic)
    entry: dict[str, Any] = field(default_factory=dict)  # size and hash of this rank's file
    moved: int = 0  # bytes written by this rank
    stall: float = 0.0  # seconds that the host waited
    copied: float = 0.0  # seconds that the device was busy with the copy
    notice: str = ""
    given_up: bool = False

    @property
    def name(self) -> str:
        return f"update-{self.update:08d}"

    def note(self, moved: int) -> None:
        """What the thread has written so far; ends it where the save was given up."""
        self.moved = moved
        if self.given_up:
            raise RuntimeError("the save was given up")


def _rest(seconds: float, beat: Callable[[], None]) -> None:
    """Sleep, with a sign of life every second."""
    ends = time.monotonic() + seconds
    while (left := ends - time.monotonic()) > 0:
        beat()
        time.sleep(min(1.0, left))
