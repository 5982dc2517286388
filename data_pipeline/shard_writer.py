"""Staged samples to tar shards: the layout of shards, then one tar at a time, byte-repeatable."""

from __future__ import annotations

import json
import tarfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from data_pipeline.frame_index import write_index
from data_pipeline.manifest import SUFFIX

FRAMES = ("image", "l1", "l2", "seg", "hide")


@dataclass(frozen=True)
class Staged:
    """A sample waiting to be put into a shard.

    `row` holds the manifest's columns except shard and offsets; `description` becomes `KEY.json`; `frames`
    maps each member to the file that holds its Blosc2 frame; `size` is their total in bytes.
    """

    row: dict[str, Any]
    description: dict[str, Any]
    frames: dict[str, Path]
    size: int


@dataclass(frozen=True)
class ShardPlan:
    """One shard to write: its file name and its samples in order."""

    name: str
    samples: tuple[Staged, ...]


def plan_shards(samples: Sequence[Staged], shard_samples: int, shard_bytes: int) -> list[ShardPlan]:
    """Group samples by split, modality and geometry; order by key; cut by count and bytes.

    Keys are hashes, so the order inside a group is random with respect to sources and subjects, yet fixed.
    """
    groups: dict[tuple[str, str, str], list[Staged]] = defaultdict(list)
    for sample in samples:
        groups[sample.row["split"], sample.row["modality"].lower(), sample.row["geometry"]].append(sample)
    return [
        ShardPlan(f"{'-'.join(group)}-{number:06d}.tar", tuple(part))
        for group in sorted(groups)
        for number, part in enumerate(_cut(groups[group], shard_samples, shard_bytes))
    ]


def _cut(samples: list[Staged], shard_samples: int, shard_bytes: int) -> Iterator[list[Staged]]:
    part: list[Staged] = []
    size = 0
    for sample in sorted(samples, key=lambda s: s.row["key"]):
        if part and (len(part) >= shard_samples or size + sample.size > shard_bytes):
            yield part
            part, size = [], 0
        part.append(sample)
        size += sample.size
    yield part


def write_shard(plan: ShardPlan, folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Write one tar and delete its staged files.

    Returns (the shard's entry of `dataset.json`: name, size, samples, xxh3-128 of the file; the manifest's
    rows).
    """
    path = folder / plan.name
    with path.open("wb") as file, _tar(file) as tar:
        for sample in plan.samples:
            frames = {name: sample.frames[name].read_bytes() for name in FRAMES if name in sample.frames}
            text = json.dumps(
                sample.description, sort_keys=True, separators=(",", ":"), allow_nan=False
            ).encode()
            key = sample.row["key"]
            members = {"json": text, **frames, "idx": write_index(key, frames, {"json": text})}
            tar.write({"__key__": key, **{SUFFIX[name]: data for name, data in members.items()}})
            for staged in sample.frames.values():
                staged.unlink()
    places: dict[str, tuple[int, int]] = {}
    with tarfile.open(path) as written:  # the offsets are read back, not assumed
        for info in written:
            places[info.name] = info.offset_data, info.size
    rows = []
    for sample in plan.samples:
        row = {**sample.row, "shard": plan.name}
        for member, suffix in SUFFIX.items():
            offset, size = places.get(f"{row['key']}.{suffix}", (-1, -1))
            row[f"{member}_offset"], row[f"{member}_size"] = offset, size
        rows.append(row)
    entry = {
        "name": plan.name,
        "size": path.stat().st_size,
        "samples": len(rows),
        "xxh3_128": file_hash(path),
    }
    return entry, rows


def file_hash(path: Path) -> str:
    """xxh3-128 hex of a whole file."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _tar(file: Any) -> Any:
    import webdataset as wds  # slow to import, and reading workers do without it

    return wds.TarWriter(file, user="", group="", mode=0o444, mtime=0, encoder=False)
