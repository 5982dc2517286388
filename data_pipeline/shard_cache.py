"""Shards read through a cache on local disk: fetched in blocks, checked on arrival, deleted in time.

Nothing in the cache is trusted for having been checked once: the reader checks every chunk it uses, and a
block that fails is dropped and fetched again before its sample counts as damaged.
"""

from __future__ import annotations

import logging
import os
import queue
import struct
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any
from urllib.parse import quote

from pydantic import BaseModel, ConfigDict, Field

from data_pipeline.block_folder import BlockFolder, DiskFault, disk, put
from data_pipeline.blocks import Block, Blocks
from data_pipeline.errors import UserError, shown
from data_pipeline.frame_index import IndexDamaged, MemberIndex, checksum, read_index
from data_pipeline.manifest import Manifest
from data_pipeline.remote_files import PART, PATIENCE_S, TIMEOUT_S, RemoteFiles
from data_pipeline.shard_files import ByteSource, LocalFiles
from data_pipeline.traffic import Meter

log = logging.getLogger(__name__)

#: The end of a block's file, after a byte for each sample (1: damaged): when it came, checksum of both.
FETCHED, CHECK = struct.Struct("<d"), struct.Struct("<Q")
BELIEVED_S = 3600.0  # for which damage at the source is not looked at again
TOUCH_S = 10.0
OPEN_BLOCKS = 16
PARTS = 4  # requests of one download at a time, and so many parts of 4 MiB in memory
REMEMBERED = 1024  # downloads of this process among which one of the same block counts as a repetition
SMALL = 8  # repetitions after which the cache counts as too small


class CacheConfig(BaseModel):
    """`data.cache`: how shards are brought to a machine. Nothing here changes what is trained on."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    folder: str = Field(
        "",
        description="folder on a local disk in which a machine keeps the shard blocks that it reads, for all "
        "its ranks; $VARIABLES and ~ are expanded; empty: no cache, shards are read in place",
    )
    gb: float = Field(64.0, gt=0, description="most that the folder holds, in 10^9 bytes")
    lookahead: int = Field(
        32, ge=0, description="micro-steps for which a worker fetches ahead, within half of its part of gb"
    )
    downloads: int = Field(4, ge=1, le=64, description="downloads of a worker at a time")
    patience_s: float = Field(
        PATIENCE_S, ge=0, description="seconds for which a failing store is asked again before the run ends"
    )
    timeout_s: float = Field(TIMEOUT_S, gt=0, description="seconds for one request of at most 4 MiB")

    def path(self) -> Path:
        """The folder. Raises `UserError` where a variable in it is not set."""
        text = os.path.expanduser(os.path.expandvars(self.folder))
        if "$" in text:
            raise UserError(f"data.cache.folder {self.folder!r} names a variable that is not set here")
        return Path(text)


def open_files(root: str | Path, manifest: Manifest, config: CacheConfig, meter: Meter) -> ByteSource:
    """The byte source for a dataset: through the cache if there is one, else in place.

    Raises `UserError` where the cache folder cannot be used.
    """
    text = os.fspath(root)
    origin: ByteSource = (
        RemoteFiles(text, patience_s=config.patience_s, timeout_s=config.timeout_s, meter=meter)
        if "://" in text
        else LocalFiles(text, 0, meter)
        if config.folder
        else LocalFiles(text)
    )
    if not config.folder:
        return origin
    folder = BlockFolder(config.path(), int(config.gb * 1e9), meter)
    folder.prepare()
    return CachedFiles(origin, manifest, folder, config, meter)


class CachedFiles:
    """A `ByteSource` that keeps blocks of another one in a `BlockFolder`.

    `read` and `renew` are for one thread; `expect` has blocks fetched by threads of this process. Safe after
    fork, picklable.
    """

    gap = LocalFiles.gap

    def __init__(
        self, origin: ByteSource, manifest: Manifest, folder: BlockFolder, config: CacheConfig, meter: Meter
    ) -> None:
        self.origin, self.manifest, self.folder = origin, manifest, folder
        self.config, self.meter = config, meter
        self.blocks = Blocks(manifest)
        self._begin()

    def _begin(self) -> None:
        self._pid = os.getpid()
        self._open: OrderedDict[tuple[str, int], tuple[int, float]] = OrderedDict()
        self._expected: dict[Block, Future[bool]] = {}
        self._queue: queue.SimpleQueue[tuple[Block, Future[bool]] | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._fetched: OrderedDict[tuple[str, int], None] = OrderedDict()

    def read(self, name: str, offset: int, size: int) -> bytes:
        """Bytes [offset, offset + size) of a shard, which lie in one sample; fewer where the shard ends.

        Raises FileNotFoundError for a shard that is missing, `UserError` where the store stays away.
        """
        block = self.blocks.at(name, offset)
        try:
            for _ in range(2):
                fd = self._descriptor(block)
                if fd is None:
                    break
                with disk():
                    data = os.pread(fd, size, offset - block.start)
                if len(data) == size:
                    return data
                self._drop(block)  # cut short since it was opened
        except DiskFault as fault:
            self.folder.failed(fault)
        self.meter.add(uncached=1)
        return self.origin.read(name, offset, size)

    def read_many(self, name: str, places: Sequence[tuple[int, int]]) -> Iterator[bytes]:
        """`read` of several (offset, size), one by one."""
        return (self.read(name, offset, size) for offset, size in places)

    def renew(self, name: str, offset: int) -> bool:
        """Drop the block of a sample that proved damaged, unless it is known to be so at the source. Whether
        reading again may give other bytes."""
        block = self.blocks.at(name, offset)
        self._here()
        held = self._open.pop((block.shard, block.start), None)
        try:
            fd = self._open_block(block) if held is None else held[0]
            if fd is not None:
                known = self._known_damaged(block, fd, offset)
                os.close(fd)
                if known:
                    return False
            self.meter.add(damaged=1)
            self.folder.drop(_name(self.manifest, block))
        except DiskFault as fault:
            raise UserError(
                f"{shown(self.folder.folder)}: holds a damaged block, and its disk fails ({fault.reason}); "
                "give another data.cache.folder"
            ) from fault
        return True

    def expect(self, block: Block) -> None:
        """Have a block fetched by a thread; what goes wrong is raised where it is read."""
        self._here()
        if block in self._expected:
            return
        future: Future[bool] = Future()
        self._expected[block] = future
        self._queue.put((block, future))
        if len(self._threads) < self.config.downloads:
            # A daemon, so that a download under way does not hold up the end of the process.
            thread = threading.Thread(target=self._run, args=(self._queue,), name="medfm-fetch", daemon=True)
            self._threads.append(thread)
            thread.start()

    def forget(self, block: Block) -> None:
        """A block that was expected has been read, or will not be."""
        self._expected.pop(block, None)

    def close(self) -> None:
        """End the threads, a download under way excepted, and close files; the next read opens them again."""
        if self._pid == os.getpid():
            for _ in self._threads:
                self._queue.put(None)
            for fd, _ in self._open.values():
                os.close(fd)
        self._begin()
        self.origin.close()

    def __reduce__(self) -> tuple[Any, ...]:
        return CachedFiles, (self.origin, self.manifest, self.folder, self.config, self.meter)

    def _here(self) -> None:
        """After a fork: no threads, and no shared descriptors."""
        if self._pid != os.getpid():
            for fd, _ in self._open.values():
                os.close(fd)
            self._begin()

    def _descriptor(self, block: Block) -> int | None:
        """An open file of a block, fetched if need be; None if there is no room for it."""
        self._here()
        at = block.shard, block.start
        held = self._open.get(at)
        now = time.monotonic()
        if held is not None and (now - held[1] < TOUCH_S or self.folder.keep(_name(self.manifest, block))):
            self._open[at] = held if now - held[1] < TOUCH_S else (held[0], now)
            self._open.move_to_end(at)
            return held[0]
        if held is not None:  # deleted under this process
            os.close(self._open.pop(at)[0])
        fd = self._open_block(block)
        if fd is None:
            self._wait(block)
            fd = self._open_block(block)
            self.meter.add(wait_s=time.monotonic() - now)
        if fd is not None:
            for other in [k for k, (f, _) in self._open.items() if os.fstat(f).st_nlink == 0]:
                os.close(self._open.pop(other)[0])
            self._open[at] = fd, now
            if len(self._open) > OPEN_BLOCKS:
                os.close(self._open.popitem(last=False)[1][0])
        return fd

    def _open_block(self, block: Block) -> int | None:
        return self.folder.open(_name(self.manifest, block), _file_size(block))

    def _wait(self, block: Block) -> None:
        future = self._expected.get(block)
        if future is None:
            self._fetch(block)
            return
        try:
            future.result()
        finally:
            self.forget(block)

    def _known_damaged(self, block: Block, fd: int, offset: int) -> bool:
        """Whether a sample was damaged when its block came, lately."""
        with disk():
            found = os.pread(fd, _file_size(block) - block.size, block.size)
        end, check = found[: -CHECK.size], found[-CHECK.size :]
        if len(found) < _file_size(block) - block.size or check != CHECK.pack(checksum(end)):
            return False
        number = next(n for n, row in enumerate(block.rows) if self.blocks.span(row)[1] > offset)
        (fetched,) = FETCHED.unpack(end[len(block.rows) :])
        return end[number] == 1 and 0 <= time.time() - fetched < BELIEVED_S

    def _drop(self, block: Block) -> None:
        held = self._open.pop((block.shard, block.start), None)
        if held is not None:
            os.close(held[0])
        self.folder.drop(_name(self.manifest, block))

    def _run(self, waiting: queue.SimpleQueue[tuple[Block, Future[bool]] | None]) -> None:
        while (item := waiting.get()) is not None:
            block, future = item
            try:
                if self._expected.get(block) is future:
                    self._fetch(block)
                future.set_result(True)
            except BaseException as error:
                future.set_exception(error)

    def _fetch(self, block: Block) -> None:
        name = _name(self.manifest, block)
        if not self.folder.keep(name):
            # Twice the patience: the process that downloads it may use up its own.
            self.folder.fill(
                name, _file_size(block), lambda fd: self._download(block, fd), 2 * self.config.patience_s + 60
            )

    def _download(self, block: Block, fd: int) -> None:
        self._copy(block.shard, block.start, block.end, block.start, fd)
        spans = [self.blocks.span(row) for row in block.rows]
        damaged = [not self._intact(row, block, fd) for row in block.rows]
        for number, row in enumerate(block.rows):
            if damaged[number]:  # on its way perhaps
                self.meter.add(damaged=1)
                self._copy(block.shard, *spans[number], block.start, fd)
                damaged[number] = not self._intact(row, block, fd)
        end = bytes(damaged) + FETCHED.pack(time.time())
        put(fd, end + CHECK.pack(checksum(end)), block.size)
        at = block.shard, block.start
        self.meter.add(fetched=1, refetched=int(at in self._fetched))
        self._fetched[at] = None
        if len(self._fetched) > REMEMBERED:
            self._fetched.popitem(last=False)
        if self.meter.total.refetched >= SMALL:
            self.folder.say(
                "twice",
                "blocks are fetched again soon after they were deleted: what is read at a time does not fit "
                "data.cache.gb; raise it",
            )

    def _copy(self, shard: str, start: int, end: int, base: int, fd: int) -> None:
        parts = [(at, min(PART, end - at)) for at in range(start, end, PART)]
        for first in range(0, len(parts), PARTS):
            together = parts[first : first + PARTS]
            for (at, _), data in zip(together, self.origin.read_many(shard, together), strict=True):
                put(fd, data, at - base)

    def _intact(self, row: int, block: Block, fd: int) -> bool:
        """Whether every byte of a sample that has a checksum matches it."""
        places = self.blocks.places(row)

        def bytes_of(member: str, offset: int, size: int) -> bytes:
            with disk():
                return os.pread(fd, size, places[member][0] + offset - block.start)

        try:
            index = read_index(bytes_of("idx", 0, places["idx"][1]), self.manifest.value(row, "key"))
        except IndexDamaged:
            return False
        return all(
            index[member].size == size
            and all(checksum(bytes_of(member, o, n)) == check for o, n, check in _pieces(index[member]))
            for member, (_, size) in places.items()
            if member in index
        )


def _pieces(member: MemberIndex) -> Iterator[tuple[int, int, int]]:
    """(offset, size, checksum) of everything that a member consists of."""
    yield 0, member.header_size, member.header_check
    for offset, size, special, check in member.chunks.tolist():
        if not special:
            yield offset, size, check
    yield member.tail_offset, member.size - member.tail_offset, member.tail_check


def _name(manifest: Manifest, block: Block) -> str:
    return f"{manifest.hash[:16]}/{quote(block.shard, safe='')}@{block.start}"


def _file_size(block: Block) -> int:
    return block.size + len(block.rows) + FETCHED.size + CHECK.size
