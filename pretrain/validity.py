"""Which tokens of a crop hold a voxel at all, found in the loader's worker exactly as the device sees it.

The device (`model.patches.gather_patches`) calls a voxel inside when it lies in the crop and most of what it
is interpolated from was stored as valid. Here that is decided for whole tokens from the boxes of stored
voxels they read; only the few that this leaves open in a resampled crop are cut out to see.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from model.patches import INVALID, gather_patches, output_extent

Bools = NDArray[np.bool_]


def valid_tokens(
    voxels: np.ndarray,
    grid: Sequence[int],
    residual: Sequence[float],
    flip: Sequence[bool],
    patch: Sequence[int],
) -> Bools:
    """Valid tokens (gz * gy * gx,) of one crop, C-order over its grid.

    voxels: (z, y, x) int16 or float32 as stored, stem axis order; the rest as in `gather_patches`.
    """
    steps = torch.tensor([list(residual)], dtype=torch.float32)
    shape, size = torch.tensor([voxels.shape]), torch.tensor([list(grid)])
    extent = output_extent(shape, size, steps, patch)[0].tolist()
    axes = list(zip(extent, voxels.shape, steps[0].tolist(), flip))
    boxes = [_boxes(n, p, *axis) for n, p, axis in zip(grid, patch, axes)]
    valid = _reached(boxes)
    missing = missing_voxels(voxels)
    if missing is None:
        return valid.ravel()
    valid &= ~_over_boxes(missing, boxes, np.all)
    if (steps != 1).any():
        # A part of a token that reads valid voxels only settles the matter.
        parts = [math.gcd(p, 4) for p in patch]
        finer = [_boxes(n * k, p // k, *axis) for n, p, k, axis in zip(grid, patch, parts, axes)]
        whole = _reached(finer) & ~_over_boxes(missing, finer, np.any)
        split = [size for n, k in zip(grid, parts) for size in (n, k)]
        unsure = np.argwhere(valid & ~whole.reshape(split).any(axis=(1, 3, 5)))
        if len(unsure):
            valid[tuple(unsure.T)] = _cut_out(voxels, grid, steps, flip, patch, unsure)
    return valid.ravel()


def _cut_out(
    voxels: np.ndarray,
    grid: Sequence[int],
    steps: torch.Tensor,
    flip: Sequence[bool],
    patch: Sequence[int],
    tokens: np.ndarray,
) -> Bools:
    """The device's own answer for some tokens (m, 3)."""
    numbers = np.ravel_multi_index(tuple(tokens.T), tuple(grid))
    flat = torch.from_numpy(np.ascontiguousarray(voxels)).view(1, -1)
    extent, size, turned = (torch.tensor([list(each)]) for each in (voxels.shape, grid, flip))
    _, inside = gather_patches(
        flat, extent, size, steps, turned, patch, len(numbers),
        tokens=torch.from_numpy(numbers)[None], resample=True,
    )  # fmt: skip
    return np.asarray(inside[0].any(dim=1).numpy())


def missing_voxels(voxels: np.ndarray) -> Bools | None:
    """True where a stored voxel is invalid, same shape; None where none is."""
    if voxels.dtype == np.int16:
        return voxels == INVALID if voxels.min() == INVALID else None
    with np.errstate(over="ignore", invalid="ignore"):
        finite = np.isfinite(voxels.sum())  # of finite voxels alone it may overflow, which costs only time
    return None if finite else ~np.isfinite(voxels)


def _boxes(tokens: int, patch: int, end: int, size: int, step: float, turned: bool) -> list[tuple[int, int]]:
    """Stored voxels (start, stop) that each token along one axis reads; empty past the output extent
    `end`."""
    found = []
    for token in range(tokens):
        first, last = token * patch, min((token + 1) * patch, end) - 1
        if last < first:
            found.append((0, 0))
            continue
        if turned:
            first, last = end - 1 - last, end - 1 - first
        if step == 1:
            found.append((first, last + 1))
        else:  # from the lower neighbour of the first voxel to the upper one of the last
            start, stop = ((place + 0.5) * step - 0.5 for place in (first, last))
            found.append((max(int(np.floor(start)), 0), min(int(np.floor(stop)) + 2, size)))
    return found


def _reached(boxes: Sequence[Sequence[tuple[int, int]]]) -> Bools:
    """Where the boxes (gz, gy, gx) are not empty."""
    z, y, x = (np.array([stop > start for start, stop in axis]) for axis in boxes)
    return np.asarray(z[:, None, None] & y[None, :, None] & x[None, None, :])


def _over_boxes(
    mask: Bools, boxes: Sequence[Sequence[tuple[int, int]]], reduce: Callable[..., Bools]
) -> Bools:
    """`reduce` (np.any or np.all) of a mask (z, y, x) over the boxes of each token: (gz, gy, gx)."""
    for axis in boxes:  # each is reduced in front, which is fast, and goes to the back
        mask = np.ascontiguousarray(mask)
        mask = np.moveaxis(np.stack([reduce(mask[slice(*pair)], axis=0) for pair in axis]), 0, -1)
    return mask
