"""What the engine costs: time of an update beside a plain PyTorch loop, and updates lost to a checkpoint.

    python benchmarks/engine.py [--quick]

Both loops train the same transformer on the same batches on one process, in the same precision and with the
same number of threads. `overhead_share` is the share of an engine update that the plain loop does not need;
`checkpoint_stall_steps` is how many plain updates fit into one blocking save.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

sys.path[0] = str(
    Path(__file__).parents[1]
)  # this file's own folder would hide the package it is named after

from engine.recipe import EngineConfig, Frozen  # noqa: E402
from engine.train import train  # noqa: E402

WARM = 3  # updates left out of the medians


class Recipe(Frozen):
    width: int = 256


class Model(nn.Module):
    """A few transformer blocks that reproduce their input."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        block = nn.TransformerEncoderLayer(
            width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(block, depth, enable_nested_tensor=False)

    def forward(self, batch: Tensor) -> tuple[Tensor, dict[str, Any]]:
        error = (self.blocks(batch).float() - batch.roll(1, 1)).square()
        return error.mean(), {"loss/all": (error.sum().detach(), float(error.numel()))}


class BenchmarkTask:
    """`engine.task.Task` whose batches note when they are taken."""

    samples_per_update = 8

    def __init__(self, width: int, depth: int) -> None:
        self.model = Model(width, depth)
        self.width, self.times = width, list[float]()
        self.example = torch.randn(8, 128, width, generator=torch.Generator().manual_seed(1))

    def micro_steps(self, world: int) -> int:
        return 1

    def batches(self, start_update: int, rank: int, world: int) -> Iterator[Tensor]:
        while True:
            self.times.append(time.perf_counter())
            yield self.example

    def recipe(self) -> Recipe:
        return Recipe(width=self.width)

    def data_identity(self) -> dict[str, str]:
        return {}

    def evaluate(self, update: int, rank: int, world: int, writer: Any) -> dict[str, float]:
        return {}

    def pictures(self, update: int, rank: int, world: int, writer: Any) -> None:
        return None

    def export(self, state: Mapping[str, Tensor], folder: Path) -> None:
        save_file(dict(state), folder / "encoder.safetensors")

    def optimizer_groups(self) -> list[dict[str, Any]]:
        return [{"params": list(self.model.parameters())}]


def plain_seconds(width: int, depth: int, updates: int) -> float:
    """Median seconds of an update of the plain loop."""
    task = BenchmarkTask(width, depth)
    adam = torch.optim.AdamW(task.optimizer_groups(), lr=1e-3, fused=True)
    batches, spent = task.batches(0, 0, 1), []
    for _ in range(updates):
        began = time.perf_counter()
        adam.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss, _ = task.model(next(batches))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(task.model.parameters(), 1.0)
        adam.step()
        spent.append(time.perf_counter() - began)
    return statistics.median(spent[WARM:])


def engine_seconds(width: int, depth: int, updates: int, stage: int) -> tuple[float, float]:
    """Median seconds of an update of the engine, and of a checkpoint."""
    task = BenchmarkTask(width, depth)
    config = EngineConfig(
        updates=updates,
        zero_stage=stage,
        checkpoint_every=updates // 2,
        log_every=10**6,
        device="cpu",
        warmup=2,
    )
    with tempfile.TemporaryDirectory() as folder:
        train(task, config, folder)
        events = [
            json.loads(line) for line in (Path(folder) / "logs" / "rank-000.jsonl").read_text().splitlines()
        ]
    saves = [e["seconds"] for e in events if e["event"] == "checkpoint"]
    steps = [b - a for a, b in zip(task.times, task.times[1:], strict=False)]
    return statistics.median(steps[WARM:]), statistics.median(saves)


def main() -> None:
    """Print the table and the JSON line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="under 50 seconds on 2 cores")
    updates, depth = (20, 4) if parser.parse_args().quick else (60, 8)
    plain = plain_seconds(256, depth, updates)
    rows = {stage: engine_seconds(256, depth, updates, stage) for stage in (0, 1, 2, 3)}
    print(f"{'loop':<10}{'ms an update':>14}{'overhead':>10}{'ms a save':>11}{'updates a save':>16}")
    print(f"{'plain':<10}{1e3 * plain:>14.1f}")
    for stage, (step, save) in rows.items():
        times = f"{1e3 * step:>14.1f}{1 - plain / step:>10.1%}{1e3 * save:>11.1f}"
        print(f"ZeRO {stage:<5}{times}{save / plain:>16.2f}")
    step, save = rows[1]
    overhead, stall = round(1 - plain / step, 4), round(save / plain, 3)
    print(json.dumps({"overhead_share": overhead, "checkpoint_stall_steps": stall}))


if __name__ == "__main__":
    main()
