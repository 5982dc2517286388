"""A simulated person: where the first click, the next click and a hasty box fall.

Pure functions of their arguments and of the generator passed in. Arrays are (z, y, x) in stem order.
Distances are in mm for training. The edge of the image and an axis of length 1 are not background: an organ
cut by the border is deep there. The evaluation protocol of the CVPR 2025 interactive challenge keeps its
own transform, in voxels, with the image border as background. Ties go to the lowest linear index everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import ndimage

Index = tuple[int, int, int]
Bool = np.ndarray  # bool (z, y, x)


def connectivity(shape: Sequence[int]) -> np.ndarray:
    """The neighbourhood of one voxel: 26 neighbours, or 8 where an axis has length 1."""
    structure = np.ones((3, 3, 3), dtype=bool)
    for axis, length in enumerate(shape):
        if length == 1:
            outer = [slice(None)] * 3
            outer[axis] = slice(0, 3, 2)
            structure[tuple(outer)] = False
    return structure


def largest_component(region: Bool) -> Bool | None:
    """The largest connected part of `region`, or None where it is empty; the first in scan order among
    equals."""
    labels, count = ndimage.label(region, connectivity(region.shape))
    if count == 0:
        return None
    sizes = np.bincount(labels.ravel())[1:]
    return labels == 1 + int(sizes.argmax())


def depth(region: Bool, spacing: Sequence[float], border_is_background: bool = False) -> np.ndarray:
    """Distance of every voxel of `region` to the nearest voxel outside it, 0 outside; float64 (z, y, x).

    A region without any outside (it fills its image) is equally deep everywhere.
    """
    result = np.zeros(region.shape)
    where = ndimage.find_objects(region.astype(np.uint8))
    if not where:
        return result
    # The nearest outside voxel always lies within one voxel of the bounding box, so the rest need not be
    # looked at.
    box = tuple(slice(max(s.start - 1, 0), min(s.stop + 1, n)) for s, n in zip(where[0], region.shape))
    part = region[box]
    if border_is_background:
        # An axis of length 1 has no neighbours to pad with: the challenge transform of a flat image is the
        # 2D one.
        pad = [(0, 0) if n == 1 else (1, 1) for n in region.shape]
        inner = tuple(slice(a, a + n) for (a, _), n in zip(pad, part.shape))
        distance = ndimage.distance_transform_edt(np.pad(part, pad), sampling=tuple(spacing))[inner]
    elif part.all():
        distance = np.ones(part.shape)
    else:
        distance = ndimage.distance_transform_edt(part, sampling=tuple(spacing))
    result[box] = distance
    return result


def draw_voxel(weights: np.ndarray, rng: np.random.Generator) -> Index | None:
    """A voxel drawn with probability proportional to `weights` >= 0, or None where all are 0."""
    chosen = np.flatnonzero(weights)
    if len(chosen) == 0:
        return None
    total = np.cumsum(weights.ravel()[chosen], dtype=np.float64)
    place = int(np.searchsorted(total, rng.random() * total[-1], side="right"))
    return _index(chosen[min(place, len(chosen) - 1)], weights.shape)


def first_click(
    region: Bool, spacing: Sequence[float], rng: np.random.Generator, power: float
) -> Index | None:
    """A click inside `region` with probability ~ depth**power: 0 is uniform, 8 is nearly the centre."""
    if power == 0:
        return draw_voxel(region.astype(np.float64), rng)
    return draw_voxel(depth(region, spacing) ** power, rng)


def correction_click(
    predicted: Bool,
    truth: Bool,
    known: Bool,
    spacing: Sequence[float],
    rng: np.random.Generator,
    power: float,
) -> tuple[Index, int] | None:
    """A click in the largest connected error among `known` voxels, and its sign: +1 where the object was
    missed.

    Misses and false alarms are separate regions. None where nothing is wrong.
    """
    best, sign, most = None, 0, 0
    for region, meaning in ((truth & ~predicted & known, 1), (predicted & ~truth & known, -1)):
        part = largest_component(region)
        if part is not None and (size := int(part.sum())) > most:
            best, sign, most = part, meaning, size
    if best is None:
        return None
    where = first_click(best, spacing, rng, power)
    return None if where is None else (where, sign)


def centre_click(predicted: Bool, truth: Bool, known: Bool | None = None) -> tuple[Index, int] | None:
    """The challenge's click: the deepest voxel (in voxels) of the largest component of all errors, and its
    sign.

    Misses and false alarms that touch form one component; the sign is that of the voxel clicked. None where
    all is right.
    """
    wrong = predicted != truth
    if known is not None:
        wrong = wrong & known
    part = largest_component(wrong)
    if part is None:
        return None
    deepest = int(depth(part, (1.0, 1.0, 1.0), border_is_background=True).argmax())
    where = _index(deepest, part.shape)
    return where, 1 if truth[where] else -1


def tight_box(region: Bool) -> tuple[Index, Index] | None:
    """Inclusive minimum and maximum index of `region`, or None where it is empty."""
    where = ndimage.find_objects(region.astype(np.uint8))
    if not where:
        return None
    low, high = [s.start for s in where[0]], [s.stop - 1 for s in where[0]]
    return (low[0], low[1], low[2]), (high[0], high[1], high[2])


def jittered_box(region: Bool, rng: np.random.Generator, jitter: float) -> tuple[Index, Index] | None:
    """The tight box with each face moved by up to `jitter` of the box's length (at least one voxel), inside
    the image."""
    box = tight_box(region)
    if box is None:
        return None
    low, high = [], []
    for a, b, n in zip(*box, region.shape):
        reach = 0 if jitter == 0 or n == 1 else max(1, round(jitter * (b - a + 1)))
        start = int(np.clip(a + rng.integers(-reach, reach + 1), 0, n - 1))
        stop = int(np.clip(b + rng.integers(-reach, reach + 1), 0, n - 1))
        low.append(min(start, stop))
        high.append(max(start, stop))
    return (low[0], low[1], low[2]), (high[0], high[1], high[2])


def _index(linear: int | np.integer, shape: Sequence[int]) -> Index:
    z, y, x = np.unravel_index(int(linear), tuple(shape))
    return int(z), int(y), int(x)
