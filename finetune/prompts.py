"""Prompts as the network sees them: dense maps at full resolution and sparse tokens.

All coordinates are voxel indices of the window in stem axis order (0-based, voxel centres), spacing is in
mm in the same order. Maps follow the domain rules: a point is a Gaussian in mm whose width is two in-plane
voxels, at least half a voxel along every axis (half a slice), and never wider than a quarter of a given
box. The exact voxel has its own channel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

MAPS = 5  # positive points, negative points, exact voxels (+1, -1), boxes, previous logits
LOGIT_RANGE = 8.0


@dataclass
class Prompts:
    """What a person said about B objects, padded to the longest list.

    points (B, P, 3) float32 voxel index; signs (B, P) +1, -1 or 0 for an absent point;
    boxes (B, K, 2, 3) inclusive minimum and maximum index; box_given (B, K) bool; spacing (B, 3) mm.
    """

    points: Tensor
    signs: Tensor
    boxes: Tensor
    box_given: Tensor
    spacing: Tensor

    def to(self, device: torch.device | str) -> Prompts:
        """The same prompts on `device`."""
        return Prompts(
            self.points.to(device), self.signs.to(device), self.boxes.to(device), self.box_given.to(device),
            self.spacing.to(device),
        )  # fmt: skip


@dataclass
class PromptList:
    """The prompts of one object while they are being collected: clicks ((z, y, x), sign) and boxes (min,
    max)."""

    clicks: list[tuple[tuple[float, float, float], int]] = field(default_factory=list)
    boxes: list[tuple[tuple[float, float, float], tuple[float, float, float]]] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.clicks or self.boxes)


def collate_prompts(lists: Sequence[PromptList], spacing: Tensor) -> Prompts:
    """Pad the prompts of B objects into tensors; `spacing` is (B, 3) mm in stem order."""
    count = len(lists)
    most_points = max((len(p.clicks) for p in lists), default=0)
    most_boxes = max((len(p.boxes) for p in lists), default=0)
    points = torch.zeros(count, most_points, 3)
    signs = torch.zeros(count, most_points, dtype=torch.int64)
    boxes = torch.zeros(count, most_boxes, 2, 3)
    given = torch.zeros(count, most_boxes, dtype=torch.bool)
    for b, prompts in enumerate(lists):
        for i, (where, sign) in enumerate(prompts.clicks):
            points[b, i] = torch.tensor(where, dtype=torch.float32)
            signs[b, i] = sign
        for i, (low, high) in enumerate(prompts.boxes):
            boxes[b, i, 0] = torch.tensor(low, dtype=torch.float32)
            boxes[b, i, 1] = torch.tensor(high, dtype=torch.float32)
            given[b, i] = True
    return Prompts(points, signs, boxes, given, spacing.float())


def point_sigma(spacing: Tensor, boxes: Tensor, box_given: Tensor) -> Tensor:
    """Standard deviation (B, 3) in mm of a point's Gaussian: two in-plane voxels, at least half a slice, at
    most a quarter of the smallest given box. In-plane is the pair of finest axes."""
    fine = spacing.sort(dim=1).values[:, :2]
    sigma = torch.maximum(2.0 * fine.prod(dim=1).sqrt()[:, None].expand_as(spacing), 0.5 * spacing)
    if boxes.shape[1]:
        extent = (boxes[:, :, 1] - boxes[:, :, 0] + 1.0) * spacing[:, None]
        extent = torch.where(box_given[:, :, None], extent, torch.inf).amin(dim=1)
        sigma = torch.minimum(sigma, extent / 4.0)
    return sigma


def prompt_maps(prompts: Prompts, shape: Sequence[int], previous: Tensor | None) -> Tensor:
    """Dense maps (B, MAPS, Z, Y, X) float32 for a window of `shape`.

    `previous` is (B, 1, Z, Y, X) logits of the last prediction; they are clipped to +-LOGIT_RANGE and
    scaled to +-1. Points may lie outside the window: the visible part of their Gaussian is drawn.
    """
    batch, device = prompts.spacing.shape[0], prompts.spacing.device
    maps = torch.zeros(batch, MAPS, *shape, device=device)
    axes = [torch.arange(n, device=device, dtype=torch.float32) for n in shape]
    if prompts.points.shape[1]:
        sigma = point_sigma(prompts.spacing, prompts.boxes, prompts.box_given)
        lines = []
        for axis, index in enumerate(axes):
            distance = (index - prompts.points[:, :, axis, None]) * prompts.spacing[:, None, axis, None]
            lines.append(torch.exp(-0.5 * (distance / sigma[:, None, axis, None]) ** 2))
        for channel, sign in ((0, 1), (1, -1)):
            chosen = (prompts.signs == sign).float()
            for p in range(
                prompts.points.shape[1]
            ):  # one at a time: the maximum needs no (B, P, Z, Y, X) array
                if not bool(chosen[:, p].any()):
                    continue
                z, y, x = (line[:, p] for line in lines)
                blob = (chosen[:, p, None] * z)[:, :, None, None] * y[:, None, :, None] * x[:, None, None, :]
                torch.maximum(maps[:, channel], blob, out=maps[:, channel])
        exact = prompts.points.round().long()
        bounds = torch.tensor(list(shape), device=device)
        inside = ((exact >= 0) & (exact < bounds)).all(dim=2) & (prompts.signs != 0)
        row, number = inside.nonzero(as_tuple=True)
        at = exact[row, number]
        maps[row, 2, at[:, 0], at[:, 1], at[:, 2]] = prompts.signs[row, number].float()
    for k in range(prompts.boxes.shape[1]):
        low, high = prompts.boxes[:, k, 0], prompts.boxes[:, k, 1]
        spans = [
            ((index >= low[:, axis, None]) & (index <= high[:, axis, None])).float()
            for axis, index in enumerate(axes)
        ]
        z, y, x = spans
        filled = (
            (z * prompts.box_given[:, k, None])[:, :, None, None] * y[:, None, :, None] * x[:, None, None, :]
        )
        torch.maximum(maps[:, 3], filled, out=maps[:, 3])
    if previous is not None:
        maps[:, 4] = previous[:, 0].float().clamp(-LOGIT_RANGE, LOGIT_RANGE) / LOGIT_RANGE
    return maps


class Fourier(nn.Module):
    """Sine and cosine of mm coordinates at wavelengths from 4 to 512 mm, then a linear map to `width`
    channels."""

    WAVELENGTHS = (4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0)

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(6 * len(self.WAVELENGTHS), width)

    def forward(self, mm: Tensor) -> Tensor:
        """(..., 3) mm from the window's first voxel to (..., width). Angles are taken in float32 at every
        precision."""
        waves = torch.tensor(self.WAVELENGTHS, device=mm.device, dtype=torch.float32)
        angle = (mm.float()[..., None] * (2 * math.pi / waves)).flatten(-2)
        return self.linear(torch.cat([angle.sin(), angle.cos()], dim=-1).to(self.linear.weight.dtype))


class SparsePrompts(nn.Module):
    """Points and box corners as tokens: Fourier features of their position in mm plus a learned kind."""

    ABSENT, NEGATIVE, POSITIVE, BOX_MINIMUM, BOX_MAXIMUM = range(5)

    def __init__(self, width: int) -> None:
        super().__init__()
        self.position = Fourier(width)
        self.kind = nn.Embedding(5, width)

    def forward(self, prompts: Prompts) -> tuple[Tensor, Tensor]:
        """Tokens (B, P + 2K, width) and which of them are real (B, P + 2K)."""
        batch = prompts.spacing.shape[0]
        corners = prompts.boxes.reshape(batch, -1, 3)
        where = torch.cat([prompts.points, corners], dim=1) * prompts.spacing[:, None]
        kinds = torch.where(prompts.signs > 0, self.POSITIVE, self.NEGATIVE)
        kinds = torch.where(prompts.signs == 0, self.ABSENT, kinds)
        ends = torch.tensor([self.BOX_MINIMUM, self.BOX_MAXIMUM], device=where.device)
        box_kinds = torch.where(prompts.box_given[:, :, None], ends, self.ABSENT).reshape(batch, -1)
        kinds = torch.cat([kinds, box_kinds], dim=1)
        return self.position(where) + self.kind(kinds), kinds != self.ABSENT
