"""Batches in reused shared memory: the same values, never overwritten while in use, no handle kept."""

from __future__ import annotations

import gc
import multiprocessing
import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.batch_slots import BatchSlots, Packed

pytestmark = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="memory files are Linux's")

DTYPES = [torch.int16, torch.uint8, torch.float32, torch.bfloat16, torch.bool, torch.int64]


@dataclass
class Batch:
    voxels: torch.Tensor
    array: np.ndarray
    more: dict[str, Any]


def batch_of(seed: int, n: int = 5) -> Batch:
    g = np.random.default_rng(seed)
    return Batch(
        torch.from_numpy(g.integers(-9, 9, (n, 3, 4)).astype(np.int16)),
        g.random((n, 2)),
        {"names": ["a", str(seed)], "none": None, "list": [torch.full((n,), seed)]},
    )


def same(a: Any, b: Batch) -> bool:
    return (
        torch.equal(a.voxels, b.voxels)
        and np.array_equal(a.array, b.array)
        and a.more["names"] == b.more["names"]
        and torch.equal(a.more["list"][0], b.more["list"][0])
    )


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 4), max_size=4), st.sampled_from(DTYPES), st.booleans(), st.integers(0, 2**31))
def test_every_tensor_comes_back(shape: list[int], dtype: torch.dtype, turned: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tensor = torch.randint(0, 2, shape, generator=generator).to(dtype)
    if turned and shape:
        tensor = tensor.transpose(0, -1)
    slots = BatchSlots(1, 1)
    got = slots.unpack(slots.pack(0, [tensor, tensor.float().numpy()]))
    assert got[0].dtype == dtype
    assert got[0].shape == tensor.shape
    assert torch.equal(got[0], tensor)
    np.testing.assert_array_equal(got[1], tensor.float().numpy())


def test_a_slot_is_used_again_only_when_no_array_of_it_is_left() -> None:
    slots = BatchSlots(1, 2)
    first = slots.unpack(slots.pack(0, batch_of(0)))
    kept = first.voxels[1:3].view(-1)  # a view of a view keeps the memory
    del first
    for seed in range(1, 20):
        packed = slots.pack(0, batch_of(seed, seed))  # of any size
        assert isinstance(packed, Packed)
        assert same(slots.unpack(packed), batch_of(seed, seed))
    assert torch.equal(kept, batch_of(0).voxels[1:3].view(-1))
    held = [slots.unpack(slots.pack(0, batch_of(30)))]
    assert isinstance(slots.pack(0, batch_of(31)), Batch)  # both in use: the loader's own way
    del kept, held
    gc.collect()
    assert isinstance(slots.pack(0, batch_of(32)), Packed)


def test_a_batch_is_written_in_a_child_and_outlives_the_slots() -> None:
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()

    def work(slots: BatchSlots) -> None:
        packed = [slots.pack(1, batch_of(seed)) for seed in range(4)]
        theirs.send([item if isinstance(item, Packed) else None for item in packed])

    slots = BatchSlots(2, 3)
    child = context.Process(target=work, args=(slots,))
    child.start()
    received = ours.recv()
    child.join()
    assert child.exitcode == 0
    assert [isinstance(item, Packed) for item in received] == [True, True, True, False]
    batches = [slots.unpack(item) for item in received[:3]]
    del slots, child
    gc.collect()
    assert all(same(batch, batch_of(seed)) for seed, batch in enumerate(batches))


def test_a_forked_copy_of_a_batch_frees_nothing() -> None:
    slots = BatchSlots(1, 1)
    batch = slots.unpack(slots.pack(0, batch_of(1)))

    def drop() -> None:
        nonlocal batch
        del batch
        gc.collect()

    child = multiprocessing.get_context("fork").Process(target=drop)
    child.start()
    child.join()
    assert isinstance(slots.pack(0, batch_of(2)), Batch)
    assert same(batch, batch_of(1))


def test_no_handle_is_kept() -> None:
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    for seed in range(5):
        slots = BatchSlots(3, 4)
        batch = slots.unpack(slots.pack(2, batch_of(seed)))
        assert same(batch, batch_of(seed))
        del slots, batch
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before
