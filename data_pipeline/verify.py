"""Check every byte of a dataset, and say which sample, member and chunk a fault lies in."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.complete import dataset_json
from data_pipeline.errors import UserError
from data_pipeline.frame_index import IndexDamaged, MemberIndex, checksum, read_index
from data_pipeline.manifest import FORMAT_VERSION, MEMBERS, Manifest
from data_pipeline.place import Place
from data_pipeline.shard_writer import file_hash
from data_pipeline.splits import check_leaks


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
    """Every fault of the dataset at `root` (folder or fsspec address); an empty list means that every byte is
    as written and that no subject or image is in two splits.

    Checks `dataset.json` against its own hash, each other file and shard against `dataset.json`, and, in a
    shard that differs, each member's header, chunks and tail against its index. `progress(done, total)` is
    called in shards. Raises `UserError` where there is no dataset.
    """
    place = Place(root)
    info, found = _description(place)
    intact = {}
    for name, digest in info["files"].items():
        reason = _difference(place, name, digest)
        intact[name] = reason is None
        if reason is not None:
            found.append(Damage("", "", name, -1, reason))
    spoiled: list[str] = []
    for done, entry in enumerate(info["shards"], 1):
        name = entry["name"]
        size = place.size(name)
        if size is None:
            found.append(Damage(name, "", "", -1, "the shard is missing"))
        elif size != entry["size"]:
            found.append(Damage(name, "", "", -1, f"has {size} bytes, {entry['size']} were written"))
            spoiled.append(name)
        else:
            with place.open(name) as file:
                if file_hash(file) != entry["xxh3_128"]:
                    spoiled.append(name)
        if progress is not None:
            progress(done, len(info["shards"]))
    if intact["manifest.parquet"]:
        manifest = Manifest.of(place.root, place.read("manifest.parquet"), info)
        found += _locate(place, manifest, spoiled)
        try:
            check_leaks(manifest.table.select(["subject", "content_hash", "split"]).to_pylist())
        except UserError as error:
            found.append(Damage("", "", "manifest.parquet", -1, str(error)))
    else:
        found += [
            Damage(name, "", "", -1, "does not match its hash (no manifest to say where)") for name in spoiled
        ]
    return found


def _description(place: Place) -> tuple[dict[str, Any], list[Damage]]:
    """`dataset.json`, and what is wrong with it."""
    try:
        text = place.read("dataset.json")
        info = json.loads(text)
        version = info["format_version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{place}: dataset.json is missing or unreadable; give a folder made by `medfm shards build`"
        ) from error
    if version != FORMAT_VERSION:
        raise UserError(
            f"{place} has dataset format {version!r}, not {FORMAT_VERSION}; rebuild it or update medfm"
        )
    if not {"files", "shards", "check"} <= info.keys():
        raise UserError(f"{place}: dataset.json names no files; restore or rebuild it")
    changed = dataset_json({n: v for n, v in info.items() if n != "check"}) != text
    return info, [Damage("", "", "dataset.json", -1, "does not match its own hash")] if changed else []


def _difference(place: Place, name: str, digest: str) -> str | None:
    try:
        same = hashlib.sha256(place.read(name)).hexdigest() == digest
    except OSError:
        return "is missing"
    return None if same else "is not the one that dataset.json names"


def _locate(place: Place, manifest: Manifest, shards: list[str]) -> list[Damage]:
    """Faults inside shards whose hash differs; a fault in no member is in a tar header or padding."""
    found: list[Damage] = []
    names = manifest.column("shard")
    for shard in shards:
        before = len(found)
        for row in (names == shard).nonzero()[0].tolist():
            found += _sample(manifest, row, shard, place)
        if len(found) == before:
            found.append(Damage(shard, "", "", -1, "differs outside every member (tar header or padding)"))
    return found


def _sample(manifest: Manifest, row: int, shard: str, place: Place) -> list[Damage]:
    key = str(manifest.column("key")[row])

    def data(member: str) -> bytes:
        offset, size = (int(manifest.column(f"{member}_{what}")[row]) for what in ("offset", "size"))
        return place.read(shard, offset, size) if size > 0 else b""

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
