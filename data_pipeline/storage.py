"""Stored members: Blosc2 frames of 16-bit voxels and their chunks.

How voxels become 16-bit integers is in `quantise.py`, reduced levels in `levels.py`, reads in
`shard_reader.py`, the chunk index in `frame_index.py`; their public names are re-exported here.
"""

from __future__ import annotations

from collections.abc import Sequence

import blosc2
import numpy as np

from data_pipeline.frame_index import index_frame, read_index, write_index
from data_pipeline.levels import block_mean, block_means, level_shape
from data_pipeline.quantise import INVALID, Stored, invalid_of, quantise
from data_pipeline.shard_reader import DamagedSample, ShardReader

__all__ = [
    "INVALID",
    "DamagedSample",
    "ShardReader",
    "Stored",
    "block_mean",
    "block_means",
    "chunk_shape",
    "decode",
    "encode",
    "index_frame",
    "invalid_of",
    "level_shape",
    "quantise",
    "read_index",
    "write_index",
]  # fmt: skip

PARAMETERS = blosc2.CParams(
    codec=blosc2.Codec.ZSTD, clevel=5, nthreads=1, filters=[blosc2.Filter.SHUFFLE], filters_meta=[0]
)


def chunk_shape(shape: Sequence[int], kind: str, axes: Sequence[int]) -> tuple[int, int, int, int]:
    """Chunk (1, z, y, x) for a geometry class: 32 cubed, 8 on the thick axis by 64 by 64, or 128 squared.

    `shape` is (c, z, y, x), `axes` the stem order of the stored axes (the first is the thick one of a slab).
    """
    stem = {"volume": (32, 32, 32), "slab": (8, 64, 64), "planar": (1, 128, 128)}[kind]
    sizes = [0, 0, 0]
    for size, axis in zip(stem, axes):
        sizes[axis] = min(size, int(shape[1 + axis]))
    return 1, sizes[0], sizes[1], sizes[2]


def encode(array: np.ndarray, chunks: Sequence[int]) -> bytes:
    """A Blosc2 b2nd frame of `array` (4 axes), zstd level 5, each chunk one block.

    One thread: with more, the same array gives different bytes on each run.
    """
    chunks = tuple(min(c, s) for c, s in zip(chunks, array.shape))
    frame = blosc2.asarray(
        np.ascontiguousarray(array),
        chunks=chunks,
        blocks=chunks,
        cparams=PARAMETERS,
        dparams=blosc2.DParams(nthreads=1),
    )
    return bytes(frame.to_cframe())


def decode(frame: bytes) -> np.ndarray:
    """The whole array of a frame (for tools; training reads boxes through `ShardReader`)."""
    return np.asarray(blosc2.ndarray_from_cframe(frame)[...])
