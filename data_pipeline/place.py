"""`Place`: where a dataset is kept, a local folder or any fsspec address (`s3://bucket/name`).

Every file appears whole or not at all: locally it is written beside its name and renamed, an object store
does the same by itself.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any, BinaryIO, cast

from data_pipeline.errors import UserError

PARTIAL = ".partial"


class _Asking:
    """A file system whose clients' own exceptions (no credentials, no such host) are OSError."""

    def __init__(self, fs: Any, address: str) -> None:
        self._fs, self._address = fs, address

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._fs, name)

        def call(*args: Any, **more: Any) -> Any:
            try:
                return method(*args, **more)
            except (OSError, TypeError):
                raise
            except Exception as error:  # botocore and others have trees of their own
                raise OSError(None, f"cannot be reached ({type(error).__name__})", self._address) from error

        return call


class Place:
    """A folder of files, by name. Picklable, so that workers may hold one."""

    def __init__(self, address: str | os.PathLike[str]) -> None:
        text = os.fspath(address)
        self.remote = "://" in text
        self.address = text.rstrip("/") if self.remote else os.path.abspath(text)
        self._fs: Any = None

    def __str__(self) -> str:
        return self.address

    @property
    def root(self) -> Path | str:
        """As `Manifest.open` and `ShardReader` take it."""
        return self.address if self.remote else Path(self.address)

    def path(self, name: str) -> str:
        """Address of one file."""
        return f"{self.address}/{name}" if self.remote else os.path.join(self.address, name)

    def create(self) -> None:
        """Make the folder (an object store needs none)."""
        if not self.remote:
            try:
                os.makedirs(self.address, exist_ok=True)
            except OSError as error:
                raise UserError(f"{self.address}: cannot be made ({error.strerror})") from error

    def names(self) -> list[str]:
        """File names directly below, sorted; empty where there is no folder."""
        if not self.remote:
            folder = Path(self.address)
            return sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
        fs, root = self._remote()
        fs.invalidate_cache()
        try:
            return sorted(p.rstrip("/").rsplit("/", 1)[-1] for p in fs.ls(root, detail=False))
        except FileNotFoundError:
            return []

    def open(self, name: str) -> BinaryIO:
        """A file for reading."""
        if not self.remote:
            return (Path(self.address) / name).open("rb")
        fs, root = self._remote()
        fs.invalidate_cache(root)  # others may have written since it was listed
        return cast("BinaryIO", fs.open(f"{root}/{name}", "rb"))

    def read(self, name: str, offset: int = 0, size: int | None = None) -> bytes:
        """Bytes of a file, or of a part of it. OSError where it is not there."""
        if self.remote:
            fs, root = self._remote()
            end = None if size is None else offset + size
            return bytes(fs.cat_file(f"{root}/{name}", start=offset or None, end=end))
        with self.open(name) as file:
            file.seek(offset)
            return file.read() if size is None else file.read(size)

    def size(self, name: str) -> int | None:
        """Bytes of a file, or None where there is none."""
        if not self.remote:
            try:
                return os.stat(self.path(name)).st_size
            except FileNotFoundError:
                return None
        fs, root = self._remote()
        try:
            return int(fs.info(f"{root}/{name}", refresh=True)["size"])
        except TypeError:  # not every file system knows `refresh`
            return int(fs.info(f"{root}/{name}")["size"]) if fs.exists(f"{root}/{name}") else None
        except FileNotFoundError:
            return None

    def write(self, name: str, data: bytes) -> None:
        """Write a whole file; readers see the old one or the new one."""
        if self.remote:
            fs, root = self._remote()
            fs.pipe_file(f"{root}/{name}", data)
            return
        path = Path(self.address) / name
        temporary = path.with_name(f".{path.name}{PARTIAL}")
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)

    def take(self, local: Path, name: str) -> None:
        """Move a finished local file here."""
        if self.remote:
            fs, root = self._remote()
            fs.put_file(str(local), f"{root}/{name}")
            local.unlink()
            return
        try:
            os.replace(local, self.path(name))
        except OSError:  # another file system
            temporary = Path(self.address) / f".{name}{PARTIAL}"
            try:
                shutil.copyfile(local, temporary)
            except OSError as error:  # a full disk here; the system names the file it was read from
                raise OSError(error.errno, error.strerror, str(temporary)) from error
            os.replace(temporary, self.path(name))
            local.unlink()

    def remove(self, name: str) -> None:
        """Delete a file, if it is there."""
        if self.remote:
            fs, root = self._remote()
            if fs.exists(f"{root}/{name}"):
                fs.rm_file(f"{root}/{name}")
            return
        Path(self.path(name)).unlink(missing_ok=True)

    def _remote(self) -> tuple[_Asking, str]:
        import fsspec

        if self._fs is None:
            try:
                fs, root = fsspec.core.url_to_fs(self.address)
                self._fs = _Asking(fs, self.address), root
            except (ImportError, ValueError) as error:
                protocol = self.address.split("://")[0]
                raise UserError(
                    f"{protocol}:// addresses need a package that is not installed or are not known ({error})"
                ) from error
        return cast("tuple[_Asking, str]", self._fs)

    def __getstate__(self) -> dict[str, Any]:
        return {"address": self.address}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["address"])  # type: ignore[misc]
