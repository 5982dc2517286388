"""Scanning an `Anatomy`: CT in HU, MR with several contrasts, X-ray as line integrals of attenuation.

Each voxel is the mean of 2 x 2 x 2 samples of the continuous body (partial volume), blurred a little,
with the noise of its modality on top. A label is the tissue that fills most of the voxel.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from launch.anatomy import LABELS, ORGANS, TISSUE, TISSUES, Anatomy

#          air   fat muscle lung bone marrow vessel bowel liver stomach spleen kidneys   lesion
_HU = (-1000, -95, 48, -780, 620, 190, 46, 42, 56, 46, 50, 38, 38, -8)
_TEXTURE_HU = (0, 14, 14, 60, 90, 60, 6, 18, 14, 16, 12, 14, 14, 8)
_MR = {
    "T1": (0, 330, 160, 25, 30, 230, 120, 150, 172, 150, 145, 135, 135, 75),
    "T2": (0, 260, 95, 25, 25, 190, 80, 150, 122, 132, 150, 185, 185, 320),
}
MR_CONTRASTS = tuple(_MR)
_ATTENUATION_PER_MM = 0.0195
"""Of water near 70 keV, 1/mm."""

_LETTERS = {"L": (0, 1), "R": (0, -1), "P": (1, 1), "A": (1, -1), "S": (2, 1), "I": (2, -1)}


@dataclass(frozen=True)
class Grid:
    """Voxel grid: `shape` in array order (z, y, x); `affine` takes (i, j, k, 1), i fastest, to LPS mm of
    a centre.
    """

    shape: tuple[int, int, int]
    affine: np.ndarray

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Of i, j, k in mm."""
        i, j, k = np.linalg.norm(self.affine[:3, :3], axis=0)
        return float(i), float(j), float(k)

    def points(self, finer: int = 1) -> np.ndarray:
        """Centres of the voxels cut `finer` times along each axis: float32 (finer^3 * voxels, 3),
        LPS mm, C order.
        """
        steps = [(np.arange(n * finer) + 0.5) / finer - 0.5 for n in self.shape]
        k, j, i = np.meshgrid(*steps, indexing="ij", sparse=True)
        out = np.empty((*(n * finer for n in self.shape), 3), np.float32)
        for axis in range(3):
            a = self.affine[axis]
            out[..., axis] = i * a[0] + j * a[1] + k * a[2] + a[3]
        return out.reshape(-1, 3)


def grid(size_mm: tuple[float, float, float], spacing: tuple[float, float, float], code: str = "LPS",
         tilt_degrees: float = 0.0) -> Grid:  # fmt: skip
    """A grid round the middle of the body.

    `size_mm` and `spacing` are along the left, posterior and superior axes; `code` names where i, j and k
    grow to (any of the 48, such as "PSR"); the whole grid is turned by `tilt_degrees` about the left axis.
    """
    directions = np.zeros((3, 3))
    lengths, steps = [], []
    for column, letter in enumerate(code):
        axis, sign = _LETTERS[letter]
        directions[axis, column] = sign
        lengths.append(max(2, round(size_mm[axis] / spacing[axis])))
        steps.append(spacing[axis])
    c, s = np.cos(np.radians(tilt_degrees)), np.sin(np.radians(tilt_degrees))
    affine = np.eye(4)
    affine[:3, :3] = np.array([[1, 0, 0], [0, c, -s], [0, s, c]]) @ directions @ np.diag(steps)
    affine[:3, 3] = -affine[:3, :3] @ ((np.array(lengths) - 1) / 2)
    return Grid((lengths[2], lengths[1], lengths[0]), affine)


@dataclass(frozen=True)
class Scan:
    """One image with its labels on `grid`; `voxels` and `labels` are (z, y, x). A radiograph has depth 1."""

    modality: str
    contrast: str
    grid: Grid
    voxels: np.ndarray
    labels: np.ndarray  # uint8, values of `anatomy.LABELS`


def _blocks(fine: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """(2z, 2y, 2x) as (z, y, x, 8)."""
    z, y, x = shape
    return fine.reshape(z, 2, y, 2, x, 2).transpose(0, 2, 4, 1, 3, 5).reshape(z, y, x, 8)


def _tissues(anatomy: Anatomy, where: Grid) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Fine tissue (z, y, x, 8) with the lesions in it, labels (z, y, x), and the texture like the tissue."""
    points = where.points(finer=2)
    fine = _blocks(anatomy.tissues(points), where.shape)
    grain = _blocks(anatomy.texture(points), where.shape)
    labels = np.zeros(where.shape, np.uint8)
    for value, name in LABELS.items():
        if name in ORGANS:
            labels[(fine == TISSUE[name]).sum(-1) >= 5] = value
    voxel_mm3 = float(abs(np.linalg.det(where.affine[:3, :3])))
    whole = where.points()
    value_of = {name: value for value, name in LABELS.items()}
    taken = np.zeros(where.shape, bool)
    for lesion in anatomy.lesions:
        wanted = int(np.clip(round(lesion.volume / voxel_mm3), 3, 10))
        free = (labels == value_of["liver"]) & ~ndimage.binary_dilation(taken, np.ones((3, 3, 3)))
        candidates = np.flatnonzero(free)
        if len(candidates) < 200:
            continue
        away = ((whole[candidates] - lesion.centre.astype(np.float32)) ** 2).sum(1)
        seed = candidates[np.argmin(away)]
        away = ((whole[candidates] - whole[seed]) ** 2).sum(1)
        spot = np.zeros(where.shape, bool)
        spot.ravel()[candidates[np.argsort(away, kind="stable")[:wanted]]] = True
        _, count = ndimage.label(spot, np.ones((3, 3, 3)))
        if count != 1:
            continue
        taken |= spot
        fine[spot] = TISSUE["lesion"]
    labels[taken] = value_of["lesion"]
    return fine, labels, grain


def _soften(image: np.ndarray) -> np.ndarray:
    return np.asarray(ndimage.gaussian_filter(image, 0.35, mode="nearest"), np.float32)


def scan_ct(anatomy: Anatomy, where: Grid, random: np.random.Generator, noise_hu: float = 22.0) -> Scan:
    """Hounsfield units as int16, -1024 to 3071."""
    fine, labels, grain = _tissues(anatomy, where)
    hu = np.asarray(_HU, np.float32)[fine] + np.asarray(_TEXTURE_HU, np.float32)[fine] * grain
    image = _soften(hu.mean(-1))
    noise = ndimage.gaussian_filter(random.normal(size=where.shape).astype(np.float32), 0.6)
    image += noise * np.float32(noise_hu / noise.std())
    return Scan("CT", "CT", where, np.clip(np.rint(image), -1024, 3071).astype(np.int16), labels)


def scan_mr(
    anatomy: Anatomy, where: Grid, contrasts: tuple[str, ...], random: np.random.Generator
) -> list[Scan]:
    """One scan per contrast, all on `where`: int16 in arbitrary units, smooth bias field, Rician noise."""
    fine, labels, grain = _tissues(anatomy, where)
    points = where.points() * np.float32(1 / 60)
    scans = []
    for contrast in contrasts:
        value = np.asarray(_MR[contrast], np.float32)
        signal = _soften((value[fine] * (1 + np.float32(0.10) * grain)).mean(-1))
        slope, bow = (
            random.normal(0, 0.16, 3).astype(np.float32),
            random.normal(0, 0.12, 3).astype(np.float32),
        )
        bias = np.exp(points @ slope + (points**2) @ bow).reshape(where.shape)
        gain, deviation = float(random.uniform(0.7, 3.0)), 11.0
        real = signal * bias + random.normal(0, deviation, where.shape).astype(np.float32)
        imaginary = random.normal(0, deviation, where.shape).astype(np.float32)
        image = np.rint(np.hypot(real, imaginary) * gain)
        scans.append(Scan("MR", contrast, where, np.clip(image, 0, 32767).astype(np.int16), labels))
    return scans


def scan_xr(
    anatomy: Anatomy, pixel_mm: float, size_mm: tuple[float, float], random: np.random.Generator
) -> Scan:
    """Frontal projection: uint16 (1, rows from head to foot, columns to the left of the body), 12 bits.

    Bright where much is absorbed, as on film. A pixel's label is the organ with the longest path through it,
    if at least 8 mm; lesions do not show.
    """
    pitch = 2.0
    where = grid((size_mm[1], 100.0, size_mm[0]), (pixel_mm, pitch, pixel_mm), code="LPI")
    tissue = anatomy.tissues(where.points()).reshape(where.shape)
    grain = anatomy.texture(where.points()).reshape(where.shape)
    hu = np.asarray(_HU, np.float32)[tissue] + np.asarray(_TEXTURE_HU, np.float32)[tissue] * grain
    path = np.maximum(hu / 1000 + 1, 0).sum(1) * np.float32(_ATTENUATION_PER_MM * pitch)
    photons = random.poisson(np.exp(-path) * 60000.0) + 1.0
    image = ndimage.gaussian_filter(-np.log(photons / 60000.0), 0.5)
    low, high = np.percentile(image, (0.1, 99.9))
    pixels = np.clip((image - low) / (high - low), 0, 1) * 4095
    depth = np.stack([(tissue == TISSUE[name]).sum(1) * pitch for name in ORGANS])
    labels = np.where(depth.max(0) >= 8.0, depth.argmax(0) + 1, 0).astype(np.uint8)
    flat = np.eye(4)
    flat[:3, 0], flat[:3, 1], flat[:3, 2] = where.affine[:3, 0], where.affine[:3, 2], (0, 1, 0)
    flat[:3, 3] = where.affine[:3, 3]
    return Scan(
        "XR", "XR", Grid((1, *pixels.shape), flat), np.rint(pixels)[None].astype(np.uint16), labels[None]
    )


assert len(_HU) == len(TISSUES) == len(_TEXTURE_HU)
