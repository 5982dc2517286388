"""The tables and charts of docs/results.md, from the run folders and score files that its commands leave.

python benchmarks/results.py --pretrain RUN --scores pretrained=A.json scratch=B.json --out docs/figures
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

COLOURS = {"CT": "#2563eb", "MR": "#dc2626", "PT": "#ea580c", "XR": "#16a34a"}
STYLES = ("-", "--", ":")


def held_out(run: Path) -> dict[str, list[tuple[int, float, float, float]]]:
    """modality -> [(update, loss, visible mean, interpolation)] from RUN/metrics.jsonl."""
    found: dict[str, list[tuple[int, float, float, float]]] = {}
    for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        values = json.loads(line)
        for name in COLOURS:
            key = f"evaluate/val/{name}"
            if key in values:
                point = (values["update"], *(values[key + end] for end in ("", "_mean", "_interpolation")))
                found.setdefault(name, []).append(point)
    return found


def dataset_line(root: Path) -> str:
    """Images by split, how many are stored with an error, and the largest in shares of its clip range."""
    from data_pipeline.manifest import Manifest

    manifest = Manifest.open(root)
    splits = Counter(manifest.column("split").astype(str).tolist())
    rows = [row for i in range(len(manifest)) if (row := manifest.row(i))["max_error"] > 0]
    worst = max((row["max_error"] / min(n[3] - n[2] for n in row["norm"]) for row in rows), default=0.0)
    counts = ", ".join(f"{count} {name}" for name, count in sorted(splits.items()))
    error = f"{len(rows)} stored with an error of at most {worst:.2g} of the clip range"
    return f"{len(manifest)} images ({counts}); {error}"


def pretraining_table(found: dict[str, list[tuple[int, float, float, float]]]) -> list[str]:
    """Markdown rows of the last held-out losses."""
    rows = [
        "| modality | visible mean | interpolation | network | network ÷ interpolation |",
        "|---|---|---|---|---|",
    ]
    for name, points in found.items():
        _, loss, mean, between = points[-1]
        rows.append(f"| {name} | {mean:.3f} | {between:.3f} | **{loss:.3f}** | {loss / between:.2f} |")
    return rows


def clicks_table(scores: dict[str, dict[str, Any]]) -> list[str]:
    """Markdown rows of the clicks protocol, a model a row."""
    steps = len(next(iter(scores.values()))["mean"]["dsc"])
    head = [f"{i + 1} click{'s' if i else ''}" for i in range(steps)]
    rows = [
        "| encoder | " + " | ".join(head) + " | DSC AUC | no prompt | other's click | own > other |",
        "|---" * (steps + 5) + "|",
    ]
    for name, report in scores.items():
        mean = report["mean"]
        cells = [*mean["dsc"], mean["dsc_auc"], mean["dsc_no_prompt"], mean["dsc_wrong_prompt"]]
        rows.append(
            f"| {name} | " + " | ".join(f"{v:.3f}" for v in cells) + f" | {mean['click_prefers_own']:.1%} |"
        )
    rows += ["", "| encoder | " + " | ".join(head) + " | NSD AUC |", "|---" * (steps + 2) + "|"]
    for name, report in scores.items():
        cells = [*report["mean"]["nsd"], report["mean"]["nsd_auc"]]
        rows.append(f"| {name} | " + " | ".join(f"{v:.3f}" for v in cells) + " |")
    return rows


def draw(
    found: dict[str, list[tuple[int, float, float, float]]], scores: dict[str, dict[str, Any]], out: Path
) -> None:
    """`pretrain-loss.svg` and `dice-by-click.svg`."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    matplotlib.rcParams["svg.hashsalt"] = "medfm"
    out.mkdir(parents=True, exist_ok=True)
    figure, axes = plt.subplots(1, len(found), figsize=(3 * len(found), 2.8), layout="constrained")
    for ax, (name, points) in zip(axes, found.items(), strict=True):
        updates, loss, mean, between = zip(*points, strict=True)
        ax.plot(updates, loss, color=COLOURS[name], marker="o", markersize=3, label="network")
        ax.axhline(mean[-1], color="#888", linestyle="--", label="visible mean")
        ax.axhline(between[-1], color="#888", linestyle=":", label="interpolation")
        ax.set(title=name, xlabel="update", ylim=(0, None))
    axes[0].set_ylabel("held-out loss")
    axes[-1].legend(fontsize=7)
    figure.savefig(out / "pretrain-loss.svg", metadata={"Date": None})
    figure, ax = plt.subplots(figsize=(4.2, 3), layout="constrained")
    for style, (name, report) in zip(STYLES, scores.items(), strict=False):
        dsc = report["mean"]["dsc"]
        ax.plot(range(1, len(dsc) + 1), dsc, style, marker="o", markersize=3, color="#2563eb", label=name)
    ax.set(xlabel="clicks", ylabel="Dice", xticks=range(1, len(dsc) + 1))
    ax.legend(fontsize=8)
    figure.savefig(out / "dice-by-click.svg", metadata={"Date": None})


def main() -> None:
    """Print the tables, write the charts; the last line is one JSON object."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pretrain", type=Path, required=True, help="run folder of the pretraining")
    parser.add_argument(
        "--scores", nargs="+", required=True, metavar="NAME=FILE.json", help="medfm evaluate --json"
    )
    parser.add_argument("--dataset", type=Path, help="shard dataset, for its counts")
    parser.add_argument("--out", type=Path, help="folder for the charts")
    args = parser.parse_args()
    found = held_out(args.pretrain)
    if args.dataset:
        print(dataset_line(args.dataset), end="\n\n")
    named = (pair.split("=", 1) for pair in args.scores)
    scores = {name: json.loads(Path(file).read_text(encoding="utf-8")) for name, file in named}
    print(*pretraining_table(found), "", *clicks_table(scores), sep="\n")
    if args.out:
        draw(found, scores, args.out)
    summary = {
        "held_out": {
            name: dict(zip(("loss", "mean", "interpolation"), p[-1][1:])) for name, p in found.items()
        },
        "clicks": {name: report["mean"] for name, report in scores.items()},
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
