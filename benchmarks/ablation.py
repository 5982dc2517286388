"""Short pretraining runs that differ in one choice: what it does to held-out loss and to the probes.

    python benchmarks/ablation.py --data DATASET [--labelled DATASET] [--updates 1000] [--seeds 2] [--save]

Each variant is `recipes/pretrain-shared.yaml` with one change, trained by `python -m pretrain` in a process
of its own with one thread, `--jobs` at a time; a run folder that is already finished is read, not run again.
The same seeds give every variant the same crops and masks. Figures are means over seeds, with the largest
distance of a seed from the mean. Held-out loss is given as a share of the interpolation baseline, mean over
modalities; it has no meaning for patches normalised one by one, which is why the probes stand beside it:
ridge regression and nearest neighbours on frozen features of labelled images (`pretrain/probe.py`), Dice.

Prints a table, then one JSON object. `--quick` makes 10 updates of two variants.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "recipes" / "pretrain-shared.yaml"
VARIANTS: dict[str, dict[str, str]] = {
    "default": {},
    "4 registers": {"encoder.registers": "4"},
    "cross-attention decoder": {"objective.decoder": "cross"},
    "norm-pix": {"objective.norm_pix": "true"},
    "positions by index": {"encoder.rotary": "index"},
    "gradient term 1.0": {"objective.gradient_weight": "1.0"},
    "half of the masked tokens": {"objective.predict_share": "0.5"},
}
COLUMNS = {
    "loss ÷ interpolation": "share",
    "linear probe": "probe/linear_dice",
    "kNN probe": "probe/knn_dice",
    "rank share": "collapse/rank_share",
}


def run(folder: Path, changes: dict[str, str], seed: int, given: argparse.Namespace) -> dict[str, float]:
    """Train one variant unless it is finished, and return its last evaluation."""
    fields = {
        "data.root": given.data,
        "engine.updates": str(given.updates),
        "engine.seed": str(seed),
        "engine.evaluate_every": "0",
        "engine.checkpoint_every": "0",
        "engine.zero_stage": "0",
        "engine.workers": "1",
        "engine.threads": "1",
        "evaluation.batches": "8",
        "probes.data": given.labelled or given.data,
        "probes.sources": f"[{given.source}]",
        "probes.cases": "34",
        **changes,
    }
    words = [word for name, value in fields.items() for word in (f"--{name}", value)]
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "output.txt", "a", encoding="utf-8") as log:
        subprocess.run(
            [sys.executable, "-m", "pretrain", str(RECIPE), "--run", str(folder), *words],
            cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, check=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
        )  # fmt: skip
    return last_evaluation(folder)


def last_evaluation(folder: Path) -> dict[str, float]:
    """The last evaluation in `metrics.jsonl`, and `share`: loss over interpolation, mean over modalities."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    found = {
        name.removeprefix("evaluate/"): value
        for line in lines
        for name, value in line.items()
        if name.startswith("evaluate/")
    }
    shares = [found[name] for name in (f"val/{m}_share" for m in ("CT", "MR", "PT", "XR")) if name in found]
    return found | ({"share": statistics.mean(shares)} if shares else {})


def table(results: dict[str, list[dict[str, float]]]) -> list[str]:
    """Markdown rows: mean over seeds ± the largest distance of a seed from it."""
    rows = [f"| variant | {' | '.join(COLUMNS)} |", "|---" * (1 + len(COLUMNS)) + "|"]
    for name, seeds in results.items():
        cells = []
        for key in COLUMNS.values():
            values = [seed[key] for seed in seeds if key in seed]
            mean = statistics.mean(values) if values else 0.0
            cells.append(f"{mean:.3f} ± {max(abs(v - mean) for v in values):.3f}" if values else "–")
        rows.append(f"| {name} | {' | '.join(cells)} |")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, help="shard dataset made by recipes/shards-shared.yaml")
    parser.add_argument(
        "--labelled", default="", help="labelled shard dataset of the probes; default: --data"
    )
    parser.add_argument("--source", default="hippocampus", help="source of the probes' images")
    parser.add_argument("--out", type=Path, default=Path("runs/ablation"), help="folder of the run folders")
    parser.add_argument("--updates", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--only", nargs="*", choices=list(VARIANTS), help="these variants only")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/ablation-DATE.json")
    given = parser.parse_args()
    variants = {name: VARIANTS[name] for name in given.only or VARIANTS}
    if given.quick:
        given.updates, given.seeds = 10, 1
        variants = {name: VARIANTS[name] for name in ("default", "cross-attention decoder")}

    given.out = given.out.resolve()
    jobs = [(name, seed) for seed in range(given.seeds) for name in variants]
    with ThreadPoolExecutor(given.jobs) as pool:
        scores = list(
            pool.map(
                lambda job: run(
                    given.out / f"{given.updates}-{job[0].replace(' ', '-')}-{job[1]}",
                    variants[job[0]],
                    job[1],
                    given,
                ),
                jobs,
            )
        )
    results: dict[str, list[dict[str, float]]] = {name: [] for name in variants}
    for (name, _), score in zip(jobs, scores):
        results[name].append(score)
    print("\n".join(table(results)))
    record = {
        "updates": given.updates,
        "seeds": given.seeds,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "date": date.today().isoformat(),
        "variants": results,
    }
    if given.save:
        path = ROOT / "benchmarks" / "results" / f"ablation-{record['date']}.json"
        path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(record))


if __name__ == "__main__":
    main()
