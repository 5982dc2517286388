"""Crops per second of the stream, beside loaders that people use today, on the same volumes in the same call.

Prints a table, then one JSON object. Every loader runs in this process on one thread and cuts crops of the
same size at uniform places from volumes in random order. Peers: `webdataset` decoding whole volumes (plain
`wds.WebDataset` on the same tars, one crop of each), and the access of nnU-Net v2 (one Blosc2 file a case,
opened under a memory map and sliced, blocks as it chooses them for its patch). The floor is the
decompression of the chunks that our crops touch, from memory.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import blosc2
import numpy as np
import webdataset as wds
from scipy.ndimage import gaussian_filter

from data_pipeline.geometry import TokenConfig
from data_pipeline.manifest import FORMAT_VERSION, Manifest, write_manifest
from data_pipeline.order import Order
from data_pipeline.place import Place
from data_pipeline.schedule import MixtureConfig
from data_pipeline.shard_writer import Piece, ShardPlan, Staged, write_shard
from data_pipeline.storage import chunk_shape, encode
from data_pipeline.stream import open_stream

CROP = 96


def volume(number: int, side: int) -> np.ndarray:
    """A smooth body with CT-like noise: it compresses about as much as a CT."""
    g = np.random.default_rng(number)
    smooth = gaussian_filter(g.standard_normal((side // 4,) * 3).astype(np.float32), 3)
    body = np.kron(smooth / smooth.std(), np.ones((4, 4, 4), np.float32)) * 300
    return (body + g.standard_normal(body.shape, dtype=np.float32) * 12).astype(np.int16)[None]


def write(root: Path, volumes: int, side: int) -> list[Path]:
    """Our shards, and beside them one Blosc2 file a volume for the peer; returns those."""
    rows, entries, files = [], [], []
    for first in range(0, volumes, 4):
        staged = []
        for number in range(first, min(volumes, first + 4)):
            array = volume(number, side)
            path = root / f"{number}.image"
            path.write_bytes(encode(array, chunk_shape(array.shape, "volume", (0, 1, 2))))
            row = {
                "key": f"{number:08x}",
                "split": "train",
                "modality": "CT",
                "geometry": "volume",
                "axes": [0, 1, 2],
                "shape": list(array.shape),
                "spacing": [1.0, 1.0, 1.0],
                "norm": [[1.0, 0.0, -1024.0, 3071.0, -200.0, 500.0, 0.0]],
                "foreground": [],
            }
            staged.append(Staged(row, {"key": row["key"]}, {"image": Piece.of(path)}))
            files.append(root / f"peer-{number}.b2nd")
            blosc2.asarray(
                array,
                urlpath=str(files[-1]),
                mode="w",
                chunks=(1, *[min(side, 192)] * 3),
                blocks=(1, 32, 32, 64),
                cparams=blosc2.CParams(codec=blosc2.Codec.ZSTD, clevel=8, nthreads=1),
            )
        shard = write_shard(ShardPlan(f"train-{first:06d}.tar", tuple(staged)), Place(root), root)
        entries.append(shard.entry)
        rows += shard.rows
    digest = write_manifest(rows, root / "manifest.parquet")
    info = {"format_version": FORMAT_VERSION, "labels": {}, "shards": entries, "manifest_sha256": digest}
    (root / "dataset.json").write_text(json.dumps(info))
    return files


def ours(root: Path, order: Order, manifest: Manifest, workers: int = 0) -> Iterator[list[np.ndarray]]:
    return open_stream(
        root, manifest, order, rank=0, world=1, start_update=0, workers=workers,
        collate=lambda update, group, crops: [crop.voxels for crop in crops],
    )  # fmt: skip


def whole_volumes(root: Path) -> Iterator[np.ndarray]:
    """One crop of each volume, decoded whole by a plain WebDataset reader."""
    g = np.random.default_rng(0)
    tars = sorted(str(path) for path in root.glob("train-*.tar"))
    while True:
        pipeline = wds.WebDataset(tars, shardshuffle=len(tars), seed=0, empty_check=False)
        for sample in pipeline:
            voxels = blosc2.ndarray_from_cframe(sample["b2nd"])[:]
            yield cut(voxels, g)


def mapped_files(files: list[Path]) -> Iterator[np.ndarray]:
    """Slices of memory-mapped Blosc2 files, as nnU-Net v2 reads its cases."""
    g = np.random.default_rng(0)
    dparams = blosc2.DParams(nthreads=1)
    while True:
        file = files[int(g.integers(len(files)))]
        array = blosc2.open(urlpath=str(file), mode="r", dparams=dparams, mmap_mode="r")
        yield cut(array, g)


def cut(array: np.ndarray, g: np.random.Generator) -> np.ndarray:
    z, y, x = (int(g.integers(n - CROP + 1)) for n in array.shape[1:])
    return np.ascontiguousarray(array[0, z : z + CROP, y : y + CROP, x : x + CROP])


def rate(step: Callable[[], int], seconds: float) -> float:
    """Crops a second of repeated calls, each returning the crops it made; the first call is not timed."""
    step()
    crops, started = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - started) < seconds:
        crops += step()
    return crops / elapsed


def floor(order: Order, draws: int, seconds: float) -> tuple[float, float]:
    """Crops a second if a crop cost only the decompression of its chunks; and voxels decompressed per voxel
    used."""
    array = volume(0, 64)[:, :32, :32, :32]
    packed = blosc2.compress2(
        np.ascontiguousarray(array), typesize=2, codec=blosc2.Codec.ZSTD, clevel=5, nthreads=1
    )
    out = np.empty(32**3, np.int16)
    chunks = used = 0
    for i in range(draws):
        draw = order.draw(i)
        chunks += int(np.prod([(o + e - 1) // 32 - o // 32 + 1 for o, e in zip(draw.origin, draw.extent)]))
        used += int(np.prod(draw.extent))

    def one() -> int:
        blosc2.decompress2(packed, dst=out, nthreads=1)
        return 1

    return rate(one, seconds) * draws / chunks, chunks * 32**3 / used


def wait_share(stream: Iterator[list[np.ndarray]], step_s: float, steps: int) -> float:
    """Share of a consumer's time spent waiting when it works `step_s` on each group and one worker loads."""
    next(stream)
    waited, started = 0.0, time.perf_counter()
    for _ in range(steps):
        asked = time.perf_counter()
        next(stream)
        waited += time.perf_counter() - asked
        time.sleep(step_s)
    return waited / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="smaller volumes and shorter runs: under 50 s")
    quick = parser.parse_args().quick
    side, volumes, seconds = (160, 8, 3.0) if quick else (256, 24, 15.0)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        os.environ["MEDFM_CACHE"] = str(root / "cache")
        files = write(root, volumes, side)
        manifest = Manifest.open(root)
        mixture = MixtureConfig(groups=2, rows_per_group=4, scale=(1.0, 1.0))
        tokens = TokenConfig(slots=(CROP // 8) ** 3, classes=(1,))
        order = Order(manifest, np.arange(len(manifest)), tokens, mixture, 0)
        stream, peer, mapped = ours(root, order, manifest), whole_volumes(root), mapped_files(files)
        rates = {
            "medfm stream": rate(lambda: len(next(stream)), seconds),
            "webdataset, whole volumes": rate(lambda: next(peer).size // CROP**3, seconds),
            "nnU-Net v2 access": rate(lambda: next(mapped).size // CROP**3, seconds),
        }
        floor_rate, over = floor(order, 200, seconds / 3)
        step = order.group_size / rates["medfm stream"] * 1.25
        with ours(root, order, manifest, workers=1) as loaded:  # type: ignore[attr-defined]
            share = wait_share(loaded, step, 15 if quick else 60)
    mine = rates["medfm stream"]
    print(f"{volumes} volumes of {side}³ int16, crops of {CROP}³, one process and thread each\n")
    for name, value in rates.items():
        print(f"{name:28} {value:8.1f} crops/s   {mine / value:5.2f}×")
    print(f"{'decompression alone (floor)':28} {floor_rate:8.1f} crops/s")
    print(
        json.dumps(
            {
                "crops_per_s": round(mine, 2),
                "ratio_to_whole_volume_peers": round(mine / rates["webdataset, whole volumes"], 3),
                "ratio_to_nnunet": round(mine / rates["nnU-Net v2 access"], 3),
                "floor_share": round(mine / floor_rate, 3),
                "decompressed_over_used": round(over, 3),
                "wait_share": round(share, 4),
            }
        )
    )


if __name__ == "__main__":
    main()
