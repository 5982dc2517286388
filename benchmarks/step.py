"""Training steps of masked autoencoding: ours, MONAI's and the textbook's on timm's blocks, in one call.

    python benchmarks/step.py [--quick] [--save] [--size small] [--crop 96] [--batch 2] [--device cuda]

Prints a table, then one JSON object. A step is forward, backward and fused AdamW on one batch of crops, at
the same width, depth, patch (8), mask ratio (0.75) and decoder (4 x 384, self-attention, every masked token
predicted). The peers (`step_peers.py`) get normalised crops. Ours does what a run does: stored int16 voxels,
a batch made by `Collate`, normalisation, tokens, `MaskedAutoencoder`, in the engine's bf16 autocast over
float32 weights; blocks compiled or not, whichever the engine does by default there (CUDA: compiled), the
other a row. Cheaper decoders are rows of their own and count for nothing.

Every peer is tried in float32, in bf16 autocast over float32 weights, and with weights, gradients and moments
in bf16, and in the fastest of these with its blocks compiled, too; what does not run is printed with its
error. All modes within twice of its fastest are raced, and the one with the best median counts. Rounds are
interleaved, so that noise hits all alike; warm-up and compilation come before. `MONAI, float32 weights` is
the fastest of its modes that keep weights in float32, as ours does; `MONAI, fused attention` switches on what
its network has no argument for. Neither counts.

FLOPs of a crop are the matrix products that `FlopCounterMode` counts in a network's forward and backward pass
(attention's twice in the backward pass: what is computed again does not count). `matmul_share` is FLOPs a
second beside the best 4096³ matrix product of the dtype, measured before and after. Peak memory is that of
live tensors (weights, gradients and moments included) by `torch.distributed._tools.mem_tracker` in a fresh
process, not compiled, beside the process's peak RSS; on CUDA `max_memory_allocated`.

On CUDA contestants run one after another with CUDA events, 128³ crops through base and large; a peer that
does not fit at the batch size gets half of it, and says so.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from datetime import date
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

sys.path[0] = str(Path(__file__).parents[1])  # this folder would hide packages

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

from benchmarks import step_peers as peers  # noqa: E402
from benchmarks.step_peers import Setting  # noqa: E402
from data_pipeline.order import Draw, RowSpec  # noqa: E402
from model.config import EncoderConfig  # noqa: E402
from pretrain.batch import Batch, Collate, to_device  # noqa: E402
from pretrain.mae import MaskedAutoencoder  # noqa: E402
from pretrain.objective import ObjectiveConfig  # noqa: E402

PRECISIONS = ("float32", "bf16 autocast", "bf16")
NEAR = 2.0  # modes up to so much slower than a peer's fastest, by a first look, are raced
CHEAPER: dict[str, dict[str, Any]] = {
    "ours, cross-attention": {"decoder": "cross"},
    "ours, half predicted": {"predict_share": 0.5},
    "ours, 2 layers": {"decoder_depth": 2},
    "ours, all three": {"decoder": "cross", "predict_share": 0.5, "decoder_depth": 2},
}
PEERS: dict[str, Callable[[Setting], nn.Module]] = {
    "plain, timm blocks": peers.plain,
    "MONAI": peers.monai,
    "MONAI, fused attention": partial(peers.monai, flash=True),
}
NORM = (
    1.0,
    0.0,
    -1024.0,
    3071.0,
    -200.0,
    500.0,
    0.0,
)  # slope, intercept, clip, center, scale, no compression


class Mode(NamedTuple):
    """How a network runs."""

    precision: str
    compiled: bool = False

    def __str__(self) -> str:
        return self.precision + ", compiled" * self.compiled

    def context(self, device: str) -> AbstractContextManager[Any]:
        """Autocast where the precision asks for it."""
        on = self.precision == "bf16 autocast"
        return torch.autocast(device, torch.bfloat16) if on else nullcontext()


class Contestant:
    """A network, its batch and its optimizer."""

    def __init__(self, network: nn.Module, batch: Any, blocks: Sequence[nn.Module], mode: Mode) -> None:
        self.network, self.batch, self.mode = network.train(), batch, mode
        self.device = next(network.parameters()).device.type
        # Matrices decay, the rest does not, as in a run.
        ours = list(network.parameters())
        groups = [
            {"params": [p for p in ours if p.requires_grad and p.ndim > 1], "weight_decay": 0.05},
            {"params": [p for p in ours if p.requires_grad and p.ndim <= 1], "weight_decay": 0.0},
        ]
        self.adam = torch.optim.AdamW(groups, lr=1e-4, fused=True)
        for block in blocks if mode.compiled else ():
            block.compile(dynamic=False)

    def loss(self) -> Tensor:
        """Loss of the batch."""
        with self.mode.context(self.device):
            result = self.network(self.batch)
        loss: Tensor = result[0] if isinstance(result, tuple) else result
        return loss

    def step(self) -> None:
        """Forward, backward, AdamW."""
        self.loss().backward()
        self.adam.step()
        self.adam.zero_grad()

    def seconds(self, steps: int = 1) -> float:
        """Mean time of so many steps."""
        if self.device == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(steps):
                self.step()
            end.record()
            end.synchronize()
            return float(start.elapsed_time(end)) / 1e3 / steps
        began = time.perf_counter()
        for _ in range(steps):
            self.step()
        return (time.perf_counter() - began) / steps


def stored_crops(setting: Setting) -> np.ndarray:
    """(n, z, y, x) int16 HU."""
    shape = (setting.batch, *(setting.crop,) * 3)
    return np.random.default_rng(0).integers(-1000, 1500, shape).astype(np.int16)


def loader_batch(setting: Setting, objective: ObjectiveConfig, depth: int) -> Batch:
    """The crops as the loader's workers would hand them over."""
    tokens, grid = setting.tokens, (setting.grid,) * 3
    crops: list[Any] = []  # as `data_pipeline.stream.Crop`, which needs what reads shards
    for slot, voxels in enumerate(stored_crops(setting)):
        draw = Draw(
            index=slot, row=0, group=0, spec=0, slot=slot, channel=0, level=0, origin=(0, 0, 0),
            extent=(setting.crop,) * 3, grid=grid, residual=(1.0,) * 3, axes=(0, 1, 2), start_mm=(0.0,) * 3,
            spacing=(1.0,) * 3, repeat=0,
        )  # fmt: skip
        crops.append(
            SimpleNamespace(draw=draw, modality="CT", voxels=voxels, norm=np.array(NORM), substituted=False)
        )
    spec = RowSpec("volume", 1, setting.batch, tokens, setting.crop**3)
    return Collate((spec,), objective, depth, seed=0)(0, 0, crops)


def ours(setting: Setting, mode: Mode, device: str, **changes: Any) -> Contestant:
    """Our masked autoencoder; `changes` to the objective."""
    objective = ObjectiveConfig(mask_ratio=setting.mask_ratio, **changes)
    network = MaskedAutoencoder(EncoderConfig(size=setting.size), objective, setting.batch)
    batch = loader_batch(setting, objective, network.encoder.depth)
    network.to(device)
    return Contestant(
        network, to_device(batch, torch.device(device)), list(network.blocks_to_compile()), mode
    )


def peer(name: str, setting: Setting, mode: Mode, device: str) -> Contestant:
    """A peer on the same crops, normalised; ImportError where it is not installed."""
    dtype = torch.bfloat16 if mode.precision == "bf16" else torch.float32
    network = PEERS[name](setting).to(device, dtype)
    crops = (torch.from_numpy(stored_crops(setting))[:, None].float() - NORM[4]) / NORM[5]
    return Contestant(network, crops.to(device, dtype), peers.blocks_of(network), mode)


def build(name: str, setting: Setting, mode: Mode, device: str) -> Contestant:
    """The contestant of a row of the table, its weights always the same."""
    torch.manual_seed(0)
    kind = name.partition(" (")[0].replace("MONAI, float32 weights", "MONAI")
    if kind in PEERS:
        return peer(kind, setting, mode, device)
    return ours(setting, mode, device, **CHEAPER.get(kind, {}))


def flops_per_crop(name: str, setting: Setting) -> float:
    """Matrix products of forward and backward, on the meta device; attention as the products that it is."""
    contestant = build(name, setting._replace(batch=1), Mode("float32"), "cpu")
    contestant.network.to("meta")
    batch = contestant.batch
    contestant.batch = (
        batch.to("meta") if isinstance(batch, Tensor) else to_device(batch, torch.device("meta"))
    )
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        contestant.loss().backward()
    return float(counter.get_total_flops())


def matmul_rate(dtype: torch.dtype, device: str, repeats: int) -> float:
    """Best rate of a 4096³ matrix product, operations a second."""
    a, b = (torch.randn(4096, 4096, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(repeats):
        if device == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(20):
                a @ b
            end.record()
            end.synchronize()
            best = min(best, float(start.elapsed_time(end)) / 1e3 / 20)
        else:
            began = time.perf_counter()
            a @ b
            best = min(best, time.perf_counter() - began)
    return 2 * 4096**3 / best


def modes_tried(name: str, setting: Setting, device: str, compiling: bool) -> dict[Mode, float | str]:
    """Crops a second of a peer in each mode, or why it does not run in it."""
    found: dict[Mode, float | str] = {}

    def attempt(mode: Mode) -> None:
        try:
            contestant = build(name, setting, mode, device)
            contestant.seconds(3 if device == "cuda" else 1)
            found[mode] = setting.batch / min(contestant.seconds() for _ in range(2))
        except Exception as error:  # a peer that breaks is a result
            found[mode] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        free(device)

    for precision in PRECISIONS[1:] if device == "cuda" else PRECISIONS:
        attempt(Mode(precision))
    if compiling and (best := fastest(found)):
        attempt(Mode(best.precision, True))
    return found


def fastest(found: dict[Mode, float | str], precisions: Sequence[str] = PRECISIONS) -> Mode | None:
    """The mode with most crops a second of those that run."""
    rates = {m: r for m, r in found.items() if isinstance(r, float) and m.precision in precisions}
    return max(rates, key=lambda mode: rates[mode], default=None)


def free(device: str) -> None:
    gc.collect()
    torch._dynamo.reset()
    if device == "cuda":
        torch.cuda.empty_cache()


def memory_of(name: str, setting: Setting, mode: Mode) -> dict[str, float]:
    """Peak MiB of live tensors in the second step of this process on the CPU, and its peak RSS."""
    from torch.distributed._tools.mem_tracker import MemTracker

    contestant = build(name, setting, mode, "cpu")
    contestant.step()  # the moments are there from now on
    tracker = MemTracker()
    inputs = [contestant.batch] if isinstance(contestant.batch, Tensor) else list(*contestant.batch.values())
    tracker.track_external(contestant.network, contestant.adam, *inputs)
    with tracker:
        contestant.step()
    peak = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
    # Not ru_maxrss, which a child inherits from the process that started it.
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {"peak_mib": peak / 2**20, "peak_rss_mib": int(status["VmHWM"].split()[0]) / 2**10}


def memory_in_fresh_process(setting: Setting, name: str, mode: Mode) -> dict[str, float]:
    """`memory_of` in a process of its own."""
    command = [sys.executable, __file__, "--memory-of", name, "--precision", mode.precision]
    command += ["--size", setting.size, "--crop", str(setting.crop), "--batch", str(setting.batch)]
    command += ["--threads", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"memory of {name}: {done.stderr[-2000:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


class Row(NamedTuple):
    """A line of the table that is to be measured."""

    name: str
    mode: Mode
    batch: int


def line_up(setting: Setting, device: str, quick: bool) -> tuple[list[Row], dict[str, dict[str, Any]]]:
    """Who is raced in which modes, and what was tried to find that out."""
    default = Mode("bf16 autocast", compiled=device == "cuda")
    rows = [Row("ours", default, setting.batch)]
    if not quick:
        other = Mode("bf16 autocast", compiled=not default.compiled)
        rows.append(Row(f"ours ({'compiled' if other.compiled else 'not compiled'})", other, setting.batch))
        rows += [Row(name, default, setting.batch) for name in CHEAPER]
    tried: dict[str, dict[str, Any]] = {}
    for name in PEERS:
        if quick and name == "MONAI, fused attention":
            continue
        fits = setting
        found = modes_tried(name, fits, device, not quick)
        while fastest(found) is None and fits.batch > 1 and "OutOfMemory" in str(found):
            fits = fits._replace(batch=fits.batch // 2)
            found = modes_tried(name, fits, device, not quick)
        tried[name] = {str(m): round(r, 4) if isinstance(r, float) else r for m, r in found.items()}
        rates = {mode: rate for mode, rate in found.items() if isinstance(rate, float)}
        kept = [mode for mode, rate in rates.items() if rate > max(rates.values()) / NEAR]
        whole = fastest(found, PRECISIONS[:2])
        if name == "MONAI" and whole and whole not in kept:
            kept.append(whole)
        rows += [Row(name, mode, fits.batch) for mode in kept]
    return rows, tried


def winners(rows: list[Row], times: list[list[float]]) -> dict[str, int]:
    """The line of the table that each number of `rows` earned: of a peer the mode with the least median; of
    MONAI also the fastest mode that keeps weights in float32, where that is another one."""

    def best(name: str, precisions: Sequence[str] = PRECISIONS) -> int | None:
        mine = [i for i, row in enumerate(rows) if row.name == name and row.mode.precision in precisions]
        return min(mine, key=lambda i: statistics.median(times[i]), default=None)

    found = {row.name: best(row.name) for row in rows}
    if (whole := best("MONAI", PRECISIONS[:2])) != found.get("MONAI"):
        found["MONAI, float32 weights"] = whole
    return {name: number for name, number in found.items() if number is not None}


def race(
    rows: list[Row], setting: Setting, device: str, rounds: int
) -> tuple[list[list[float]], list[float]]:
    """Seconds a step of each row in each round, and on CUDA its peak memory in MiB."""
    times: list[list[float]] = [[] for _ in rows]
    peaks: list[float] = []
    if device == "cuda":
        for row, spent in zip(rows, times):
            free(device)
            before = torch.cuda.memory_allocated()
            contestant = build(row.name, setting._replace(batch=row.batch), row.mode, device)
            contestant.seconds(5)
            torch.cuda.reset_peak_memory_stats()
            spent += [contestant.seconds(10) for _ in range(rounds)]
            peaks.append((torch.cuda.max_memory_allocated() - before) / 2**20)
            del contestant
        return times, peaks
    contestants = [build(row.name, setting, row.mode, device) for row in rows]
    for contestant in contestants:
        contestant.step()
    for _ in range(rounds):
        for contestant, spent in zip(contestants, times):
            spent.append(contestant.seconds())
    return times, peaks


def measure(setting: Setting, device: str, quick: bool, rounds: int, threads: int) -> dict[str, Any]:
    """The table of one size: printed, and as a dictionary."""
    repeats = 3 if quick else 6
    dtypes = {"float32": torch.float32, "bf16": torch.bfloat16}
    matmul = {name: matmul_rate(dtype, device, repeats) for name, dtype in dtypes.items()}
    rows, tried = line_up(setting, device, quick)
    times, peaks = race(rows, setting, device, rounds)
    for name, dtype in dtypes.items():
        matmul[name] = max(matmul[name], matmul_rate(dtype, device, repeats))

    for row, spent in zip(rows, times):
        if row.name in tried:  # better known by now
            tried[row.name][str(row.mode)] = round(row.batch / statistics.median(spent), 4)
    lines = winners(rows, times)
    results: dict[str, dict[str, Any]] = {}
    for name, number in lines.items():
        row, seconds = rows[number], statistics.median(times[number])
        flops = flops_per_crop(name, setting)
        dtype_name = "float32" if row.mode.precision == "float32" else "bf16"
        results[name] = {
            "mode": str(row.mode),
            "batch": row.batch,
            "crops_per_s": row.batch / seconds,
            "step_s": [round(s, 4) for s in times[number]],
            "gflop_per_crop": flops / 1e9,
            "matmul_share": flops * row.batch / seconds / matmul[dtype_name],
        }
        if device == "cuda":
            results[name]["peak_mib"] = peaks[number]
    if device == "cpu":
        plain = [name for name in lines if name != "ours (compiled)"]  # of compiled code nobody can tell
        with ThreadPoolExecutor(threads) as pool:
            found = pool.map(
                lambda name: memory_in_fresh_process(setting, name, rows[lines[name]].mode), plain
            )
            for name, memory in zip(plain, found):
                results[name] |= memory
    return summary(setting, results, tried, matmul, rounds)


def summary(
    setting: Setting,
    results: dict[str, dict[str, Any]],
    tried: dict[str, dict[str, Any]],
    matmul: dict[str, float],
    rounds: int,
) -> dict[str, Any]:
    """Print the table; return its figures."""
    first = results["ours"]

    def ratio(name: str, key: str = "crops_per_s") -> float | None:
        there = results.get(name, {}).get(key)
        return round(first[key] / there, 3) if there and key in first else None

    print(
        f"\nViT {setting.size}/8, {setting.crop}³ crops ({setting.tokens} tokens, {setting.visible} visible)"
        f", batch {setting.batch}, median of {rounds} rounds; load {os.getloadavg()[0]:.1f} on "
        f"{os.cpu_count()} cores\n4096³ matrix products: "
        + ", ".join(f"{name} {rate / 1e9:.0f} GFLOP/s" for name, rate in matmul.items())
        + f"\n\n{'':27}{'mode':25}{'crops/s':>9}{'GFLOP/crop':>12}{'matmul':>8}{'tensors, MiB':>14}"
        f"{'RSS, MiB':>10}{'ours is':>9}"
    )
    for name, r in results.items():
        how = r["mode"] + (f", batch {r['batch']}" if r["batch"] != setting.batch else "")
        print(
            f"{name:27}{how:25}"
            f"{r['crops_per_s']:9.3f}{r['gflop_per_crop']:12.1f}{r['matmul_share']:8.1%}"
            f"{r.get('peak_mib', float('nan')):14.0f}{r.get('peak_rss_mib', float('nan')):10.0f}"
            f"{ratio(name) or 0:8.2f}×"
        )
    print("\nTried, crops/s:")
    for name, modes in tried.items():
        for mode, what in modes.items():
            print(f"  {name}, {mode}: {what}")
    ceiling = matmul["bf16"] / 1e9 / first["gflop_per_crop"]
    print(
        f"\nAt its best bf16 matrix product this machine would do {ceiling:.2f} of our crops a second, and "
        "no network of these FLOPs more"
        + (f": {ceiling / results['MONAI']['crops_per_s']:.1f} × MONAI." if "MONAI" in results else ".")
    )
    return {
        "crops_per_s": round(first["crops_per_s"], 4),
        "ratio_to_monai": ratio("MONAI"),
        "ratio_to_timm": ratio("plain, timm blocks"),
        "matmul_share": round(first["matmul_share"], 4),
        "memory_ratio_to_monai": ratio("MONAI", "peak_mib"),
        "ratio_to_monai_float32_weights": ratio("MONAI, float32 weights"),
        "ratio_to_monai_fused_attention": ratio("MONAI, fused attention"),
        "memory_ratio_to_monai_float32_weights": ratio("MONAI, float32 weights", "peak_mib"),
        "memory_ratio_to_timm": ratio("plain, timm blocks", "peak_mib"),
        "ceiling_crops_per_s": round(ceiling, 4),
        "matmul_gflop_per_s": {name: round(rate / 1e9, 1) for name, rate in matmul.items()},
        "setting": setting._asdict(),
        "rows": {
            n: {k: round(v, 4) if isinstance(v, float) else v for k, v in r.items()}
            for n, r in results.items()
        },
        "tried": tried,
    }


def machine(device: str, threads: int) -> dict[str, Any]:
    """What it ran on."""
    cpu = platform.processor() or platform.machine()
    if (info := Path("/proc/cpuinfo")).exists():
        lines = [line.split(":", 1) for line in info.read_text().splitlines() if ":" in line]
        known = {key.strip(): value.strip() for key, value in lines}
        bf16 = [flag for flag in ("amx_bf16", "avx512_bf16") if flag in known.get("flags", "").split()]
        cpu = f"{known.get('model name', cpu)}, {' '.join(bf16) or 'no bf16 instructions'}"
    named = ("torch", "timm", "monai", "numpy")
    return {
        "machine": f"{cpu}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "threads": threads,
        "load": round(os.getloadavg()[0], 2),
        "versions": {name: version(name) for name in named if find_spec(name)},
        "date": date.today().isoformat(),
    }


def main() -> None:
    """Print the tables and the JSON line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="64³ crops, nothing compiled: under 50 s on 2 cores"
    )
    parser.add_argument("--save", action="store_true", help="keep the JSON under benchmarks/results/")
    parser.add_argument("--size", nargs="+", help="encoder sizes (CPU: small; CUDA: base large)")
    parser.add_argument("--crop", type=int, help="edge in voxels (CPU: 96, quick 64; CUDA: 128)")
    parser.add_argument("--batch", type=int, help="crops a step (CPU: 2; CUDA: 32)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, help="of each contestant (5, quick 3)")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    parser.add_argument("--precision", choices=PRECISIONS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    cuda = args.device == "cuda"
    crop = args.crop or (128 if cuda else 64 if args.quick else 96)
    batch = args.batch or (32 if cuda else 2)
    sizes = args.size or (["base", "large"] if cuda else ["small"])
    if args.memory_of:
        print(json.dumps(memory_of(args.memory_of, Setting(sizes[0], crop, batch), Mode(args.precision))))
        return
    rounds = args.rounds or (3 if args.quick else 5)
    about = machine(args.device, args.threads)
    measured = {
        size: measure(Setting(size, crop, batch), args.device, args.quick, rounds, args.threads)
        for size in sizes
    }
    result = {**measured[sizes[0]], **about, "quick": args.quick}
    if len(sizes) > 1:
        result["sizes"] = measured
    if args.save:
        kept = Path(__file__).parent / "results" / f"step-{args.device}-{result['date']}.json"
        kept.parent.mkdir(exist_ok=True)
        kept.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
