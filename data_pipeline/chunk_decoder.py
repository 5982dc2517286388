"""Decompression of single Blosc2 chunks, without making a context for each."""

from __future__ import annotations

import struct

import blosc2
import numpy as np

_SIZES = struct.Struct("<4xi4xi")  # of a chunk's header: decompressed bytes, (block size), compressed bytes


class ChunkDecoder:
    """Decompresses one chunk after another, on one thread.

    A super-chunk of one chunk keeps its context between calls, zstd state and buffers and all;
    `blosc2.decompress2` makes and frees one every time, a third of the time that a chunk of 32 cubed takes.
    Holds no lock and no thread, so a fork may go on using it; not for use by two threads at once.
    """

    def __init__(self) -> None:
        self._slot = blosc2.SChunk(
            data=bytes(32),
            chunksize=32,
            cparams=blosc2.CParams(nthreads=1),
            dparams=blosc2.DParams(nthreads=1),
        )

    def __reduce__(self) -> tuple[type[ChunkDecoder], tuple[()]]:
        return ChunkDecoder, ()

    def decode(self, chunk: memoryview, out: np.ndarray) -> None:
        """Decompress `chunk` into the contiguous `out`, which it has to fill.

        The caller has checked the bytes: a flipped one may go unnoticed. ValueError or RuntimeError when they
        are no chunk of this size; the sizes in its header are compared with the two buffers, since Blosc2
        believes the header.
        """
        if len(chunk) < blosc2.MIN_HEADER_LENGTH or _SIZES.unpack_from(chunk) != (out.nbytes, len(chunk)):
            raise ValueError("not a chunk of this size")
        self._slot.update_chunk(0, chunk)
        self._slot.decompress_chunk(0, out)
