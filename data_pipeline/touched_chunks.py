"""Which chunks of a member a box touches, where their bytes lie, and which voxels of each go where."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter

from data_pipeline.frame_index import MemberIndex


@dataclass(slots=True)
class Piece:
    """A chunk that a box touches: its record in the index (see `frame_index.py`), its number in C-order over
    the chunk grid, and slices of the box and of the chunk that hold the same voxels.
    """

    offset: int
    size: int
    special: int
    check: int
    number: int
    target: tuple[slice, ...]
    inside: tuple[slice, ...]


def touched_chunks(index: MemberIndex, low: Sequence[int], high: Sequence[int]) -> list[Piece]:
    """The chunks that the box [low, high) touches, in C-order; (c, z, y, x), not empty, inside the member."""
    strides = [math.prod(index.grid[axis + 1 :]) for axis in range(4)]
    axes = [_overlaps(*axis) for axis in zip(low, high, index.chunk, strides)]
    places = [
        (c + z + y + x, (tc, tz, ty, tx), (ic, iz, iy, ix))
        for (c, tc, ic), (z, tz, iz), (y, ty, iy), (x, tx, ix) in itertools.product(*axes)
    ]
    records = index.chunks[[number for number, _, _ in places]].tolist()
    return [
        Piece(offset, size, special, check, number, target, inside)
        for (offset, size, special, check), (number, target, inside) in zip(records, places)
    ]


def _overlaps(low: int, high: int, size: int, stride: int) -> list[tuple[int, slice, slice]]:
    """One axis of a box [low, high): what each chunk adds to its number, and the overlap as a slice of the
    box and of the chunk.
    """
    found = []
    for start in range(low - low % size, high, size):
        first, end = max(low, start), min(high, start + size)
        found.append(
            (start // size * stride, slice(first - low, end - low), slice(first - start, end - start))
        )
    return found


def runs(pieces: Iterable[Piece], gap: int) -> Iterator[list[Piece]]:
    """Pieces by their place in the shard, together where at most `gap` bytes lie between them."""
    ordered = sorted(pieces, key=attrgetter("offset"))
    start = 0
    for end, (piece, following) in enumerate(itertools.pairwise(ordered), 1):
        if following.offset > piece.offset + piece.size + gap:
            yield ordered[start:end]
            start = end
    if ordered:
        yield ordered[start:]
