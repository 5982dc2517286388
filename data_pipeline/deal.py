"""In which order the samples of a cell are dealt to the lanes: runs of neighbours, in turn."""

from __future__ import annotations

import numpy as np

from data_pipeline.blocks import STRIPE

#: Runs that a lane gets from a cell, where its samples lie in as many blocks.
RUNS = 32


def dealing(shard: np.ndarray, first_byte: np.ndarray, lanes: int) -> np.ndarray:
    """A permutation of the samples of a cell (int64), of which lane g takes the g-th of `lanes` equal parts.

    shard, first_byte: of each sample, in storage order. Samples of one source and size lie together in the
    shards, so that plain parts would give one lane all the large ones, and its node many times the bytes of
    another. Hence the cell is cut into runs of whole blocks (see `blocks.py`), each at most a shard and at
    least `RUNS` a lane where there are as many blocks, and the runs are dealt like cards, every other round
    in reverse. What a lane then has too many of goes to its neighbours from both ends of its part, where the
    rounds of the smallest samples stand. A block goes to one lane, but for those at the ends of the parts.
    """
    new_shard = _changes(shard)
    new_block = new_shard | _changes(first_byte // STRIPE)
    block = np.cumsum(new_block, dtype=np.int32) - 1
    blocks, shards = int(block[-1]) + 1, int(new_shard.sum())
    width = max(1, min(blocks // shards, blocks // (RUNS * lanes)))
    in_shard = block - np.repeat(block[new_shard], np.diff(np.append(np.flatnonzero(new_shard), len(shard))))
    run = np.cumsum(new_shard | (new_block & (in_shard % width == 0)), dtype=np.int32) - 1
    turn, lane = np.divmod(run, np.int32(lanes))
    lane = np.where(turn % 2 == 1, lanes - 1 - lane, lane)
    turns = int(turn[-1]) + 1
    known = np.flatnonzero(~new_shard) - 1  # samples followed by one in their shard, hence of known size
    counts = np.maximum(np.bincount(turn[known], minlength=turns), 1)
    size = np.bincount(turn[known], first_byte[known + 1] - first_byte[known], turns) / counts
    rank = np.argsort(np.argsort(size, kind="stable"), kind="stable")
    place = np.where(rank % 2 == 0, rank // 2, turns - 1 - rank // 2)
    return np.argsort(lane * turns + place[turn], kind="stable")


def _changes(values: np.ndarray) -> np.ndarray:
    return np.concatenate([[True], values[1:] != values[:-1]])
