"""Reduced levels: block means of stored voxels, all levels in one pass."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from data_pipeline.quantise import INVALID, invalid_of, slab_depth


def level_shape(shape_zyx: Sequence[int], factors: Sequence[int]) -> tuple[int, int, int]:
    """Shape of a reduced level: ceil(n / f) on each axis; the last block may be a partial one."""
    z, y, x = (-(-int(n) // int(f)) for n, f in zip(shape_zyx, factors))
    return z, y, x


def block_mean(voxels: np.ndarray, factors: Sequence[int]) -> np.ndarray:
    """Block mean of stored voxels (c, z, y, x) over the valid ones, by integer `factors` (z, y, x).

    Voxel i of the result covers source voxels [i f, i f + f), so a crop at a level starts at the same corner
    in mm. A block without a valid voxel is invalid. int16 means are rounded to the nearest stored step, a
    half to the even one. The dtype is kept.
    """
    return block_means(voxels, [factors])[0]


def block_means(voxels: np.ndarray, levels: Sequence[Sequence[int]]) -> list[np.ndarray]:
    """`block_mean` by each of `levels`, in one pass over the voxels.

    The factors of a level are multiples of those of the level before it, whose sums it adds up.
    """
    if not levels:
        return []
    sizes = [level_shape(voxels.shape[1:], factors) for factors in levels]
    steps = [
        tuple(f // g for f, g in zip(factors, before))
        for before, factors in zip([(1, 1, 1), *levels], levels)
    ]
    if any(f != s * g for fs, ss, gs in zip(levels[1:], steps[1:], levels) for f, s, g in zip(fs, ss, gs)):
        raise ValueError(f"the factors of {list(levels)} are not multiples of those before them")
    means = [np.empty((len(voxels), *size), voxels.dtype) for size in sizes]
    wide = np.int32 if voxels.dtype == np.int16 else np.float64
    depth = int(levels[-1][0])
    depth *= -(-slab_depth(voxels.shape[1:]) // depth)
    for c, channel in enumerate(voxels):
        for z in range(0, len(channel), depth):
            total: np.ndarray = channel[z : z + depth]
            count: np.ndarray | None = None
            bad = invalid_of(total)
            if bad.any():
                total, count = np.where(bad, 0, total), (~bad).astype(np.uint16)
            for mean, step, factors in zip(means, steps, levels):
                total = _block_sum(total, step, wide)
                if count is None:
                    number = _block_sizes(channel.shape, factors, z, total.shape)
                else:
                    number = count = _block_sum(count, step, np.uint16)
                first = z // int(factors[0])
                _divide(total, number, mean[c, first : first + len(total)])
    return means


def _block_sum(values: np.ndarray, step: Sequence[int], dtype: type) -> np.ndarray:
    """Sums over blocks of `step` (z, y, x) voxels, those at the far ends partly outside."""
    for axis, f in enumerate(step):
        if f == 1:
            continue
        head = (slice(None),) * axis
        total: np.ndarray = values[(*head, slice(0, None, f))].astype(dtype)
        for k in range(1, f):
            part = values[(*head, slice(k, None, f))]
            total[(*head, slice(0, part.shape[axis]))] += part
        values = total
    return values.astype(dtype, copy=False)


def _block_sizes(
    shape_zyx: Sequence[int], factors: Sequence[int], z: int, blocks: Sequence[int]
) -> np.ndarray | int:
    """Voxels in each block of the slab that starts at plane `z`: one number where all are whole."""
    starts = (z, 0, 0)
    sizes = [
        np.minimum(f, n - start - f * np.arange(count))
        for n, f, start, count in zip(shape_zyx, factors, starts, blocks)
    ]
    if all(size[-1] == f for size, f in zip(sizes, factors)):
        return math.prod(int(f) for f in factors)
    return sizes[0][:, None, None] * sizes[1][:, None] * sizes[2]


def _divide(total: np.ndarray, number: np.ndarray | int, out: np.ndarray) -> None:
    if out.dtype == np.int16:
        # Up to 64 voxels: sums are exact in float32, and no mean but a half comes near a half.
        wide = np.float32 if np.max(number) <= 64 else np.float64
        mean = np.divide(total, np.maximum(number, 1), dtype=wide)
        np.rint(mean, out=mean)
    else:
        mean = total / np.maximum(number, 1)
    out[...] = mean
    if not isinstance(number, int):
        np.copyto(out, INVALID if out.dtype == np.int16 else np.nan, where=number == 0)
