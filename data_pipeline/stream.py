"""Manifest → batches, in the exact order, at any number of workers.

A `webdataset.DataPipeline` whose source is the order: it yields the work of one rank (update, group), which
is mapped to crops by verified box reads and collated a group at a time. It is loaded with
`webdataset.WebLoader(batch_size=None)`: worker w of N takes the micro-steps m ≡ w mod N and the loader visits
the workers in turn, so that batches come in order of m whatever N is. There is no shuffle buffer and no
state, hence nothing to replay on a resume.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import itertools
import multiprocessing
import os
import signal
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch
import webdataset as wds

from data_pipeline.batch_slots import BatchSlots, Packed
from data_pipeline.damage import DamageCount
from data_pipeline.errors import UserError
from data_pipeline.manifest import Manifest
from data_pipeline.order import Draw, Order, lanes_of
from data_pipeline.prefetch import Prefetch, part_of
from data_pipeline.shard_cache import CacheConfig, CachedFiles, open_files
from data_pipeline.shard_reader import DamagedSample, ShardReader
from data_pipeline.traffic import Meter, Traffic

Batch = TypeVar("Batch")
LEVELS = ("image", "l1", "l2")
#: Substitutes tried for one crop, of its source and then of any, before the data count as unusable.
SUBSTITUTES = 8


@dataclass
class Crop:
    """One crop as read. `voxels` is (z, y, x) in stem order, stored dtype; (c, z, y, x) if all channels were
    asked for.

    modality: of the drawn channel; of channel 0 if all were asked for. norm: float64 (7,): slope, intercept,
    low, high, center, scale, compress; (c, 7) for all channels. seg: uint8 (layer, z, y, x) in stem order
    over the same voxels, or None. substituted: the sample the order chose was damaged and this is another.
    """

    draw: Draw
    key: str
    modality: str
    voxels: np.ndarray
    norm: np.ndarray
    seg: np.ndarray | None
    substituted: bool


@dataclass(frozen=True)
class Work:
    """One micro-step of a rank: a group of an update, or None where the rank has none left."""

    update: int
    group: int | None


@dataclass(frozen=True)
class _Read:
    """The crops of one micro-step. `replaced`: keys of the damaged samples that the order chose; `faults`: of
    every sample that this process found damaged for the first time.
    """

    work: Work
    crops: list[Crop]
    replaced: tuple[str, ...]
    faults: tuple[DamagedSample, ...]


@dataclass(frozen=True)
class _Done(Generic[Batch]):
    """A batch and what is counted about it. `drawn`: crops of each source, and its latest epoch."""

    batch: Batch
    crops: int
    replaced: tuple[str, ...]
    faults: tuple[DamagedSample, ...]
    drawn: dict[str, tuple[int, int]]
    traffic: Traffic


@dataclass(frozen=True)
class _Failed:
    message: str


def work_of(lanes: list[int | None], start_update: int, worker: int = 0, workers: int = 1) -> Iterator[Work]:
    """Micro-steps of a rank that owns `lanes`, endless; every `workers`-th from the `worker`-th on."""
    for m in itertools.count(worker, workers):
        yield Work(start_update + m // len(lanes), lanes[m % len(lanes)])


class _Source:
    """Pipeline stage: the work of one rank; in a worker process, that worker's share of it."""

    def __init__(self, lanes: list[int | None], start_update: int) -> None:
        self.lanes, self.start_update = lanes, start_update

    def __call__(self) -> Iterator[Work]:
        here = torch.utils.data.get_worker_info()
        worker, workers = (0, 1) if here is None else (here.id, here.num_workers)
        return work_of(self.lanes, self.start_update, worker, workers)


class _Reader:
    """Pipeline stages from work to batches."""

    def __init__(
        self,
        shards: ShardReader,
        manifest: Manifest,
        order: Order,
        collate: Callable[[int, int | None, list[Crop]], Any],
        with_seg: bool,
        all_channels: bool,
        meter: Meter,
    ) -> None:
        self.meter = meter
        self.shards, self.manifest, self.order, self.collate = shards, manifest, order, collate
        self.with_seg, self.all_channels = with_seg, all_channels
        self._known: set[str] = set()  # damaged samples that the consuming process was told of
        self._channels: dict[int, tuple[list[str], np.ndarray]] = {}

    def read(self, source: Iterator[Work]) -> Iterator[_Read | _Failed]:
        """Stage: the crops of each group; none for a micro-step without one."""
        for work in source:
            try:
                yield self._group(work)
            except UserError as error:
                # Raised in the consuming process; a worker's traceback would bury the line.
                yield _Failed(str(error))
                return

    def assemble(self, source: Iterator[_Read | _Failed]) -> Iterator[_Done[Any] | _Failed]:
        """Stage: batches."""
        for item in source:
            if isinstance(item, _Failed):
                yield item
                return
            work, crops = item.work, item.crops
            drawn: dict[str, tuple[int, int]] = {}
            for draw in (crop.draw for crop in crops):
                name = self.order.source_of(draw.index)
                count, epoch = drawn.get(name, (0, 0))
                drawn[name] = count + 1, max(epoch, draw.repeat)
            batch = self.collate(work.update, work.group, crops)
            yield _Done(batch, len(crops), item.replaced, item.faults, drawn, self.meter.take())

    def send(
        self, slots: BatchSlots, source: Iterator[_Done[Any] | _Failed]
    ) -> Iterator[_Done[Any] | _Failed]:
        """Stage of a worker process: batches in memory that both processes map."""
        here = torch.utils.data.get_worker_info()
        worker = 0 if here is None else here.id
        for item in source:
            yield item if isinstance(item, _Failed) else replace(item, batch=slots.pack(worker, item.batch))

    def _group(self, work: Work) -> _Read:
        draws = [] if work.group is None else self.order.group_draws(work.update, work.group)
        crops, replaced, new = [], [], []
        for draw in draws:
            crop, faults = self.crop(draw)
            crops.append(crop)
            if faults:
                replaced.append(faults[0].key)
            for fault in faults:
                if fault.key not in self._known:
                    self._known.add(fault.key)
                    new.append(fault)
        self.manifest.release()
        return _Read(work, crops, tuple(replaced), tuple(new))

    def crop(self, draw: Draw) -> tuple[Crop, list[DamagedSample]]:
        """The crop of a draw, or of its first readable substitute, which depends on index and damage alone;
        and the faults of those that were not readable.
        """
        faults: list[DamagedSample] = []
        tried = set()
        for taken in self._candidates(draw):
            if taken.row not in tried:
                tried.add(taken.row)
                try:
                    crop = self._cut(taken)
                except DamagedSample as damage:
                    faults.append(damage)
                    continue
                crop.substituted = bool(faults)
                return crop, faults
        raise UserError(
            f"{faults[0]}, and so are all {len(faults) - 1} others tried in its place; "
            f"run `medfm shards verify {self.manifest.root}`"
        )

    def _candidates(self, draw: Draw) -> Iterator[Draw]:
        """A draw, its substitutes, and, for a source without any, what has its place in the next updates."""
        yield draw
        for attempt in range(1, SUBSTITUTES + 1):
            yield self.order.substitute(draw.index, attempt)
        for later in range(1, SUBSTITUTES + 1):
            other = self.order.draw(draw.index + later * self.order.batch_size)
            yield replace(other, index=draw.index)

    def _cut(self, draw: Draw) -> Crop:
        channel = None if self.all_channels else draw.channel
        box = draw.origin, draw.extent
        voxels = self.shards.read_box(draw.row, LEVELS[draw.level], channel, *box)
        seg = None
        if self.with_seg and self.manifest.column("seg_offset")[draw.row] >= 0:
            if draw.level:
                raise ValueError("labels are stored at level 0 only; draw with a window to read them")
            seg = _to_stem(self.shards.read_box(draw.row, "seg", None, *box), draw.axes)
        modalities, norm = self._described(draw.row)
        return Crop(
            draw=draw,
            key=str(self.manifest.value(draw.row, "key")),
            modality=modalities[channel or 0],
            voxels=_to_stem(voxels, draw.axes),
            norm=norm if channel is None else norm[channel],
            seg=seg,
            substituted=False,
        )

    def _described(self, row: int) -> tuple[list[str], np.ndarray]:
        """Modality of every channel of a sample, and their norms (c, 7); kept for a few thousand samples."""
        if row not in self._channels:
            if len(self._channels) > 4096:
                self._channels.clear()
            norm = np.asarray(self.manifest.value(row, "norm"), dtype=np.float64).reshape(-1, 7)
            self._channels[row] = self.manifest.value(row, "modalities"), norm
        return self._channels[row]


def _to_stem(array: np.ndarray, axes: tuple[int, int, int]) -> np.ndarray:
    """(…, z, y, x) → (…, stem order), contiguous."""
    lead = array.ndim - 3
    return np.ascontiguousarray(array.transpose(*range(lead), *(lead + a for a in axes)))


class Stream(Generic[Batch]):
    """An endless iterator of batches. Close it, or leave a `with` block, to end its workers.

    Counted over the batches taken: `crops`; `damaged`, crops replaced because their sample is damaged;
    `damage`, the same by key of the sample; `drawn`, crops by source; `epochs`, by source, how often its
    samples have come round (the largest `Draw.repeat`); `traffic`, what reading them cost.
    """

    def __init__(
        self,
        pipeline: wds.DataPipeline,
        workers: int,
        prefetch: int,
        damage: DamageCount,
        slots: BatchSlots | None,
        shards: ShardReader,
    ) -> None:
        self._damage, self._slots, self._shards = damage, slots, shards
        self.drawn: dict[str, int] = {}
        self.epochs: dict[str, int] = {}
        self.traffic = Traffic()
        self._started = False
        # Not inherited by name and free of locks, so that a signal handler may read it.
        self._closing = multiprocessing.get_context("fork").RawValue("b", 0) if workers else None
        options: dict[str, Any] = {}
        if workers:
            main = threading.current_thread() is threading.main_thread()
            options = {
                "prefetch_factor": prefetch,
                "multiprocessing_context": "fork",
                "worker_init_fn": partial(_start_worker, self._closing, os.getpid(), main),
            }
        # Its own generator: the loader draws a seed that nobody uses, and must not move the one of the
        # training process.
        loader = wds.WebLoader(
            pipeline,
            batch_size=None,
            num_workers=workers,
            generator=torch.Generator().manual_seed(0),
            **options,
        )
        if workers:
            _freeze(1)
        self._items: Any = iter(loader)
        # At exit, too, and before multiprocessing waits for children that ignore its SIGTERM.
        self._end = partial(_allow_end, self._closing, os.getpid())
        atexit.register(self._end)
        weakref.finalize(self, self._end)

    def __iter__(self) -> Stream[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._items is None:
            raise StopIteration
        try:
            with self._worker_deaths_wait():
                item = next(self._items)
        except RuntimeError as error:
            self.close()
            if "DataLoader worker (pid" in str(error):
                raise RuntimeError(  # not the input's fault: a run that is started again may go on
                    "a loader worker was killed, often for lack of memory or /dev/shm; lower engine.workers"
                ) from error
            raise
        if isinstance(item, _Failed):
            self.close()
            raise UserError(item.message)
        try:
            self._damage.add(item.crops, item.replaced, item.faults)
        except UserError:
            self.close()
            raise
        for source, (crops, epoch) in item.drawn.items():
            self.drawn[source] = self.drawn.get(source, 0) + crops
            self.epochs[source] = max(self.epochs.get(source, 0), epoch)
        self.traffic += item.traffic
        if isinstance(item.batch, Packed) and self._slots is not None:
            unpacked: Batch = self._slots.unpack(item.batch)
            return unpacked
        return item.batch

    @property
    def crops(self) -> int:
        """Crops taken so far."""
        return self._damage.crops

    @property
    def damaged(self) -> int:
        """Crops replaced so far because their sample is damaged."""
        return self._damage.total

    @property
    def damage(self) -> dict[str, int]:
        """Crops replaced so far by key of the damaged sample."""
        return self._damage.by_key

    @contextmanager
    def _worker_deaths_wait(self) -> Iterator[None]:
        """Keep the loader's SIGCHLD handler from outliving the first batch, whose request installs it.

        It raises in whatever the training process does at the moment a worker is killed, be it the last save.
        Without it the loader still notices, inside `next` and within seconds.
        """
        if (
            self._closing is None
            or self._started
            or threading.current_thread() is not threading.main_thread()
        ):
            yield
            return
        before = signal.getsignal(signal.SIGCHLD)
        try:
            yield
        finally:
            self._started = True
            signal.signal(signal.SIGCHLD, before if before is not None else signal.SIG_DFL)

    def close(self) -> None:
        """End the workers and close files; a second call does nothing."""
        self._end()
        atexit.unregister(self._end)
        self._items = self._slots = None
        self._shards.close()  # without workers they were read, and fetched ahead, here

    def __enter__(self) -> Stream[Batch]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _allow_end(closing: Any, owner: int) -> None:
    if closing is not None and not closing.value and os.getpid() == owner:  # not for a forked copy
        closing.value = 1
        _freeze(-1)


_frozen_for = 0


def _freeze(streams: int) -> None:
    """Streams with workers that were opened or closed. While there are any, collections here or in a worker
    leave alone what there was before the first, or the pages that they share would one by one become copies.
    """
    global _frozen_for
    before, _frozen_for = _frozen_for, _frozen_for + streams
    if not before:
        gc.freeze()
    elif not _frozen_for:
        gc.unfreeze()


def _start_worker(closing: Any, parent: int, tied: bool, _worker: int) -> None:
    """One thread, and no death by the signals that end a job: the batches for the last save must still come.

    A scheduler signals every process of a job, or any one. SIGINT is ignored; SIGTERM and SIGUSR1 are passed
    on to a parent that handles them, and SIGTERM is heeded once the stream is closing. When the parent dies
    the kernel kills the worker (where it was started from the parent's main thread, to whose life Linux ties
    it), else the loader's own watchdog ends it within seconds.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for number in (signal.SIGTERM, signal.SIGUSR1):
        handled = callable(signal.getsignal(number))  # what the parent does with it
        signal.signal(number, partial(_pass_on, closing, parent if handled else 0))
    if tied and sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(0)
    torch.set_num_threads(1)
    _keep_freed_memory()


def _pass_on(closing: Any, parent: int, number: int, _frame: object) -> None:
    """In a worker: a signal that asks for the end of the job."""
    if not closing.value:
        if os.getppid() == parent:
            os.kill(parent, number)
    elif number == signal.SIGTERM:
        os._exit(0)


def _keep_freed_memory() -> None:
    """Have the C library keep what this process frees, for the next batch.

    It maps large arrays one by one and gives their pages back, so that every crop and every batch meets new
    ones: a fault for each page cost a sixth of the time of a crop.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # of glibc
    if mallopt is not None:
        trim_threshold, mmap_threshold = -1, -3
        mallopt(mmap_threshold, 32 << 20)  # the most that it takes
        mallopt(trim_threshold, 512 << 20)


def open_stream(
    root: str | Path,
    manifest: Manifest,
    order: Order,
    *,
    rank: int,
    world: int,
    start_update: int,
    workers: int,
    collate: Callable[[int, int | None, list[Crop]], Batch],
    with_seg: bool = False,
    all_channels: bool = False,
    max_damage: float = 0.01,
    prefetch: int = 2,
    cache: CacheConfig | None = None,
) -> Stream[Batch]:
    """Endless batches of one rank from `start_update` on: ceil(groups / world) consecutive ones an update, in
    order.

    collate: `(update, group, crops) -> batch`, run in the worker; `(update, None, [])` where this rank has no
    group for a micro-step. Arrays and tensors of a batch cross from workers in shared memory, which is used
    again when none of them is left.
    with_seg: read labels too (level 0 only, so with an order that has a window). all_channels: read every
    channel, not the drawn one. prefetch: batches a worker prepares ahead. cache: how shards are brought to
    this machine.

    max_damage: share of the crops of this stream that may come from damaged samples, of the last hundred
    thousand or so and of at least a thousand; above it, UserError. Such a crop is replaced by another of the
    same stratum and lane, and of the same source while that has a readable one; it is counted by sample in
    `Stream.damage`, and each sample is logged once.
    """
    cache, meter = cache or CacheConfig(), Meter()
    files = open_files(root, manifest, cache, meter)
    meter.take()  # of making room there, or every worker would tell of it
    shards = ShardReader(root, manifest, files)
    reader = _Reader(shards, manifest, order, collate, with_seg, all_channels, meter)
    stages: list[Any] = [_Source(lanes_of(rank, world, order.groups), start_update)]
    if isinstance(files, CachedFiles):
        stages.append(Prefetch(files, order, cache.lookahead, part_of(cache, workers)))
    stages += [reader.read, reader.assemble]
    slots = None
    if workers and hasattr(os, "memfd_create"):  # Linux
        slots = BatchSlots(workers, prefetch + 2)  # the consumer holds one while it takes the next
        stages.append(partial(reader.send, slots))
    damage = DamageCount(max_damage, manifest.root)
    manifest.release()  # of what the order read
    return Stream(wds.DataPipeline(*stages), workers, prefetch, damage, slots, shards)
