"""A short real pretraining run that is harmed again and again, beside the same run left alone.

    python benchmarks/chaos.py [--faults 100] [--seed 0] [--quick] [--save] [--out DIR]

`medfm launch local` trains a tiny network on shards of phantoms, 2 processes with a loader process each.
First without faults; then processes are killed, stopped and told to end, checkpoints are damaged and the disk
is filled, one fault after another at random instants: in start-up, between updates, during saves, at the end.
Where the launcher has ended it is started again as a user would, with the same command. At the end weights,
moments and positions must be those of the run without faults, bit for bit.

`recovered` counts the faults after which the run went on as documented: after SIGTERM, SIGUSR1 or Ctrl-C it
has saved, lost no update and returned 75; a damaged checkpoint was left out; a full disk ended nothing.
`hangs`: times that the run showed no sign of life for longer than its watchdog and one start take. The run
folder lies on a small file system of its own, which needs root; without it full disks are `skipped`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # this file's own folder would hide the packages that its neighbours are named after

from benchmarks.chaos_faults import (  # noqa: E402
    ASKS,
    CUT,
    FLIP,
    FULL,
    QUICK,
    STOPPED,
    STOPPED_KILLED,
    Disk,
    Fault,
    damage,
    draw,
    find,
    send,
)
from benchmarks.chaos_run import Run, differences  # noqa: E402

HANG_MINUTES = 0.5
STILL_SECONDS = 60 * HANG_MINUTES + 90
"""Without a sign of life for so long the run hangs: the watchdog's time, what it and the launcher leave to
the processes for their stacks, and a start on a busy machine."""
RECIPE: dict[str, dict[str, Any]] = {
    "tokens": {"slots": 64, "classes": [1, 2]},
    "mixture": {"groups": 2},
    "encoder": {"width": 48, "depth": 2, "heads": 2},
    "objective": {"decoder_width": 48, "decoder_depth": 1, "decoder_heads": 2},
    "evaluation": {"batches": 1, "mask_ratios": [0.9], "pictures": 0},
    "engine": {
        "warmup": 5, "checkpoint_every": 5, "keep_last": 3, "log_every": 5, "workers": 1, "threads": 1,
        "hang_minutes": HANG_MINUTES, "save_minutes": 2,
    },
}  # fmt: skip


class Chaos:
    """Does faults to a run, one after another, and sees it through to its end.

    Args:
        run: not started yet.
        disk: where its folder lies.
        updates: at which it is finished.
        seed: of what is left to chance when a fault is done.
        evidence: folder for what is left of a fault that was not recovered from.
    """

    def __init__(self, run: Run, disk: Disk, updates: int, seed: int, evidence: Path) -> None:
        self.run, self.disk, self.updates, self.evidence = run, disk, updates, evidence
        self.chance = random.Random(seed)
        self.done: list[Fault] = []
        self.pending: list[Fault] = []
        self.hangs = self.exits = self.starts = 0
        self.finished = False
        self.surprises: list[str] = []
        self._damaged: set[tuple[Path, int]] = set()
        self._ended = False

    def go(self, faults: Sequence[Fault]) -> None:
        """All faults, then the rest of the run."""
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
            self._until(lambda: time.time() >= self.run.began + fault.wait)
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

    def _do(self, fault: Fault) -> None:
        run = self.run
        fault.fired, fault.at, fault.launch = time.time(), run.progress.update, run.launches
        fault.starts, fault.exits = len(run.progress.starts), self.exits
        fault.early = run.torchrun() is None
        self.pending.append(fault)
        self.done.append(fault)
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
        if self.run.code() is None and time.monotonic() - self.run.progress.moved > STILL_SECONDS:
            self._hang()

    def _start(self) -> None:
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
        send(self.run.processes(), signal.SIGUSR2)  # stacks
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


def make_dataset(folder: Path) -> Path:
    """Shards of a few phantoms."""
    from launch.phantoms import write

    source = write(folder / "phantoms", 3).sources
    words = ["shards", "build", str(source), "--out", str(folder / "dataset"), "--workers", "2"]
    _medfm([*words, "--split", "1,0,0"], folder / "build.txt")
    return folder / "dataset"


def _medfm(words: Sequence[str], console: Path) -> None:
    with open(console, "ab") as output:
        command = [sys.executable, "-m", "launch.cli", *words]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run(command, cwd=ROOT, env=environment, stdout=output, stderr=output, check=True)


def write_recipe(folder: Path, dataset: Path, updates: int) -> Path:
    """The recipe of both runs."""
    import yaml

    recipe = {"data": {"root": str(dataset)}, **RECIPE}
    recipe["engine"] = {**recipe["engine"], "updates": updates}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    return path


def undisturbed(run: Run) -> float:
    """Run to the end without faults; seconds from the start to the first update."""
    run.start()
    first = 0.0
    while run.code() is None:
        time.sleep(0.05)
        run.look()
        first = first or run.progress.stepped
    if run.code() != 0:
        raise SystemExit(f"the run without faults ended with {run.code()}: {run.console}")
    run.look()
    return (first or time.time()) - run.began


def table(faults: Sequence[Fault], skipped: int) -> str:
    """A line for every kind and target."""
    head = ("fault", "target", "count", "recovered", "updates lost", "seconds to recover")
    lines = ["{:<18}{:<19}{:>6}{:>11}{:>18}{:>22}".format(*head)]
    for kind, target in sorted({(fault.kind, fault.target) for fault in faults}):
        these = [fault for fault in faults if (fault.kind, fault.target) == (kind, target)]
        line = f"{kind:<18}{target:<19}{len(these):>6}{sum(fault.recovered for fault in these):>11}"
        line += f"{_middle([float(fault.lost or 0) for fault in these], 0):>18}"
        lines.append(line + f"{_middle([f.seconds for f in these if f.seconds is not None], 1):>22}")
    if skipped:
        lines.append(f"{FULL:<18}{'run folder':<19}  {skipped} skipped: mounting a file system needs root")
    return "\n".join(lines)


def _middle(values: Sequence[float], digits: int) -> str:
    """Median and largest."""
    if not values:
        return "-"
    return f"{statistics.median(values):.{digits}f} (most {max(values):.{digits}f})"


def main() -> None:
    """Print progress, the table and the JSON line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--faults", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a few faults: under 50 s on 2 cores")
    parser.add_argument("--save", action="store_true", help="keep the JSON under benchmarks/results/")
    parser.add_argument("--out", type=Path, help="keep all logs here; else only where something went wrong")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    began = time.monotonic()
    work = (args.out or Path(tempfile.mkdtemp(prefix="medfm-chaos-"))).resolve()
    work.mkdir(parents=True, exist_ok=True)
    updates = 45 if args.quick else 40 + 8 * args.faults
    recipe = write_recipe(work, make_dataset(work), updates)
    print(f"shards built after {time.monotonic() - began:.0f} s", flush=True)

    def medfm(run: Path) -> Run:
        words = ["launch", "local", str(recipe), "--processes", "2", "--run", str(run)]
        return Run(run, [sys.executable, "-m", "launch.cli", *words], ROOT, work / f"{run.name}.txt")

    reference = medfm(work / "undisturbed")
    disk = Disk(work / "disk", 128)
    run = medfm(disk.folder / "harmed")
    try:
        start_seconds = undisturbed(reference)
        print(f"{updates} updates without a fault; the first came after {start_seconds:.1f} s", flush=True)
        if args.quick:
            faults = [Fault(*row) for row in QUICK]
            for number, fault in enumerate(faults):
                fault.update, fault.hold, fault.wait = 7 + 10 * number, 1.0, 0.2
        else:
            faults = draw(args.faults, args.seed, updates, start_seconds)
        kept = [fault for fault in faults if fault.kind != FULL or disk.mounted]
        chaos = Chaos(run, disk, updates, args.seed, work / "evidence")
        chaos.go(kept)
        found = differences(reference.folder, run.folder)
        left = run.processes()
        recovered = sum(fault.recovered for fault in chaos.done)
        good = not (found or left or chaos.hangs or chaos.surprises) and recovered == len(chaos.done)
        if not good or args.out:
            disk.keep(work / "evidence")
    finally:
        for each in (run, reference):
            each.kill()
        disk.close()
    print(table(chaos.done, len(faults) - len(kept)))
    for line in (*found[:10], *chaos.surprises):
        print(line)
    if left:
        print(f"{len(left)} processes of the run are left behind")
    result = {
        "faults": len(chaos.done), "recovered": recovered, "identical": not found, "hangs": chaos.hangs,
        "skipped": len(faults) - len(kept), "surprises": len(chaos.surprises), "left_behind": len(left),
        "updates": updates, "launches": run.launches, "seed": args.seed, "quick": args.quick,
        "updates_lost_median": statistics.median(fault.lost or 0 for fault in chaos.done),
        "updates_lost_max": max(fault.lost or 0 for fault in chaos.done),
        "seconds_to_recover_median": round(
            statistics.median(f.seconds for f in chaos.done if f.seconds is not None), 1
        ),
        "seconds_to_start": round(start_seconds, 1), "seconds": round(time.monotonic() - began),
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
    }  # fmt: skip
    if args.save:
        kept_at = ROOT / "benchmarks" / "results" / f"chaos-{result['date']}.json"
        kept_at.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if good and not args.out:
        shutil.rmtree(work)
    else:
        print(f"logs are in {work}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
