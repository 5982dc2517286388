"""Blocks: the pieces in which a shard is fetched from a store, whole samples that lie together.

A shard is divided into stripes of equal length; a block holds the samples that begin in one stripe. A large
sample is a block by itself, small ones travel together, and every process finds the same blocks in the
manifest alone. The order deals runs of whole stripes of `STRIPE` bytes to the lanes, and stripes are never
wider.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import OrderedDict
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from data_pipeline.manifest import MEMBERS, Manifest

STRIPE = 8 << 20
LEAST_STRIPE = 1 << 18
SHARDS = 256  # whose blocks are kept, 64 bytes a block


def stripe_of(manifest: Manifest) -> int:
    """Bytes of a dataset's stripes: about a sixteenth of its mean shard, a power of two up to `STRIPE`.

    A window of shards is read in blocks, and those that reach across its edges are read for another window or
    node too: blocks have to be small beside a shard.
    """
    shards = manifest.info.get("shards") or [{"size": 16 * STRIPE}]
    wanted = sum(shard["size"] for shard in shards) // (16 * len(shards))
    return min(STRIPE, max(LEAST_STRIPE, 1 << max(0, wanted.bit_length() - 1)))


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
    """Finds the block of a sample. Holds views of the mapped manifest and the blocks of the last few shards;
    copies of it in other processes share the map."""

    def __init__(self, manifest: Manifest, stripe: int | None = None) -> None:
        self._manifest, self._stripe = manifest, stripe or stripe_of(manifest)
        self._members = [(manifest.column(f"{m}_offset"), manifest.column(f"{m}_size")) for m in MEMBERS]
        self._shards: OrderedDict[str, list[Block]] = OrderedDict()

    def of(self, row: int) -> Block:
        """The block that holds a sample."""
        return self.at(self._manifest.value(row, "shard"), self.span(row)[0])

    def at(self, shard: str, offset: int) -> Block:
        """The block that holds a byte of a sample. Microseconds; a millisecond for a shard's first one."""
        blocks = self.in_shard(shard)
        found = bisect_right(blocks, offset, key=lambda block: block.start) - 1
        if found < 0 or offset >= blocks[found].end:
            raise ValueError(f"byte {offset} of {shard} belongs to no sample")
        return blocks[found]

    def in_shard(self, shard: str) -> list[Block]:
        """Every block of a shard, in the order of their bytes; none for a shard without samples."""
        blocks = self._shards.get(shard)
        if blocks is None:
            blocks = self._shards[shard] = self._cut(shard)
            if len(self._shards) > SHARDS:
                self._shards.popitem(last=False)
        else:
            self._shards.move_to_end(shard)
        return blocks

    def span(self, row: int) -> tuple[int, int]:
        """First byte of a sample's first member in its shard, and the byte after its last one."""
        places = self.places(row).values()
        return min(o for o, _ in places), max(o + n for o, n in places)

    def places(self, row: int) -> dict[str, tuple[int, int]]:
        """Offset and size in the shard of each member that a sample has."""
        return {m: (int(o[row]), int(n[row])) for m, (o, n) in zip(MEMBERS, self._members) if o[row] >= 0}

    def spans(self, rows: np.ndarray) -> np.ndarray:
        """`span` of many rows: (n, 2) int64."""
        offsets = np.stack(
            [np.where(o[rows] >= 0, o[rows], np.iinfo(np.int64).max) for o, _ in self._members]
        )
        ends = np.stack([np.where(o[rows] >= 0, o[rows] + n[rows], -1) for o, n in self._members])
        return np.stack([offsets.min(axis=0), ends.max(axis=0)], axis=1)

    def _cut(self, shard: str) -> list[Block]:
        """Rows of a shard lie together, sorted by shard and offset, so both ends are found by bisection."""

        def name_of(row: int) -> str:
            return str(self._manifest.value(row, "shard"))

        everything = range(len(self._manifest))
        first = bisect_left(everything, shard, key=name_of)
        last = bisect_right(everything, shard, lo=first, key=name_of)
        if first == last:
            return []
        spans = self.spans(np.arange(first, last))
        stripes = spans[:, 0] // self._stripe
        cuts = [0, *(np.flatnonzero(np.diff(stripes)) + 1).tolist(), last - first]
        return [
            Block(shard, int(spans[a, 0]), int(spans[a:b, 1].max()), range(first + a, first + b))
            for a, b in pairwise(cuts)
        ]
