"""Ranged reads of a dataset's shards: from a local folder, or from a store (`remote_files`)."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

from data_pipeline.remote_files import RemoteFiles
from data_pipeline.traffic import Meter

OPEN_FILES = 32  # file descriptors a reader keeps; a lane's window of shards fits


class ByteSource(Protocol):
    """Ranged reads of named files. `gap`: bytes that cost less to read and drop than another read."""

    gap: int

    def read(self, name: str, offset: int, size: int) -> bytes: ...

    def read_many(self, name: str, places: Sequence[tuple[int, int]]) -> Iterable[bytes]:
        """`read` of several (offset, size) of one file: fetched together, or one by one as they are taken."""
        ...

    def renew(self, name: str, offset: int) -> bool:
        """Called when bytes of a sample proved damaged: whether reading them again may give others."""
        ...

    def close(self) -> None: ...


class LocalFiles:
    """`pread` with a bounded cache of descriptors. `pread` has no shared position, so a fork may go on using
    them.

    With `limit` 0 nothing is kept open, and any number of threads may read. meter: counts the reads.
    """

    gap = 32 << 10

    def __init__(
        self, root: str | os.PathLike[str], limit: int = OPEN_FILES, meter: Meter | None = None
    ) -> None:
        self.root, self.limit, self.meter = os.fspath(root), limit, meter
        self._open: OrderedDict[str, int] = OrderedDict()

    def read(self, name: str, offset: int, size: int) -> bytes:
        """Bytes [offset, offset + size) of a file; fewer at its end. OSError when it cannot be read."""
        data = self._read(name, offset, size)
        if self.meter is not None:
            self.meter.add(requests=1, bytes=len(data))
        return data

    def _read(self, name: str, offset: int, size: int) -> bytes:
        fd = self._open.get(name)
        if fd is not None:
            self._open.move_to_end(name)
            return _pread(fd, size, offset)
        fd = os.open(os.path.join(self.root, name), os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        if not self.limit:
            try:
                return _pread(fd, size, offset)
            finally:
                os.close(fd)
        self._open[name] = fd
        if len(self._open) > self.limit:
            os.close(self._open.popitem(last=False)[1])
        return _pread(fd, size, offset)

    def read_many(self, name: str, places: Sequence[tuple[int, int]]) -> Iterator[bytes]:
        """`read` of several (offset, size), one by one."""
        return (self.read(name, offset, size) for offset, size in places)

    def renew(self, name: str, offset: int) -> bool:
        """A disk gives the same bytes again."""
        return False

    def close(self) -> None:
        """Close every descriptor; the next read opens again."""
        while self._open:
            os.close(self._open.popitem()[1])

    def __getstate__(self) -> dict[str, Any]:
        return {"root": self.root, "limit": self.limit, "meter": self.meter}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def __del__(self) -> None:
        self.close()


def _pread(fd: int, size: int, offset: int) -> bytes:
    data = os.pread(fd, size, offset)
    while len(data) < size:  # a signal or a network file system may return less than asked
        more = os.pread(fd, size - len(data), offset + len(data))
        if not more:
            break
        data += more
    return data


def files_at(root: str | os.PathLike[str]) -> LocalFiles | RemoteFiles:
    """The byte source for a dataset folder or address."""
    text = os.fspath(root)
    return RemoteFiles(text) if "://" in text else LocalFiles(text)
