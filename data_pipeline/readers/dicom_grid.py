"""Whether slices are one evenly spaced grid, and its step. Tolerances are stated here."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from data_pipeline.errors import Quarantined
from data_pipeline.readers.dicom_frames import Frame

SAME = 1e-2  # mm: slices no further apart along the normal lie at one position
EVEN = 0.05  # largest deviation of a slice distance, as a share of the median
OFF_GRID = 0.1  # largest distance of a slice from its place on the even grid, in slice distances
DRIFT = 0.5  # largest sideways shift that is no tilt, and largest deviation from an even tilt, in pixels
STEEPEST = 60.0  # degrees; no gantry tilts by half of it


def by_position(frames: Sequence[Frame]) -> list[list[Frame]]:
    """Frames of one orientation grouped by position along the normal, ascending."""
    normal = frames[0].normal
    along = np.array([frame.position @ normal for frame in frames])
    groups: list[list[Frame]] = []
    last = -np.inf
    for n in np.argsort(along, kind="stable"):
        if along[n] - last > SAME:
            groups.append([])
            last = along[n]
        groups[-1].append(frames[n])
    return groups


def step_of(slices: Sequence[Frame]) -> np.ndarray:
    """LPS mm from one slice to the next, of slices in order along the normal.

    The step is the normal itself times the distance unless the slices shift sideways evenly (gantry tilt):
    then it leans. Raises `Quarantined` ``missing_slices`` for a gap of whole slices, ``uneven_spacing`` for
    other distances and for uneven sideways shifts.
    """
    first, normal = slices[0], slices[0].normal
    if len(slices) == 1:
        return normal * (first.thickness or max(first.pixel))
    offsets = np.array([s.position for s in slices]) - first.position
    along = offsets @ normal
    gaps = np.diff(along)
    median = float(np.median(gaps))
    if len(gaps) == 1 and first.thickness and median > 3 * first.thickness:
        raise Quarantined("missing_slices", f"2 slices {median:.2f} mm apart, {first.thickness:.2f} mm thick")
    if (off := np.abs(gaps - median) > max(EVEN * median, SAME)).any():
        ratios = gaps[off] / median
        whole = (ratios > 1.5).all() and np.abs(ratios - np.round(ratios)).max() < 0.1
        detail = (
            f"{int(off.sum())} of {len(gaps)} distances are not {median:.2f} mm, up to {gaps.max():.2f} mm"
        )
        raise Quarantined("missing_slices" if whole else "uneven_spacing", detail)
    step = float(along[-1] / (len(slices) - 1))
    if (worst := np.abs(along - step * np.arange(len(slices))).max()) > OFF_GRID * step:
        raise Quarantined("uneven_spacing", f"a slice lies {worst:.2f} mm off an even grid of {step:.2f} mm")

    sideways = offsets @ first.orientation.T / np.array(first.pixel[::-1])  # pixels along x, along y
    if np.abs(sideways).max() <= DRIFT:
        return normal * step
    lean = sideways[-1] / (len(slices) - 1)
    worst = np.abs(sideways - lean * np.arange(len(slices))[:, np.newaxis]).max()
    tilted = normal * step + (lean * first.pixel[::-1]) @ first.orientation
    if worst > DRIFT or tilt_degrees(tilted, normal) > STEEPEST:
        raise Quarantined("uneven_spacing", f"slices shift sideways unevenly, by up to {worst:.1f} pixels")
    return tilted


def tilt_degrees(step: np.ndarray, normal: np.ndarray) -> float:
    """Angle between the step from slice to slice and the normal of the slices."""
    return float(np.degrees(np.arccos(np.clip(abs(step @ normal) / np.linalg.norm(step), 0, 1))))
