"""Decompression of single Blosc2 chunks."""

from __future__ import annotations

import struct

import blosc2
import numpy as np

_SIZES = struct.Struct("<4xi4xi")  # of a chunk's header: decompressed bytes, (block size), compressed bytes


def decode_chunk(chunk: memoryview, out: np.ndarray) -> None:
    """Decompress `chunk` into the contiguous `out`, which it has to fill.

    The caller has checked the bytes: a flipped one may go unnoticed. ValueError or RuntimeError when they are
    no chunk of this size; the sizes in its header are compared with the two buffers, since Blosc2 believes
    the header.

    `blosc2.decompress` keeps one context for the process, zstd state and buffers and all; `decompress2` makes
    and frees one every time, a third of the time that a chunk of 32 cubed takes. A chunk of one block, as
    ours are, is decompressed on the calling thread, which holds the interpreter's lock meanwhile: no fork
    comes between.
    """
    if len(chunk) < blosc2.MIN_HEADER_LENGTH or _SIZES.unpack_from(chunk) != (out.nbytes, len(chunk)):
        raise ValueError("not a chunk of this size")
    blosc2.decompress(chunk, out)
