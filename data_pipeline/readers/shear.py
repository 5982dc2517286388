"""Sheared stacks (gantry tilt, sheared affines) on a right-angled grid, shifting each slice in its own plane.

Nothing is interpolated across slices. The grid grows so that no voxel is cut off; what lies outside the
sheared stack is invalid, and so is what would mix valid and invalid voxels.
"""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import numpy as np

from data_pipeline.errors import Quarantined
from data_pipeline.readers.raw import RIGHT_ANGLE
from data_pipeline.volume import Volume, spacing_of


def is_sheared(affine: np.ndarray) -> bool:
    """Whether two axes are further from the right angle than a header's rounding makes them."""
    return bool(np.abs(_cosines(affine)).max() > RIGHT_ANGLE)


def straighten(volume: Volume) -> Volume:
    """A volume as read on the right-angled grid with the same slices and the same first voxel direction.

    The axis along which slices are stacked is the one whose two others are at right angles (z if several
    are); where none is, `Quarantined` ``sheared``. Within a slice, values are interpolated linearly along the
    shear and rounded to the voxels' own dtype where that is an integer. ``provenance["shear"]`` states the
    angle.
    """
    axis = stacking_axis(volume.affine)
    u, v = (a for a in range(3) if a != axis)  # affine columns; array axis of column a is 3 - a
    columns = volume.affine[:3, :3]
    # Both at once: u and v may be off the right angle by a header's rounding.
    lean = np.linalg.lstsq(columns[:, [u, v]], columns[:, axis])[0].tolist()
    upright = columns[:, axis] - lean[0] * columns[:, u] - lean[1] * columns[:, v]
    angle = float(np.degrees(np.arccos(np.linalg.norm(upright) / np.linalg.norm(columns[:, axis]))))

    order = (0, 3 - axis, 3 - u, 3 - v)
    source = volume.voxels.transpose(order)
    bad = None if volume.invalid is None else volume.invalid.transpose(order)
    last = source.shape[1] - 1
    low = [int(np.floor(min(0.0, p * last) + 1e-6)) for p in lean]
    grown = [int(np.ceil(max(0.0, p * last) - 1e-6)) - lo for p, lo in zip(lean, low)]
    shape = (*source.shape[:2], source.shape[2] + grown[0], source.shape[3] + grown[1])
    voxels, invalid = np.empty(shape, source.dtype), np.empty(shape, bool)
    for c in range(shape[0]):
        fill = _lowest(volume, c)
        for k in range(shape[1]):
            shifts = [p * k - lo for p, lo in zip(lean, low)]
            hole = np.zeros(source.shape[2:], bool) if bad is None else bad[c, k]
            plane, hole = _shifted(source[c, k].astype(np.float64), hole, shifts, shape[2:])
            plane = np.rint(plane) if source.dtype.kind in "iu" else plane
            plane[hole] = fill
            voxels[c, k], invalid[c, k] = plane, hole
    affine = volume.affine.copy()
    affine[:3, axis] = upright
    affine[:3, 3] += columns[:, u] * low[0] + columns[:, v] * low[1]
    back = np.argsort(order)
    voxels, invalid = voxels.transpose(back), invalid.transpose(back)
    return replace(
        volume,
        voxels=voxels,
        invalid=invalid if invalid.any() else None,
        affine=affine,
        source_affine=affine,
        source_shape=cast("tuple[int, int, int]", voxels.shape[1:]),
        spacing=spacing_of(affine),
        provenance={**volume.provenance, "shear": f"{angle:.1f} degrees"},
    )


def stacking_axis(affine: np.ndarray) -> int:
    """The affine's column along which slices at right angles in themselves are stacked; `Quarantined`
    ``sheared`` where there is none."""
    cosines = np.abs(_cosines(affine))
    for axis, pair in ((2, (0, 1)), (1, (0, 2)), (0, (1, 2))):
        if cosines[pair] <= RIGHT_ANGLE:
            return axis
    raise Quarantined("sheared", "no two axes are at right angles")


def _shifted(
    plane: np.ndarray, hole: np.ndarray, shifts: list[float], shape: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """A plane moved by ``shifts`` >= 0 (rows, columns) into a larger one, and where it is not valid."""
    for axis, (shift, length) in enumerate(zip(shifts, shape)):
        whole = int(np.floor(shift + 1e-6))
        part = max(shift - whole, 0.0)
        around = [(0, 0), (0, 0)]
        around[axis] = (whole, length - plane.shape[axis] - whole)
        if part <= 1e-6:
            plane, hole = np.pad(plane, around), np.pad(hole, around, constant_values=True)
            continue
        around[axis] = (whole + 1, length - plane.shape[axis] - whole)
        plane, hole = np.pad(plane, around), np.pad(hole, around, constant_values=True)
        here, before = [slice(None)] * 2, [slice(None)] * 2
        here[axis], before[axis] = slice(1, None), slice(None, -1)
        plane = (1 - part) * plane[tuple(here)] + part * plane[tuple(before)]
        hole = hole[tuple(here)] | hole[tuple(before)]
    return plane, hole


def _lowest(volume: Volume, channel: int) -> float:
    """The stored value of the lowest valid real value of a channel."""
    values = volume.voxels[channel]
    if volume.invalid is not None:
        values = values[~volume.invalid[channel]]
    return values.min() if volume.slope[channel] > 0 else values.max()


def _cosines(affine: np.ndarray) -> np.ndarray:
    unit = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    return unit.T @ unit - np.eye(3)
