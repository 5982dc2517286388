"""Which box is cut from a volume: zoom, level, token grid, residual, origin; arithmetic in stem order."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from data_pipeline.geometry import PATCH, ZOOMED, Triple, fit_grid, fit_scale

#: Most voxels of a level that one output voxel may span: half a level, so that a crop never skips voxels.
MAX_RESIDUAL = math.sqrt(2.0)
Floats = tuple[float, float, float]


@dataclass(frozen=True, slots=True)
class Box:
    """A crop, all triples in stem order. `origin` and `extent` are voxels of `level`."""

    level: int
    grid: Triple
    residual: Floats
    origin: Triple
    extent: Triple


def zoom_range(
    shape: Sequence[int], kind: str, capacity: int, scale: tuple[float, float], levels: int
) -> tuple[float, float]:
    """Zooms allowed for a volume: those of the recipe, cut where the whole volume fits and where its levels
    end.

    Zooming out stops where the whole volume fits `capacity` tokens (at 1 for what fits at its own
    resolution), and half a level beyond the coarsest of its `levels`. If the recipe's range lies beyond, the
    nearest allowed zoom is left.
    """
    low, high = scale
    high = min(high, MAX_RESIDUAL * 2 ** (levels - 1))
    if high > 1.0:
        high = fit_scale(shape, kind, capacity, 1.0, high)
    return min(low, high), high


def zoomed_box(
    shape: Sequence[int],
    kind: str,
    capacity: int,
    scale: tuple[float, float],
    levels: int,
    u: Sequence[float],
    focus: Sequence[int] | None = None,
) -> Box:
    """The pretraining crop of a volume of this shape (stem order), from four uniform numbers (zoom, three
    origins).

    The zoom is log-uniform in `zoom_range`; the level is the nearest power of two among the `levels` there
    are, and the residual what remains to be resampled on the device. `focus` is a native voxel that has to
    lie inside.
    """
    low, high = zoom_range(shape, kind, capacity, scale, levels)
    zoom = low * (high / low) ** u[0]
    level = min(levels - 1, max(0, math.floor(math.log2(zoom) + 0.5)))
    factor = 1 << level
    patch = PATCH[kind]
    r = min(zoom / factor, MAX_RESIDUAL)
    acts = ZOOMED[kind]
    residual = (r if acts[0] else 1.0, r if acts[1] else 1.0, r if acts[2] else 1.0)
    # A level's last voxel may be the mean of fewer source voxels or missing; whole ones are there in any
    # case.
    size = [max(1, n // factor) if act else n for n, act in zip(shape, acts)]
    need = [max(1, math.ceil(n / (p * r) - 1e-6)) for n, p, r in zip(size, patch, residual)]
    grid = fit_grid(need, capacity)
    extent = [min(n, math.ceil(g * p * r - 1e-6)) for n, g, p, r in zip(size, grid, patch, residual)]
    if focus is not None:
        focus = [min(v // factor if act else v, n - 1) for v, n, act in zip(focus, size, acts)]
    return Box(level, grid, residual, place(size, extent, u[1:4], focus), _triple(extent))


def window_box(
    shape: Sequence[int],
    kind: str,
    window: Sequence[int],
    u: Sequence[float],
    focus: Sequence[int] | None = None,
) -> Box:
    """A crop of at most `window` voxels (stem order) at native resolution; `u[0]` is unused."""
    extent = [min(n, w) for n, w in zip(shape, window)]
    grid = _triple([-(-e // p) for e, p in zip(extent, PATCH[kind])])
    return Box(0, grid, (1.0, 1.0, 1.0), place(shape, extent, u[1:4], focus), _triple(extent))


def place(
    size: Sequence[int], extent: Sequence[int], u: Sequence[float], focus: Sequence[int] | None = None
) -> Triple:
    """An origin, uniform among those that keep the box inside `size` and the voxel `focus`, if any, in it."""
    origin = []
    for axis in range(3):
        first, last = 0, size[axis] - extent[axis]
        if focus is not None:
            first, last = max(first, focus[axis] - extent[axis] + 1), min(last, focus[axis])
        origin.append(first + int(u[axis] * (last - first + 1)))
    return _triple(origin)


def _triple(values: Sequence[int]) -> Triple:
    return values[0], values[1], values[2]
