"""Blocks: the pieces in which a shard is fetched from a store, whole samples that lie together.

A shard is divided into stripes of `STRIPE` bytes; a block holds the samples that begin in one stripe. A large
sample is a block by itself, small ones travel together, and every process finds the same blocks in the
manifest alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from data_pipeline.manifest import MEMBERS, Manifest

STRIPE = 8 << 20


@dataclass(frozen=True, slots=True)
class Block:
    """Bytes [start, end) of a shard, with the manifest rows whose samples lie in them (ascending)."""

    shard: str
    start: int
    end: int
    rows: range

    @property
    def size(self) -> int:
        """Bytes."""
        return self.end - self.start


class Blocks:
    """Finds the block of a sample. Holds nothing but views of the mapped manifest."""

    def __init__(self, manifest: Manifest, stripe: int = STRIPE) -> None:
        self._manifest, self._stripe = manifest, stripe
        self._members = [(manifest.column(f"{m}_offset"), manifest.column(f"{m}_size")) for m in MEMBERS]

    def of(self, row: int) -> Block:
        """The block that holds a sample; tens of microseconds."""
        shard = self._manifest.value(row, "shard")
        start, end = self.span(row)
        stripe = start // self._stripe
        first, last = row, row + 1
        while first > 0 and self._manifest.value(first - 1, "shard") == shard:
            before = self.span(first - 1)[0]
            if before // self._stripe != stripe:
                break
            first, start = first - 1, before
        while last < len(self._manifest) and self._manifest.value(last, "shard") == shard:
            after = self.span(last)
            if after[0] // self._stripe != stripe:
                break
            last, end = last + 1, after[1]
        return Block(shard, start, end, range(first, last))

    def span(self, row: int) -> tuple[int, int]:
        """First byte of a sample's first member in its shard, and the byte after its last one."""
        places = [(int(o[row]), int(n[row])) for o, n in self._members if o[row] >= 0]
        return min(o for o, _ in places), max(o + n for o, n in places)

    def spans(self, rows: np.ndarray) -> np.ndarray:
        """`span` of many rows: (n, 2) int64."""
        offsets = np.stack(
            [np.where(o[rows] >= 0, o[rows], np.iinfo(np.int64).max) for o, _ in self._members]
        )
        ends = np.stack([np.where(o[rows] >= 0, o[rows] + n[rows], -1) for o, n in self._members])
        return np.stack([offsets.min(axis=0), ends.max(axis=0)], axis=1)
