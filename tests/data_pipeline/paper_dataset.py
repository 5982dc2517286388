"""Datasets on paper: a real manifest with shapes, places and sizes, whose shards are never written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline.geometry import PATCH
from data_pipeline.manifest import MEMBERS, SCHEMA, Manifest

HEADER = 512


@dataclass(frozen=True)
class Part:
    """Samples of one source. sides: edge lengths of cubes (squares where planar), drawn with equal chances.
    voxel_bytes: compressed bytes a voxel."""

    samples: int
    source: str = "a"
    modality: str = "CT"
    geometry: str = "volume"
    sides: Sequence[int] = (128,)
    voxel_bytes: float = 1.0


def paper_dataset(
    folder: Path,
    parts: Sequence[Part],
    *,
    shard_samples: int = 64,
    shard_bytes: float = 1 << 30,
    by_size: bool = True,
) -> Manifest:
    """The manifest that a build of these samples would have written (`plan_shards` and its order, in NumPy).

    by_size: False leaves out the order by source and size inside a shard's group, as older builds did.
    """
    g = np.random.default_rng(0)
    n = sum(part.samples for part in parts)
    which = np.repeat(np.arange(len(parts)), [part.samples for part in parts])
    side = np.concatenate([g.choice(part.sides, part.samples) for part in parts])
    planar = np.array([part.geometry == "planar" for part in parts])[which]
    shape = np.stack([np.ones(n, int), np.where(planar, 1, side), side, side], axis=1)
    patch = np.array([PATCH[part.geometry] for part in parts])[which]
    tokens = np.prod(-(-shape[:, 1:] // patch), axis=1)
    size_class = np.ceil(np.log2(tokens)).astype(int)
    voxels = np.prod(shape, axis=1)
    noise = g.uniform(0.7, 1.3, n)
    image = (voxels * np.array([part.voxel_bytes for part in parts])[which] * noise).astype(np.int64) + 1
    large = voxels > 96**3
    l1, l2 = np.where(large, image // 8, -1), np.where(large, image // 64, -1)
    idx, text = 600 + image // 1000, np.full(n, 900)
    sizes = {"json": text, "image": image, "l1": l1, "l2": l2, "idx": idx}  # as they follow in a shard
    padded = {m: np.where(s >= 0, HEADER + -(-s // HEADER) * HEADER, 0) for m, s in sizes.items()}
    total = np.sum(list(padded.values()), axis=0)

    group = np.array([f"train-{p.modality.lower()}-{p.geometry}" for p in parts])[which]
    source = np.array([p.source for p in parts])[which]
    key = g.permutation(n)
    order = np.lexsort((key, size_class, source, group) if by_size else (key, group))
    name, start, shard = [], np.zeros(n, np.int64), np.zeros(n, int)
    number, count, filled, before = -1, 0, 0, ""
    numbers: dict[str, int] = {}
    for at, row in enumerate(order.tolist()):
        if group[row] != before or count >= shard_samples or filled + total[row] > shard_bytes:
            before, count, filled = group[row], 0, 0
            numbers[before] = numbers.get(before, -1) + 1
            name.append(f"{before}-{numbers[before]:06d}.tar")
            number += 1
        shard[at], start[at] = number, filled
        count, filled = count + 1, filled + int(total[row])

    columns: dict[str, Any] = {
        "key": pa.array([f"{k:016x}" for k in key[order].tolist()]),
        "shard": pa.array(name).take(pa.array(shard)),
        "split": pa.array(["train"]).take(pa.array(np.zeros(n, int))),
        "source": pa.array(source[order]),
        "subject": pa.array([f"{k:x}" for k in key[order].tolist()]),
        "modality": pa.array([p.modality for p in parts]).take(pa.array(which[order])),
        "geometry": pa.array([p.geometry for p in parts]).take(pa.array(which[order])),
        "axes": pa.FixedSizeListArray.from_arrays(pa.array(np.tile(np.arange(3, dtype=np.int8), n)), 3),
        "shape": pa.FixedSizeListArray.from_arrays(pa.array(shape[order].astype(np.int32).ravel()), 4),
        "spacing": pa.FixedSizeListArray.from_arrays(pa.array(np.ones(3 * n, np.float32)), 3),
    }
    for member in MEMBERS:
        columns[f"{member}_offset"] = columns[f"{member}_size"] = pa.array(np.full(n, -1))
    for member, size in sizes.items():
        there = size[order] >= 0
        columns[f"{member}_offset"] = pa.array(np.where(there, start + HEADER, -1))
        columns[f"{member}_size"] = pa.array(size[order])
        start += padded[member][order]
    table = pa.table([columns.get(f.name, pa.nulls(n, f.type)) for f in SCHEMA], schema=SCHEMA)
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    bytes_of = np.bincount(shard, total[order]).astype(int).tolist()
    shards = [{"name": n, "size": size} for n, size in zip(name, bytes_of)]
    return Manifest.of(folder, bytes(sink.getvalue()), {"shards": shards})
