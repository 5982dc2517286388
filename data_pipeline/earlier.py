"""The dataset that is there already: what of it stays when scans are added, changed or taken away."""

from __future__ import annotations

import hashlib
import io
import json
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline.errors import UserError
from data_pipeline.journal import Outcome, Refusal, write_whole
from data_pipeline.manifest import FORMAT_VERSION, MEMBERS, SCHEMA
from data_pipeline.place import Place
from data_pipeline.sample import Job
from data_pipeline.shard_writer import Piece, Staged

LOCATION = ("shard", *(f"{member}_{what}" for member in MEMBERS for what in ("offset", "size")))
FILES = ("dataset.json", "manifest.parquet", "duplicates.jsonl", "quarantine.jsonl")


@dataclass(frozen=True)
class Known:
    """A case of an earlier build whose files and statements have not changed. `hashes` are (content, values)
    of each of its samples, also of those left out as copies; `keys` are the samples written.
    """

    outcome: Outcome
    hashes: tuple[tuple[str, str], ...]
    keys: tuple[str, ...]


@dataclass
class Earlier:
    """`info` is its `dataset.json`; `rows` the manifest by key; `index` the private record of each case."""

    place: Place
    info: dict[str, Any] = field(default_factory=dict)
    rows: dict[str, dict[str, Any]] = field(default_factory=dict)
    index: dict[str, dict[str, Any]] = field(default_factory=dict)
    left_out: list[dict[str, str]] = field(default_factory=list)

    @classmethod
    def open(cls, place: Place, index: Path, scratch: Path) -> Earlier:
        """Read the dataset at `place` (empty where there is none) and the private index.

        Its descriptions are copied to `scratch` first: the build may be cut off while it replaces them, and
        what is there then must not be taken for the start.
        """
        if place.size(FILES[0]) is None:  # also where a copy is left of a dataset deleted since
            return cls(place)
        if not (scratch / FILES[0]).is_file():
            write_whole(scratch / "index.jsonl", index.read_bytes() if index.is_file() else b"")
            for name in reversed(FILES):  # dataset.json last: with it the copy is whole
                write_whole(scratch / name, place.read(name))
        found = cls(place, json.loads((scratch / FILES[0]).read_text()))
        if found.info.get("format_version") != FORMAT_VERSION:
            raise UserError(
                f"{place} has dataset format {found.info.get('format_version')!r}, not {FORMAT_VERSION}; "
                "build into another folder"
            )
        raw = (scratch / "manifest.parquet").read_bytes()
        if hashlib.sha256(raw).hexdigest() != found.info["manifest_sha256"]:
            raise UserError(f"{place}: manifest.parquet is not the one that dataset.json names; restore it")
        found.rows = {row["key"]: row for row in pq.read_table(io.BytesIO(raw), schema=SCHEMA).to_pylist()}
        lines = (scratch / "index.jsonl").read_text().splitlines()
        found.index = {entry["key"]: entry for entry in map(json.loads, lines)}
        lines = (scratch / "duplicates.jsonl").read_text().splitlines()
        found.left_out = [json.loads(line) for line in lines]
        if found.rows.keys() != {key for entry in found.index.values() for key in entry["keys"]}:
            raise UserError(
                f"{place}: is complete, but the private folder has no index.jsonl of it; give the "
                "--private folder it was built with (one for each dataset), or another --out"
            )
        return found

    def __bool__(self) -> bool:
        return bool(self.info)

    @property
    def labels(self) -> dict[str, int]:
        """Label ids that stay what they are."""
        return {name: int(i) for i, name in self.info.get("labels", {}).items()}

    def known(self, jobs: Iterable[Job], retry: bool = False) -> dict[str, Known]:
        """Cases of `jobs`, by key, that need no reading; with `retry` refused ones do."""
        found = {}
        for job in jobs:
            entry = self.index.get(job.key)
            if entry is None or entry["fingerprint"] != job.fingerprint or (retry and entry["refusals"]):
                continue
            refusals = tuple(Refusal(**r) for r in entry["refusals"])
            hashes = tuple((h[0], h[1]) for h in entry["hashes"])
            keys = tuple(k for k in entry["keys"] if k in self.rows)
            found[job.key] = Known(job.outcome(refusals=refusals, notes=entry["notes"]), hashes, keys)
        return found

    def touched(self, known: Mapping[str, Known], read: Collection[str]) -> set[str]:
        """Known cases that have to be read after all: copies of an image of which another copy was read now
        (content hashes in `read`), was there before and is known no more, or has to be read for the same
        reason. Their labels may join anew.
        """
        images = {key: {content for content, _ in entry["hashes"]} for key, entry in self.index.items()}
        changed = set(read).union(*(images[key] for key in images.keys() - known.keys()))
        found: set[str] = set()
        while more := {key for key in known.keys() - found if images[key] & changed}:
            found |= more
            changed.update(*(images[key] for key in more))
        return found

    def missing(self, wanted: Collection[str]) -> list[dict[str, Any]]:
        """Private records of cases with samples that are not among `wanted` keys."""
        return [e for e in self.index.values() if e["key"] not in wanted and e["keys"]]

    def sample(self, key: str) -> Staged:
        """A sample as it is in its shard."""
        row = self.rows[key]
        frames = {
            member: Piece(
                self.place.address, row["shard"], row[f"{member}_size"], offset=row[f"{member}_offset"]
            )
            for member in MEMBERS
            if member != "idx" and (row[f"{member}_size"] or -1) > 0
        }
        return Staged({n: v for n, v in row.items() if n not in LOCATION}, {}, frames)

    def staying(self, samples: Sequence[Staged]) -> tuple[list[dict[str, Any]], list[Staged]]:
        """Divide what the dataset shall hold into rows that stay where they are, in shards of which every row
        stays, and samples to write.
        """
        if not self.rows:
            return [], list(samples)
        rows = as_stored([sample.row for sample in samples])
        same: dict[str, Staged] = {}
        for sample, row in zip(samples, rows):
            there = self.rows.get(row["key"])
            if there is not None and _equal(sample, row, there):
                same[row["key"]] = sample
        by_shard: dict[str, list[str]] = defaultdict(list)
        for key, row in self.rows.items():
            by_shard[row["shard"]].append(key)
        intact = {shard for shard, keys in by_shard.items() if all(key in same for key in keys)}
        stays = [row for key, row in self.rows.items() if row["shard"] in intact]
        kept = {row["key"] for row in stays}
        return stays, [sample for sample in samples if sample.row["key"] not in kept]


def as_stored(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows as the manifest gives them back (float32 spacings and the like), without their location."""
    fields = [f for f in SCHEMA if f.name not in LOCATION]
    table = pa.Table.from_pylist(
        [{f.name: row.get(f.name) for f in fields} for row in rows], pa.schema(fields)
    )
    return list(table.to_pylist())


def _equal(sample: Staged, row: Mapping[str, Any], there: Mapping[str, Any]) -> bool:
    return all(there[name] == value for name, value in row.items()) and all(
        (there[f"{member}_size"] or -1) == (sample.frames[member].size if member in sample.frames else -1)
        for member in MEMBERS
        if member not in ("idx", "json")
    )
