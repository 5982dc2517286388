"""Where inputs lie: local paths and fsspec addresses (``s3://bucket/folder``), listed and fetched alike.

Storage options and credentials come from the environment and fsspec's own configuration (for S3
``AWS_ENDPOINT_URL``, ``AWS_ACCESS_KEY_ID`` ... or ``FSSPEC_S3_...``), never from an address: addresses are
printed and stored in recipes.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PureWindowsPath
from typing import Any, TypeAlias

from upath import UPath

from data_pipeline.errors import UserError, shown

Location: TypeAlias = Path | UPath
PIECE = 1 << 22
TABLES = (".csv", ".tsv", ".parquet")


def location(text: Any) -> Location:
    """A `Path` for a local path, a `UPath` for an address with ``://``. Raises ValueError for an address that
    carries a password or a query (which may be a signed token)."""
    if isinstance(text, Path):
        return text
    if isinstance(text, UPath):
        return Path(text.path) if text.protocol in ("", "file", "local") else text
    address = os.fspath(text)
    scheme, separator, rest = address.partition("://")
    if not separator:
        return Path(address)
    if scheme in ("file", "local"):
        return Path(rest)
    if "@" in rest.split("/")[0] or "?" in rest:
        raise ValueError(
            f"an address {scheme}:// must not carry credentials or a query; give them by environment "
            "variables or fsspec's configuration"
        )
    try:
        return UPath(address)
    except (ValueError, ImportError) as error:
        raise ValueError(f"no file system for addresses {scheme}:// ({type(error).__name__})") from error


def is_remote(place: Location) -> bool:
    """Whether a file has to be fetched before a format's library can read it."""
    return not isinstance(place, Path)


def joined(root: Location, name: str) -> Location:
    """``name`` below ``root``; an absolute path or an address stands for itself. A relative name of Windows
    (``scans\\a.nii.gz``) is one with ``/``, unless a file is called so. Raises ValueError as `location`
    does."""
    if "://" in name:
        return location(name)
    if "\\" in name and not PureWindowsPath(name).drive and not (root / name).exists():
        name = PureWindowsPath(name).as_posix()
    return Path(name) if is_remote(root) and name.startswith("/") else root / name.removeprefix("./")


def relative(path: Location, root: Location) -> str:
    """Path below ``root`` (below its folder where it is a file or a table) with forward slashes; the whole
    path where it lies elsewhere."""
    own, base = _text(path), _text(root).rstrip("/")
    if own == base or root.suffix.lower() in TABLES:
        base = _text(root.parent).rstrip("/")
    return own[len(base) + 1 :] if own.startswith(f"{base}/") else own.lstrip("/")


def files_below(root: Location, unreadable: Callable[[], None] = lambda: None) -> list[Location]:
    """Every file below a folder (or the file itself), sorted; hidden files and folders are left out.

    A folder reached twice through links is listed once; ``unreadable`` is called for each folder that cannot
    be listed. Raises `UserError` where an address cannot be listed at all.
    """
    if is_remote(root):
        return _remote_files(root)
    if root.is_file():
        return [root]
    found: list[Location] = []
    seen = set()
    pending = [str(root)]
    while pending:
        folder = pending.pop()
        try:
            status = os.stat(folder)
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(folder) as entries:
                ordered = sorted(entries, key=lambda entry: entry.name, reverse=True)
        except OSError:
            unreadable()
            continue
        for entry in ordered:
            if entry.name.startswith("."):
                continue
            try:
                if entry.is_dir():
                    pending.append(entry.path)
                elif entry.is_file():
                    found.append(Path(entry.path))
            except OSError:  # a link to itself
                continue
    return sorted(found)


def head(path: Location, count: int) -> bytes:
    """The first bytes of a file; none where it cannot be read."""
    try:
        with path.open("rb") as file:
            return bytes(file.read(count))
    except OSError:
        return b""


@contextmanager
def fetched(paths: Iterable[Location]) -> Iterator[dict[Location, Path]]:
    """Local paths for files: themselves, or copies in a temporary folder that goes when the block ends.

    Copies keep their names and their folders (two files of one name stay apart). A remote folder comes with
    every file below it; a remote file that is not there is left out. Raises `UserError` where the store
    cannot be reached.
    """
    wanted = list(dict.fromkeys(paths))
    remote = [path for path in wanted if is_remote(path)]
    if not remote:
        yield {path: path for path in wanted if isinstance(path, Path)}
        return
    with tempfile.TemporaryDirectory(prefix="medfm-") as folder:
        local: dict[Location, Path] = {path: path for path in wanted if isinstance(path, Path)}
        folders: dict[str, Path] = {}
        for path in remote:
            parent = folders.setdefault(_text(path.parent), Path(folder) / str(len(folders)))
            if _fetch(path, parent / path.name):
                local[path] = parent / path.name
        yield local


def _fetch(path: Location, target: Path) -> bool:
    """Copy a remote file, or a folder with all below it; whether there was anything."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with store_errors(path):
        try:
            with path.open("rb") as source, target.open("wb") as sink:
                shutil.copyfileobj(source, sink, PIECE)
            if target.stat().st_size:
                return True
            there = True  # an empty file, or a folder that the store opens as one
        except (FileNotFoundError, IsADirectoryError):
            there = False
        if not path.is_dir():
            return there
        target.unlink(missing_ok=True)
        target.mkdir()
        for file in files_below(path):
            _fetch(file, target / relative(file, path))
    return True


def _remote_files(root: Location) -> list[Location]:
    with store_errors(root):
        store, base = root.fs, root.path.rstrip("/")  # type: ignore[union-attr]
        found = store.find(base)
        if found == [base]:
            return [root]
        names = sorted(name[len(base) :].lstrip("/") for name in found if name != base)
    return [root / name for name in names if not any(p.startswith(".") for p in name.split("/"))]


@contextmanager
def store_errors(place: Location) -> Iterator[None]:
    """Failures of a store as one line; its own texts may quote keys and tokens."""
    try:
        yield
    except (FileNotFoundError, UserError):
        raise
    except Exception as error:  # every file system has its own
        raise UserError(
            f"{shown(place)}: cannot be read from its store ({type(error).__name__}); check the address, the "
            "network and the credentials in the environment"
        ) from None


def _text(place: Location) -> str:
    return place.as_posix() if isinstance(place, Path) else str(place)
