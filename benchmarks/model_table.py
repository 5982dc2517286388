"""Encoder sizes: parameters and operations, computed; and the measured cost of a training step of one size.

    python benchmarks/model_table.py [--quick] [--size tiny] [--rows 8] [--visible 128]

Prints a table and, as its last line, one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import torch

from model.config import SIZES, EncoderConfig
from model.cost import forward_flops, parameter_count, stem_flops
from model.encoder import Encoder

VISIBLE, WHOLE = 1024, 4096  # a quarter of the default row, and all of it


def table() -> list[dict[str, float | str | int]]:
    """One row a size: shape, million parameters, forward GFLOP of 1,024 and 4,096 tokens, stem included."""
    rows: list[dict[str, float | str | int]] = []
    for name, shape in SIZES.items():
        config = EncoderConfig(size=name)
        cost = [
            (forward_flops(config, ((1, n),)) + stem_flops(config, "volume", n)) / 1e9
            for n in (VISIBLE, WHOLE)
        ]
        rows.append(
            {
                "size": name,
                **shape._asdict(),
                "parameters_m": round(parameter_count(config) / 1e6, 2),
                "gflop_visible": round(cost[0], 1),
                "gflop_whole": round(cost[1], 1),
            }
        )
    return rows


def step_seconds(size: str, rows: int, visible: int, dtype: torch.dtype, repeats: int) -> float:
    """Median seconds of forward and backward of stem and trunk on rows x visible tokens."""
    torch.manual_seed(0)
    encoder = Encoder(EncoderConfig(size=size)).to(dtype).train()
    patches = torch.randn(rows, visible, 512)
    centres = torch.rand(rows * visible, 3) * 200
    times = []
    for _ in range(repeats + 1):
        encoder.zero_grad()
        start = time.perf_counter()
        tokens = encoder.stem("volume", patches).flatten(0, 1)
        (out,) = encoder.trunk(tokens, centres, ((rows, visible),))
        out.float().square().mean().backward()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="3 timed steps instead of 10")
    parser.add_argument("--size", choices=list(SIZES), default="tiny")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--visible", type=int, default=128)
    given = parser.parse_args()

    sizes = table()
    print("| size | width | depth | heads | parameters, M | GFLOP, 1,024 tokens | GFLOP, 4,096 tokens |")
    print("|---|---|---|---|---|---|---|")
    for row in sizes:
        print("| " + " | ".join(str(value) for value in row.values()) + " |")

    config = EncoderConfig(size=given.size)
    layout = ((given.rows, given.visible),)
    work = 3 * (forward_flops(config, layout) + stem_flops(config, "volume", given.rows * given.visible))
    steps = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        seconds = step_seconds(given.size, given.rows, given.visible, dtype, 3 if given.quick else 10)
        steps[name] = {"seconds": round(seconds, 4), "gflop_per_s": round(work / seconds / 1e9, 1)}
        print(
            f"{given.size}, {given.rows} x {given.visible} tokens, {name}, "
            f"{torch.get_num_threads()} thread(s): {seconds * 1e3:.0f} ms a step, "
            f"{work / seconds / 1e9:.0f} GFLOP/s"
        )
    print(json.dumps({"sizes": sizes, "step": {**vars(given), "threads": torch.get_num_threads(), **steps}}))


if __name__ == "__main__":
    main()
