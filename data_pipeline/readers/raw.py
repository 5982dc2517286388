"""`Raw`: what a file format's decoder gives, before modality, channels and units are settled."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from data_pipeline.errors import Quarantined

MAX_VOXELS = 1 << 33  # of one file, all frames
SMALLEST_SIDE, LARGEST_SIDE = 0.5, 5000.0  # mm, of the longest side of a scan
RIGHT_ANGLE = 2e-3  # largest cosine between axes that count as at right angles
DEFLATE = 1032  # times that zlib can shrink anything, at most


@dataclass(frozen=True)
class Raw:
    """Decoded frames on one grid.

    ``frames`` (t, z, y, x) in the dtype of the file, native byte order; real value = ``frames*slope +
    intercept``. ``affine``: x, y, z index to LPS mm. ``spacing_known`` is False where the format states no
    spacing (the affine then has unit spacing), ``has_position`` False where it states no place in the
    patient (a picture). ``modality`` and ``units`` only where the header states them. ``components`` says
    that the frames are those of a vector, no series in time. ``padding`` marks voxels that the header calls
    padding, (t, z, y, x) or None. ``instances`` are the SOPInstanceUIDs the frames came from (they identify:
    memory only).
    """

    frames: np.ndarray
    affine: np.ndarray
    slope: float = 1.0
    intercept: float = 0.0
    spacing_known: bool = True
    has_position: bool = True
    modality: str | None = None
    units: str | None = None
    padding: np.ndarray | None = None
    provenance: Mapping[str, str] = field(default_factory=dict)
    instances: frozenset[str] = frozenset()
    components: bool = False


def check_affine(affine: np.ndarray, *, sheared: bool = False) -> np.ndarray:
    """The affine, if it can be that of a scan; else `Quarantined` ``bad_geometry``, or ``sheared`` unless
    that is accepted."""
    columns = affine[:3, :3]
    lengths = np.linalg.norm(columns, axis=0)
    if not np.isfinite(affine).all() or lengths.min() < 1e-4 or lengths.max() > 1e4:
        raise Quarantined("bad_geometry", "voxel sizes are zero, not finite or beyond 10 m")
    if np.abs(affine[:3, 3]).max() > 1e5:  # such a number is no place; it may be a date or an identity number
        raise Quarantined("bad_geometry", "a position more than 100 m from the scanner")
    unit = columns / lengths
    cosines = np.abs(unit.T @ unit - np.eye(3)).max()
    if cosines > 0.9:
        raise Quarantined("bad_geometry", "two axes are parallel")
    if cosines > RIGHT_ANGLE and not sheared:
        raise Quarantined(
            "sheared", f"axes are {np.degrees(np.arcsin(cosines)):.2f} degrees off the right angle"
        )
    return affine


def check_extent(affine: np.ndarray, shape_zyx: tuple[int, ...]) -> None:
    """Refuse a scan in millimetres whose size tells that they are none (metres, micrometres called so).

    Raises `Quarantined` ``bad_geometry``.
    """
    side = float((np.linalg.norm(affine[:3, :3], axis=0) * shape_zyx[::-1]).max())
    if np.isfinite(side) and not SMALLEST_SIDE <= side <= LARGEST_SIDE:
        raise Quarantined("bad_geometry", f"a longest side of {side:.2g} mm")


def check_size(voxels: int, size: int, stored: int, shrink: int = DEFLATE) -> None:
    """Refuse, before any memory is taken, a header that states more than its file can hold.

    ``size`` is the stated number of bytes, ``stored`` the length of the file and ``shrink`` the most that its
    compression can achieve. Raises `Quarantined` ``truncated`` or ``unsupported_layout``.
    """
    if voxels > MAX_VOXELS:
        raise Quarantined("unsupported_layout", f"{voxels} voxels, at most {MAX_VOXELS}")
    if size > stored * shrink:
        raise Quarantined("truncated", f"{stored} bytes cannot hold the {size} that the header states")
