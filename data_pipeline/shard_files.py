"""Ranged reads of a dataset's shards: from a local folder or through fsspec."""

from __future__ import annotations

import os
from collections import OrderedDict
from typing import Any, Protocol

OPEN_FILES = 32  # file descriptors a reader keeps; a lane's window of shards fits


class ByteSource(Protocol):
    """Ranged reads of named files."""

    def read(self, name: str, offset: int, size: int) -> bytes: ...

    def close(self) -> None: ...


class LocalFiles:
    """`pread` with a bounded cache of descriptors. `pread` has no shared position, so a fork may go on using
    them.
    """

    def __init__(self, root: str | os.PathLike[str], limit: int = OPEN_FILES) -> None:
        self.root, self.limit = os.fspath(root), limit
        self._open: OrderedDict[str, int] = OrderedDict()

    def read(self, name: str, offset: int, size: int) -> bytes:
        """Bytes [offset, offset + size) of a file; fewer at its end. OSError when it cannot be read."""
        fd = self._open.get(name)
        if fd is None:
            fd = os.open(os.path.join(self.root, name), os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
            self._open[name] = fd
            if len(self._open) > self.limit:
                os.close(self._open.popitem(last=False)[1])
        else:
            self._open.move_to_end(name)
        data = os.pread(fd, size, offset)
        while len(data) < size:  # a signal or a network file system may return less than asked
            more = os.pread(fd, size - len(data), offset + len(data))
            if not more:
                break
            data += more
        return data

    def close(self) -> None:
        """Close every descriptor; the next read opens again."""
        while self._open:
            os.close(self._open.popitem()[1])

    def __getstate__(self) -> dict[str, Any]:
        return {"root": self.root, "limit": self.limit}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.root, self.limit, self._open = state["root"], state["limit"], OrderedDict()

    def __del__(self) -> None:
        self.close()


class RemoteFiles:
    """Ranged GETs through fsspec (`s3://`, `gs://`, `https://`, `memory://`)."""

    def __init__(self, root: str) -> None:
        self.root = root.rstrip("/")
        self._fs: Any = None
        self._pid = -1

    def read(self, name: str, offset: int, size: int) -> bytes:
        """Bytes [offset, offset + size) of an object; OSError when it cannot be read."""
        if self._pid != os.getpid():  # an asynchronous client does not survive a fork
            import fsspec

            self._fs, self._path = fsspec.core.url_to_fs(self.root, skip_instance_cache=self._pid != -1)
            self._pid = os.getpid()
        return bytes(self._fs.cat_file(f"{self._path}/{name}", start=offset, end=offset + size))

    def close(self) -> None:
        """Drop the client."""
        self._fs, self._pid = None, -1

    def __getstate__(self) -> dict[str, Any]:
        return {"root": self.root}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["root"])  # type: ignore[misc]


def files_at(root: str | os.PathLike[str]) -> LocalFiles | RemoteFiles:
    """The byte source for a dataset folder or address."""
    text = os.fspath(root)
    return RemoteFiles(text) if "://" in text else LocalFiles(text)
