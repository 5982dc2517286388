"""Crops per second of the stream, beside the loaders that people use today, on the same volumes in one call.

    python benchmarks/loader.py [--quick] [--save]

Prints a table, then one JSON object. Every loader hands batches of the same number of crops of 96³ to this
process from the same number of worker processes (`--workers`, default 2), one thread each, after warm-up, in
interleaved rounds; medians are reported. CPU time is that of all processes. Peers:

- nnU-Net v2: its Blosc2 dataset and data loader, on int16 as kindest to it, and on float32 as it stores;
- MONAI `PersistentDataset` with `RandSpatialCropd`, whole volumes cached as int16;
- TorchIO `Queue` over uncompressed NIfTI, one patch of each volume it loads, and eight;
- plain `wds.WebDataset` on our own shards, decoding whole volumes.

The whole-volume loaders cut one crop of a volume at a time, as the stream does; the queue with eight, whose
batches repeat volumes, is shown but does not count for `ratio_to_whole_volume_peers`. `ratio_to_nnunet` is
to the faster of its two. The floor is `blosc2.decompress2`, one thread, of the very chunks that the crops
touch, from memory into a buffer, in as many processes: no file, no check, no copy, no transport. The stream
may come close to it, or pass it: it keeps its decompression context, which `decompress2` makes every time.

`wait_share` is the share of a CPU training step (a tiny masked autoencoder on the stream's batches, one
loader process) spent in `next(stream)`; `wait_share_gpu` the same for a base encoder where there is a GPU.
`first_byte_ms` is from `open_stream` at sample 10⁹, with a new order, to the first bytes of a shard,
`first_crop_ms` to the first crop; `resume_ms` opens the manifest and deals the order too.

A peer that is not installed is named, and its figures are null. To install them:
`pip install 'medfm[bench]'`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import date
from importlib.metadata import version
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest.mock import patch

os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"
sys.path[0] = str(Path(__file__).parents[1])  # this folder would hide packages

import blosc2  # noqa: E402
import nibabel  # noqa: E402
import numpy as np  # noqa: E402
import psutil  # noqa: E402
import torch  # noqa: E402
from scipy.ndimage import gaussian_filter  # noqa: E402

from benchmarks import loader_peers as peers  # noqa: E402
from data_pipeline.frame_index import read_index  # noqa: E402
from data_pipeline.geometry import TokenConfig  # noqa: E402
from data_pipeline.manifest import FORMAT_VERSION, Manifest, write_manifest  # noqa: E402
from data_pipeline.order import Order  # noqa: E402
from data_pipeline.place import Place  # noqa: E402
from data_pipeline.schedule import MixtureConfig  # noqa: E402
from data_pipeline.shard_reader import ShardReader  # noqa: E402
from data_pipeline.shard_writer import Piece, ShardPlan, Staged, write_shard  # noqa: E402
from data_pipeline.storage import chunk_shape, encode  # noqa: E402
from data_pipeline.stream import Crop, Stream, open_stream  # noqa: E402
from data_pipeline.touched_chunks import touched_chunks  # noqa: E402

CROP = 96
BATCH = 4
MEGABYTES = 2e-6 * CROP**3  # of a crop's voxels, as int16 whatever a loader delivers


def volume(number: int, side: int) -> np.ndarray:
    """A smooth body with CT-like noise: it compresses about as much as a CT."""
    g = np.random.default_rng(number)
    smooth = gaussian_filter(g.standard_normal((side // 4,) * 3).astype(np.float32), 3)
    body = np.kron(smooth / smooth.std(), np.ones((4, 4, 4), np.float32)) * 300
    return (body + g.standard_normal(body.shape, dtype=np.float32) * 12).astype(np.int16)[None]


def write(root: Path, arrays: list[np.ndarray]) -> list[Path]:
    """Our shards, one a volume, and an uncompressed NIfTI file of every volume; returns those."""
    rows, entries, niftis = [], [], []
    for number, array in enumerate(arrays):
        path = root / f"{number}.image"
        path.write_bytes(encode(array, chunk_shape(array.shape, "volume", (0, 1, 2))))
        row = {
            "key": f"{number:08x}", "split": "train", "source": "synthetic", "subject": f"{number:08x}",
            "modality": "CT", "modalities": ["CT"], "channels": ["CT"], "geometry": "volume",
            "axes": [0, 1, 2], "shape": list(array.shape), "spacing": [1.0, 1.0, 1.0], "dtype": "int16",
            "norm": [[1.0, 0.0, -1024.0, 3071.0, -200.0, 500.0, 0.0]], "foreground": [],
        }  # fmt: skip
        staged = Staged(row, {"key": row["key"]}, {"image": Piece.of(path)})
        shard = write_shard(ShardPlan(f"train-{number:06d}.tar", (staged,)), Place(root), root)
        entries.append(shard.entry)
        rows += shard.rows
        niftis.append(root / f"{number}.nii")
        nibabel.save(nibabel.Nifti1Image(array[0].T, np.eye(4)), niftis[-1])
    digest = write_manifest(rows, root / "manifest.parquet")
    info = {"format_version": FORMAT_VERSION, "labels": {}, "shards": entries, "manifest_sha256": digest}
    (root / "dataset.json").write_text(json.dumps(info))
    return niftis


def an_order(root: Path, rows: int = BATCH) -> tuple[Manifest, Order]:
    manifest = Manifest.open(root)
    mixture = MixtureConfig(groups=2, rows_per_group=rows, scale=(1.0, 1.0))
    tokens = TokenConfig(slots=(CROP // 8) ** 3, classes=(1,))
    return manifest, Order(manifest, np.arange(len(manifest)), tokens, mixture, 0)


def collate(update: int, group: int | None, crops: list[Crop]) -> torch.Tensor:
    """(crop, channel, z, y, x), as the peers deliver."""
    batch = np.empty((len(crops), 1, CROP, CROP, CROP), np.int16)
    for place, crop in zip(batch, crops, strict=True):
        place[0] = crop.voxels
    return torch.from_numpy(batch)


def opened(manifest: Manifest, order: Order, workers: int, start_update: int = 0) -> Stream[torch.Tensor]:
    return open_stream(
        manifest.root, manifest, order, rank=0, world=1, start_update=start_update, workers=workers,
        collate=collate,
    )  # fmt: skip


def chunks_of(root: Path, manifest: Manifest, order: Order, draws: int) -> tuple[list[list[bytes]], float]:
    """The stored chunks that each of the first draws touches, and voxels decompressed per voxel used."""
    found, decompressed, used = [], 0, 0
    for draw in map(order.draw, range(draws)):
        shard = root / manifest.value(draw.row, "shard")
        with shard.open("rb") as file:
            file.seek(manifest.value(draw.row, "idx_offset"))
            index = read_index(
                file.read(manifest.value(draw.row, "idx_size")), manifest.value(draw.row, "key")
            )["image"]
            low = draw.channel, *draw.origin
            high = draw.channel + 1, *(o + e for o, e in zip(draw.origin, draw.extent))
            pieces = touched_chunks(index, low, high)
            decompressed += len(pieces) * int(np.prod(index.chunk))
            used += int(np.prod(draw.extent))
            stored = []
            for piece in pieces:
                if not piece.special:
                    file.seek(manifest.value(draw.row, "image_offset") + piece.offset)
                    stored.append(file.read(piece.size))
            found.append(stored)
    return found, decompressed / used


def decompress(chunks: list[list[bytes]], seconds: float, answer: Any) -> None:
    """Of one process: crops decompressed in so many seconds, the time and the CPU time they took."""
    out = np.empty(32**3, np.int16)
    done, began, cpu = 0, time.perf_counter(), time.process_time()
    while time.perf_counter() - began < seconds:
        for chunk in chunks[done % len(chunks)]:
            blosc2.decompress2(chunk, dst=out, nthreads=1)
        done += 1
    answer.send((done, time.perf_counter() - began, time.process_time() - cpu))


def floor(chunks: list[list[bytes]], workers: int, seconds: float) -> tuple[float, float]:
    """Crops a second of all processes, and CPU seconds a crop."""
    context, parts = get_context("fork"), []
    for n in range(workers):
        ours, theirs = context.Pipe()
        process = context.Process(target=decompress, args=(chunks[n::workers], seconds, theirs))
        process.start()
        parts.append((process, ours))
    answers = [pipe.recv() for _, pipe in parts]
    for process, _ in parts:
        process.join()
    done = sum(n for n, _, _ in answers)
    return sum(n / wall for n, wall, _ in answers), sum(cpu for _, _, cpu in answers) / done


def cpu_seconds() -> float:
    """CPU time of this process and its children so far."""
    me = psutil.Process()
    times = [process.cpu_times() for process in (me, *me.children(recursive=True))]
    return sum(t.user + t.system for t in times)


def timed(loader: Iterator[Any], count: Callable[[Any], int], seconds: float) -> tuple[float, float]:
    """Crops a second and CPU seconds a crop, after what the workers had prepared has been taken."""
    for _ in range(7):
        next(loader)
    crops, began, cpu = 0, time.perf_counter(), cpu_seconds()
    while (elapsed := time.perf_counter() - began) < seconds:
        crops += count(next(loader))
    return crops / elapsed, (cpu_seconds() - cpu) / crops


def size_of(batch: Any) -> int:
    """Crops in a batch of any of the loaders."""
    while isinstance(batch, dict):
        batch = batch["data" if "data" in batch else "image"]
    return len(batch)


def milliseconds(call: Callable[[], Any], repeats: int = 5) -> float:
    """Median CPU time of a call in this process, the first left out."""
    call()
    spent = []
    for _ in range(repeats):
        began = time.process_time()
        call()
        spent.append(1e3 * (time.process_time() - began))
    return statistics.median(spent)


def first_byte(root: Path, repeats: int) -> dict[str, float]:
    """Median milliseconds from `open_stream` at sample 10⁹, with a new manifest and order, to the first bytes
    of a shard and to the first crop; and of the whole with opening those.
    """
    found: dict[str, list[float]] = {"first_byte_ms": [], "first_crop_ms": [], "resume_ms": []}
    read_at: list[float] = []
    pread = os.pread

    def noted(file: int, size: int, offset: int) -> bytes:
        data = pread(file, size, offset)
        read_at.append(time.perf_counter())
        return data

    for _ in range(repeats):
        read_at.clear()
        began = time.perf_counter()
        manifest, order = an_order(root, rows=1)
        ready = time.perf_counter()
        with patch("os.pread", noted), opened(manifest, order, 0, 10**9 // order.batch_size) as stream:
            next(stream)
        done = time.perf_counter()
        for name, spent in zip(found, (read_at[0] - ready, done - ready, done - began)):
            found[name].append(1e3 * spent)
    return {name: round(statistics.median(values), 2) for name, values in found.items()}


def wait_share(root: Path, device: str, steps: int) -> tuple[float, float]:
    """Share of training steps spent in `next(stream)`, and seconds a step, of a real masked autoencoder."""
    from pretrain.batch import to_device
    from pretrain.recipe import PretrainRecipe
    from pretrain.task import PretrainTask

    gpu = device != "cpu"
    recipe = PretrainRecipe.model_validate(
        {
            "data": {"root": str(root), "held_out": "val"},
            "tokens": {"slots": (CROP // 8) ** 3, "classes": [1]},
            "mixture": {"groups": 1, "rows_per_group": 32 if gpu else 1, "scale": [1.0, 1.0]},
            "encoder": {"size": "base" if gpu else "tiny"},
            "objective": {} if gpu else {"decoder_width": 192, "decoder_depth": 2, "decoder_heads": 3},
            "engine": {"workers": min(16, os.cpu_count() or 1) if gpu else 1},
        }
    )
    task = PretrainTask(recipe)
    task.network.to(device)
    adam = torch.optim.AdamW(task.network.parameters(), lr=1e-4)
    batches = task.batches(0, 0, 1)
    waited = began = 0.0
    for step in range(-3, steps):
        if step == 0:
            waited, began = 0.0, time.perf_counter()
        asked = time.perf_counter()
        batch = to_device(next(batches), torch.device(device))
        waited += time.perf_counter() - asked
        with torch.autocast(device, dtype=torch.bfloat16):
            loss, _ = task.network(batch)
        loss.backward()
        adam.step()
        adam.zero_grad()
        loss.item()
    took = time.perf_counter() - began
    batches.close()  # type: ignore[attr-defined]
    return waited / took, took / steps


def contestants(
    root: Path, arrays: list[np.ndarray], niftis: list[Path]
) -> dict[str, tuple[peers.Opener, str, Callable[[], Any]]]:
    """The peers that are installed, by the name that the table shows."""
    found = {"webdataset, whole volumes": peers.webdataset(root, CROP, BATCH)}
    if find_spec("monai"):
        found["MONAI PersistentDataset"] = peers.monai(root, niftis, CROP, BATCH)
    if find_spec("torchio"):
        found["TorchIO queue"] = peers.torchio(niftis, CROP, BATCH, 1)
        found["TorchIO queue, 8 a volume"] = peers.torchio(niftis, CROP, BATCH, 8)
    if find_spec("nnunetv2"):
        found["nnU-Net, int16"] = peers.nnunet(root, arrays, CROP, BATCH, np.int16)
        found["nnU-Net, float32"] = peers.nnunet(root, arrays, CROP, BATCH, np.float32)
    for module in ("monai", "torchio", "nnunetv2"):
        if not find_spec(module):
            print(f"{module} is not installed here: not measured (pip install 'medfm[bench]')")
    return found


def measure(root: Path, side: int, count: int, workers: int, seconds: float, rounds: int) -> dict[str, Any]:
    arrays = [volume(number, side) for number in range(count)]
    niftis = write(root, arrays)
    manifest, order = an_order(root)
    chunks, over = chunks_of(root, manifest, order, 48)
    reader = ShardReader(root, manifest)
    draws = [order.draw(i) for i in range(20)]
    others = contestants(root, arrays, niftis)
    runs: dict[str, list[tuple[float, float]]] = {}
    for _ in range(rounds):
        with opened(manifest, order, workers) as stream:
            runs.setdefault("medfm stream", []).append(timed(stream, len, seconds))
        runs.setdefault("floor: decompression alone", []).append(floor(chunks, workers, seconds))
        for name, (opener, _, _) in others.items():
            loader = opener(workers)
            runs.setdefault(name, []).append(timed(loader, size_of, seconds))
            loader.close()  # type: ignore[attr-defined]
    rate = {name: statistics.median(r for r, _ in found) for name, found in runs.items()}
    cpu = {name: statistics.median(c for _, c in found) for name, found in runs.items()}
    ours, bare = rate["medfm stream"], "floor: decompression alone"
    print(
        f"\n{count} volumes of {side}³ int16, crops of {CROP}³ in batches of {BATCH}, {workers} processes of "
        f"one thread, median of {rounds}; load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores\n"
    )
    print(f"{'':28}{'crops/s':>9}{'MB/s':>9}{'CPU ms/crop':>13}{'ours is':>10}")
    for name in sorted(rate, key=lambda name: -rate[name]):
        print(
            f"{name:28}{rate[name]:9.1f}{rate[name] * MEGABYTES:9.0f}{1e3 * cpu[name]:13.2f}"
            f"{ours / rate[name]:9.2f}×"
        )
    read = milliseconds(lambda: [reader.read_box(d.row, "image", 0, d.origin, d.extent) for d in draws]) / 20
    print("\nWhat limits each (CPU time of one process, without transport):")
    print(
        f"  medfm stream: a verified crop {read:.1f} ms, of which decompression "
        f"{1e3 * cpu[bare]:.1f} ms by decompress2; {over:.2f} voxels decompressed a voxel used"
    )
    for name, (_, what, one) in others.items():
        print(f"  {name}: {what}; {milliseconds(one):.1f} ms for {'a crop' if 'nnU' in name else 'a volume'}")
    whole = [
        rate[n]
        for n in ("webdataset, whole volumes", "MONAI PersistentDataset", "TorchIO queue")
        if n in rate
    ]
    nnunet = [rate[name] for name in rate if name.startswith("nnU-Net")]
    eight = rate.get("TorchIO queue, 8 a volume")
    return {
        "crops_per_s": round(ours, 2),
        "ratio_to_whole_volume_peers": round(ours / max(whole), 3),
        "ratio_to_nnunet": round(ours / max(nnunet), 3) if nnunet else None,
        "floor_share": round(ours / rate[bare], 3),
        "floor_share_cpu": round(cpu[bare] / cpu["medfm stream"], 3),
        "ratio_to_torchio_8_a_volume": round(ours / eight, 3) if eight else None,
        "decompressed_over_used": round(over, 3),
        "crops_per_s_of": {name: round(value, 2) for name, value in rate.items()},
        "cpu_s_per_crop": {name: round(value, 6) for name, value in cpu.items()},
        "workers": workers,
    }


def main() -> None:
    """Print the table and the JSON line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="small volumes, short runs: under 50 s on 2 cores"
    )
    parser.add_argument("--save", action="store_true", help="keep the JSON under benchmarks/results/")
    parser.add_argument("--workers", type=int, default=2, help="loader processes of each contestant")
    args = parser.parse_args()
    torch.set_num_threads(1)
    side, count, seconds, rounds = (320, 2, 1.0, 1) if args.quick else (384, 2, 4.0, 3)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        os.environ["MEDFM_CACHE"] = str(root / "cache")
        result = measure(root, side, count, args.workers, seconds, rounds)
        first = first_byte(root, 7)
        share, step = wait_share(root, "cpu", 5 if args.quick else 30)
        result |= {"wait_share": round(share, 4), "step_s": round(step, 3), **first}
        print(
            "\nresume at sample 10⁹: first bytes of a shard {first_byte_ms} ms after open_stream, first crop "
            "{first_crop_ms} ms; {resume_ms} ms with opening manifest and order".format(**first)
        )
        print(
            f"waiting for data: {share:.2%} of a CPU training step of {step:.2f} s (tiny, one loader process)"
        )
        if torch.cuda.is_available():
            share, step = wait_share(root, "cuda", 30)
            result |= {"wait_share_gpu": round(share, 4), "step_s_gpu": round(step, 4)}
            print(f"waiting for data: {share:.2%} of a GPU training step of {step:.3f} s (base)")
    if args.save:
        named = ("torch", "numpy", "blosc2", "webdataset", "monai", "torchio", "nnunetv2")
        result["date"] = date.today().isoformat()
        result["machine"] = (
            f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
        )
        result["versions"] = {name: version(name) for name in named if find_spec(name)}
        kept = Path(__file__).parent / "results" / f"loader-{result['date']}.json"
        kept.parent.mkdir(exist_ok=True)
        kept.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
