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
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

sys.path[0] = str(
    Path(__file__).parents[1]
)  # this file's own folder would hide the packages that its neighbours are named after

from benchmarks.chaos_driver import HANG_MINUTES, Chaos, GivenUp  # noqa: E402
from benchmarks.chaos_faults import FLIP, FULL, NEWEST, Disk, Fault, draw  # noqa: E402
from benchmarks.chaos_run import ROOT, Run, differences, finish  # noqa: E402

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


def quick() -> list[Fault]:
    """A few faults that need only one more start of the training itself."""
    return [
        Fault("SIGKILL", "launcher", "start-up", wait=0.3),
        Fault("SIGTERM", "launcher", "start-up", wait=1.0),
        Fault("SIGKILL", "torchrun", "start-up", wait=1.5),
        Fault(FULL, "run folder", "save", update=7, hold=1.0),
        Fault(FLIP, NEWEST, "update", update=16),
    ]


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
    updates = 30 if args.quick else 40 + 12 * args.faults
    recipe = write_recipe(work, make_dataset(work), updates)
    print(f"shards built after {time.monotonic() - began:.0f} s", flush=True)

    def medfm(run: Path) -> Run:
        words = ["launch", "local", str(recipe), "--processes", "2", "--run", str(run)]
        return Run(run, [sys.executable, "-m", "launch.cli", *words], work / f"{run.name}.txt")

    reference = medfm(work / "undisturbed")
    disk = Disk(work / "disk", 128)
    run = medfm(disk.folder / "harmed")
    try:
        reference.start()
        if args.quick:  # both runs at once
            start_seconds, faults = 0.0, quick()
        else:
            start_seconds = finish(reference)
            print(
                f"{updates} updates without a fault; the first came after {start_seconds:.1f} s", flush=True
            )
            faults = draw(args.faults, args.seed, updates, start_seconds)
        kept = [fault for fault in faults if fault.kind != FULL or disk.mounted]
        chaos = Chaos(run, disk, updates, args.seed, work / "evidence")
        try:
            chaos.go(kept)
            finish(reference)
            found = differences(reference.folder, run.folder)
        except GivenUp as error:
            found = [str(error)]
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
    lost = [fault.lost or 0 for fault in chaos.done] or [0]
    seconds = [fault.seconds for fault in chaos.done if fault.seconds is not None] or [0.0]
    result = {
        "faults": len(chaos.done), "recovered": recovered, "identical": not found, "hangs": chaos.hangs,
        "skipped": len(faults) - len(kept), "surprises": len(chaos.surprises), "left_behind": len(left),
        "longest_silence_s": round(chaos.silence, 1),
        "updates": updates, "launches": run.launches, "seed": args.seed, "quick": args.quick,
        "updates_lost_median": statistics.median(lost), "updates_lost_max": max(lost),
        "seconds_to_recover_median": round(statistics.median(seconds), 1),
        "seconds_to_start": round(start_seconds, 1) or None, "seconds": round(time.monotonic() - began),
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
