"""How voxels are stored: 16-bit integers where that loses nothing, Blosc2 frames, reduced levels.

Reads are in `shard_reader.py`, the chunk index in `frame_index.py`; both are re-exported here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import blosc2
import numpy as np

from data_pipeline.frame_index import index_frame, read_index, write_index
from data_pipeline.shard_reader import DamagedSample, ShardReader

__all__ = [
    "INVALID",
    "DamagedSample",
    "ShardReader",
    "Stored",
    "block_mean",
    "chunk_shape",
    "decode",
    "encode",
    "index_frame",
    "invalid_of",
    "level_shape",
    "quantise",
    "read_index",
    "write_index",
]  # fmt: skip

INVALID = -32768  # stored int16 of a voxel with no real value; no real value is ever stored as this
LOWEST, HIGHEST = -32767, 32767
PARAMETERS = blosc2.CParams(
    codec=blosc2.Codec.ZSTD, clevel=5, nthreads=1, filters=[blosc2.Filter.SHUFFLE], filters_meta=[0]
)


@dataclass(frozen=True)
class Stored:
    """Voxels as they are stored: real value = voxels * slope + intercept, per channel.

    `voxels` is (c, z, y, x), int16 with `INVALID` or float32 with NaN where there is no real value.
    `max_error` is the largest absolute difference from the source in real units; 0.0 where the storage is
    exact (equal as float32 to the source's value, which for integer sources means equal).
    """

    voxels: np.ndarray
    slope: tuple[float, ...]
    intercept: tuple[float, ...]
    max_error: float


def quantise(
    voxels: np.ndarray,
    slope: Sequence[float],
    intercept: Sequence[float],
    invalid: np.ndarray | None = None,
    *,
    exact: bool = False,
) -> Stored:
    """Choose the stored form of a volume (c, z, y, x) whose real values are `voxels * slope + intercept`.

    Per channel: integers (of any dtype, floats among them) whose range fits keep their value or take an
    offset; values on a regular lattice (a float image that was once integers times a constant) are stored as
    lattice positions if the reconstruction equals the source; anything else is spread over 65,535 steps and
    the largest error recorded, or, under `exact`, the whole volume becomes float32. Non-finite voxels count
    as invalid.
    """
    bad = np.zeros(voxels.shape, bool) if invalid is None else invalid.copy()
    if not np.issubdtype(voxels.dtype, np.integer):
        bad |= ~np.isfinite(voxels)
    out = np.empty(voxels.shape, np.int16)
    slopes: list[float] = []
    intercepts: list[float] = []
    worst = 0.0
    for c in range(len(voxels)):
        step, start, error = _quantise_channel(voxels[c], bad[c], out[c])
        slopes.append(step * float(slope[c]))
        intercepts.append(start * float(slope[c]) + float(intercept[c]))
        worst = max(worst, error * abs(float(slope[c])))
    if worst and exact:
        real = np.empty(voxels.shape, np.float32)
        worst = 0.0
        for c in range(len(voxels)):
            source = np.where(bad[c], 0, voxels[c]) * np.float64(slope[c]) + np.float64(intercept[c])
            real[c] = source
            if not bad[c].all():
                worst = max(worst, float(np.abs(source - real[c])[~bad[c]].max()))
        real[bad] = np.nan
        return Stored(real, (1.0,) * len(voxels), (0.0,) * len(voxels), worst)
    out[bad] = INVALID
    return Stored(out, tuple(slopes), tuple(intercepts), worst)


def _quantise_channel(values: np.ndarray, bad: np.ndarray, out: np.ndarray) -> tuple[float, float, float]:
    """Fill `out` (z, y, x) so that `out * step + start` gives `values`; return (step, start, largest error).

    Planes are converted one at a time, so that no copy of a large volume in a wide dtype is made.
    """
    good = values[~bad] if bad.any() else values.ravel()
    if not good.size:
        out[...] = 0
        return 1.0, 0.0, 0.0
    low, high = good.min(), good.max()
    if float(high) - float(low) <= HIGHEST - LOWEST and _all_integers(good):
        shift = 0 if low >= LOWEST and high <= HIGHEST else int(low) - LOWEST
        for plane, wrong, target in zip(values, bad, out):
            clean = np.where(wrong, low, plane)
            target[...] = clean if shift == 0 else clean.astype(np.int64) - shift
        return 1.0, float(shift), 0.0
    step = (float(high) - float(low)) / (HIGHEST - LOWEST)
    if step == 0.0:  # values closer than float64 can divide
        out[...] = 0
        return 1.0, float(low), float(high) - float(low)
    lattice = _lattice(good)
    if lattice is not None and lattice[2] < step / 2:
        step, start, error = lattice
        first, last = (round((float(end) - start) / step) for end in (low, high))
        offset = 0 if first >= LOWEST and last <= HIGHEST else first - LOWEST
    else:
        lattice, start, offset, error = None, float(low), -LOWEST, 0.0
    for plane, wrong, target in zip(values, bad, out):
        clean = np.where(wrong, low, plane).astype(np.float64)
        target[...] = np.clip(np.rint((clean - start) / step) - offset, LOWEST, HIGHEST)
        if lattice is None:
            rebuilt = target * np.float64(step) + (start + offset * step)
            error = max(error, float(np.abs(rebuilt - clean).max()))
    return step, start + offset * step, error


def _all_integers(values: np.ndarray) -> bool:
    if values.dtype.kind in "iub":
        return True
    head = values[:4096]  # most float images fail here
    return bool((np.rint(head) == head).all()) and bool((np.rint(values) == values).all())


def _lattice(values: np.ndarray) -> tuple[float, float, float] | None:
    """(step, start, largest error) of the lattice `start + n step` that float values lie on, or None.

    The error is 0.0 when the lattice gives every value back as float32. The smallest gap between levels
    estimates the step; ever longer distances, each a whole number of steps, then refine it.
    """
    if values.dtype.kind != "f":
        return None
    if values.size > 1 << 16 and len(np.unique(values[:: values.size >> 16])) > 0.9 * (1 << 16):
        return None  # too many levels, seen without sorting them all
    levels = np.unique(values).astype(np.float64)
    if not 2 <= len(levels) <= HIGHEST - LOWEST + 1:
        return None
    distance = levels - levels[0]
    gaps = np.diff(levels)
    step = float(gaps.min())
    if distance[-1] / step > HIGHEST - LOWEST + 0.5:
        return None
    reach = step = float(gaps[gaps < 1.5 * step].mean())
    while reach < distance[-1]:  # doubling keeps the estimate's drift below half a step
        further = np.searchsorted(distance, (reach, 2 * reach), "right")
        reach = float(distance[max(further[0], further[1] - 1)])
        step = reach / max(round(reach / step), 1)
    best: tuple[float, float, float] | None = None
    rounded = float(np.float32(step))
    for width in (step, rounded) if rounded else (step,):
        for start in (0.0, float(levels[0])):
            count = np.rint((levels - start) / width)
            if count[-1] - count[0] > HIGHEST - LOWEST:
                continue
            rebuilt = count * width + start
            error = float(np.abs(rebuilt - levels).max())
            if values.dtype != np.float64 and np.array_equal(
                rebuilt.astype(np.float32), levels.astype(np.float32)
            ):
                error = 0.0
            if best is None or error < best[2]:
                best = width, start, error
    return best


def invalid_of(voxels: np.ndarray) -> np.ndarray:
    """Boolean mask of the stored voxels that carry no real value."""
    return voxels == INVALID if voxels.dtype == np.int16 else np.isnan(voxels)


def chunk_shape(shape: Sequence[int], kind: str, axes: Sequence[int]) -> tuple[int, int, int, int]:
    """Chunk (1, z, y, x) for a geometry class: 32 cubed, 8 on the thick axis by 64 by 64, or 128 squared.

    `shape` is (c, z, y, x), `axes` the stem order of the stored axes (the first is the thick one of a slab).
    """
    stem = {"volume": (32, 32, 32), "slab": (8, 64, 64), "planar": (1, 128, 128)}[kind]
    sizes = [0, 0, 0]
    for size, axis in zip(stem, axes):
        sizes[axis] = min(size, int(shape[1 + axis]))
    return 1, sizes[0], sizes[1], sizes[2]


def encode(array: np.ndarray, chunks: Sequence[int]) -> bytes:
    """A Blosc2 b2nd frame of `array` (4 axes), zstd level 5, each chunk one block.

    One thread: with more, the same array gives different bytes on each run.
    """
    chunks = tuple(min(c, s) for c, s in zip(chunks, array.shape))
    frame = blosc2.asarray(
        np.ascontiguousarray(array),
        chunks=chunks,
        blocks=chunks,
        cparams=PARAMETERS,
        dparams=blosc2.DParams(nthreads=1),
    )
    return bytes(frame.to_cframe())


def decode(frame: bytes) -> np.ndarray:
    """The whole array of a frame (for tools; training reads boxes through `ShardReader`)."""
    return np.asarray(blosc2.ndarray_from_cframe(frame)[...])


def level_shape(shape_zyx: Sequence[int], factors: Sequence[int]) -> tuple[int, int, int]:
    """Shape of a reduced level: ceil(n / f) on each axis; the last block may be a partial one."""
    z, y, x = (-(-int(n) // int(f)) for n, f in zip(shape_zyx, factors))
    return z, y, x


def block_mean(voxels: np.ndarray, factors: Sequence[int]) -> np.ndarray:
    """Block mean of stored voxels (c, z, y, x) over the valid ones, by integer `factors` (z, y, x).

    Voxel i of the result covers source voxels [i f, i f + f), so a crop at a level starts at the same corner
    in mm. A block without a valid voxel is invalid. int16 means are rounded to the nearest stored step. The
    dtype is kept.
    """
    fz, fy, fx = (int(f) for f in factors)
    channels, depth = voxels.shape[:2]
    nz, ny, nx = level_shape(voxels.shape[1:], factors)
    out = np.empty((channels, nz, ny, nx), voxels.dtype)
    starts_y, starts_x = np.arange(ny) * fy, np.arange(nx) * fx
    empty = INVALID if voxels.dtype == np.int16 else np.nan
    for c in range(channels):
        for z in range(nz):  # a slab at a time keeps the wide sums small
            part = voxels[c, z * fz : min(z * fz + fz, depth)]
            good = ~invalid_of(part)
            total = np.where(good, part, 0).sum(0, dtype=np.float64)
            count = good.sum(0, dtype=np.int32)
            for starts, axis in ((starts_y, 0), (starts_x, 1)):
                if len(starts) != total.shape[axis]:
                    total = np.add.reduceat(total, starts, axis)
                    count = np.add.reduceat(count, starts, axis)
            mean = total / np.maximum(count, 1)
            if voxels.dtype == np.int16:
                mean = np.rint(mean)
            out[c, z] = np.where(count > 0, mean, empty)
    return out
