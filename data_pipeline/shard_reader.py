"""Verified reads of boxes out of shards: only the touched chunks are fetched, and none is used unchecked."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from data_pipeline.chunk_decoder import decode_chunk
from data_pipeline.frame_index import IndexDamaged, MemberIndex, checksum, read_index
from data_pipeline.shard_files import ByteSource, LocalFiles, files_at
from data_pipeline.touched_chunks import Piece, runs, touched_chunks

CACHED_INDICES = 64  # parsed indices a reader keeps; about 60 KB for a 512x512x300 CT
GAP = LocalFiles.gap
INVALID = -32768  # as in storage.py, which imports this file: stored int16 of a voxel with no real value


class DamagedSample(Exception):
    """Bytes of a sample are missing or not what was written.

    Attributes: `key` of the sample, `shard` (file name), `member` ("image", "l1", "l2", "seg", "hide",
    "idx"), `chunk` (number in C-order over the member's chunk grid, -1 where the fault is not in a chunk),
    `reason` (one phrase).
    """

    def __init__(self, key: str, shard: str, member: str, chunk: int, reason: str) -> None:
        super().__init__(
            key, shard, member, chunk, reason
        )  # positional, so that it survives a process boundary
        self.key, self.shard, self.member, self.chunk, self.reason = key, shard, member, chunk, reason

    def __str__(self) -> str:
        where = f"{self.member} chunk {self.chunk}" if self.chunk >= 0 else self.member
        return f"sample {self.key} in {self.shard} is damaged: {where}: {self.reason}"


class ManifestColumns(Protocol):
    """What a reader needs of a manifest."""

    root: Any

    def column(self, name: str) -> np.ndarray: ...
    def value(self, i: int, name: str) -> Any: ...


class ShardReader:
    """Reads boxes of samples, checking every byte it uses.

    A box costs one read for the sample's index (kept for the last few samples) and one read per run of
    neighbouring chunks. Each chunk's compressed bytes are compared with the index, then decompressed, while
    they are in the processor's cache. Safe after fork and picklable; not for use by two threads at once.
    """

    def __init__(
        self, root: str | os.PathLike[str], manifest: ManifestColumns, files: ByteSource | None = None
    ) -> None:
        self.files: ByteSource = files_at(root) if files is None else files
        self.manifest = manifest
        self._places: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        self._hide_sizes: np.ndarray | None = None
        self._indices: OrderedDict[int, dict[str, MemberIndex]] = OrderedDict()
        self._last = -1, ""  # row and shard of the last read

    def read_box(
        self,
        row: int,
        member: str,
        channel: int | None,
        origin: Sequence[int],
        extent: Sequence[int],
        *,
        hidden: bool = False,
    ) -> np.ndarray:
        """Voxels of one box, stored dtype, C-contiguous.

        `row` is a row of the manifest, `member` one of "image", "l1", "l2", "seg", "hide"; `channel` an index
        on the first axis (channel, or layer of seg), or None for all of them. `origin` and `extent` are
        (z, y, x) voxels of that member. Returns (z, y, x), or (c, z, y, x) when `channel` is None. Voxels of
        "image" that the sample hides (member "hide", 1 where `deface: mask` found a face) come back as
        invalid, INVALID or NaN, unless `hidden`; the reduced levels never held them. Raises `DamagedSample`,
        never wrong voxels, if bytes are damaged and reading them again does not help; ValueError when the box
        does not lie inside the member or the sample has no such member.
        """
        try:
            return self._box(row, member, channel, origin, extent, hidden)
        except DamagedSample as damage:
            missing = isinstance(damage.__cause__, FileNotFoundError)
            if missing or not self.files.renew(self._shard(row), self._place(row, "idx")[0]):
                raise
            self._indices.pop(int(row), None)
            return self._box(row, member, channel, origin, extent, hidden)

    def _box(
        self,
        row: int,
        member: str,
        channel: int | None,
        origin: Sequence[int],
        extent: Sequence[int],
        hidden: bool,
    ) -> np.ndarray:
        index = self._member(row, member)
        channels = (0, index.shape[0]) if channel is None else (channel, channel + 1)
        low = (channels[0], *map(int, origin))
        high = (channels[1], *(int(o) + int(e) for o, e in zip(origin, extent)))
        if len(low) != 4 or any(a < 0 or b > s or a >= b for a, b, s in zip(low, high, index.shape)):
            if self._member(row, "image").shape != tuple(self.manifest.column("shape")[row]):
                raise self._damaged(row, "idx", -1, "manifest and index differ on the shape")
            raise ValueError(
                f"box {low}..{high} does not lie inside {member} of shape {index.shape} ({self._key(row)})"
            )
        out = np.empty(tuple(b - a for a, b in zip(low, high)), index.dtype)
        self._fill(row, index, low, high, out)
        if member == "image" and not hidden and self.hides(row):
            out[:, self._hidden(row, index, low, high)] = np.nan if out.dtype.kind == "f" else INVALID
        return out if channel is None else out[0]

    def hides(self, row: int) -> bool:
        """Whether a sample has voxels that are hidden from training."""
        if self._hide_sizes is None:
            self._hide_sizes = self.manifest.column("hide_size")
        return bool(self._hide_sizes[row] > 0)

    def _hidden(
        self, row: int, image: MemberIndex, low: tuple[int, ...], high: tuple[int, ...]
    ) -> np.ndarray:
        """Which voxels (z, y, x) of the box [low, high) of an image are hidden."""
        index = self._member(row, "hide")
        if index.shape != (1, *image.shape[1:]):
            raise self._damaged(row, "hide", -1, "its shape is not the image's")
        hide = np.empty((1, *(b - a for a, b in zip(low[1:], high[1:]))), index.dtype)
        self._fill(row, index, (0, *low[1:]), (1, *high[1:]), hide)
        return hide[0] != 0

    def _fill(
        self, row: int, index: MemberIndex, low: tuple[int, ...], high: tuple[int, ...], out: np.ndarray
    ) -> None:
        """Put the box [low, high) of a member into `out`."""
        stored = []
        for piece in touched_chunks(index, low, high):
            if piece.special:
                bits = piece.check.to_bytes(8, "little")[: index.dtype.itemsize]
                out[piece.target] = np.frombuffer(bits, index.dtype)[0]
            else:
                stored.append(piece)
        scratch = np.empty(index.chunk, index.dtype)
        for piece, data in self._fetch(row, index.name, list(runs(stored, self.files.gap))):
            try:
                decode_chunk(data, scratch)
            except (RuntimeError, ValueError) as error:
                raise self._damaged(row, index.name, piece.number, "does not decompress") from error
            out[piece.target] = scratch[piece.inside]

    def _fetch(self, row: int, member: str, batch: list[list[Piece]]) -> Iterator[tuple[Piece, memoryview]]:
        """Chunks with their stored bytes, checked; by one request for each run of neighbours."""
        start = self._place(row, member)[0]
        places = [(start + run[0].offset, run[-1].offset + run[-1].size - run[0].offset) for run in batch]
        try:
            for run, fetched in zip(batch, self.files.read_many(self._shard(row), places)):
                for piece in run:
                    at = piece.offset - run[0].offset
                    data = memoryview(fetched)[at : at + piece.size]
                    if len(data) != piece.size:
                        raise self._damaged(row, member, piece.number, "the shard ends too early")
                    if checksum(data) != piece.check:
                        raise self._damaged(
                            row, member, piece.number, "its bytes do not match their checksum"
                        )
                    yield piece, data
        except (OSError, ValueError) as error:
            raise self._unreadable(row, member, error) from error

    def _member(self, row: int, member: str) -> MemberIndex:
        """The checked index of one member of a sample."""
        row = int(row)
        members = self._indices.get(row)
        if members is None:
            offset, size = self._place(row, "idx")
            try:
                members = read_index(self._read(row, "idx", offset, size), self._key(row))
            except IndexDamaged as error:
                raise self._damaged(row, "idx", -1, str(error)) from error
            self._indices[row] = members
            if len(self._indices) > CACHED_INDICES:
                self._indices.popitem(last=False)
        else:
            self._indices.move_to_end(row)
        if member not in members and self._place(row, member)[1] > 0:
            raise self._damaged(row, "idx", -1, f"the index lacks {member}")
        if member not in members or not len(members[member].chunks):
            raise ValueError(f"sample {self._key(row)} has no member {member!r}")
        found = members[member]
        if found.size != self._place(row, member)[1]:
            raise self._damaged(row, "idx", -1, f"manifest and index differ on the size of {member}")
        return found

    def _place(self, row: int, member: str) -> tuple[int, int]:
        """Absolute offset and size of a member in its shard."""
        columns = self._places.get(member)
        if columns is None:
            columns = self._places[member] = (
                self.manifest.column(f"{member}_offset"),
                self.manifest.column(f"{member}_size"),
            )
        return int(columns[0][row]), int(columns[1][row])

    def _read(self, row: int, member: str, offset: int, size: int) -> bytes:
        try:
            return self.files.read(self._shard(row), offset, size)
        except (OSError, ValueError) as error:
            raise self._unreadable(row, member, error) from error

    def _unreadable(self, row: int, member: str, error: Exception) -> DamagedSample:
        missing = isinstance(error, FileNotFoundError)
        return self._damaged(row, member, -1, f"the shard {'is missing' if missing else 'cannot be read'}")

    def _key(self, row: int) -> str:
        return str(self.manifest.value(row, "key"))

    def _shard(self, row: int) -> str:
        if row != self._last[0]:
            self._last = row, str(self.manifest.value(row, "shard"))
        return self._last[1]

    def _damaged(self, row: int, member: str, chunk: int, reason: str) -> DamagedSample:
        return DamagedSample(self._key(row), self._shard(row), member, chunk, reason)

    def close(self) -> None:
        """Close open files; the next read opens them again."""
        self.files.close()
