"""Members of tar archives as places to read from, never unpacked whole: `members`, `TarMember`.

Headers alone are read, members are opened one by one. Sources: POSIX.1-2017 pax (ustar and extended headers),
GNU tar. ``tarfile`` decodes the headers; what it takes for the end without saying so (a damaged header, a cut
file) is told apart here.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import tarfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple, cast

from data_pipeline.errors import Quarantined
from data_pipeline.locations import Location

PLAIN, COMPRESSED = (".tar",), (".tar.gz", ".tgz")
HEADER = tarfile.BLOCKSIZE
GZIP = b"\x1f\x8b"
LARGEST = 1 << 35  # bytes of a member: twice what the largest image that can be stored takes in float64
LONGEST_HEADER = 1 << 20  # an extended header that claims more is damage
LARGEST_TEXT = 1 << 20
LONGEST_NAME = 255  # bytes of a file name, once it is fetched
DAMAGE = (EOFError, zlib.error, gzip.BadGzipFile)  # of the compression
READ_AHEAD = 1 << 16  # of a store, at each header: a small JSON comes with it


class _Stat(NamedTuple):
    """`st_mtime_ns` is no time, but changes when the archive's does, or the member's place or header."""

    st_size: int
    st_mtime_ns: int


@dataclass(frozen=True)
class TarMember:
    """A file inside an archive, as far as a `Location` of a file is used: named, looked at, opened, copied.

    `place` is where its bytes begin in the archive (uncompressed), `check` the sum in its header, `written`
    (bytes, time) of the archive. `fault` is the reason code of a member that must not be opened.
    """

    shard: Location
    member: str
    place: int
    size: int
    check: int
    written: tuple[int, int]
    fault: str | None = None

    def __str__(self) -> str:
        return f"{self.shard}/{self.member}"

    @property
    def name(self) -> str:
        """Without folders, as it is called where it is copied to."""
        return PurePosixPath(self.member).name

    @property
    def suffix(self) -> str:
        """The last suffix, with its dot."""
        return PurePosixPath(self.member).suffix

    @property
    def parent(self) -> Location:
        """The folder in the archive as if it were one on disk; for names alone."""
        return self.shard.joinpath(*PurePosixPath(self.member).parts[:-1])

    def exists(self) -> bool:
        """Whether the archive is there."""
        return bool(self.shard.exists())

    def is_file(self) -> bool:
        """Always: folders are no members."""
        return True

    def is_dir(self) -> bool:
        """Never."""
        return False

    def stat(self) -> _Stat:
        """Its size, and a number that changes with it."""
        about = repr((self.place, self.size, self.check, self.written)).encode()
        return _Stat(self.size, int.from_bytes(hashlib.blake2b(about, digest_size=7).digest(), "little"))

    @contextmanager
    def open(self, mode: str = "rb") -> Iterator[IO[bytes]]:
        """The member as a file; one that was gzipped twice (`webdataset.TarWriter` does so with the bytes of
        a .nii.gz) once. Raises `Quarantined` where its archive is not as it was listed."""
        if mode != "rb":
            raise ValueError(f"a member of an archive is opened to read bytes, not {mode!r}")
        if self.fault is not None:
            raise Quarantined(self.fault)
        with opened(self.shard) as archive:
            try:
                archive.seek(self.place - HEADER)
                block = archive.read(HEADER)
                if len(block) < HEADER or _check(block) != self.check:
                    raise Quarantined("damaged_archive", "it changed while it was read")
                part: io.BufferedReader[Any] = io.BufferedReader(_Part(archive, self.size), 1 << 20)
                if _gzipped_twice(part.peek()):
                    part = io.BufferedReader(_Limited(gzip.GzipFile(fileobj=part)), 1 << 20)
                yield cast("IO[bytes]", part)
            except DAMAGE as error:
                raise Quarantined("damaged_archive", type(error).__name__) from error


class _Part(io.RawIOBase):
    """The next bytes of a file, so many; fewer are `Quarantined` ``truncated``."""

    def __init__(self, file: IO[bytes], size: int) -> None:
        self.file, self.left = file, size

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self.file.read(min(len(buffer), self.left))
        if not data and self.left and len(buffer):
            raise Quarantined("truncated", "its archive ends before it does")
        self.left -= len(data)
        buffer[: len(data)] = data
        return len(data)


class _Limited(io.RawIOBase):
    """A decompressed file; more than `LARGEST` bytes are `Quarantined` ``too_large``."""

    def __init__(self, file: gzip.GzipFile) -> None:
        self.file, self.left = file, LARGEST

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self.file.readinto(buffer)
        self.left -= count
        if self.left < 0:
            raise Quarantined("too_large")
        return count


class Listing(NamedTuple):
    """Members in the order of the archive, the bytes of those asked for, and what ended it too early."""

    members: list[TarMember]
    texts: dict[str, bytes]
    damage: Quarantined | None


def is_archive(path: Location) -> bool:
    """Whether a file is a tar archive by its suffix."""
    return path.name.lower().endswith(PLAIN + COMPRESSED)


def members(shard: Location, wanted: Callable[[str], bool] = lambda name: False) -> Listing:
    """The files of an archive, and what is in those whose name is `wanted`, up to 1 MiB each.

    Folders are left out; what is no plain file (links, devices, sparse files), has a name that leads
    elsewhere, is there twice or is too large has a `fault`. OSError where the archive cannot be read at all.
    """
    about = shard.stat()
    written = about.st_size, int(getattr(about, "st_mtime_ns", None) or about.st_mtime * 1e9)
    found: dict[str, TarMember] = {}
    texts: dict[str, bytes] = {}
    damage = None
    with opened(shard) as file:
        try:
            for info in _headers(file):
                name = _plain(info.name)
                if info.isdir() and not info.size:
                    continue
                fault = "duplicate_member" if name in found else _fault(info)
                if fault is None and wanted(name) and info.size <= LARGEST_TEXT:
                    file.seek(info.offset_data)
                    texts[name] = file.read(info.size)
                if fault is None and not _reaches(file, info):
                    damage = Quarantined("truncated", "its archive ends before it does", shard)
                    fault = damage.code
                place = info.offset_data
                found[name] = TarMember(shard, name, place, info.size, info.chksum, written, fault)
                if damage is not None:
                    break
        except (*DAMAGE, tarfile.TarError, RecursionError, ValueError):
            damage = Quarantined("damaged_archive", f"after {len(found)} members", shard)
    return Listing(list(found.values()), texts, damage)


@contextmanager
def opened(shard: Location) -> Iterator[IO[bytes]]:
    """The tar stream of an archive. A compressed one is read from its start to wherever is wanted."""
    if isinstance(shard, Path):
        raw: Any = shard.open("rb")
    else:
        raw = shard.fs.open(shard.path, "rb", block_size=READ_AHEAD)
    with raw:
        if shard.name.lower().endswith(COMPRESSED):
            with gzip.GzipFile(fileobj=raw, mode="rb") as inside:
                yield cast("IO[bytes]", inside)
        else:
            yield raw


class _Headers:
    """A file as `tarfile` may read it: what a damaged header claims is never read at once."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.tell, self.seek = file, file.tell, file.seek
        self.last = b""

    def read(self, size: int) -> bytes:
        if not 0 <= size <= LONGEST_HEADER:
            raise tarfile.ReadError("a header that cannot be")
        self.last = self.file.read(size)
        return self.last


def _headers(file: IO[bytes]) -> Iterator[tarfile.TarInfo]:
    """Every header up to the end mark. Raises `tarfile.TarError` where the archive ends without one."""
    blocks = _Headers(file)
    with tarfile.TarFile(fileobj=cast("IO[bytes]", blocks), mode="r", errors="backslashreplace") as tar:
        while (info := tar.next()) is not None:
            if info.size < 0 or tar.offset < info.offset_data:
                raise tarfile.ReadError("a size that cannot be")
            yield info
    if blocks.last != bytes(HEADER):  # whatever it is, `tarfile` takes it for the end
        raise tarfile.ReadError("no end mark")


def _reaches(file: IO[bytes], info: tarfile.TarInfo) -> bool:
    """Whether the last byte of a member is there."""
    last = info.offset_data + max(0, info.size - 1)
    if not info.size or file.tell() > last:
        return True
    file.seek(last)
    return len(file.read(1)) == 1


def _gzipped_twice(start: bytes) -> bool:
    try:
        return zlib.decompressobj(wbits=31).decompress(start, len(GZIP)) == GZIP
    except zlib.error:
        return False


def _plain(name: str) -> str:
    return name.removeprefix("./")


def _fault(info: tarfile.TarInfo) -> str | None:
    name = _plain(info.name)
    parts = name.split("/")
    if (
        not info.isreg()
        or info.issparse()
        or name.startswith("/")
        or any(part in ("", ".", "..") for part in parts)
        or "\\" in name
        or "\0" in name
        or len(parts[-1].encode("utf-8", "backslashreplace")) > LONGEST_NAME
    ):
        return "unsafe_member"
    return "too_large" if info.size > LARGEST else None


def _check(block: bytes) -> int:
    """The sum that a header states of itself."""
    try:
        return int(tarfile.nti(block[148:156]))  # type: ignore[attr-defined]
    except tarfile.HeaderError:
        return -1
