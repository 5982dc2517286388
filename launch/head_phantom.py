"""A head with skull, skin and face built around a brain, so that defacing can be measured against a known
face.

Places are those of the MNI152 brain in mm (x to the left, y to the front, z up; the root of the nose at
(0, 84, -41) is the published nasion of that space), stretched to the box of the brain that is given.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

#: Box of the MNI152 brain: (z, y, x) low and high in mm, y to the front.
BOX = np.array([[-68.0, -105.0, -71.0], [80.0, 72.0, 71.0]])
FIELD = np.array([[-170.0, -140.0, -100.0], [115.0, 130.0, 100.0]])  # of the phantom, the same way
NASION = (-41.0, 84.0, 0.0)


@dataclass(frozen=True)
class Head:
    """Arrays (z, y, x) in L, P, S order (y to the back), isotropic voxels of `spacing` mm.

    `values`: HU or MR-like intensities, float32. `brain`: the brain's own voxels. `face`: skin of the face,
    which is what lies within 3 mm of the air, looks to the front, and stands between the brow and the chin.
    """

    values: np.ndarray
    brain: np.ndarray
    face: np.ndarray
    spacing: float


def head(
    modality: str,
    brain: np.ndarray | None = None,
    values: np.ndarray | None = None,
    *,
    spacing: float = 1.0,
    turn: tuple[float, float, float] = (0.0, 0.0, 0.0),
    face: bool = True,
    seed: int = 0,
) -> Head:
    """A head around a brain; `modality` CT or MR.

    `brain` is bool (z, y, x) in L, P, S order with isotropic voxels, `values` its image (MR); None for an
    ellipsoid. `turn`: degrees about x (chin up), y (ear to shoulder) and z (to the left). `face` False
    stops above the eyes.
    """
    grid = np.meshgrid(*(np.arange(a, b, spacing) for a, b in FIELD.T), indexing="ij", sparse=True)
    z, y, x = _turned((grid[0], -grid[1] - 10.0, grid[2]), turn)
    inside, image = _placed(brain, values, (z, y, x))
    out = ndimage.distance_transform_edt(
        ~ndimage.binary_closing(inside, iterations=max(1, round(8 / spacing)))
    )
    out = out * spacing

    def ball(at: tuple[float, float, float], radii: tuple[float, float, float]) -> np.ndarray:
        return np.asarray(sum(((a - b) / r) ** 2 for a, b, r in zip((z, y, x), at, radii)) < 1)

    # From nasion to tip the nose grows 24 mm to the front and 11 mm to each side.
    down = ((NASION[0] - z) / 40).clip(0, 1)
    nose = (
        (z < NASION[0])
        & (z > -88)
        & (y < 84 + 24 * down)
        & (y > 40)
        & (np.abs(x) < (5 + 11 * down) * ((84 + 24 * down + 4 - y) / 14).clip(0, 1))
    )
    mass = ball((-85, 25, 0), (80, 62, 66)) | ball((-140, 74, 0), (19, 19, 24)) | nose
    mass |= (z < -80) & (((y + 22) / 58) ** 2 + (x / 55) ** 2 < 1)
    mass &= ~(ball((-45, 95, 32), (15, 20, 17)) | ball((-45, 95, -32), (15, 20, 17)))
    eyes = ball((-44, 63, 32), (12, 12, 12)) | ball((-44, 63, -32), (12, 12, 12))
    if not face:
        mass &= z > NASION[0] + 15
        eyes &= False
    cavity = ball((-70, 62, 0), (18, 28, 12)) | ball((-112, 62, 0), (5, 30, 20))
    whole = (out < 14) | mass | eyes
    depth = ndimage.distance_transform_edt(whole) * spacing
    bone = ((out >= 3) & (out < 9)) | (ball((-140, 66, 0), (14, 14, 30)) & (depth > 6))
    random = np.random.default_rng(seed)
    if modality == "CT":
        picture = np.select(
            [~whole, inside, bone, cavity, out < 3], [-1000.0, 36.0, 1000.0, -950.0, 8.0], 40.0
        )
        picture += random.normal(0, 8, picture.shape)
    else:
        scalp = 190.0 - 5 * depth.clip(0, 12)
        picture = np.select(
            [~whole, inside, bone, cavity, out < 3, eyes], [0.0, image, 14.0, 6.0, 45.0, 60.0], scalp
        )
        picture = np.abs(picture + random.normal(0, 4, picture.shape))
    skin = whole & (depth <= 3)
    facing = np.gradient(ndimage.gaussian_filter(whole.astype(np.float32), 3 / spacing))
    forwards = facing[1] > 0.3 * np.sqrt(sum(g**2 for g in facing) + 1e-12)
    brow_to_chin = (z < NASION[0] + 12) & (z > -158) & (np.abs(x) < 60) & (y > NASION[1] - 45)
    return Head(picture.astype(np.float32), inside, skin & forwards & brow_to_chin, spacing)


def _turned(axes: tuple[np.ndarray, ...], turn: tuple[float, float, float]) -> tuple[np.ndarray, ...]:
    """Places (z, y, x) in the head of the voxels of a scan in which the head is turned about its middle."""
    z, y, x = (np.asarray(a) for a in np.broadcast_arrays(*axes))
    for angle, (a, b) in zip(np.radians(turn), (("z", "y"), ("x", "z"), ("y", "x"))):
        now = {"z": z, "y": y, "x": x}
        now[a], now[b] = (
            np.cos(angle) * now[a] - np.sin(angle) * now[b],
            np.sin(angle) * now[a] + np.cos(angle) * now[b],
        )
        z, y, x = now["z"], now["y"], now["x"]
    return z, y, x


def _placed(
    brain: np.ndarray | None, values: np.ndarray | None, at: tuple[np.ndarray, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """Brain mask and image at places (z, y, x) in mm of the standard space."""
    if brain is None:
        middle, half = BOX.mean(0), (BOX[1] - BOX[0]) / 2
        inside = np.asarray(sum(((p - m) / h) ** 2 for p, m, h in zip(at, middle, half)) < 1)
        # Temporal lobes hang lower, the frontal lobe's floor is flat: nothing below it in front.
        inside &= ~((at[1] > 25) & (at[0] < -28))
        return inside, np.full(inside.shape, 120.0, np.float32)
    found = np.argwhere(brain)
    low, high = found.min(0), found.max(0)
    index = []
    for n, (p, a, b) in enumerate(zip(at, *BOX)):
        share = (p - a) / (b - a)
        index.append(high[n] - share * (high[n] - low[n]) if n == 1 else low[n] + share * (high[n] - low[n]))
    inside = ndimage.map_coordinates(brain.astype(np.uint8), index, order=0) > 0
    image = np.zeros(brain.shape, np.float32) if values is None else values.astype(np.float32)
    bright = float(np.percentile(image[brain], 90)) or 1.0
    return inside, np.asarray(ndimage.map_coordinates(image * (150.0 / bright), index, order=1))
