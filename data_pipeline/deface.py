"""Faces in head scans: where the face is, found from the nose, the vertex and the skull.

Published tools register a template (pydeface, mri_reface, mri_deface) or need a brain mask (quickshear:
Schimke and Hale, HealthSec 2011, which removes everything in front of one plane below the brain). This one
needs neither. The voxels' axes are the patient's, so a head is known by its size, by the dark or bony shell
of its skull and by its nose, the one thing on a head that stands out in front of what is beside it. From
the nose follows the root of the nose (nasion), at whose level the floor of the brain's case begins behind
the brow; the face is a wedge below that level and the skin above it up to the brow. Lengths scale with the
head's. Where any of this is missing, a head cut off below the eyes, a skull-stripped brain, a neck, there
is no mask. `benchmarks/privacy.py` measures it; docs/privacy.md says what it is not.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from data_pipeline.volume import Volume, nearest_lps

GRID = 2.0  # mm: the grid on which a head is looked for
AIR_BELOW = -300.0  # HU
BONE_ABOVE = 250.0  # HU
LENGTH, WIDTH = (130.0, 240.0), (95.0, 200.0)  # mm: brow to back of the head, side to side, skin included
HEAD_OVER_NOSE = (0.60, 1.02)  # from the tip of the nose up to the vertex ÷ length of the head
NOSE = 0.045  # least height of the nose over the cheeks ÷ length
NASION = 0.20  # from the tip of the nose up to its root ÷ length
SHELL = 0.5  # share of the directions over the head in which a skull must be seen
DEPTH = 0.20  # of the wedge, behind the nasion ÷ length
THROAT = 0.40  # of the wedge below the tip of the nose at most, where the front recedes ÷ length
CLEAR = 0.03  # below the nasion where the wedge begins, and its fall of 1 in 2 to the back ÷ length
SKIN = 0.03  # thickness of what goes above the wedge ÷ length
BROW = 0.09  # above the nasion up to which skin goes ÷ length


def face_mask(volume: Volume) -> np.ndarray | None:
    """Face voxels of a head to hide: bool (z, y, x) on the volume's grid; None where no whole head is found.

    The first channel decides. CT in HU and MR only; a head counts with its vertex (at most a small cap cut
    off), skull and nose in view. The mask holds air in front of the face too; ears and the back of the jaw
    stay. The result is the same in every axis order and direction of the file.
    """
    channel = volume.channels[0]
    if volume.spacing_source == "assumed" or (channel.modality, channel.units) not in _TAKEN:
        return None
    order, turned = nearest_lps(volume.affine)
    flips = tuple(n for n in range(3) if turned[n])
    values = np.flip(volume.real(0).transpose(order), flips)
    spacing = np.array([volume.spacing[a] for a in order])
    size = spacing * values.shape
    if size.min() < 100 or size[1] < LENGTH[0] or spacing.max() > 7:
        return None
    if channel.modality == "MR" and (values < 0).mean() > 0.05:
        return None  # no magnitude image: a phase, a difference, or a CT under a wrong name
    head = _find(values, spacing, channel.units == "HU")
    if head is None:
        return None
    mask = np.flip(_region(head, values.shape, spacing), flips)
    return np.ascontiguousarray(mask.transpose(np.argsort(order)))


_TAKEN = {("CT", "HU"), ("MR", "arbitrary")}


@dataclass(frozen=True)
class _Head:
    """A head on a grid of `GRID` mm, lengths and places in mm from the first corner, (z, y, x)."""

    inside: np.ndarray  # bool: skin and all it encloses
    front: np.ndarray  # (z,): the foremost y of the strip over the nose, smoothed; NaN where there is nothing
    length: float
    tip: float  # z of the tip of the nose
    nasion: tuple[float, float]  # z, y


def _find(values: np.ndarray, spacing: np.ndarray, ct: bool) -> _Head | None:
    """The head in an image whose axes are z (up), y (back), x (left), or None."""
    image = _coarse(values, spacing, -1024.0 if ct else 0.0)
    inside = _inside(image, ct)
    if inside is None:
        return None
    top = _vertex(inside)
    if not np.isfinite(top):
        return None
    cap = inside[max(0, int(top - 110 / GRID)) :]
    length, width = (_extent(np.asarray(cap.any((0, axis)))) * GRID for axis in (2, 1))
    if not (LENGTH[0] <= length <= LENGTH[1] and WIDTH[0] <= width <= WIDTH[1] and width < 1.05 * length):
        return None
    if _skull_share(image, inside, top, length, ct) < SHELL:
        return None
    nose = _nose(inside, top, length)
    if nose is None:
        return None
    tip, front = nose
    nasion = tip + NASION * length / GRID
    level = round(nasion)
    if level >= len(front) or not np.isfinite(front[level]):
        return None
    return _Head(inside, front * GRID, length, tip * GRID, (nasion * GRID, float(front[level]) * GRID))


def _coarse(values: np.ndarray, spacing: np.ndarray, nothing: float) -> np.ndarray:
    """The image on a grid of about `GRID` mm, smoothed first where it is finer; corners stay corners."""
    image = np.where(np.isfinite(values), values, nothing).astype(np.float32)
    image = ndimage.gaussian_filter(image, np.where(spacing < GRID, 0.5 * GRID / spacing, 0.0))
    return np.asarray(ndimage.zoom(image, spacing / GRID, order=1, grid_mode=True, mode="nearest"))


def _inside(image: np.ndarray, ct: bool) -> np.ndarray | None:
    """Skin and all it encloses: the largest thing that is not air, its cavities filled plane by plane."""
    body = image > (AIR_BELOW if ct else 0.5 * _otsu(image))
    # Padded by what exists, so that a mouth open at the front closes and nothing else grows.
    closed = ndimage.binary_closing(np.pad(body, 4, mode="edge"), iterations=4)[4:-4, 4:-4, 4:-4] | body
    body = ndimage.binary_opening(_filled(closed), iterations=2)  # cuts a head rest or a cushion off
    numbers, count = ndimage.label(body)
    if not count:
        return None
    return _filled(numbers == 1 + int(np.argmax(np.bincount(numbers.ravel())[1:])))


def _filled(body: np.ndarray) -> np.ndarray:
    """Filled in the planes of every axis: a skull opens downwards and an orbit forwards, none all round."""
    for axis in range(3):
        across = ndimage.generate_binary_structure(3, 1)
        np.moveaxis(across, axis, 0)[::2] = False  # neighbours in a plane only
        numbers, count = ndimage.label(~body, across)
        outside = np.zeros(count + 1, bool)
        for other in {0, 1, 2} - {axis}:
            outside[np.take(numbers, (0, -1), other)] = True
        outside[0] = False  # the body itself
        body = ~outside[numbers]
    return body


def _otsu(image: np.ndarray) -> float:
    """Otsu's threshold (IEEE SMC 1979) of values between 0 and the 99th percentile of what is above 0."""
    above = image[image > 0]
    if not above.size:
        return float("inf")
    counts, edges = np.histogram(image.clip(0, float(np.percentile(above, 99))), 128)
    middle = (edges[1:] + edges[:-1]) / 2
    below = counts.cumsum()
    total, mean = below[-1], (counts * middle).cumsum()
    with np.errstate(divide="ignore", invalid="ignore"):
        between = (mean[-1] * below / total - mean) ** 2 / (below * (total - below))
    return float(middle[int(np.nanargmax(between[:-1]))])


def _vertex(inside: np.ndarray) -> float:
    """z of the top of the head, in voxels; where the image cuts a cap off, of the sphere it is a cap of."""
    area = inside.sum((1, 2))
    level = int(np.flatnonzero(area)[-1])
    cut = np.sqrt(area[level] / np.pi) if level >= len(area) - 2 else 0.0
    radius = 85.0 / GRID
    return level + (radius - float(np.sqrt(radius**2 - cut**2)) if cut < 0.65 * radius else float("inf"))


def _extent(there: np.ndarray) -> int:
    where = np.flatnonzero(there)
    return int(where[-1] - where[0] + 1) if len(where) else 0


def _skull_share(image: np.ndarray, inside: np.ndarray, top: float, length: float, ct: bool) -> float:
    """Share of the directions from the middle of the head upwards in which there is skull below the skin.

    In CT skull is bone. In MR it is dark between the brighter scalp and what lies under it, whatever the
    sequence; a brain without its skull has no such rim.
    """
    z = top - 0.45 * length / GRID
    section = np.argwhere(inside[min(max(int(z), 0), len(inside) - 1)])
    if z < 0 or not len(section):
        return 0.0
    centre = np.array([z, *(section.min(0) + section.max(0)) / 2])
    up, round_ = np.meshgrid(np.radians([10, 25, 40, 55]), np.radians(np.arange(0, 360, 10)), indexing="ij")
    ways = np.stack([np.sin(up), np.cos(up) * np.cos(round_), np.cos(up) * np.sin(round_)], -1).reshape(-1, 3)
    steps = np.arange(0, 75 * GRID) * 1.0 / GRID  # of 1 mm, in voxels
    points = centre[:, None, None] + ways.T[:, :, None] * steps
    profile = ndimage.map_coordinates(image, points, order=1, cval=float(image.min()))
    within = ndimage.map_coordinates(inside.astype(np.float32), points, order=1) > 0.5
    seen = 0
    asked = 0
    for line, there in zip(profile, within):
        skin = int(np.flatnonzero(there)[-1]) if there.any() else 0
        if skin < 50 or skin >= len(line) - 2:
            continue
        asked += 1
        rim = line[skin - 25 : skin + 1][::-1]  # from the skin inwards
        if ct:
            seen += bool(rim.max() > BONE_ABOVE and line[: skin - 25].max() < rim.max())
            continue
        trough = 2 + int(np.argmin(rim[2:16]))
        scalp, under = float(rim[:trough].max()), float(np.median(rim[trough + 2 :]))
        seen += bool(rim[trough] < 0.7 * min(scalp, under))
    return seen / asked if asked > 40 else 0.0


def _nose(inside: np.ndarray, top: float, length: float) -> tuple[float, np.ndarray] | None:
    """z of the tip of the nose, and the front of the strip of skin over it at every z, in voxels; or None.

    The tip is where a strip 14 mm wide stands out most in front of the strips 20 to 32 mm to its sides.
    """
    n = inside.shape[1]
    front = np.where(inside.any(1), inside.argmax(1), n).astype(np.float64)  # (z, x)
    front[front == n] = np.nan
    x_there = np.flatnonzero(inside.any((0, 1)))
    middle = (x_there[0] + x_there[-1]) / 2
    low, high = (round(top - share * length / GRID) for share in HEAD_OVER_NOSE[::-1])
    low, high = max(low, 2), min(high, len(inside) - 1)
    near, far = (np.arange(a, b + 1) for a, b in ((-3, 3), (10, 16)))
    height, place = (
        np.zeros(len(inside)),
        np.zeros(len(inside), int),
    )  # of the most that stands out, and its x
    for z in range(low, high):
        strip = front[z - 2 : z + 3].mean(0)
        for x in range(int(middle - 25 / GRID), int(middle + 25 / GRID) + 1):
            if x - 16 < 0 or x + 17 > len(strip):
                continue
            out = min(strip[x + far].mean(), strip[x - far].mean()) - strip[x + near].mean()
            if out > height[z]:  # never where a strip is missing: NaN
                height[z], place[z] = out, x
    least = max(NOSE * length / GRID, 0.7 * height.max())
    peaks = np.flatnonzero(
        (height >= least) & (height == ndimage.maximum_filter1d(height, int(24 / GRID) + 1))
    )
    if not len(peaks):
        return None
    tip = int(peaks[-1])  # the uppermost: a chin may stand out as far
    x = int(place[tip])
    profile = ndimage.uniform_filter1d(np.mean(front[:, x + near], axis=1), 3, mode="nearest")
    return float(tip), profile


def _region(head: _Head, shape: tuple[int, ...], spacing: np.ndarray) -> np.ndarray:
    """The face on the grid of the image, bool (z, y, x)."""
    z, y = ((np.arange(n) + 0.5) * s for n, s in zip(shape[:2], spacing))
    level, behind = head.nasion
    reach = np.full(len(z), behind + DEPTH * head.length)
    # Below the tip of the nose no brain is near the front, and the chin of a bent head lies far back.
    at = (np.arange(len(head.front)) + 0.5) * GRID
    front = np.interp(z, at, np.nan_to_num(head.front, nan=behind))
    lower = z < head.tip
    reach[lower] = np.clip(front[lower] + DEPTH * head.length, reach[lower], behind + THROAT * head.length)
    fall = np.maximum(y - behind, 0) / 2
    wedge = (z[:, None] < level - CLEAR * head.length - fall) & (y < reach[:, None])
    depth = ndimage.distance_transform_edt(head.inside) * GRID
    skin = np.asarray(_fine(depth, shape, spacing)) <= SKIN * head.length
    above = (z < level + BROW * head.length)[:, None] & (y < behind + DEPTH * head.length) & ~wedge
    above &= (z > level - (2 * CLEAR + DEPTH / 2) * head.length)[:, None]
    return wedge[:, :, None] | (above[:, :, None] & skin)


def _fine(coarse: np.ndarray, shape: tuple[int, ...], spacing: np.ndarray) -> np.ndarray:
    """A coarse image at the voxels of the image it was made from."""
    places = [(np.arange(n) + 0.5) * s / GRID - 0.5 for n, s in zip(shape, spacing)]
    for axis, at in enumerate(places):
        at = at.clip(0, coarse.shape[axis] - 1)
        first = np.minimum(at.astype(int), max(coarse.shape[axis] - 2, 0))
        share = (at - first).reshape([-1 if a == axis else 1 for a in range(3)])
        after = np.minimum(first + 1, coarse.shape[axis] - 1)
        coarse = coarse.take(first, axis) * (1 - share) + coarse.take(after, axis) * share
    return coarse
