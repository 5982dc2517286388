"""A random trunk in millimetres: which tissue is at a point of the body.

Everything here is continuous: an `Anatomy` answers for any point (x towards the left, y towards the back,
z towards the head, mm from the middle of the body), so that one subject can be scanned on any grid,
oblique ones included. Shapes are superellipsoids with wobbling surfaces in a smoothly bent space. Liver
touches stomach and kidney, spleen touches kidney and body wall, and bowel of the same tissue values lies
between: no value tells an organ from its neighbour.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

TISSUES = (
    "air", "fat", "muscle", "lung", "bone", "marrow", "vessel", "bowel", "liver", "stomach", "spleen",
    "kidney_right", "kidney_left", "lesion",
)  # fmt: skip
TISSUE = {name: number for number, name in enumerate(TISSUES)}
ORGANS = ("liver", "stomach", "spleen", "kidney_right", "kidney_left")
LABELS: Mapping[int, str] = dict(enumerate((*ORGANS, "lesion"), start=1))
"""Label value in the written files -> name."""

HALF_BODY_MM = (58.0, 41.0)
"""Half width (x) and half depth (y) of a body of scale 1."""


@dataclass(frozen=True)
class Blob:
    """A superellipsoid: |u|^p + |v|^p + |w|^p < (1 + wobble)^p in its own turned and scaled axes."""

    tissue: str
    centre: np.ndarray  # (3,) x, y, z in mm
    axes: np.ndarray  # (3, 3): unit ball coordinates = axes @ (point - centre)
    reach: float  # no point further than this, mm, is inside
    power: float
    waves: np.ndarray  # (n, 4): three wave numbers in ball coordinates and a phase
    height: float  # of the wobble, share of the radius

    def contains(self, points: np.ndarray) -> np.ndarray:
        """For points (n, 3) in mm: bool (n,)."""
        ball = (points - self.centre.astype(np.float32)) @ self.axes.T.astype(np.float32)
        radius = (np.abs(ball) ** self.power).sum(1) ** (1.0 / self.power)
        phase = ball @ self.waves[:, :3].T.astype(np.float32) + self.waves[:, 3].astype(np.float32)
        return np.asarray(radius < 1.0 + self.height * np.sin(phase).mean(1))


@dataclass(frozen=True)
class Lesion:
    """A small spot inside the liver; an acquisition gives it the nearest 3 to 10 voxels."""

    centre: np.ndarray  # (3,) x, y, z in mm
    volume: float  # mm^3


@dataclass(frozen=True)
class Anatomy:
    """One subject. Make it with `grow`; ask it with `tissues` and `texture`."""

    subject: int
    scale: float
    bend: np.ndarray  # (waves, 7): wave numbers x, y, z in rad/mm, phase, displacement x, y, z in mm
    blobs: tuple[Blob, ...]
    rib_phase: float
    spine: np.ndarray  # (4,) x, y of the middle, radius, disc phase; mm
    vessels: np.ndarray  # (n, 6) x, y, radius, sway mm, wave number rad/mm, phase
    lesions: tuple[Lesion, ...]
    grain: np.ndarray  # (48, 48, 48) zero-mean unit-variance periodic texture, one entry 1.5 mm

    def _straighten(self, points: np.ndarray) -> np.ndarray:
        """From bent body space (n, 3) to the space where the shapes are defined; mm."""
        phase = points @ self.bend[:, :3].T.astype(np.float32) + self.bend[:, 3].astype(np.float32)
        return np.asarray(
            points / np.float32(self.scale) + np.sin(phase) @ self.bend[:, 4:].astype(np.float32)
        )

    def tissues(self, points: np.ndarray) -> np.ndarray:
        """Tissue number at points (n, 3) float32 in mm: uint8 (n,). The acquisition puts the lesions in."""
        p = self._straighten(points)
        x, y, z = p[:, 0], p[:, 1], p[:, 2]
        out = np.zeros(len(p), np.uint8)
        rim = np.sqrt((x / HALF_BODY_MM[0]) ** 2 + (y / HALF_BODY_MM[1]) ** 2)
        out[rim < 1.0] = TISSUE["fat"]
        wall = (rim < 0.94) & (rim > 0.80)
        out[wall] = TISSUE["muscle"]
        rib = (rim < 0.90) & (rim > 0.84) & (((z - 0.35 * y + self.rib_phase) % 19.0) < 5.0) & (z > -12.0)
        out[rib & (y > -0.6 * HALF_BODY_MM[1])] = TISSUE["bone"]
        inside = rim <= 0.80
        for blob in self.blobs:
            reach = np.float32(blob.reach)
            cx, cy, cz = blob.centre.astype(np.float32)
            box = (np.abs(x - cx) < reach) & (np.abs(y - cy) < reach) & (np.abs(z - cz) < reach)
            near = np.flatnonzero(inside & box)
            out[near[blob.contains(p[near])]] = TISSUE[blob.tissue]
        for vx, vy, radius, sway, wave, phase in self.vessels.astype(np.float32):
            away = (x - vx - sway * np.sin(wave * z + phase)) ** 2 + (y - vy) ** 2
            out[inside & (away < radius**2)] = TISSUE["vessel"]
        self._put_spine(out, x, y, z)
        return out

    def _put_spine(self, out: np.ndarray, x: np.ndarray, y: np.ndarray, z: np.ndarray) -> None:
        sx, sy, radius, disc = self.spine.astype(np.float32)
        away = np.hypot(x - sx, y - sy)
        out[(away < 2.1 * radius) & (y > sy - 0.4 * radius) & (np.hypot(x, y * 1.4) < 57.0)] = TISSUE[
            "muscle"
        ]
        between = ((z + disc) % 15.0) < 3.5
        out[away < radius] = TISSUE["bone"]
        out[(away < radius) & between] = TISSUE["muscle"]
        out[(away < 0.72 * radius) & ~between] = TISSUE["marrow"]

    def texture(self, points: np.ndarray) -> np.ndarray:
        """Grain of the tissue at points (n, 3): float32 (n,), mean 0, deviation 1, fixed to the body."""
        cell = np.floor(points * np.float32(1 / 1.5)).astype(np.int32) % 48
        return np.asarray(self.grain[cell[:, 0], cell[:, 1], cell[:, 2]])


def _turn(random: np.random.Generator, degrees: float) -> np.ndarray:
    """A random rotation (3, 3) by about `degrees`."""
    axis = random.normal(size=3)
    axis /= np.linalg.norm(axis)
    angle = np.radians(random.normal(0, degrees))
    cross = np.cross(np.eye(3), axis)
    return np.asarray(np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross)


def _blob(
    random: np.random.Generator, tissue: str, centre: tuple[float, ...], radii: tuple[float, ...]
) -> Blob:
    size = np.asarray(radii) * np.exp(random.normal(0, 0.10, 3))
    waves = np.concatenate([random.uniform(-4.5, 4.5, (3, 3)), random.uniform(0, 2 * np.pi, (3, 1))], axis=1)
    return Blob(
        tissue, np.asarray(centre) + random.normal(0, 2.0, 3), _turn(random, 14.0) / size[:, None],
        float(1.5 * size.max()), float(random.uniform(1.9, 2.8)), waves, 0.16,
    )  # fmt: skip


def _grain(random: np.random.Generator) -> np.ndarray:
    """Periodic noise: white, with the finest and coarsest waves taken out."""
    spectrum = np.fft.rfftn(random.normal(size=(48, 48, 48)))
    wave = np.fft.fftfreq(48)
    square = wave[:, None, None] ** 2 + wave[None, :, None] ** 2 + np.fft.rfftfreq(48)[None, None, :] ** 2
    noise = np.fft.irfftn(
        spectrum * np.exp(-square / (2 * 0.12**2)) * (square > 0.03**2), s=(48, 48, 48), axes=(0, 1, 2)
    )
    return np.asarray(noise / noise.std(), np.float32)


def grow(seed: int, subject: int) -> Anatomy:
    """The anatomy of one subject: a pure function of (seed, subject)."""
    random = np.random.default_rng([seed, subject])
    length = random.uniform(45.0, 95.0, (5, 1))
    direction = random.normal(size=(5, 3))
    direction /= np.linalg.norm(direction, axis=1, keepdims=True)
    bend = np.concatenate(
        [2 * np.pi / length * direction, random.uniform(0, 2 * np.pi, (5, 1)), random.normal(0, 1.3, (5, 3))],
        axis=1,
    )
    blobs = [
        _blob(random, "lung", (-27, 0, 46), (17, 23, 24)),
        _blob(random, "lung", (27, 0, 46), (17, 23, 24)),
        *(
            _blob(random, "bowel", (x, y, z), (10, 10, 9))
            for x, y, z in (
                (-24, -12, -34),
                (-4, -17, -24),
                (14, -14, -32),
                (28, -6, -22),
                (2, -2, -44),
                (-12, 2, -24),
            )
        ),
        _blob(random, "stomach", (18, -10, 6), (20, 15, 14)),
        _blob(random, "liver", (-20, -5, 7), (24, 24, 20)),
        _blob(random, "spleen", (35, 9, 8), (10, 14, 15)),
        _blob(random, "kidney_right", (-23, 17, -16), (9.5, 9.5, 16)),
        _blob(random, "kidney_left", (24, 17, -13), (9.5, 9.5, 16)),
    ]
    liver = next(blob for blob in blobs if blob.tissue == "liver")
    scale = float(random.uniform(0.88, 1.06))
    corners = np.array(list(itertools.product((-1, 1), repeat=3)))
    spots = random.permutation(corners)[: random.integers(1, 4)]
    lesions = tuple(
        Lesion(
            (liver.centre + 6.5 * spot + random.normal(0, 1.0, 3)) * scale, float(random.uniform(24.0, 80.0))
        )
        for spot in spots
    )
    vessels = np.array([
        [5 + random.normal(0, 1), 12, random.uniform(3.6, 5.0), 3.0, 0.05, random.uniform(0, 6)],
        [-7 + random.normal(0, 1), 12, random.uniform(3.6, 5.0), 2.0, 0.04, random.uniform(0, 6)],
    ])  # fmt: skip
    spine = np.array([random.normal(0, 1), 24.0, random.uniform(8.0, 9.5), random.uniform(0, 15)])
    ribs = float(random.uniform(0, 19))
    return Anatomy(subject, scale, bend, tuple(blobs), ribs, spine, vessels, lesions, _grain(random))
