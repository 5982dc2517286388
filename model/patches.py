"""Voxels to patches: the one place that fixes the order of tokens and of the voxels inside a token.

Tokens run in C order over the grid (z, y, x); inside a token values run (c, z, y, x). Both stages and every
export use these functions. All axes here are in stem axis order unless a name says patient.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from einops import rearrange
from torch import Tensor

INVALID = -32768  # stored int16 value of a voxel that is not there; float32 storage uses NaN


def patchify(x: Tensor, patch: Sequence[int]) -> Tensor:
    """(B, c, z, y, x) -> (B, N, c * pz * py * px); every axis must be a multiple of its patch."""
    pz, py, px = patch
    if any(size % p for size, p in zip(x.shape[2:], patch)):
        raise ValueError(
            f"image {tuple(x.shape[2:])} is not a multiple of patch {tuple(patch)}; pad it first"
        )
    return rearrange(x, "b c (gz pz) (gy py) (gx px) -> b (gz gy gx) (c pz py px)", pz=pz, py=py, px=px)


def unpatchify(tokens: Tensor, grid: Sequence[int], patch: Sequence[int], channels: int = 1) -> Tensor:
    """(B, N, c * pz * py * px) -> (B, c, z, y, x), the inverse of `patchify` on a grid (gz, gy, gx)."""
    (gz, gy, gx), (pz, py, px) = grid, patch
    return rearrange(
        tokens,
        "b (gz gy gx) (c pz py px) -> b c (gz pz) (gy py) (gx px)",
        gz=gz, gy=gy, gx=gx, c=channels, pz=pz, py=py, px=px,
    )  # fmt: skip


def constant(values: Sequence[float], device: torch.device | str, dtype: torch.dtype = torch.int64) -> Tensor:
    """A few numbers on a device, (len(values),), without the copy that `torch.tensor` would make the host
    wait for."""
    return torch.stack([torch.full((), value, device=device, dtype=dtype) for value in values])


def token_index(grid: Tensor, tokens: Tensor | int) -> tuple[Tensor, Tensor]:
    """Grid coordinates of tokens. grid: (n, 3) int; tokens: (n, m) int64 token numbers, or m for the numbers
    0..m-1.

    Returns index (n, m, 3) int64 and real (n, m) bool, False for numbers past the grid (their index is
    clipped into it).
    """
    grid = grid.to(torch.int64)
    if isinstance(tokens, int):
        tokens = torch.arange(tokens, device=grid.device).expand(len(grid), -1)
    _, gy, gx = (g.clamp(min=1).unsqueeze(1) for g in grid.unbind(1))
    count = grid.prod(1, keepdim=True)
    real = (tokens >= 0) & (tokens < count)
    number = tokens.clamp(min=0).minimum((count - 1).clamp(min=0))
    plane = gy * gx
    return torch.stack((number // plane, number % plane // gx, number % gx), -1), real


def output_extent(extent: Tensor, grid: Tensor, residual: Tensor, patch: Sequence[int]) -> Tensor:
    """(n, 3) int64 output voxels whose centre lies inside the crop, at most grid * patch.

    extent: source voxels of the crop; residual: source voxels per output voxel. Output voxel o is centred on
    source coordinate (o + 1/2) * residual from the crop's corner.
    """
    room = grid.to(torch.int64) * constant(patch, grid.device)
    count = torch.ceil(extent.to(torch.float64) / residual.to(torch.float64) - 0.5 - 1e-6)
    return count.to(torch.int64).clamp(min=0).minimum(room)


def gather_patches(
    voxels: Tensor,
    extent: Tensor,
    grid: Tensor,
    residual: Tensor,
    flip: Tensor,
    patch: Sequence[int],
    capacity: int,
    *,
    tokens: Tensor | None = None,
    resample: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """Patches of n packed crops of different shapes, by index arithmetic, with static output shapes.

    voxels: (n, V) int16 or float32, each crop (extent z, y, x) raveled in C order and then padded to V with
    anything. extent, grid: (n, 3) int. residual: (n, 3) source voxels per output voxel; 1 copies, else
    trilinear, clamped at the crop's border, with the weights renormalised over source voxels that are there.
    flip: (n, 3) bool, reverses the valid output extent along that axis. patch: (pz, py, px). capacity: tokens
    a sequence. tokens: (n, m) int64 takes only these tokens instead of all `capacity`. resample: whether any
    residual differs from 1; None looks (which waits for a device).

    Returns raw float32 (n, capacity or m, P) stored values, 0 where not inside, and inside bool of that
    shape: False past the extent or the grid, and where most of the weight is invalid (-32768 or not finite).
    """
    if voxels.dtype not in (torch.int16, torch.float32):
        raise TypeError(f"voxels must be int16 or float32, not {voxels.dtype}")
    if resample is None:
        resample = bool((residual != 1).any())
    index, real = token_index(grid, capacity if tokens is None else tokens)
    valid = output_extent(extent, grid, residual, patch)
    n, m = real.shape
    extent = extent.to(torch.int64)

    within: list[Tensor] = []  # per axis (n, m, p): the output voxel lies inside the valid extent
    nearest: list[
        tuple[Tensor, Tensor, Tensor]
    ] = []  # per axis: lower and upper source index, weight of the upper
    for axis, p in enumerate(patch):
        place = index[..., axis, None] * p + torch.arange(p, device=voxels.device)
        end = valid[:, axis, None, None]
        within.append((place < end) & real[..., None])
        place = torch.where(flip[:, axis, None, None], end - 1 - place, place)
        last = (extent[:, axis] - 1).clamp(min=0)[:, None, None]
        if resample:
            step = residual[:, axis, None, None].to(torch.float64)
            source = ((place + 0.5) * step - 0.5).clamp(min=0).minimum(last.to(torch.float64))
            lower = source.floor()
            weight = (source - lower).to(torch.float32)
            nearest.append((lower.to(torch.int64), (lower.to(torch.int64) + 1).minimum(last), weight))
        else:
            nearest.append((place.clamp(min=0).minimum(last), place, place))

    inside = _outer(within, torch.bitwise_and).reshape(n, m, -1)
    if not resample:
        raw, there = _take(voxels, extent, [low for low, _, _ in nearest])
        inside &= there
        return raw.masked_fill_(~inside, 0.0), inside

    total = voxels.new_zeros((n, m, math.prod(patch)), dtype=torch.float32)
    mass = torch.zeros_like(total)
    for corner in itertools.product((0, 1), repeat=3):
        weight = _outer([w if up else 1 - w for up, (_, _, w) in zip(corner, nearest)], torch.mul).reshape(
            n, m, -1
        )
        value, there = _take(voxels, extent, [pair[up] for up, pair in zip(corner, nearest)])
        weight = weight * there
        total += weight * value.masked_fill_(~there, 0.0)
        mass += weight
    inside &= mass > 0.5 - 1e-6
    return (total / mass.clamp(min=1e-6)).masked_fill_(~inside, 0.0), inside


def _outer(parts: Sequence[Tensor], combine: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """(n, m, pz), (n, m, py), (n, m, px) combined to (n, m, pz, py, px)."""
    z, y, x = parts
    return combine(combine(z[..., :, None, None], y[..., None, :, None]), x[..., None, None, :])


def _take(voxels: Tensor, extent: Tensor, place: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Values (n, m, P) float32 at source indices per axis (n, m, p), and whether a voxel is there."""
    z, y, x = place
    _, ey, ex = (e[:, None, None] for e in extent.unbind(1))
    offset = _outer((z * (ey * ex), y * ex, x), torch.add)
    value = voxels.gather(1, offset.reshape(len(voxels), -1).clamp_(max=voxels.shape[1] - 1))
    there = value != INVALID if voxels.dtype == torch.int16 else value.isfinite()
    shape = (*offset.shape[:2], -1)
    return value.to(torch.float32).reshape(shape), there.reshape(shape)


def token_centres(
    grid: Tensor,
    start_mm: Tensor,
    spacing: Tensor,
    patch: Sequence[int],
    axes: Tensor,
    capacity: int | None = None,
    *,
    tokens: Tensor | None = None,
) -> Tensor:
    """Centre of every token in mm from the volume's corner, along the patient axes (z, y, x).

    A token that starts at output voxel s has its centre at voxel coordinate s + (p - 1) / 2, counted from the
    centre of voxel 0; from the corner that is start_mm + (s + (p - 1) / 2 + 1 / 2) * spacing. With half the
    spacing a coarse centre is therefore the mean of its 2 x 2 x 2 fine centres.

    grid (n, 3) int, start_mm (n, 3) corner of output voxel 0, spacing (n, 3) mm of an output voxel, patch:
    all in stem axis order. axes: (n, 3) int, stem axis i lies along patient axis axes[:, i]. tokens: (n, m)
    as in `gather_patches`. A flip mirrors the content and leaves the centres alone: a flipped crop is a
    mirrored patient. Returns float32 (n, capacity or m, 3); past the grid, the last centre.
    """
    which = tokens if tokens is not None else int(grid.prod(1).max()) if capacity is None else capacity
    index, _ = token_index(grid, which)
    size = constant(patch, grid.device, torch.float64)
    centre = start_mm.double()[:, None] + (index * size + size / 2) * spacing.double()[:, None]
    patient = torch.argsort(axes.to(torch.int64), dim=1)  # stem axis of each patient axis
    return centre.gather(2, patient[:, None].expand(-1, centre.shape[1], -1)).to(torch.float32)
