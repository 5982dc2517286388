"""Check every byte of a dataset, and say which sample, member and chunk a fault lies in."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.errors import UserError
from data_pipeline.frame_index import IndexDamaged, MemberIndex, checksum, read_index
from data_pipeline.manifest import FORMAT_VERSION, MEMBERS, Manifest
from data_pipeline.shard_writer import file_hash


@dataclass(frozen=True)
class Damage:
    """One fault. `key`, `member` are empty and `chunk` is -1 where the fault is not inside one."""

    shard: str
    key: str
    member: str
    chunk: int
    reason: str

    def __str__(self) -> str:
        parts = [self.shard, self.key, self.member, f"chunk {self.chunk}" if self.chunk >= 0 else ""]
        return f"{' '.join(p for p in parts if p)}: {self.reason}"


def verify(root: str | Path, progress: Callable[[int, int], None] | None = None) -> list[Damage]:
    """Every fault of the local dataset at `root`; an empty list means that every byte of the
    manifest and the shards is as written.

    Checks the manifest against `dataset.json`, each shard's size and whole-file hash, and, in a shard that
    differs, each member's header, chunks and tail against its index. `progress(done, total)` is called in
    shards. Raises `UserError` where there is no dataset.
    """
    root = Path(root)
    try:
        info = json.loads((root / "dataset.json").read_text())
        shards = {shard["name"]: shard for shard in info["shards"]}
        version = info["format_version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{root}: dataset.json is missing or unreadable; give a folder made by `medfm shards build`"
        ) from error
    if version != FORMAT_VERSION:
        raise UserError(
            f"{root} has dataset format {version!r}, not {FORMAT_VERSION}; rebuild it or update medfm"
        )
    found: list[Damage] = []
    try:
        intact = (
            hashlib.sha256((root / "manifest.parquet").read_bytes()).hexdigest() == info["manifest_sha256"]
        )
        if not intact:
            found.append(Damage("", "", "manifest.parquet", -1, "is not the one that dataset.json names"))
    except OSError:
        intact = False
        found.append(Damage("", "", "manifest.parquet", -1, "is missing"))
    spoiled: list[str] = []
    for done, (name, entry) in enumerate(shards.items(), 1):
        path = root / name
        if not path.is_file():
            found.append(Damage(name, "", "", -1, "the shard is missing"))
        else:
            size = path.stat().st_size
            if size != entry["size"]:
                found.append(Damage(name, "", "", -1, f"has {size} bytes, {entry['size']} were written"))
                spoiled.append(name)
            elif file_hash(path) != entry["xxh3_128"]:
                spoiled.append(name)
        if progress is not None:
            progress(done, len(shards))
    if spoiled and intact:
        found += _locate(root, spoiled)
    elif spoiled:
        found += [
            Damage(name, "", "", -1, "does not match its hash (no manifest to say where)") for name in spoiled
        ]
    return found


def _locate(root: Path, shards: list[str]) -> list[Damage]:
    """Faults inside shards whose hash differs; a fault in no member is in a tar header or padding."""
    manifest = Manifest.open(root, check_shards=False)
    found: list[Damage] = []
    names = manifest.column("shard")
    for shard in shards:
        before = len(found)
        with (root / shard).open("rb") as file:
            for row in (names == shard).nonzero()[0].tolist():
                found += _sample(manifest, row, shard, file.fileno())
        if len(found) == before:
            found.append(Damage(shard, "", "", -1, "differs outside every member (tar header or padding)"))
    return found


def _sample(manifest: Manifest, row: int, shard: str, fd: int) -> list[Damage]:
    key = str(manifest.column("key")[row])

    def data(member: str) -> bytes:
        offset, size = (int(manifest.column(f"{member}_{what}")[row]) for what in ("offset", "size"))
        return os.pread(fd, size, offset) if size > 0 else b""

    try:
        index = read_index(data("idx"), key)
    except IndexDamaged as error:
        return [Damage(shard, key, "idx", -1, str(error))]
    return [
        Damage(shard, key, member, chunk, reason)
        for member in MEMBERS
        if member in index
        for chunk, reason in _member(index[member], data(member))
    ]


def _member(index: MemberIndex, data: bytes) -> list[tuple[int, str]]:
    if len(data) != index.size:
        return [(-1, f"{len(data)} of {index.size} bytes are there")]
    view = memoryview(data)
    faults = []
    if checksum(view[: index.header_size]) != index.header_check:
        faults.append((-1, "the header does not match its checksum"))
    for number, (offset, size, special, check) in enumerate(index.chunks.tolist()):
        if not special and checksum(view[offset : offset + size]) != check:
            faults.append((number, "its bytes do not match their checksum"))
    if checksum(view[index.tail_offset :]) != index.tail_check:
        faults.append((-1, "the trailer does not match its checksum"))
    return faults
