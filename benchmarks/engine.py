"""What the engine costs beside a bare PyTorch loop, and what a checkpoint costs.

    python benchmarks/engine.py [--quick] [--blocks N] [--threads N]

Both train the same transformer (two copies with equal weights) on the same batches, in the same precision,
with the same optimizer and learning rate, in the same process. They take turns: between blocks of engine
updates the task's batch generator runs a block of the bare loop, so that what else the machine does meets
both. An engine block is held against the mean of the bare blocks before and after it; the overhead is the
median of these ratios, with a 95 % confidence interval from their ranks. The same is done with the process's
CPU seconds, its background threads counted in: on a machine that does other work too, these tell more. The
number of samples is chosen so that an update of the bare loop takes at least 200 ms; the losses of both loops
must agree.

In a second run checkpoints are saved in the background, and no bare loop runs. `checkpoint_stall_steps` is
for how many updates the step waits for a save (the copy); `write_steps` how many updates' worth of time the
updates lose that run while it is written.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
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

WIDTH, DEPTH, TOKENS = 192, 4, 256  # about as many tokens for a weight as a large batch has on a GPU
AT_LEAST = 0.25  # seconds of an update, by which the number of samples is chosen
WARM = 2  # blocks of each kind before those that count
BATCHES = 4  # that are repeated
EVERY = 12  # updates between checkpoints of the second run


class Recipe(Frozen):
    width: int = WIDTH


class Model(nn.Module):
    """A few transformer blocks that reproduce their input."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        block = nn.TransformerEncoderLayer(
            WIDTH, 4, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(block, DEPTH, enable_nested_tensor=False)

    def forward(self, batch: Tensor) -> tuple[Tensor, dict[str, Any]]:
        error = (self.blocks(batch).float() - batch.roll(1, 1)).square()
        return error.mean(), {"loss/all": (error.sum().detach(), float(error.numel()))}


class Bare:
    """The loop that anybody would write."""

    def __init__(self, config: EngineConfig) -> None:
        self.model, self.clip = Model(), config.clip
        self.adam = torch.optim.AdamW(
            self.model.parameters(),
            lr=config.lr,
            betas=config.betas,
            eps=config.eps,
            weight_decay=config.weight_decay,
            fused=True,
        )

    def update(self, batch: Tensor) -> float:
        self.adam.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss, _ = self.model(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.adam.step()
        return float(loss.item())


def draw(samples: int) -> list[Tensor]:
    """The batches that are repeated."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(samples, TOKENS, WIDTH, generator=generator) for _ in range(BATCHES)]


def enough_samples() -> int:
    """Samples with which an update of the bare loop takes long enough."""
    bare, (batch, *_), times = Bare(EngineConfig()), draw(2), []
    for _ in range(5):
        began = time.process_time()
        bare.update(batch)
        times.append(time.process_time() - began)
    return math.ceil(2 * AT_LEAST * torch.get_num_threads() / min(times))


class Clock:
    """Wall and CPU seconds since the last look."""

    def __init__(self) -> None:
        self._last = self._now()

    def lap(self) -> tuple[float, float]:
        before, self._last = self._last, self._now()
        return self._last[0] - before[0], self._last[1] - before[1]

    def _now(self) -> tuple[float, float]:
        return time.perf_counter(), time.process_time()


class BenchmarkTask:
    """`engine.task.Task` that runs blocks of the bare loop, if there is one, between blocks of its own.

    Attributes:
        engine_times, bare_times: wall and CPU seconds of each block, in turn; the bare ones lie between those
            of the engine.
    """

    def __init__(self, samples: int, bare: Bare | None = None, block: int = 1) -> None:
        self.model: nn.Module = Model()
        self.bare, self.block = bare, block
        self.samples_per_update, self.examples = samples, draw(samples)
        self.engine_times: list[tuple[float, float]] = []
        self.bare_times: list[tuple[float, float]] = []
        self.bare_losses: list[float] = []

    def micro_steps(self, world: int) -> int:
        return 1

    def batches(self, start_update: int, rank: int, world: int) -> Iterator[Tensor]:
        update = start_update
        while True:
            clock = Clock()
            if self.bare is not None:
                for number in range(update, update + self.block):
                    self.bare_losses.append(self.bare.update(self.examples[number % BATCHES]))
                self.bare_times.append(clock.lap())
            for _ in range(self.block):
                yield self.examples[update % BATCHES]
                update += 1
            self.engine_times.append(clock.lap())

    def recipe(self) -> Recipe:
        return Recipe()

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


@dataclass(frozen=True)
class Share:
    """A median with its 95 % confidence interval."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Overhead:
    """Of the engine over the bare loop, as shares of the bare loop's wall and CPU time; how far the losses
    differ, relative."""

    wall: Share
    cpu: Share
    bare_seconds: float
    difference: float


def config_of(updates: int, threads: int, checkpoint_every: int = 0) -> EngineConfig:
    """As a run has it: logged every ten updates, TensorBoard."""
    return EngineConfig(
        updates=updates,
        schedule="constant",
        warmup=0,
        checkpoint_every=checkpoint_every,
        device="cpu",
        threads=threads,
    )


def measure_overhead(samples: int, blocks: int, block: int, threads: int) -> Overhead:
    """Time both loops in turns."""
    # The generator is asked once more than there are engine blocks to be timed.
    config = config_of((blocks + WARM) * block + 1, threads)
    task = BenchmarkTask(samples, Bare(config), block)
    with tempfile.TemporaryDirectory() as folder:
        train(task, config, folder)
        rows = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    difference, before = 0.0, 0
    for row in (row for row in rows if "loss" in row):  # means over the updates since the row before
        theirs = statistics.mean(task.bare_losses[before : row["update"]])
        difference, before = max(difference, abs(row["loss"] / theirs - 1)), row["update"]
    engine, plain = task.engine_times[WARM:], task.bare_times[WARM:]
    shares = []
    for kind in (0, 1):
        turns = zip(engine, plain, plain[1:], strict=False)
        ratios = [2 * e[kind] / (b[kind] + a[kind]) - 1 for e, b, a in turns]
        assert len(ratios) == blocks, (len(engine), len(plain))
        shares.append(Share(statistics.median(ratios), *interval(ratios)))
    wall, cpu = shares
    return Overhead(wall, cpu, statistics.median(seconds for seconds, _ in plain) / block, difference)


def interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % confidence interval of the median from the binomial distribution of ranks: no assumption about
    how the values are distributed."""
    n, tail, rank = len(values), 0.0, 0
    while (tail := tail + math.comb(n, rank) / 2**n) <= 0.025:
        rank += 1
    ordered = sorted(values)
    return ordered[max(0, rank - 1)], ordered[min(n - 1, n - rank)]


@dataclass(frozen=True)
class Save:
    """Seconds that updates wait for a save, lose while it is written, and that the writing takes."""

    stall: float
    lost: float
    seconds: float
    update_seconds: float


def measure_saves(samples: int, saves: int, threads: int) -> Save:
    """Save every few updates; an update is held against the median of those during which nothing is saved."""
    updates = saves * EVERY + EVERY // 2
    with tempfile.TemporaryDirectory() as folder:
        train(BenchmarkTask(samples), config_of(updates, threads, EVERY), folder)
        rows = [
            json.loads(line) for line in (Path(folder) / "logs" / "rank-000.jsonl").read_text().splitlines()
        ]
    steps = [row for row in rows if row["event"] == "step"][WARM:]
    events = [row for row in rows if row["event"] == "checkpoint"][:saves]  # without that of the end
    assert len(events) == saves, f"{len(events)} saves in place of {saves}"
    spans = [(row["time"] - row["seconds"], row["time"]) for row in events]
    during = [any(s["time"] > a and s["time"] - s["seconds"] < b for a, b in spans) for s in steps]
    usual = statistics.median(s["seconds"] for s, saving in zip(steps, during, strict=True) if not saving)
    lost = sum(
        s["seconds"] - s.get("stall", 0.0) - usual for s, saving in zip(steps, during, strict=True) if saving
    )
    stalls, seconds = ([float(row[name]) for row in events] for name in ("stall", "seconds"))
    return Save(statistics.median(stalls), lost / saves, statistics.median(seconds), usual)


def main() -> None:
    """Print the table and the JSON line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="under 50 seconds on 2 cores")
    parser.add_argument("--blocks", type=int, help="of each loop; default 60, with --quick 30")
    parser.add_argument(
        "--threads", type=int, default=1, help="default 1: as beside a GPU, cores are left for the writers"
    )
    words = parser.parse_args()
    blocks, block = words.blocks or (30 if words.quick else 60), 1 if words.quick else 2
    torch.set_num_threads(words.threads)
    samples, saves = enough_samples(), 2 if words.quick else 5
    o = measure_overhead(samples, blocks, block, words.threads)
    s = measure_saves(samples, saves, words.threads)
    parameters = sum(p.numel() for p in Model().parameters()) / 1e6
    print(
        f"{parameters:.1f} M parameters, {samples} x {TOKENS} tokens, bf16, {words.threads} threads; "
        f"{blocks} blocks of {block} updates; losses agree to {o.difference:.1g}; {saves} saves"
    )
    columns = (
        "bare ms",
        "overhead",
        "95 %",
        "of CPU",
        "95 %",
        "stall ms",
        "in steps",
        "write s",
        "costs steps",
    )
    widths = (9, 10, 17, 9, 17, 10, 10, 9, 13)
    print("".join(f"{c:>{w}}" for c, w in zip(columns, widths, strict=True)))
    cells = [f"{1e3 * o.bare_seconds:.0f}"]
    for share in (o.wall, o.cpu):
        cells += [f"{share.median:.2%}", f"{share.low:.1%} to {share.high:.1%}"]
    cells += [f"{1e3 * s.stall:.1f}", f"{s.stall / s.update_seconds:.3f}"]
    cells += [f"{s.seconds:.2f}", f"{s.lost / s.update_seconds:.2f}"]
    print("".join(f"{c:>{w}}" for c, w in zip(cells, widths, strict=True)))
    figures = {
        "overhead_share": round(o.wall.median, 4),
        "overhead_interval": [round(o.wall.low, 4), round(o.wall.high, 4)],
        "overhead_cpu_share": round(o.cpu.median, 4),
        "blocks": blocks,
        "step_ms": round(1e3 * o.bare_seconds, 1),
        "checkpoint_stall_steps": round(s.stall / s.update_seconds, 4),
        "checkpoint_write_steps": round(s.lost / s.update_seconds, 3),
        "loss_difference": o.difference,
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
