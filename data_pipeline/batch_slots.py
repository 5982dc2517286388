"""Batches cross from worker processes in shared memory that is used again.

PyTorch makes a new shared file for every tensor of every batch: its pages are allocated, zeroed and mapped
twice, which costs about as much as decompressing the voxels, and a small `/dev/shm`, as containers have it,
kills the worker. Here each worker has a few memory files (`memfd_create`: no name, no mount, gone with the
processes) that both sides map once. Arrays and tensors of a batch are views of its slot; the slot is free
again when the last of them is gone.
"""

from __future__ import annotations

import io
import mmap
import os
import pickle
import weakref
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

ALIGNMENT = 64  # bytes: a cache line, and more than any element


@dataclass(frozen=True)
class Packed:
    """A batch in a slot: pickled without its arrays, and where they lie, as (start, end) bytes."""

    slot: int
    pickled: bytes
    places: list[tuple[int, int]]


class BatchSlots:
    """Memory for `count` batches of each of `workers` forked processes; made before they are forked.

    `pack` is called in a worker, `unpack` in the process that made this object. A consumer that keeps more
    batches than there are slots gets the others as `pack` got them, by the loader's own way.
    """

    def __init__(self, workers: int, count: int) -> None:
        self._count, self._owner = count, os.getpid()
        self._files = [os.memfd_create("medfm-batch", os.MFD_CLOEXEC) for _ in range(workers * count)]
        self._maps: dict[int, mmap.mmap] = {}  # of this process, by slot
        self._taken = mmap.mmap(-1, workers * count)  # a byte a slot; set by the worker, cleared by the owner
        weakref.finalize(self, _close, self._files, self._owner)

    def pack(self, worker: int, batch: Any) -> Any:
        """`Packed` if a slot of this worker is free, else the batch itself."""
        slots = range(worker * self._count, (worker + 1) * self._count)
        slot = next((s for s in slots if not self._taken[s]), None)
        if slot is None:
            return batch
        buffers: list[pickle.PickleBuffer] = []
        stream = io.BytesIO()
        _Pickler(stream, protocol=5, buffer_callback=buffers.append).dump(batch)
        places, end = [], 0
        for buffer in buffers:
            start = -(-end // ALIGNMENT) * ALIGNMENT
            end = start + buffer.raw().nbytes
            places.append((start, end))
        size = max(end, mmap.PAGESIZE)
        if os.fstat(self._files[slot]).st_size < size:
            os.posix_fallocate(self._files[slot], 0, size)  # all pages at once, or an error and no signal
        memory = self._mapped(slot, size)
        for buffer, (start, stop) in zip(buffers, places):
            memory[start:stop] = buffer.raw()
        self._taken[slot] = 1
        return Packed(slot, stream.getvalue(), places)

    def unpack(self, packed: Packed) -> Any:
        """The batch, whose arrays and tensors are views of the slot."""
        size = max([mmap.PAGESIZE, *(end for _, end in packed.places)])
        lease = np.frombuffer(self._mapped(packed.slot, size), np.uint8)
        weakref.finalize(lease, _release, self._taken, packed.slot, self._owner).atexit = False
        return pickle.loads(packed.pickled, buffers=[lease[start:stop] for start, stop in packed.places])

    def _mapped(self, slot: int, size: int) -> mmap.mmap:
        """The first `size` bytes of the slot's file, or more."""
        found = self._maps.get(slot)
        if found is None or len(found) < size:
            found = self._maps[slot] = mmap.mmap(self._files[slot], size)
        return found


class _Pickler(pickle.Pickler):
    """Tensors are pickled as arrays, which protocol 5 leaves outside."""

    def reducer_override(self, obj: Any) -> Any:
        if type(obj) is not torch.Tensor or obj.layout is not torch.strided or obj.requires_grad:
            return NotImplemented
        raw = obj.contiguous().reshape(-1).view(torch.uint8).numpy()
        return _tensor, (raw, obj.dtype, tuple(obj.shape))


def _tensor(raw: np.ndarray, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.from_numpy(raw).view(dtype).reshape(shape)


def _release(taken: mmap.mmap, slot: int, owner: int) -> None:
    if os.getpid() == owner:  # a forked copy of the batch says nothing about the original
        taken[slot] = 0


def _close(files: list[int], owner: int) -> None:
    if os.getpid() == owner:
        for file in files:
            os.close(file)
