"""Samples to tar shards: the layout of shards, then one tar at a time, byte-repeatable."""

from __future__ import annotations

import json
import os
import re
import tarfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import xxhash

from data_pipeline.errors import UserError
from data_pipeline.frame_index import checksum, write_index
from data_pipeline.geometry import PATCH, token_count
from data_pipeline.manifest import MEMBERS, SUFFIX
from data_pipeline.place import Place

FRAMES = ("image", "l1", "l2", "seg", "hide")
SHARD_NAME = re.compile(r"([a-z0-9]+-[a-z]+-[a-z]+)-(\d{6,})\.tar")


@dataclass(frozen=True)
class Piece:
    """Bytes of one member: a staged file, or a part of a shard that is there already.

    `check` is the xxh3-64 of a staged frame, compared before the frame goes into a shard; None where the
    shard's own index covers the bytes.
    """

    folder: str
    name: str
    size: int
    offset: int = 0
    check: int | None = None

    @classmethod
    def of(cls, path: Path) -> Piece:
        """A whole local file."""
        return cls(str(path.parent), path.name, path.stat().st_size)

    def read(self) -> bytes:
        """The bytes. Raises `UserError` where they are not what was written."""
        data = Place(self.folder).read(self.name, self.offset, self.size)
        if len(data) != self.size or (self.check is not None and checksum(data) != self.check):
            raise UserError(
                f"{self.folder}/{self.name} was changed or cut short after it was written; "
                "delete the work folder and start the same build again"
            )
        return data


@dataclass(frozen=True)
class Staged:
    """A sample waiting to be put into a shard.

    `row` holds the manifest's columns except shard and offsets; `description` becomes `KEY.json` (empty where
    `frames` holds the finished `json` member of a sample of an older shard); `frames` maps each member to
    where its bytes are. `values_hash` is of the voxels alone, whatever their grid.
    """

    row: dict[str, Any]
    description: dict[str, Any]
    frames: Mapping[str, Piece]
    values_hash: str = ""

    @property
    def size(self) -> int:
        """Bytes of all members together."""
        return sum(piece.size for piece in self.frames.values())


@dataclass(frozen=True)
class ShardPlan:
    """One shard to write: its file name and its samples in order."""

    name: str
    samples: tuple[Staged, ...]

    def digest(self) -> str:
        """Says whether a shard written earlier is the one planned now."""
        content = [
            (s.row, s.description, {n: (p.size, p.check) for n, p in s.frames.items()}) for s in self.samples
        ]
        return xxhash.xxh3_128_hexdigest(json.dumps([self.name, content], sort_keys=True).encode())


def plan_shards(
    samples: Sequence[Staged], shard_samples: int, shard_bytes: int, taken: Sequence[str] = ()
) -> list[ShardPlan]:
    """Group samples by split, modality and geometry; order by source, size, key; cut by count and bytes.

    A node fetches blocks of neighbouring samples, and the order draws samples of one source and one row class
    in the same epoch. Neighbours of one source and one size class are wanted together, so that next to no
    byte is fetched for another lane's sake. Keys are keyed hashes: inside a source and size class the order
    is random, yet fixed. Nothing of the patient follows from a place in a shard, for source and shape are
    columns of the manifest anyway. Numbers go on after those of the shards in `taken`.
    """
    start: dict[str, int] = defaultdict(int)
    for name in taken:
        if match := SHARD_NAME.fullmatch(name):
            start[match.group(1)] = max(start[match.group(1)], int(match.group(2)) + 1)
    groups: dict[str, list[Staged]] = defaultdict(list)
    for sample in samples:
        row = sample.row
        groups["-".join((row["split"], row["modality"].lower(), row["geometry"]))].append(sample)
    return [
        ShardPlan(f"{group}-{number:06d}.tar", tuple(part))
        for group in sorted(groups)
        for number, part in enumerate(_cut(groups[group], shard_samples, shard_bytes), start[group])
    ]


def _cut(samples: list[Staged], shard_samples: int, shard_bytes: int) -> Iterator[list[Staged]]:
    part: list[Staged] = []
    size = 0
    for sample in sorted(samples, key=lambda s: (s.row["source"], size_class(s.row), s.row["key"])):
        if part and (len(part) >= shard_samples or size + sample.size > shard_bytes):
            yield part
            part, size = [], 0
        part.append(sample)
        size += sample.size
    yield part


def size_class(row: Mapping[str, Any]) -> int:
    """Smallest m such that 2^m tokens hold the whole sample; row classes are bounded by powers of two."""
    stem = [row["shape"][1 + axis] for axis in row["axes"]]
    return (token_count(stem, PATCH[row["geometry"]]) - 1).bit_length()


@dataclass(frozen=True)
class Written:
    """A finished shard: its `entry` of `dataset.json` (name, size, samples, xxh3-128) and its rows."""

    entry: dict[str, Any]
    rows: list[dict[str, Any]] = field(default_factory=list)


def write_shard(plan: ShardPlan, out: Place, scratch: Path) -> Written:
    """Write one tar in `scratch` and move it to `out`. Members' bytes are checked on the way."""
    path = scratch / f"{plan.name}.{os.getpid()}"
    with path.open("wb", buffering=1 << 20) as file:
        hashed = _Hashed(file)
        with _tar(hashed) as tar:
            for sample in plan.samples:
                tar.write(_members(sample))
    size = path.stat().st_size
    places: dict[str, tuple[int, int]] = {}
    with tarfile.open(path) as written:  # the offsets are read back, not assumed
        for info in written:
            places[info.name] = info.offset_data, info.size
    rows = []
    for sample in plan.samples:
        row = {**sample.row, "shard": plan.name}
        for member in MEMBERS:
            offset, length = places.get(f"{row['key']}.{SUFFIX[member]}", (-1, -1))
            row[f"{member}_offset"], row[f"{member}_size"] = offset, length
        rows.append(row)
    out.take(path, plan.name)
    return Written(
        {"name": plan.name, "size": size, "samples": len(rows), "xxh3_128": hashed.hexdigest()}, rows
    )


def _members(sample: Staged) -> dict[str, Any]:
    """The members of one sample as `webdataset.TarWriter` takes them."""
    key = sample.row["key"]
    frames = {name: sample.frames[name].read() for name in FRAMES if name in sample.frames}
    if "json" in sample.frames:
        text = sample.frames["json"].read()
    else:
        text = json.dumps(sample.description, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
    members = {"json": text, **frames, "idx": write_index(key, frames, {"json": text})}
    return {"__key__": key, **{SUFFIX[name]: data for name, data in members.items()}}


def file_hash(file: BinaryIO) -> str:
    """xxh3-128 hex of a whole open file."""
    digest = xxhash.xxh3_128()
    while block := file.read(1 << 22):
        digest.update(block)
    return digest.hexdigest()


class _Hashed:
    """A file that is hashed as it is written, so that a shard is not read again for it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._digest = file, xxhash.xxh3_128()

    def write(self, data: bytes) -> int:
        self._digest.update(data)
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()

    def tell(self) -> int:
        return self._file.tell()

    def close(self) -> None:
        self._file.flush()

    def hexdigest(self) -> str:
        return self._digest.hexdigest()


def _tar(file: Any) -> Any:
    import webdataset as wds  # slow to import, and reading workers do without it

    return wds.TarWriter(file, user="", group="", mode=0o444, mtime=0, encoder=False)
