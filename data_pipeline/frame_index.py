"""The chunk index of a sample (`KEY.idx`): where each piece of each member lies, and what its bytes hash to.

Blosc2 does not notice a flipped byte, and a whole-file checksum would force a whole-file read. The index
lets a crop fetch and check only the chunks it touches. Layout, all little-endian:

    prefix    magic "MEDFMIX1" | key S32 | members u32 | chunks u32
    members   one `MEMBER` record each (name, dtype, shape, chunk shape, header, tail, first chunk record)
    chunks    one `CHUNK` record each (offset, size, special, check), C-order over the member's chunk grid
    trailer   xxh3-64 of everything before it

A chunk whose voxels are all one value has no bytes in a Blosc2 frame (`special` = 1, size 0); `check` then
holds the value's bits. A member without chunks (`KEY.json`) is covered by its header record alone.

Source: the C-Blosc2 contiguous frame format, README_CFRAME_FORMAT.rst of c-blosc2 2.x.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import blosc2
import numpy as np
import xxhash

MAGIC = b"MEDFMIX1"
PREFIX = struct.Struct("<8s32sII")
MEMBER = np.dtype(
    [
        ("name", "S8"), ("dtype", "S8"), ("ndim", "<u4"), ("first", "<u4"), ("count", "<u4"), ("pad", "<u4"),
        ("shape", "<i8", 4), ("chunk", "<i8", 4),
        ("size", "<u8"), ("header_size", "<u8"), ("header_check", "<u8"),
        ("tail_offset", "<u8"), ("tail_check", "<u8"),
    ]
)  # fmt: skip
CHUNK = np.dtype([("offset", "<u8"), ("size", "<u4"), ("special", "<u4"), ("check", "<u8")])
SPECIAL_ZERO, SPECIAL_NAN = 1, 2  # of the top byte's low bits in the offset of a chunk without bytes


class IndexDamaged(ValueError):
    """The bytes of a `KEY.idx` are not what was written."""


@dataclass(frozen=True, slots=True)
class MemberIndex:
    """One member of a sample: its geometry, so that a read needs no Blosc2 open, and its pieces.

    `shape` and `chunk` have four axes, (c, z, y, x) or (layer, z, y, x). `grid` is the number of chunks
    along each. `chunks` is a `CHUNK` array in C-order over `grid`; offsets count from the first byte of the
    member. The `tail` (Blosc2's own offset table and trailer) reaches from `tail_offset` to `size`.
    """

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    chunk: tuple[int, ...]
    grid: tuple[int, ...]
    size: int
    header_size: int
    header_check: int
    tail_offset: int
    tail_check: int
    chunks: np.ndarray


def checksum(data: bytes | memoryview) -> int:
    """xxh3-64 of `data`, the one checksum of this format."""
    return xxhash.xxh3_64_intdigest(data)


def index_frame(frame: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Work out the pieces of a contiguous Blosc2 b2nd frame.

    Returns (one `MEMBER` record without name and `first`, its `CHUNK` records). The chunks must fill the room
    between header and offset table without a gap; a frame that this format cannot describe (lazy,
    variable-size or other special chunks, more than 4 axes) raises ValueError.
    """
    array = blosc2.ndarray_from_cframe(frame)
    schunk = array.schunk
    header_size = struct.unpack(">i", frame[11:15])[0]
    frame_size = struct.unpack(">Q", frame[16:24])[0]
    compressed = struct.unpack(">q", frame[39:47])[0]
    if frame_size != len(frame) or len(array.shape) != 4 or array.chunks != array.blocks:
        raise ValueError("not a complete 4-axis Blosc2 frame whose chunk is one block")
    tail_offset = header_size + compressed
    table_size = struct.unpack("<i", frame[tail_offset + 12 : tail_offset + 16])[0]
    offsets = np.frombuffer(
        blosc2.decompress2(frame[tail_offset : tail_offset + table_size], nthreads=1), dtype="<u8"
    )
    if len(offsets) != schunk.nchunks:
        raise ValueError("the frame's offset table does not match its chunk count")
    chunks = np.zeros(len(offsets), CHUNK)
    special = offsets >> np.uint64(63) == 1
    for i in np.flatnonzero(special):
        kind = (int(offsets[i]) >> 56) & 0x7F
        if kind not in (SPECIAL_ZERO, SPECIAL_NAN):
            raise ValueError(f"chunk {i} is of a special kind ({kind}) that the index does not know")
        value = np.zeros((), array.dtype) if kind == SPECIAL_ZERO else np.full((), np.nan, array.dtype)
        chunks[i] = (0, 0, 1, int.from_bytes(value.tobytes(), "little"))
    starts = offsets[~special] + np.uint64(header_size)
    if len(starts) and int(starts.max()) + 16 > tail_offset:
        raise ValueError("a chunk does not lie where the frame's offset table says")
    stated = np.frombuffer(frame, np.uint8)[starts[:, None] + np.arange(12, 16, dtype=np.uint64)]
    sizes = stated.view("<i4").ravel().astype(np.int64)  # the compressed size, in the chunk's own header
    order = np.argsort(starts)
    edges = header_size + np.concatenate([[0], np.cumsum(sizes[order])])
    if not np.array_equal(starts[order], edges[:-1]) or edges[-1] != tail_offset:
        raise ValueError("the frame's chunks do not lie where its offset table says")
    view = memoryview(frame)
    chunks["offset"][~special], chunks["size"][~special] = starts, sizes
    chunks["check"][~special] = [
        checksum(view[start : start + size]) for start, size in zip(starts.tolist(), sizes.tolist())
    ]
    member = np.zeros((), MEMBER)
    member["dtype"], member["ndim"], member["count"] = np.dtype(array.dtype).str, 4, len(chunks)
    member["shape"], member["chunk"], member["size"] = array.shape, array.chunks, len(frame)
    member["header_size"], member["header_check"] = header_size, checksum(view[:header_size])
    member["tail_offset"], member["tail_check"] = tail_offset, checksum(view[tail_offset:])
    return member, chunks


def write_index(key: str, frames: Mapping[str, bytes], others: Mapping[str, bytes]) -> bytes:
    """Build `KEY.idx` for a sample: `frames` are Blosc2 members by name, `others` members of plain bytes."""
    members: list[np.ndarray] = []
    chunks: list[np.ndarray] = []
    first = 0
    for name, frame in frames.items():
        member, records = index_frame(frame)
        member["name"], member["first"] = name, first
        first += len(records)
        members.append(member)
        chunks.append(records)
    for name, data in others.items():
        member = np.zeros((), MEMBER)
        member["name"], member["first"] = name, first
        member["size"] = member["header_size"] = member["tail_offset"] = len(data)
        member["header_check"], member["tail_check"] = checksum(data), checksum(b"")
        members.append(member)
    body = b"".join(
        [
            PREFIX.pack(MAGIC, key.encode("ascii"), len(members), first),
            *(m.tobytes() for m in members),
            *(c.tobytes() for c in chunks),
        ]
    )
    return body + checksum(body).to_bytes(8, "little")


def read_index(data: bytes, key: str) -> dict[str, MemberIndex]:
    """Parse `KEY.idx`; raises `IndexDamaged` when its own checksum, its lengths or its key disagree."""
    if len(data) < PREFIX.size + 8 or checksum(data[:-8]) != int.from_bytes(data[-8:], "little"):
        raise IndexDamaged("the index does not match its own checksum")
    magic, stored_key, n_members, n_chunks = PREFIX.unpack_from(data)
    if magic != MAGIC or stored_key.rstrip(b"\0") != key.encode("ascii"):
        raise IndexDamaged("the index belongs to another sample or format")
    if len(data) != PREFIX.size + n_members * MEMBER.itemsize + n_chunks * CHUNK.itemsize + 8:
        raise IndexDamaged("the index has the wrong length")
    members = np.frombuffer(data, MEMBER, n_members, PREFIX.size)
    chunks = np.frombuffer(data, CHUNK, n_chunks, PREFIX.size + members.nbytes)
    return {m.name: m for m in map(_member, members, _parts(members, chunks))}


def _parts(members: np.ndarray, chunks: np.ndarray) -> Iterable[np.ndarray]:
    for first, count in zip(members["first"].tolist(), members["count"].tolist()):
        yield chunks[first : first + count]


def _member(record: np.void, chunks: np.ndarray) -> MemberIndex:
    shape, chunk = tuple(record["shape"].tolist()), tuple(record["chunk"].tolist())
    return MemberIndex(
        name=bytes(record["name"]).decode("ascii"),
        dtype=np.dtype(bytes(record["dtype"]).decode("ascii") or "u1"),
        shape=shape,
        chunk=chunk,
        grid=tuple(-(-s // c) if c else 0 for s, c in zip(shape, chunk)),
        size=int(record["size"]),
        header_size=int(record["header_size"]),
        header_check=int(record["header_check"]),
        tail_offset=int(record["tail_offset"]),
        tail_check=int(record["tail_check"]),
        chunks=chunks,
    )
