"""A folder of blocks on local disk, of bounded size, shared by every process of a machine.

    FOLDER/ledger                        bytes in use; locked for every change of the folder
    FOLDER/DATASET/NAME.block            a block: written beside its name, checked, renamed
    FOLDER/DATASET/NAME.block.partial    a block being written, locked by its writer

The kernel frees both locks when their holder dies, so that a crash leaves at most a `.partial` that its next
writer takes over or the next in need of room deletes. The time of modification of a block is the time of
its last use, the time of access 0 until its first. The blocks used longest ago make room for new ones.
"""

from __future__ import annotations

import errno
import logging
import os
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from data_pipeline.errors import UserError, shown
from data_pipeline.traffic import Meter

try:
    import fcntl
except ImportError:  # Windows, where nothing is trained
    fcntl = None  # type: ignore[assignment]

log = logging.getLogger(__name__)

BLOCK, PARTIAL = ".block", ".block.partial"
SAID, SAY_AGAIN_S = "said-", 600.0
LEDGER = struct.Struct("<q")
POLL_S = 0.02
SLACK = 0.05  # of the limit is freed at once, so that the folder is not listed for every block


class DiskFault(Exception):
    """The folder's own disk fails or is full."""

    def __init__(self, error: OSError) -> None:
        super().__init__(error.strerror)
        self.reason = error.strerror or type(error).__name__


class BlockFolder:
    """Blocks by name (`DATASET/NAME`), at most `limit` bytes of them with those being written.

    A block that a process still has open when it is deleted takes up space until that process opens another.
    Picklable; for any number of threads and processes. `open`, `keep` and `drop` raise `DiskFault`.
    """

    def __init__(self, folder: Path, limit: int, meter: Meter | None = None) -> None:
        self.folder, self.limit = folder / "medfm-blocks", limit  # nothing of anyone else's is in there
        self.meter = Meter() if meter is None else meter
        self._said: set[str] = set()

    def prepare(self) -> None:
        """Make the folder and try it out. `UserError` where it cannot be used."""
        if fcntl is None:
            raise UserError("data.cache.folder needs file locks, which this system lacks; leave it empty")
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            with self._ledger() as ledger:
                self._try_locks()
                trial = self.folder / f"trial-{os.getpid()}"
                trial.write_bytes(b"1")
                trial.unlink()
                for mark in self.folder.glob(f"{SAID}*"):
                    mark.unlink(missing_ok=True)
                free = os.statvfs(self.folder)
                used = self._make_room(0)
                self._note(ledger, used)
        except OSError as error:
            raise UserError(
                f"{shown(self.folder)}: cannot be used as data.cache.folder ({error.strerror}); give a "
                "folder on a local disk that can be written"
            ) from error
        room = used + free.f_bavail * free.f_frsize
        if room < self.limit:
            log.warning(
                "%s: data.cache.gb is %.1f but only %.1f GB are free there; the cache will be smaller",
                shown(self.folder), self.limit / 1e9, room / 1e9,
            )  # fmt: skip

    def _try_locks(self) -> None:
        """OSError where a second lock of the ledger is had at once, as on some network file systems."""
        fd = os.open(f"{self.folder}/ledger", os.O_RDWR | os.O_CLOEXEC)
        try:
            if _locked(fd):
                raise OSError(errno.ENOLCK, "its file locks do not hold")
        finally:
            os.close(fd)

    def open(self, name: str, size: int) -> int | None:
        """A descriptor for reading a block, now the last used; None if it is not there in its size."""
        with disk():
            try:
                fd = os.open(self._path(name), os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                return None
            if os.fstat(fd).st_size != size:
                os.close(fd)
                self.drop(name)
                return None
            with suppress(OSError):
                os.utime(fd)
            return fd

    def keep(self, name: str) -> bool:
        """Whether a block is there; if so, it goes as late as one just used, without counting as used."""
        path = self._path(name)
        with disk(), suppress(FileNotFoundError):
            os.utime(path, ns=(os.stat(path).st_atime_ns, time.time_ns()))
            return True
        return False

    def drop(self, name: str) -> None:
        """Delete a block, if it is there."""
        with disk(), suppress(FileNotFoundError), self._ledger() as ledger:
            size = os.stat(self._path(name)).st_size
            os.unlink(self._path(name))
            self._note(ledger, self._noted(ledger) - size)

    def fill(self, name: str, size: int, write: Callable[[int], None], wait_s: float) -> bool:
        """Have one process write a block; the others wait for it, up to `wait_s`.

        `write` gets a descriptor, which it fills with `size` bytes through `put`; what it raises is raised
        here and leaves nothing behind. True: the block was there or is now. False: there is no room for
        it, or the disk failed; that is logged once.
        """
        for again in (False, True):
            try:
                return self._fill(self._path(name), size, write, wait_s)
            except DiskFault as fault:
                problem = fault
            with suppress(DiskFault):
                if not again and self._shrink(2 * size):
                    continue
            break
        return self.failed(problem)

    def _fill(self, path: str, size: int, write: Callable[[int], None], wait_s: float) -> bool:
        partial = path.removesuffix(BLOCK) + PARTIAL
        with disk():
            os.makedirs(os.path.dirname(path), 0o700, exist_ok=True)
            fd = _claim(path, partial, wait_s)
        if fd is None:
            return True
        try:
            if not self._reserve(fd, size):
                self.say("room", f"no room for {size / 1e6:.1f} MB, read past it: raise data.cache.gb")
                return False
            write(fd)
            with disk(), self._ledger():
                os.utime(fd, ns=(0, time.time_ns()))
                os.rename(partial, path)
            return True
        finally:
            self._let_go(fd, partial)

    def _path(self, name: str) -> str:
        """As text: `Path` interns every part, and over a long run the table of interned strings doubles."""
        return f"{self.folder}/{name}{BLOCK}"

    def failed(self, fault: DiskFault) -> bool:
        """Log that the disk fails; false."""
        self.say("disk", f"the cache cannot be used ({fault.reason}); shards are read past it")
        return False

    def say(self, kind: str, text: str) -> None:
        """Log once a process, and once a run of this machine: 10 minutes pass or `prepare` is called."""
        if kind in self._said:
            return
        self._said.add(kind)
        mark = self.folder / f"{SAID}{kind}"
        with suppress(OSError):
            if mark.exists() and time.time() - mark.stat().st_mtime < SAY_AGAIN_S:
                return
            mark.touch()
        log.warning("%s: %s", shown(self.folder), text)

    def _reserve(self, fd: int, size: int) -> bool:
        """Set aside `size` bytes for a file being written, deleting what was used longest ago."""
        with disk(), self._ledger() as ledger:
            before = os.fstat(fd).st_size  # of a dead process's attempt, counted already
            used = self._noted(ledger)
            if used < 0 or used - before + size > self.limit:
                used = self._make_room(size - before)
            fits = used - before + size <= self.limit
            if fits:
                os.ftruncate(fd, size)
            self._note(ledger, used - before + size if fits else used)
            return fits

    def _let_go(self, fd: int, partial: str) -> None:
        """Unlock and close; what was not finished is deleted."""
        with suppress(OSError):  # a failing disk: the next process that needs room deletes it
            if _is_at(fd, partial):
                with self._ledger() as ledger:
                    self._note(ledger, self._noted(ledger) - os.fstat(fd).st_size)
                    os.unlink(partial)
        fcntl.flock(fd, fcntl.LOCK_UN)  # a forked process may hold a copy of the descriptor
        os.close(fd)

    def _shrink(self, size: int) -> bool:
        """Make room on a full disk; whether anything could go."""
        with disk(), self._ledger() as ledger:
            used = self._make_room(0)
            less = self._make_room(0, min(used - size, int(used * (1 - SLACK))))
            self._note(ledger, less)
        if less < used:
            self.say(
                "full", f"the disk is full with {used / 1e9:.1f} GB in the cache, less than data.cache.gb; "
                "older blocks make room"
            )  # fmt: skip
        return less < used

    def _make_room(self, size: int, goal: int | None = None) -> int:
        """Delete leftovers, then the blocks used longest ago until `size` more bytes fit (with some slack) or
        `goal` is reached. Returns the bytes in use. The ledger is locked."""
        blocks: list[tuple[int, int, bool, str]] = []
        used, now = 0, time.time_ns()
        for entry in self._files():
            with suppress(FileNotFoundError):
                status = entry.stat()
                if entry.name.endswith(PARTIAL):
                    used += 0 if _removed_if_left(entry.path) else status.st_size
                elif entry.name.endswith(BLOCK):
                    used_at = status.st_mtime_ns if status.st_mtime_ns <= now else 0  # the clock was set back
                    blocks.append((used_at, status.st_size, status.st_atime_ns == 0, entry.path))
                    used += status.st_size
        if goal is None:
            spare = 0 if used + size <= self.limit else max(size, int(SLACK * self.limit))
            goal = self.limit - spare
        for _, length, unused, path in sorted(blocks):
            if used <= goal:
                break
            with suppress(FileNotFoundError):
                os.unlink(path)
            used -= length
            self.meter.add(evicted=1, evicted_unused=int(unused))
            if unused:
                self.say(
                    "unused",
                    "blocks are deleted before they are read: data.cache.gb is too small for what is read at "
                    "a time; raise it, or lower data.cache.lookahead",
                )
        return used

    def _files(self) -> Iterator[os.DirEntry[str]]:
        with os.scandir(self.folder) as datasets:
            for dataset in datasets:
                if dataset.is_dir(follow_symlinks=False):
                    with os.scandir(dataset.path) as files:
                        yield from files

    @contextmanager
    def _ledger(self) -> Iterator[int]:
        """The locked ledger. Every change of the folder's bytes and names happens inside, so that a listing
        sees each file once."""
        fd = os.open(f"{self.folder}/ledger", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield fd
        finally:
            fcntl.flock(fd, fcntl.LOCK_UN)
            os.close(fd)

    def _noted(self, ledger: int) -> int:
        """Bytes in use; negative where that is not known and the folder has to be listed."""
        text = os.pread(ledger, LEDGER.size, 0)
        return int(LEDGER.unpack(text)[0]) if len(text) == LEDGER.size else -1

    def _note(self, ledger: int, used: int) -> None:
        os.pwrite(ledger, LEDGER.pack(used), 0)


@contextmanager
def disk() -> Iterator[None]:
    """What goes wrong inside is a `DiskFault`: of the cache, not of the shards."""
    try:
        yield
    except OSError as error:
        raise DiskFault(error) from error


def put(fd: int, data: bytes, offset: int) -> None:
    """Write into a block being filled."""
    done = 0
    with disk():
        while done < len(data):
            done += os.pwrite(fd, memoryview(data)[done:], offset + done)


def _claim(path: str, partial: str, wait_s: float) -> int | None:
    """A locked descriptor of `partial`, or None once another process has made `path`."""
    deadline = time.monotonic() + wait_s
    while True:
        if os.path.exists(path):
            return None
        fd = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        if _locked(fd) and _is_at(fd, partial):
            if not os.path.exists(path):
                return fd
            os.unlink(partial)  # made by this call after the other one's was renamed
        fcntl.flock(fd, fcntl.LOCK_UN)
        os.close(fd)
        if time.monotonic() > deadline:
            raise UserError(
                f"{shown(partial)}: another process has been downloading this for {wait_s:.0f} s; end it, or "
                "give this run a data.cache.folder of its own"
            )
        time.sleep(POLL_S)


def _locked(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_at(fd: int, path: str) -> bool:
    """Whether a descriptor's file is the one that lies at `path`."""
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except FileNotFoundError:
        return False


def _removed_if_left(partial: str) -> bool:
    """Delete an unfinished block whose writer is dead."""
    fd = os.open(partial, os.O_RDWR | os.O_CLOEXEC)
    try:
        if not _locked(fd):
            return False
        if _is_at(fd, partial):
            os.unlink(partial)
        fcntl.flock(fd, fcntl.LOCK_UN)
        return True
    finally:
        os.close(fd)
