"""Shape arithmetic shared by the builder, the order and the model's stems: geometry class, levels, token
grids, row classes.

Pure NumPy and integers. Triples are (z, y, x) unless a name says stem order. *Stem order* is the axis order
in which a stem reads a volume: `axes` lists the stored axes in that order, so that `stem[i] ==
stored[axes[i]]`; the thick axis of a slab and the axis of length 1 of a planar image come first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, field_validator

Kind = Literal["volume", "slab", "planar"]
Triple = tuple[int, int, int]

#: Voxels of one token along each axis, in stem order.
PATCH: dict[str, Triple] = {"volume": (8, 8, 8), "slab": (2, 16, 16), "planar": (1, 16, 16)}
#: Whether zooming acts on an axis, in stem order: the thick axis of a slab is never resampled.
ZOOMED: dict[str, tuple[bool, bool, bool]] = {
    "volume": (True, True, True),
    "slab": (False, True, True),
    "planar": (False, True, True),
}
#: Largest over middle spacing from which a stack counts as thick-sliced.
SLAB_RATIO = 3.0


class TokenConfig(BaseModel):
    """Token slots of one row and the numbers of crops that may share it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    slots: int = Field(4096, ge=1, description="token slots in a row: 4,096 is 128³, 32×256×256 or 1024²")
    classes: tuple[int, ...] = Field(
        (1, 2, 3, 4, 6, 8, 12, 16, 24, 32), description="crops a row may hold, each of slots / k tokens"
    )

    @field_validator("classes")
    @classmethod
    def _check_classes(cls, classes: tuple[int, ...]) -> tuple[int, ...]:
        if not classes or min(classes) < 1 or len(set(classes)) != len(classes) or 1 not in classes:
            raise ValueError("row classes are distinct whole numbers from 1 up and hold 1, like [1, 2, 4]")
        return tuple(sorted(classes))


def geometry_of(shape_zyx: Sequence[int], spacing_zyx: Sequence[float]) -> tuple[Kind, Triple]:
    """Geometry class of a grid and its axes in stem order, from the header alone.

    An axis of length 1 makes it `planar`; a largest spacing of at least three times the middle one makes it
    `slab`, thick axis first; anything else is a `volume` in stored order.
    """
    shape = [int(n) for n in shape_zyx]
    spacing = [float(s) for s in spacing_zyx]
    if len(shape) != 3 or min(shape) < 1:
        raise ValueError(f"shape {shape}: three lengths of at least 1 are needed (z, y, x)")
    if len(spacing) != 3 or not all(math.isfinite(s) and s > 0 for s in spacing):
        raise ValueError(f"spacing {spacing}: three positive lengths in mm are needed (z, y, x)")
    if 1 in shape:
        return "planar", _first(shape.index(1))
    _, middle, largest = sorted(spacing)
    if largest >= SLAB_RATIO * middle:
        return "slab", _first(spacing.index(largest))
    return "volume", (0, 1, 2)


def _first(axis: int) -> Triple:
    a, b = (other for other in range(3) if other != axis)
    return axis, a, b


def level_factors(kind: str, axes: Sequence[int]) -> tuple[Triple, Triple, Triple]:
    """Reduction of levels 0, 1 and 2 along stored (z, y, x): 1, 2, 4, in-plane only for slab and planar."""
    zoomed = [False, False, False]
    for stem_axis, stored_axis in enumerate(axes):
        zoomed[stored_axis] = ZOOMED[kind][stem_axis]

    def factors(f: int) -> Triple:
        z, y, x = (f if zoom else 1 for zoom in zoomed)
        return z, y, x

    return factors(1), factors(2), factors(4)


def token_count(shape_stem: Sequence[int] | np.ndarray, patch: Sequence[int]) -> int:
    """Tokens that cover a whole grid of this shape (stem order), the last ones partly outside."""
    return math.prod(-(-int(n) // p) for n, p in zip(shape_stem, patch))


def fit_grid(tokens_needed: Sequence[int], capacity: int) -> Triple:
    """The token grid of a crop: at most `tokens_needed` along each axis and at most `capacity` tokens in all.

    As cubic in tokens as the need allows: axes shorter than the cube keep their whole length and leave their
    room to the others; what rounding leaves over lengthens the longer axes one layer at a time.
    """
    need = [int(n) for n in tokens_needed]
    if len(need) != 3 or min(need) < 1 or capacity < 1:
        raise ValueError(f"a grid needs at least one token an axis and one slot, not {need} in {capacity}")
    if math.prod(need) <= capacity:
        return need[0], need[1], need[2]
    grid = [1, 1, 1]
    room = capacity
    ascending = sorted(range(3), key=lambda a: (need[a], a))
    for left, axis in zip((3, 2, 1), ascending):
        grid[axis] = min(need[axis], _root(room, left))
        room //= grid[axis]
    longest_first = ascending[::-1]
    grew = True
    while grew:
        grew = False
        for axis in longest_first:
            if grid[axis] < need[axis] and math.prod(grid) // grid[axis] * (grid[axis] + 1) <= capacity:
                grid[axis] += 1
                grew = True
                break
    return grid[0], grid[1], grid[2]


def _root(n: int, degree: int) -> int:
    """Whole part of the degree-th root of n, at least 1."""
    root = max(1, round(n ** (1.0 / degree)))
    while root > 1 and root**degree > n:
        root -= 1
    return root


def row_class(tokens: int, slots: int, classes: Sequence[int] = (1, 2, 4, 8, 16)) -> int:
    """Most crops a row can hold with room for a whole sample in each; 1 for a sample larger than a row."""
    return max((k for k in classes if slots // k >= tokens), default=1)


def fit_scale(shape_stem: Sequence[int], kind: str, capacity: int, lowest: float, highest: float) -> float:
    """The smallest zoom in [lowest, highest] at which the whole grid fits into `capacity` tokens; `highest`
    if none does.

    A zoom of s makes an output voxel s voxels of the grid wide along the zoomed axes. Accurate to 1 % above.
    """
    patch = PATCH[kind]
    fixed = 1.0
    zoomed: list[float] = []
    for n, p, zoom in zip(shape_stem, patch, ZOOMED[kind]):
        if zoom:
            zoomed.append(n / p)
        else:
            fixed *= -(-n // p)

    def fits(scale: float) -> bool:
        tokens = fixed
        for length in zoomed:
            tokens *= math.ceil(length / scale - 1e-6)
        return tokens <= capacity

    if fits(lowest):
        return lowest
    if not fits(highest):
        return highest
    below, above = lowest, highest
    while above > 1.01 * below:
        middle = math.sqrt(below * above)
        if fits(middle):
            above = middle
        else:
            below = middle
    return above


@lru_cache(maxsize=256)
def largest_box(kind: str, capacity: int, residual: float) -> int:
    """Most voxels a crop of up to `capacity` tokens reads at up to `residual` voxels per output voxel."""
    step = [p * (residual if zoom else 1.0) for p, zoom in zip(PATCH[kind], ZOOMED[kind])]
    most = 0
    for a in range(1, capacity + 1):
        b = np.arange(1, capacity // a + 1)
        c = capacity // a // b
        first = math.ceil(a * step[0] - 1e-6)
        boxes = np.ceil(b * step[1] - 1e-6) * np.ceil(c * step[2] - 1e-6)
        most = max(most, first * int(boxes.max()))
    return most
