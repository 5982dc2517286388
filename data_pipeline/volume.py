"""`Volume`: voxels on a regular grid in patient space, and the way to the nearest L, P, S axis order and
back.

Arrays are ``(c, z, y, x)``; triples of spacing and shape are ``(z, y, x)``; points and indices are ``(x, y,
z)`` like SimpleITK's. Patient space is DICOM's LPS in mm. In canonical order x grows to the left, y to the
back (posterior), z to the head (superior), as nearly as permuting and flipping axes can make it; nothing is
resampled.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import permutations
from typing import Literal, cast

import numpy as np

Modality = Literal["CT", "MR", "XR", "PT"]
Units = Literal["HU", "SUV", "arbitrary"]
SpacingSource = Literal["header", "declared", "assumed"]
Triple = tuple[float, float, float]


@dataclass(frozen=True)
class Channel:
    """One measured quantity: its name, modality and units (``HU``, ``SUV`` or ``arbitrary``)."""

    name: str
    modality: Modality
    units: Units


@dataclass(frozen=True)
class Volume:
    """Voxels and where they are.

    ``voxels`` (c, z, y, x) keep the dtype they were decoded in; the real value is ``voxels * slope +
    intercept``, per channel. ``invalid`` (same shape, or None for none) marks NaN, infinity and padding
    outside the field of view: their voxels hold the lowest valid value of the channel and are never to be
    used as measurements. ``affine`` maps ``(i, j, k, 1)``, the x, y, z index of a voxel, to the LPS mm of
    its centre. ``source_affine`` and ``source_shape`` (z, y, x) are those of the grid as read; canonical
    array axis ``n`` is source array axis ``axes[n]``, reversed if ``flips[n]``. ``instances`` are the DICOM
    SOPInstanceUIDs of its slices, by which labels find it; they identify and are never stored. Raises
    ValueError where the parts do not fit.
    """

    voxels: np.ndarray
    channels: tuple[Channel, ...]
    slope: tuple[float, ...]
    intercept: tuple[float, ...]
    spacing: Triple
    spacing_source: SpacingSource
    affine: np.ndarray
    axes: tuple[int, int, int]
    flips: tuple[bool, bool, bool]
    source_affine: np.ndarray
    source_shape: tuple[int, int, int]
    invalid: np.ndarray | None = None
    provenance: Mapping[str, str] = field(default_factory=dict)
    instances: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        if self.voxels.ndim != 4 or not len(self.channels) == self.voxels.shape[0] == len(self.slope) == len(
            self.intercept
        ):
            raise ValueError(f"voxels of shape {self.voxels.shape} do not fit {len(self.channels)} channels")
        if self.invalid is not None and self.invalid.shape != self.voxels.shape:
            raise ValueError(f"invalid has shape {self.invalid.shape}, voxels {self.voxels.shape}")
        if tuple(self.source_shape[a] for a in self.axes) != self.shape:
            raise ValueError(
                f"axes {self.axes} do not take the source shape {self.source_shape} to {self.shape}"
            )

    @staticmethod
    def on_grid(
        voxels: np.ndarray,
        channels: tuple[Channel, ...],
        affine: np.ndarray,
        *,
        slope: tuple[float, ...] | None = None,
        intercept: tuple[float, ...] | None = None,
        spacing_source: SpacingSource = "header",
        invalid: np.ndarray | None = None,
        provenance: Mapping[str, str] | None = None,
        instances: frozenset[str] = frozenset(),
    ) -> Volume:
        """A volume as a reader finds it: its own grid is the source grid. ``voxels`` is (c, z, y, x)."""
        affine = np.array(affine, dtype=np.float64)
        c, z, y, x = voxels.shape
        return Volume(
            voxels=voxels, channels=channels, slope=slope or (1.0,) * c, intercept=intercept or (0.0,) * c,
            spacing=spacing_of(affine), spacing_source=spacing_source, affine=affine, axes=(0, 1, 2),
            flips=(False, False, False), source_affine=affine, source_shape=(z, y, x), invalid=invalid,
            provenance=dict(provenance or {}), instances=instances,
        )  # fmt: skip

    @property
    def shape(self) -> tuple[int, int, int]:
        """(z, y, x)."""
        return cast("tuple[int, int, int]", tuple(self.voxels.shape[1:]))

    def real(self, channel: int) -> np.ndarray:
        """Real values of one channel, (z, y, x) float64, NaN where invalid."""
        values = self.voxels[channel] * np.float64(self.slope[channel]) + self.intercept[channel]
        if self.invalid is not None:
            values[self.invalid[channel]] = np.nan
        return values

    def to_lps(self) -> Volume:
        """The same voxels with axes permuted and flipped to the nearest L, P, S order (C-contiguous)."""
        order, turned = nearest_lps(self.affine)
        if order == (0, 1, 2) and not any(turned):
            return (
                self
                if self.voxels.flags.c_contiguous
                else replace(self, voxels=np.ascontiguousarray(self.voxels))
            )
        affine = self.affine.copy()
        for n in range(3):  # n counts canonical array axes z, y, x; matrix columns count x, y, z
            column = self.affine[:3, 2 - order[n]]
            affine[:3, 2 - n] = -column if turned[n] else column
            if turned[n]:
                affine[:3, 3] += column * (self.shape[order[n]] - 1)
        return replace(
            self,
            voxels=np.ascontiguousarray(_permute(self.voxels, order, turned)),
            invalid=None
            if self.invalid is None
            else np.ascontiguousarray(_permute(self.invalid, order, turned)),
            affine=affine,
            spacing=cast("Triple", tuple(self.spacing[a] for a in order)),
            axes=cast("tuple[int, int, int]", tuple(self.axes[a] for a in order)),
            flips=cast(
                "tuple[bool, bool, bool]", tuple(bool(self.flips[a] ^ t) for a, t in zip(order, turned))
            ),
        )

    def from_source(self, array_zyx: np.ndarray) -> np.ndarray:
        """Map an array (..., z, y, x) on the source grid to this volume's grid (a view)."""
        _check_shape(array_zyx, self.source_shape, "source")
        return _permute(array_zyx, self.axes, self.flips)

    def to_source(self, array_zyx: np.ndarray) -> np.ndarray:
        """Map an array (..., z, y, x) on this volume's grid to the grid as read (C-contiguous)."""
        _check_shape(array_zyx, self.shape, "volume's")
        lead = array_zyx.ndim - 3
        unflipped = np.flip(array_zyx, tuple(lead + n for n in range(3) if self.flips[n]))
        inverse = [lead + self.axes.index(n) for n in range(3)]
        return np.ascontiguousarray(unflipped.transpose(*range(lead), *inverse))

    def lps_mm_of_index(self, index_xyz: np.ndarray | Triple) -> np.ndarray:
        """LPS mm (..., 3) of x, y, z indices (..., 3) on this grid; whole numbers are voxel centres."""
        return np.asarray(index_xyz, dtype=np.float64) @ self.affine[:3, :3].T + self.affine[:3, 3]

    def index_of_lps_mm(self, point_xyz: np.ndarray | Triple) -> np.ndarray:
        """Continuous x, y, z index (..., 3) on this grid of points (..., 3) in LPS mm. Round for the
        voxel."""
        offset = np.asarray(point_xyz, dtype=np.float64) - self.affine[:3, 3]
        return offset @ np.linalg.inv(self.affine[:3, :3]).T


def spacing_of(affine: np.ndarray) -> Triple:
    """(z, y, x) distance in mm between neighbouring voxel centres."""
    x, y, z = (float(v) for v in np.linalg.norm(affine[:3, :3], axis=0))
    return (z, y, x)


def nearest_lps(affine: np.ndarray) -> tuple[tuple[int, int, int], tuple[bool, bool, bool]]:
    """Which array axis (z, y, x) to take for each canonical one, and whether to reverse it.

    The assignment of axes maximises the summed cosines with S, P and L; of equals the first in the order of
    `itertools.permutations` wins, so the identity is preferred.
    """
    directions = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    cosine = directions[::-1, ::-1]  # rows: S, P, L; columns: array axes z, y, x
    orders = list(permutations(range(3)))
    order = max(orders, key=lambda o: round(sum(abs(cosine[n, o[n]]) for n in range(3)), 9))
    return cast("tuple[int, int, int]", order), tuple(bool(cosine[n, order[n]] < 0) for n in range(3))  # type: ignore[return-value]


def corner_distance(a: np.ndarray, b: np.ndarray, shape_zyx: tuple[int, int, int]) -> float:
    """Largest distance, over the eight corners, between two grids of one shape, in voxels of the finer axis
    of ``a``."""
    z, y, x = shape_zyx
    corners = np.array(
        [(i, j, k, 1.0) for i in (-0.5, x - 0.5) for j in (-0.5, y - 0.5) for k in (-0.5, z - 0.5)]
    )
    offset = corners @ (np.linalg.inv(a) @ b - np.eye(4)).T
    return float(np.abs(offset[:, :3]).max())


def _permute(array: np.ndarray, axes: tuple[int, int, int], flips: tuple[bool, bool, bool]) -> np.ndarray:
    lead = array.ndim - 3
    permuted = array.transpose(*range(lead), *(lead + a for a in axes))
    return np.flip(permuted, tuple(lead + n for n in range(3) if flips[n]))


def _check_shape(array: np.ndarray, shape: tuple[int, int, int], what: str) -> None:
    if array.ndim < 3 or tuple(array.shape[-3:]) != shape:
        raise ValueError(f"an array of shape {array.shape} is not on the {what} grid {shape}")
