"""What a node reads from the store: the order played against a cache, without data.

`Pieces` says into what the shards are cut for fetching (blocks, or whole shards), `play` gives the samples
that a node draws one after another, `fetch` sends them through a cache.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data_pipeline.blocks import Blocks, stripe_of
from data_pipeline.manifest import Manifest
from data_pipeline.order import Order, lanes_of

PART = 1 << 20  # rows worked on at a time: a few hundred MB, whatever the dataset


@dataclass(frozen=True)
class Pieces:
    """What is fetched at once. of: number of the piece of each manifest row (int32). size: bytes of each
    piece (int64).
    """

    of: np.ndarray
    size: np.ndarray


@dataclass(frozen=True)
class Layout:
    """Where the samples of a manifest lie. bytes: of each sample, all its members (int64). blocks, shards:
    two ways to fetch them.
    """

    bytes: np.ndarray
    blocks: Pieces
    shards: Pieces

    @classmethod
    def of(cls, manifest: Manifest) -> Layout:
        """Worked out from the mapped offsets; about 50 bytes of memory a row."""
        n, finder = len(manifest), Blocks(manifest)
        spans = np.concatenate([finder.spans(np.arange(a, min(a + PART, n))) for a in range(0, n, PART)])
        names = manifest.table.column("shard").combine_chunks().dictionary_encode()
        codes = names.indices.to_numpy(zero_copy_only=False)
        shard = np.ones(n, bool)  # where a shard begins: rows are sorted by shard and offset
        shard[1:] = codes[1:] != codes[:-1]
        stripes = spans[:, 0] // stripe_of(manifest)
        block = shard.copy()
        block[1:] |= stripes[1:] != stripes[:-1]
        first = np.flatnonzero(block)
        return cls(
            bytes=spans[:, 1] - spans[:, 0],
            blocks=Pieces(_number(block), np.maximum.reduceat(spans[:, 1], first) - spans[first, 0]),
            shards=Pieces(_number(shard), np.maximum.reduceat(spans[:, 1], np.flatnonzero(shard))),
        )


def _number(begins: np.ndarray) -> np.ndarray:
    return (np.cumsum(begins) - 1).astype(np.int32)


def node_lanes(node: int, nodes: int, ranks_per_node: int, groups: int) -> list[int]:
    """Lanes of a node in the order in which its ranks take them: micro-step by micro-step."""
    world = nodes * ranks_per_node
    by_rank = [lanes_of(node * ranks_per_node + r, world, groups) for r in range(ranks_per_node)]
    return [lane for step in zip(*by_rank) for lane in step if lane is not None]


def play(order: Order, lanes: Sequence[int], updates: range) -> np.ndarray:
    """Manifest rows that these lanes draw, one after another (int32)."""
    size, crops = order.group_size, range(order.group_size)
    firsts = [u * order.batch_size + lane * size for u in updates for lane in lanes]
    rows = (order.row(first + j) for first in firsts for j in crops)
    return np.fromiter(rows, np.int32, len(firsts) * size)


@dataclass(frozen=True)
class NodeDraws:
    """What a node draws: `rows`, one after another. share: bytes that it would fetch if each sample drawn
    were fetched once and all of a source and kind of row were of one size. cache: its bytes. part: of the
    node's lanes that were played; share and cache are theirs.
    """

    rows: np.ndarray
    share: float
    cache: float
    part: float = 1.0


@dataclass(frozen=True)
class Fetched:
    """Over several nodes. least, most: bytes fetched over the share, of the best and the worst node.
    per_crop: pieces fetched for each crop. piece_bytes: mean size of those.
    """

    least: float
    most: float
    per_crop: float
    piece_bytes: float

    @property
    def bytes_per_crop(self) -> float:
        """Bytes fetched for each crop."""
        return self.per_crop * self.piece_bytes


def fetched(draws: Sequence[NodeDraws], pieces: Pieces, scale: float = 1.0) -> Fetched:
    """What these nodes fetch, each with `scale` times its cache."""
    ratios, total, count, crops = [], 0, 0, 0
    for node in draws:
        size, fetches = fetch(node.rows, pieces, node.cache * scale)
        ratios.append(size / node.share)
        total, count, crops = total + size, count + fetches, crops + len(node.rows)
    return Fetched(min(ratios), max(ratios), count / crops, total / count)


def fetch(rows: np.ndarray, pieces: Pieces, cache: float) -> tuple[int, int]:
    """Bytes and pieces fetched for these samples by a cache of so many bytes.

    What was used longest ago is dropped first; the piece in use stays, be it larger than the cache.
    """
    size = pieces.size.tolist()
    held: OrderedDict[int, None] = OrderedDict()
    total = count = room = 0
    for piece in pieces.of[rows].tolist():
        if piece in held:
            held.move_to_end(piece)
            continue
        held[piece] = None
        count += 1
        total += size[piece]
        room += size[piece]
        while room > cache and len(held) > 1:
            room -= size[held.popitem(last=False)[0]]
    return total, count


def working_set(draws: Sequence[NodeDraws], pieces: Pieces, goal: float) -> float | None:
    """Bytes of the smallest cache, to 10 %, with which each of these nodes fetches at most `goal` times its
    share; 0 where the piece in use is enough, None where no cache is.
    """
    needed = 0.0
    for node in draws:
        most, low = goal * node.share, needed * node.part
        high = float(pieces.size[np.unique(pieces.of[node.rows])].sum())
        if fetch(node.rows, pieces, high)[0] > most:
            return None
        if fetch(node.rows, pieces, low)[0] <= most:
            continue
        while high - low > 0.1 * high:
            middle = (low + high) / 2
            low, high = (low, middle) if fetch(node.rows, pieces, middle)[0] <= most else (middle, high)
        needed = high / node.part
    return needed
