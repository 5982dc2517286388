"""Check every byte of a dataset, and say which sample, member and chunk a fault lies in."""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.complete import dataset_json
from data_pipeline.errors import UserError
from data_pipeline.frame_index import IndexDamaged, MemberIndex, checksum, read_index
from data_pipeline.manifest import FORMAT_VERSION, MEMBERS, SUFFIX, Manifest
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
    shard that differs, each member's tar header, its header, chunks and tail against its index. A tar that
    `dataset.json` does not name is a fault too, as whoever reads all of them would take it. `progress(done,
    total)` is called in shards. Raises `UserError` where there is no dataset.
    """
    place = Place(root)
    info, found = _description(place)
    if not _readable(info):
        return found
    intact = {}
    for name, digest in info["files"].items():
        reason = _difference(place, name, digest)
        intact[name] = reason is None
        if reason is not None:
            found.append(Damage("", "", name, -1, reason))
    named = {entry["name"] for entry in info["shards"]}
    found += [
        Damage(name, "", "", -1, "is no shard of this dataset")
        for name in place.names()
        if name.endswith(".tar") and name not in named
    ]
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
    if dataset_json({n: v for n, v in info.items() if n != "check"}) == text:
        return info, []
    rest = "" if _readable(info) else "; nothing else could be checked, restore it first"
    return info, [Damage("", "", "dataset.json", -1, f"does not match its own hash{rest}")]


def _readable(info: dict[str, Any]) -> bool:
    """Whether a `dataset.json` that may be damaged still says what the files and shards are to be."""
    files, shards = info.get("files"), info.get("shards")
    return (
        isinstance(files, dict)
        and "manifest.parquet" in files
        and isinstance(shards, list)
        and all(isinstance(s, dict) and s.keys() >= {"name", "size", "xxh3_128"} for s in shards)
        and isinstance(info.get("labels"), dict)
    )


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

    def part(member: str) -> tuple[int, int]:
        offset, size = (int(manifest.column(f"{member}_{what}")[row]) for what in ("offset", "size"))
        return offset, max(size, 0)

    def data(member: str) -> bytes:
        offset, size = part(member)
        return _bytes(place, shard, offset, size)

    found = []
    for member in MEMBERS:
        offset, size = part(member)
        if size and not _header_fits(
            _bytes(place, shard, offset - tarfile.BLOCKSIZE, tarfile.BLOCKSIZE),
            f"{key}.{SUFFIX[member]}",
            size,
        ):
            found.append(Damage(shard, key, member, -1, "its tar header is damaged"))
    try:
        index = read_index(data("idx"), key)
    except IndexDamaged as error:
        return [*found, Damage(shard, key, "idx", -1, str(error))]
    return found + [
        Damage(shard, key, member, chunk, reason)
        for member in MEMBERS
        if member in index
        for chunk, reason in _member(index[member], data(member))
    ]


def _bytes(place: Place, shard: str, offset: int, size: int) -> bytes:
    """What is there of a part of a shard; of one cut short an object store answers with an error."""
    try:
        return place.read(shard, offset, size) if size else b""
    except OSError:
        return b""


def _header_fits(block: bytes, name: str, size: int) -> bool:
    try:
        info = tarfile.TarInfo.frombuf(block, "utf-8", "strict")
    except (tarfile.HeaderError, UnicodeDecodeError):
        return False
    return (info.name, info.size) == (name, size)


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
