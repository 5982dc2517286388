"""Does faults to a run, one after another, starts it again as its user would, and says what came of each."""

from __future__ import annotations

import json
import random
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path

from benchmarks.chaos_faults import (
    ASKS,
    CUT,
    FLIP,
    FULL,
    STOPPED,
    STOPPED_KILLED,
    Disk,
    Fault,
    damage,
    find,
    send,
)  # fmt: skip
from benchmarks.chaos_run import Run
from engine.signals import STACKS

HANG_MINUTES = 0.5
STILL_SECONDS = 60 * HANG_MINUTES + 90
"""Without a sign of life for so long the run hangs: the watchdog's time, what it and the launcher leave to
the processes for their stacks, and a start on a busy machine."""
MOST_STARTS = 6  # in a row without a fault between and without an update


class GivenUp(RuntimeError):
    """The run no longer goes on, however often it is started."""


class Chaos:
    """Does faults to a run, one after another, and sees it through to its end.

    Args:
        run: not started yet.
        disk: where its folder lies.
        updates: at which it is finished.
        seed: of what is left to chance when a fault is done.
        evidence: folder for what is left of a fault that was not recovered from.

    Attributes:
        done: the faults so far.
        hangs: times that the run was silent for longer than `STILL_SECONDS`.
        silence: the longest time without a sign of life, in seconds.
        surprises: ends of the launcher that no fault explains.
    """

    def __init__(self, run: Run, disk: Disk, updates: int, seed: int, evidence: Path) -> None:
        self.run, self.disk, self.updates, self.evidence = run, disk, updates, evidence
        self.chance = random.Random(seed)
        self.done: list[Fault] = []
        self.pending: list[Fault] = []
        self.hangs = self.exits = self.starts = 0
        self.finished = False
        self.silence = 0.0
        self.surprises: list[str] = []
        self._damaged: set[tuple[Path, int]] = set()
        self._ended = False
        self._fruitless = 0  # starts since an update or a fault

    def go(self, faults: Sequence[Fault]) -> None:
        """All faults, then the rest of the run.

        Raises:
            GivenUp: it does not go on.
        """
        for number, fault in enumerate(faults):
            self._reach(fault)
            self._do(fault)
            following = faults[number + 1].instant if number + 1 < len(faults) else ""
            if fault.ends_launch:
                self._until(partial(self._over, fault))
            if not (fault.ends_launch and following == "start-up"):
                self._until(lambda: not self.pending)
        self._until(lambda: self.finished and not self.pending)

    def _reach(self, fault: Fault) -> None:
        """Wait for the fault's instant, and for its target."""
        if self.run.launches == 0 or self.run.code() is not None:
            self._start()
        if fault.instant == "start-up":
            self._until(lambda: time.time() >= self.run.began + fault.wait or self._training())
        else:
            near = self.updates - 2 if fault.instant == "end" else min(fault.update, self.updates - 2)
            self._until(lambda: self.finished or (self._training() and self.run.progress.update >= near))
            if fault.instant == "save":
                self._until(self.run.saving, within=10.0, every=0.002)
            self._rest(fault.wait)
        if fault.kind in (FLIP, CUT):
            self._until(lambda: len(self._good()) >= 2)
        elif fault.kind != FULL:
            self._until(lambda: find(self.run, fault.target) or self.finished)
        if self.finished:  # too late: it is done to another launch, which finds nothing left to do
            fault.instant, fault.hold = "start-up", min(fault.hold, 1.0)
            fault.target = fault.target if fault.kind in (FLIP, CUT, FULL) else "launcher"
            fault.kind = STOPPED_KILLED if fault.kind == STOPPED else fault.kind
            self._start()
            self._rest(2 * self.chance.random())

    def _do(self, fault: Fault) -> None:
        run = self.run
        fault.fired, fault.at, fault.launch = time.time(), run.progress.update, run.launches
        fault.starts, fault.exits = len(run.progress.starts), self.exits
        fault.early = run.torchrun() is None
        self.pending.append(fault)
        self.done.append(fault)
        self._fruitless = 0
        if fault.kind in (FLIP, CUT):
            self._damage(fault)
        elif fault.kind == FULL:
            until = time.monotonic() + fault.hold

            def enough() -> bool:
                self._tick(0.02)
                return time.monotonic() > until

            self.disk.fill(enough)
            self.disk.free()
            fault.fired = time.time()
        else:
            targets = find(run, fault.target)
            if fault.kind in (STOPPED, STOPPED_KILLED):
                send(targets, signal.SIGSTOP)
                if fault.kind == STOPPED_KILLED:
                    self._rest(fault.hold)
                    send(targets, signal.SIGKILL)
            else:
                send(targets, signal.Signals[fault.kind])
                if fault.again:
                    self._rest(fault.again)
                    send(targets, signal.Signals[fault.kind])

    def _damage(self, fault: Fault) -> None:
        """End the launch at once and damage the newest checkpoint before the next."""
        send([self.run.launcher], signal.SIGKILL)
        end = time.monotonic() + 10
        while self.run.processes() and time.monotonic() < end:
            time.sleep(0.02)
        newest = self._good()[-1]
        fault.damaged = newest.name
        what = damage(newest, fault.kind, self.chance)
        self._damaged.add(_identity(newest))
        self._note(f"{newest.name}: {what}")

    def _good(self) -> list[Path]:
        """Whole checkpoints that no fault has damaged."""
        with suppress(FileNotFoundError):  # one was deleted or renamed meanwhile
            return [path for path in self.run.checkpoints() if _identity(path) not in self._damaged]
        return []

    def _over(self, fault: Fault) -> bool:
        """Whether the launch that the fault was done to has ended."""
        return bool(fault.trouble) or self.run.launches > fault.launch or self.exits > fault.exits

    def _training(self) -> bool:
        """Whether the launch that lives has done an update."""
        progress = self.run.progress
        return bool(progress.starts) and progress.stepped > progress.starts[-1].time > self.run.began

    def _until(
        self, reached: Callable[[], object], within: float = float("inf"), every: float = 0.03
    ) -> None:
        end = time.monotonic() + within
        while not reached() and time.monotonic() < end:
            self._tick(every)

    def _rest(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self._tick(min(0.02, seconds))

    def _tick(self, seconds: float) -> None:
        """Let the run go on for a moment, and look after it as its user would."""
        time.sleep(seconds)
        self.run.look()
        self._hear_starts()
        code = self.run.code()
        if code is not None and not self._ended:
            self._hear_end(code)
        if self._ended and not self.finished:
            self._start()
        for fault in list(self.pending):
            if self._recovered(fault):
                self._settle(fault)
        if self._training():
            self._fruitless = 0
        still = time.monotonic() - self.run.progress.moved if self.run.code() is None else 0.0
        self.silence = max(self.silence, still)
        if still > STILL_SECONDS:
            self._hang()

    def _start(self) -> None:
        self._fruitless += 1
        if self._fruitless > MOST_STARTS:
            self._keep("given-up")
            raise GivenUp(f"the run did not go on in {MOST_STARTS} launches: {self.run.console}")
        self._ended = self.finished = False
        self.run.start()

    def _hear_starts(self) -> None:
        """Updates that a launch does again are put down to the fault that ended the one before."""
        starts = self.run.progress.starts
        for start in starts[self.starts :]:
            waiting = [fault for fault in self.pending if fault.lost is None and fault.ends_launch]
            if waiting:
                waiting[0].lost = start.lost
            for fault in self.pending:
                if fault.damaged == f"update-{start.update:08d}":
                    fault.trouble = "the run went on from the damaged checkpoint"
        self.starts = len(starts)

    def _hear_end(self, code: int) -> None:
        self._ended, self.exits = True, self.exits + 1
        self.run.look()
        self.finished = code == 0
        if not self.pending:
            if code != 0:
                self.surprises.append(f"the launcher ended with {code} though nothing was done to it")
                self._keep(f"surprise-{len(self.surprises)}")
            return
        fault = self.pending[-1]
        fault.code = code if fault.code is None else fault.code
        if fault.kind in ASKS:
            # A process that has not begun to listen is ended by the signal itself.
            unheard = -signal.Signals[fault.kind] if fault.early else 75
            if code not in (0, 75, unheard):
                fault.trouble = f"exit code {code} instead of 75"
        elif fault.kind == FULL and fault.instant != "start-up" and code != 0:
            fault.trouble = f"a full disk ended the run with exit code {code}"

    def _recovered(self, fault: Fault) -> bool:
        progress, started = self.run.progress, len(self.run.progress.starts) > fault.starts
        if self.finished and self.exits > fault.exits:
            return True
        if fault.kind == FULL:
            return progress.stepped > fault.fired and progress.saved > fault.fired
        return started and self._over(fault) and progress.stepped > max(fault.fired, progress.starts[-1].time)

    def _settle(self, fault: Fault) -> None:
        """The run has taken a fault."""
        self.pending.remove(fault)
        fault.lost = fault.lost or 0
        if not self.pending:
            fault.seconds = time.time() - fault.fired
        if fault.kind in ASKS and fault.lost:
            fault.trouble = fault.trouble or f"{fault.lost} updates were lost"
        fault.recovered = not fault.trouble
        self._report(fault)

    def _hang(self) -> None:
        self.hangs += 1
        for fault in self.pending:
            fault.trouble = f"no sign of life for {STILL_SECONDS:.0f} s"
        send(list(self.run.ranks().values()), STACKS)
        time.sleep(2)
        self._keep("hang")
        for fault in list(self.pending):
            self._settle(fault)
        self.run.kill()

    def _report(self, fault: Fault) -> None:
        count = len(self.done) - len(self.pending)
        code = "" if fault.code is None else f"exit {fault.code}"
        seconds = "" if fault.seconds is None else f"{fault.seconds:.1f} s"
        line = f"{count:>4}  {fault.kind:<17}{fault.target:<19}{fault.instant:<9}update {fault.at:<5}"
        line += f"{code:<9}lost {fault.lost:<4}{seconds:>8}  {fault.trouble}"
        print(line, flush=True)
        if fault.trouble:
            self._keep(f"fault-{count:03d}")

    def _keep(self, name: str) -> None:
        """What the logs say at this instant."""
        folder = self.evidence / name
        folder.mkdir(parents=True, exist_ok=True)
        for path in (self.run.console, *self.run.folder.glob("logs/*"), *self.run.folder.glob("*.json*")):
            with suppress(OSError):
                (folder / path.name).write_bytes(path.read_bytes()[-200_000:])
        (folder / "faults.json").write_text(json.dumps([asdict(fault) for fault in self.done], indent=1))

    def _note(self, text: str) -> None:
        with open(self.run.console, "a", encoding="utf-8") as console:
            console.write(f"--- {time.strftime('%H:%M:%S')} {text}\n")


def _identity(checkpoint: Path) -> tuple[Path, int]:
    """Another save of the same update is another folder."""
    return checkpoint, checkpoint.stat().st_ino
