"""How voxels become 16-bit integers without losing anything, or with the loss measured."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

INVALID = -32768  # stored int16 of a voxel with no real value; no real value is ever stored as this
LOWEST, HIGHEST = -32767, 32767
SLAB_VOXELS = 1 << 17


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
    as invalid. The result is `voxels` itself where these can be stored as they are.
    """
    if invalid is not None and not invalid.any():
        invalid = None
    if invalid is None and voxels.dtype == np.int16 and voxels.min() >= LOWEST:
        return Stored(voxels, tuple(map(float, slope)), tuple(map(float, intercept)), 0.0)
    bad = [_bad(channel, None if invalid is None else invalid[c]) for c, channel in enumerate(voxels)]
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
        return _as_floats(voxels, slope, intercept, bad)
    for c, wrong in enumerate(bad):
        if wrong is not None:
            np.copyto(out[c], INVALID, where=wrong)
    return Stored(out, tuple(slopes), tuple(intercepts), worst)


def _bad(values: np.ndarray, invalid: np.ndarray | None) -> np.ndarray | None:
    """Mask of the voxels of a channel that hold no value, None where all do."""
    if values.dtype.kind in "iub" or np.isfinite([values.min(), values.max()]).all():
        return invalid if invalid is not None and invalid.any() else None
    infinite = ~np.isfinite(values)
    return infinite if invalid is None else infinite | invalid


def _as_floats(
    voxels: np.ndarray, slope: Sequence[float], intercept: Sequence[float], bad: Sequence[np.ndarray | None]
) -> Stored:
    real = np.empty(voxels.shape, np.float32)
    worst = 0.0
    for c, wrong in enumerate(bad):
        for target, clean in zip(slabs(real[c], None, 0), slabs(voxels[c], wrong, 0)):
            source = clean * np.float64(slope[c]) + np.float64(intercept[c])
            target[...] = source
            worst = max(worst, float(np.abs(source - target).max()))
        if wrong is not None:
            np.copyto(real[c], np.nan, where=wrong)
    return Stored(real, (1.0,) * len(voxels), (0.0,) * len(voxels), worst)


def slabs(values: np.ndarray, bad: np.ndarray | None, fill: int | np.generic) -> Iterator[np.ndarray]:
    """A channel a few planes at a time, `fill` at bad voxels: no wide copy of the whole is ever made."""
    step = slab_depth(values.shape)
    for z in range(0, len(values), step):
        slab = values[z : z + step]
        if bad is not None and bad[z : z + step].any():
            slab = np.where(bad[z : z + step], fill, slab)
        yield slab


def slab_depth(shape_zyx: Sequence[int]) -> int:
    """Planes to work on at a time: few enough for the processor's cache, and at least one."""
    return max(1, SLAB_VOXELS // max(1, int(shape_zyx[1]) * int(shape_zyx[2])))


def _quantise_channel(
    values: np.ndarray, bad: np.ndarray | None, out: np.ndarray
) -> tuple[float, float, float]:
    """Fill `out` (z, y, x) so that `out * step + start` gives `values`; return (step, start, largest
    error)."""
    if bad is not None and bad.all():
        out[...] = 0
        return 1.0, 0.0, 0.0
    some = values.flat[0 if bad is None else int(np.argmin(bad))]
    extremes = [(slab.min(), slab.max()) for slab in slabs(values, bad, some)]
    low, high = min(e[0] for e in extremes), max(e[1] for e in extremes)
    if float(high) - float(low) <= HIGHEST - LOWEST and _all_integers(values, bad, low):
        shift = 0 if low >= LOWEST and high <= HIGHEST else int(low) - LOWEST
        wide = np.int32 if values.dtype.itemsize <= 2 and values.dtype.kind in "iub" else np.int64
        for clean, target in zip(slabs(values, bad, low), slabs(out, None, 0)):
            target[...] = clean if shift == 0 else np.subtract(clean, shift, dtype=wide, casting="unsafe")
        return 1.0, float(shift), 0.0
    step = (float(high) - float(low)) / (HIGHEST - LOWEST)
    if step == 0.0:  # values closer than float64 can divide
        out[...] = 0
        return 1.0, float(low), float(high) - float(low)
    lattice = _lattice(values, bad, low)
    if lattice is not None and lattice[2] < step / 2:
        step, start, error = lattice
        first, last = (round((float(end) - start) / step) for end in (low, high))
        offset = 0 if first >= LOWEST and last <= HIGHEST else first - LOWEST
    else:
        lattice, start, offset, error = None, float(low), -LOWEST, 0.0
    for clean, target in zip(slabs(values, bad, low), slabs(out, None, 0)):
        place = np.subtract(clean, start, dtype=np.float64)
        place /= step
        np.rint(place, out=place)
        place -= offset
        np.clip(place, LOWEST, HIGHEST, out=place)
        target[...] = place
        if lattice is None:
            place *= step
            place += start + offset * step
            place -= clean
            error = max(error, float(place.max()), -float(place.min()))
    return step, start + offset * step, error


def _all_integers(values: np.ndarray, bad: np.ndarray | None, low: np.generic) -> bool:
    if values.dtype.kind in "iub":
        return True
    return all(bool((np.rint(slab) == slab).all()) for slab in slabs(values, bad, low))


def _lattice(
    values: np.ndarray, bad: np.ndarray | None, low: np.generic
) -> tuple[float, float, float] | None:
    """(step, start, largest error) of the lattice `start + n step` that float values lie on, or None.

    The error is 0.0 when the lattice gives every value back as float32. The smallest gap between levels
    estimates the step; ever longer distances, each a whole number of steps, then refine it.
    """
    if values.dtype.kind != "f":
        return None
    levels = _levels(values, bad, low)
    if levels is None or len(levels) < 2:
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


def _levels(values: np.ndarray, bad: np.ndarray | None, low: np.generic) -> np.ndarray | None:
    """Sorted distinct values as float64, None if there are more than 65,535.

    Values are looked up in a hash table of those seen before; only what is not there is sorted.
    """
    dtype, bits, odd, shift = (
        (np.float32, np.uint32, 0x9E3779B1, 14)
        if values.dtype.itemsize <= 4
        else (np.float64, np.uint64, 0x9E3779B97F4A7C15, 46)
    )
    table: np.ndarray = np.full(1 << 18, low, dtype)

    def places(of: np.ndarray) -> np.ndarray:
        product: np.ndarray = np.multiply(of.view(bits), odd, dtype=bits)
        return product >> shift

    levels = np.array([low], dtype)
    for slab in slabs(values, bad, low):
        flat = np.ascontiguousarray(slab, dtype).ravel()
        for part in (flat[:4096], flat[4096:]):  # most levels are met early
            new = part[table[places(part)] != part]
            if new.size:
                new = np.unique(new)
                table[places(new)] = new
                levels = np.union1d(levels, new)
            if len(levels) > HIGHEST - LOWEST + 1:
                return None
    return levels.astype(np.float64)


def invalid_of(voxels: np.ndarray) -> np.ndarray:
    """Boolean mask of the stored voxels that carry no real value."""
    return voxels == INVALID if voxels.dtype == np.int16 else np.isnan(voxels)
