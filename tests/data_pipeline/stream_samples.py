"""Small datasets whose every voxel tells which sample, channel and place it is, for tests of the stream."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.geometry import geometry_of, level_factors
from data_pipeline.manifest import FORMAT_VERSION, write_manifest
from data_pipeline.place import Place
from data_pipeline.shard_writer import Piece, ShardPlan, Staged, write_shard
from data_pipeline.storage import block_mean, chunk_shape, encode

NORM = [1.0, 0.0, -1024.0, 3071.0, -200.0, 500.0, 0.0]


def voxels_of(number: int, shape: tuple[int, ...]) -> np.ndarray:
    """A volume whose every voxel tells which volume, channel and place it is."""
    c, z, y, x = np.indices(shape)
    return ((number * 7919 + c * 4001 + z * 1009 + y * 101 + x * 13) % 30000).astype(np.int16)


def members_of(
    number: int,
    shape: tuple[int, ...],
    kind: str,
    axes: tuple[int, ...],
    *,
    levels: int = 1,
    hide: bool = False,
) -> dict[str, np.ndarray]:
    """Every member of a sample, (c, z, y, x)."""
    image = voxels_of(number, shape)
    arrays = {"image": image, "seg": (image[:1] % 5).astype(np.uint8)}
    for level in range(1, levels + 1):
        arrays[f"l{level}"] = block_mean(image, level_factors(kind, axes)[level])
    if hide:
        arrays["hide"] = (image[:1] % 7 == 0).astype(np.uint8)
    return arrays


def stage(
    root: Path, number: int, side: tuple[int, int] = (20, 70), *, levels: int = 1, hide: bool = False
) -> Staged:
    """A sample of two channels: CT or MR, every third one with thick slices, labelled."""
    generator = np.random.default_rng(number)
    shape = (2, *(int(n) for n in generator.integers(*side, 3)))
    spacing = (1.0, 4.0, 1.0) if number % 3 == 1 else (1.0, 1.0, 1.0)
    modality = "MR" if number % 2 else "CT"
    kind, axes = geometry_of(shape[1:], spacing)
    arrays = members_of(number, shape, kind, axes, levels=levels, hide=hide)
    frames = {}
    for name, array in arrays.items():
        frames[name] = root / f"{number}.{name}"
        frames[name].write_bytes(encode(array, chunk_shape(array.shape, kind, axes)))
    row: dict[str, Any] = {
        "key": f"{number:08x}", "split": "train", "source": "a", "subject": f"s{number}",
        "modality": modality,
        "modalities": [modality, "PT"], "channels": ["x", "y"], "geometry": kind, "axes": list(axes),
        "shape": list(shape), "spacing": list(spacing), "spacing_source": "header", "dtype": "int16",
        "max_error": 0.0, "levels": [list(f) for f in level_factors(kind, axes)[: levels + 1]],
        "norm": [NORM, NORM], "content_hash": f"{number:032x}",
        "label_origin": "human", "annotated": ["organ"],
        "classes": ["organ"],
        "foreground": [{"class": 1, "layer": 0, "voxels": [100]}], "valid_fraction": 1.0,
    }  # fmt: skip
    return Staged(row, {"key": row["key"]}, {name: Piece.of(path) for name, path in frames.items()})


def write_dataset(folder: Path, samples: Sequence[Staged], per_shard: int) -> None:
    """Shards of `per_shard` samples, their manifest and description."""
    rows, entries = [], []
    for first in range(0, len(samples), per_shard):
        plan = ShardPlan(f"train-{first:06d}.tar", tuple(samples[first : first + per_shard]))
        shard = write_shard(plan, Place(folder), folder)
        (folder / plan.name).chmod(0o644)
        entries.append(shard.entry)
        rows += shard.rows
    digest = write_manifest(rows, folder / "manifest.parquet")
    info = {
        "format_version": FORMAT_VERSION,
        "labels": {"1": "organ"},
        "shards": entries,
        "manifest_sha256": digest,
    }
    (folder / "dataset.json").write_text(json.dumps(info))
