"""What a training step costs over size, tokens, mask ratio and batch, beside what the FLOP model predicts.

    python benchmarks/step_cost.py [--quick] [--save] [--device cuda]

Prints a table, then one JSON object. The step is that of `step.py`: our masked autoencoder in bf16 autocast
on a batch as the loader makes it, backward, fused AdamW. One thing varies at a time from a common setting.
The model knows matrix products only (`pretrain/cost.py`) and runs them all at one rate, the largest that any
row of the table reached; `× model` is the measured time over that prediction, so it is 1 at best. Rows are
measured in interleaved rounds; medians are reported.

Then the times are explained by a fit with non-negative weights over the rows: products of linear layers (with
them what else is done to each token, which grows alike), attention's products, weights (casts, gradients,
AdamW), and a constant a step. The sentences at the end are computed from it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

sys.path[0] = str(Path(__file__).parents[1])  # this folder would hide packages

import numpy as np  # noqa: E402
import torch  # noqa: E402
from scipy.optimize import nnls  # noqa: E402

from benchmarks import step  # noqa: E402
from benchmarks.step_peers import PATCH, Setting  # noqa: E402
from model.config import EncoderConfig  # noqa: E402
from model.cost import parameter_count  # noqa: E402
from pretrain.cost import crop_flops  # noqa: E402
from pretrain.masking import places  # noqa: E402
from pretrain.objective import ObjectiveConfig  # noqa: E402

TERMS = ("linear layers", "attention", "weights", "constant")


class Row(NamedTuple):
    """One line: what varies in it, and its setting."""

    varied: str
    setting: Setting


class Plan(NamedTuple):
    """The common setting and what is varied from it: crop edges, batches, mask ratios, sizes."""

    common: Setting
    crops: tuple[int, ...]
    batches: tuple[int, ...]
    ratios: tuple[float, ...]
    sizes: tuple[str, ...]

    def rows(self) -> list[Row]:
        """Settings that differ from the common one in one respect."""
        # Fewer crops of more tokens, so that what differs is how many attend to each other.
        whole = self.common.batch * self.common.tokens
        batch = {crop: max(1, whole // (crop // PATCH) ** 3) for crop in self.crops}
        found = [Row("tokens", self.common._replace(crop=crop, batch=n)) for crop, n in batch.items()]
        found += [Row("batch", self.common._replace(batch=n)) for n in self.batches]
        found += [Row("mask ratio", self.common._replace(mask_ratio=ratio)) for ratio in self.ratios]
        return found + [Row("size", self.common._replace(size=size)) for size in self.sizes]


RATIOS = (0.5, 0.6, 0.75, 0.9)
QUICK = Plan(Setting("tiny", 64, 2), (32, 48, 64, 80), (1, 2, 4), (0.5, 0.75, 0.9), ("tiny", "small"))
FULL = Plan(Setting("small", 64, 4), (48, 64, 80, 96, 128), (1, 2, 4, 8), RATIOS, ("tiny", "small", "base"))
CUDA = Plan(Setting("base", 128, 16), (48, 64, 96, 128), (1, 4, 16, 64), RATIOS, ("small", "base", "large"))


def parts(setting: Setting) -> tuple[float, list[float]]:
    """Operations of a step by the FLOP model; and the terms of the fit, in units of 10^9."""
    encoder = EncoderConfig(size=setting.size)
    objective = ObjectiveConfig(mask_ratio=setting.mask_ratio)
    visible, predicted = places(setting.tokens, objective)
    width, depth, _ = encoder.shape
    decoder_width, decoder_depth = objective.decoder_width, objective.decoder_depth
    whole = visible + predicted
    attention = 3 * 4 * (depth * visible**2 * width + decoder_depth * whole**2 * decoder_width)
    flops = crop_flops(encoder, objective, "volume", setting.tokens)
    weights = parameter_count(encoder) + decoder_depth * 12 * decoder_width**2
    n = setting.batch
    terms = [n * (flops - attention), n * attention, weights, 1e9]
    return float(n * flops), [term / 1e9 for term in terms]


def measure(table: list[Row], device: str, rounds: int) -> list[list[float]]:
    """Seconds a step of each row in each round."""
    settings = list(dict.fromkeys(row.setting for row in table))
    times: dict[Setting, list[float]] = {setting: [] for setting in settings}
    mode = step.Mode("bf16 autocast", compiled=device == "cuda")
    if device == "cuda":
        for setting in settings:
            contestant = step.build("ours", setting, mode, device)
            contestant.seconds(5)
            times[setting] = [contestant.seconds(10) for _ in range(rounds)]
            del contestant
            step.free(device)
    else:
        contestants = [step.build("ours", setting, mode, device) for setting in settings]
        for contestant in contestants:
            contestant.step()
        for _ in range(rounds):
            for setting, contestant in zip(settings, contestants):
                times[setting].append(contestant.seconds())
    return [times[row.setting] for row in table]


def fit(terms: np.ndarray, seconds: np.ndarray) -> np.ndarray:
    """Weights >= 0 of the terms with the least squared relative error."""
    scale = terms.max(0)
    weights, _ = nnls(terms / scale / seconds[:, None], np.ones(len(seconds)))
    return weights / scale


def sentences(table: list[Row], seconds: np.ndarray, beyond: np.ndarray, shares: np.ndarray) -> list[str]:
    """Where and why the model is left, from the figures."""
    best, worst = int(beyond.argmin()), int(beyond.argmax())

    def named(i: int) -> str:
        s = table[i].setting
        return f"{s.size}, {s.batch} × {s.tokens} tokens, mask {s.mask_ratio}"

    found = [
        f"The model's rate is that of {named(best)}; it is left furthest at {named(worst)}: "
        f"{beyond[worst]:.2f} × the prediction."
    ]
    for varied in dict.fromkeys(row.varied for row in table):
        mine = [i for i, row in enumerate(table) if row.varied == varied]
        low, high = mine[0], mine[-1]
        grown = shares[high] - shares[low]
        term = int(np.abs(grown).argmax())
        found.append(
            f"Over {varied}: {beyond[low]:.2f} × the model at {named(low)}, {beyond[high]:.2f} × at "
            f"{named(high)}; by the fit {TERMS[term]} "
            f"{'grows' if grown[term] > 0 else 'shrinks'} from {shares[low, term]:.0%} to "
            f"{shares[high, term]:.0%} of the step."
        )
    return found


def main() -> None:
    """Print the table, the sentences and the JSON line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="small settings: under 50 s on 2 cores")
    parser.add_argument("--save", action="store_true", help="keep the JSON under benchmarks/results/")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, help="of each row (5, quick 3)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    about = step.machine(args.device, args.threads)
    plan = CUDA if args.device == "cuda" else QUICK if args.quick else FULL
    table = plan.rows()
    matmul = step.matmul_rate(torch.bfloat16, args.device, 3)
    spent = measure(table, args.device, args.rounds or (3 if args.quick else 5))
    seconds = np.array([statistics.median(s) for s in spent])
    flops = np.array([parts(row.setting)[0] for row in table])
    terms = np.array([parts(row.setting)[1] for row in table])
    rate = float((flops / seconds).max())
    predicted = flops / rate
    beyond = seconds / predicted
    weights = fit(terms, seconds)
    fitted = terms * weights
    shares = fitted / fitted.sum(1, keepdims=True)
    matmul = max(matmul, step.matmul_rate(torch.bfloat16, args.device, 3))

    print(
        f"Largest rate {rate / 1e9:.0f} GFLOP/s, {rate / matmul:.0%} of a 4096³ bf16 matrix product; load "
        f"{os.getloadavg()[0]:.1f} on {os.cpu_count()} cores\n\n"
        f"{'varied':11}{'size':7}{'tokens':>7}{'batch':>6}{'mask':>6}{'GFLOP':>8}{'s/step':>9}"
        f"{'model, s':>10}{'× model':>9}  by the fit: linear, attention, weights, constant"
    )
    lines: list[dict[str, Any]] = []
    for row, work, took, should, over, share in zip(table, flops, seconds, predicted, beyond, shares):
        s = row.setting
        print(
            f"{row.varied:11}{s.size:7}{s.tokens:7}{s.batch:6}{s.mask_ratio:6.2f}{work / 1e9:8.1f}{took:9.4f}"
            f"{should:10.4f}{over:9.2f}  " + "  ".join(f"{part:4.0%}" for part in share)
        )
        lines.append(
            {
                "varied": row.varied, "size": s.size, "tokens": s.tokens, "batch": s.batch,
                "mask_ratio": s.mask_ratio, "gflop": round(work / 1e9, 2), "step_s": round(float(took), 5),
                "model_s": round(float(should), 5), "over_model": round(float(over), 3),
                "fitted_shares": dict(zip(TERMS, map(float, share.round(3)))),
            }
        )  # fmt: skip
    error = np.abs(fitted.sum(1) / seconds - 1)
    said = sentences(table, seconds, beyond, shares)
    said.append(f"The fit is off by {np.median(error):.0%} in the median and {error.max():.0%} at worst.")
    print("\n" + "\n".join(said))
    per_unit = dict(zip(("s_per_gflop_linear", "s_per_gflop_attention"), map(float, weights[:2])))
    result = {
        "rate_gflop_per_s": round(rate / 1e9, 1), "matmul_gflop_per_s": round(matmul / 1e9, 1),
        "largest_over_model": round(float(beyond.max()), 3),
        "fit_error_median": round(float(np.median(error)), 4),
        **{name: round(value, 6) for name, value in per_unit.items()},
        "rows": lines, "sentences": said, **about, "quick": args.quick,
    }  # fmt: skip
    if args.save:
        kept = Path(__file__).parent / "results" / f"step-cost-{args.device}-{date.today().isoformat()}.json"
        kept.parent.mkdir(exist_ok=True)
        kept.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
