"""Rotary positions in mm (Su et al. 2021, on three patient axes), and a learned table for foreign weights."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor, nn

from model.patches import constant


def rotary(
    centres: Tensor, head_dim: int, wavelengths: tuple[float, float] = (2.0, 2048.0)
) -> tuple[Tensor, Tensor]:
    """Cosine and sine tables, each float32 (S, head_dim // 2).

    centres: (S, 3) float32 mm along the patient axes z, y, x. Pairs of channels are shared out evenly between
    the axes, each with the same wavelengths, log-spaced from the shortest to the longest (both included);
    pairs left over are not turned. Attention between turned queries and keys depends on differences of
    positions only.
    """
    if centres.dtype != torch.float32:
        raise TypeError(f"centres must be float32 (bf16 turns 300.5 mm into 300), not {centres.dtype}")
    pairs = head_dim // 6
    low, high = wavelengths
    exponent = torch.linspace(0.0, 1.0, pairs, device=centres.device, dtype=torch.float32)
    frequency = (2 * math.pi / low) * torch.exp(-math.log(high / low) * exponent)
    angle = (centres[:, :, None] * frequency).flatten(1)
    angle = nn.functional.pad(angle, (0, head_dim // 2 - 3 * pairs))
    return angle.cos(), angle.sin()


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn x (S, heads, head_dim) by tables (S, head_dim // 2); channel i pairs with i + head_dim // 2.

    Computed in float32; the result has the dtype of x.
    """
    turned: Tensor = _Turn.apply(x, cos, sin)
    return turned


class _Turn(torch.autograd.Function):
    """A turn, whose backward pass is the turn the other way: nothing but the tables is kept for it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turned(grad, cos, -sin), None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    pairs = x.float().unflatten(-1, (2, -1))
    out = pairs * cos[:, None, None]
    out[..., 0, :].addcmul_(pairs[..., 1, :], sin[:, None], value=-1)
    out[..., 1, :].addcmul_(pairs[..., 0, :], sin[:, None])
    return out.flatten(-2).to(x.dtype)


def from_middle(centres: Tensor, layout: tuple[tuple[int, int], ...], attend: Tensor | None = None) -> Tensor:
    """Centres (S, 3) of each sequence relative to the middle of the box around its attended tokens.

    Prefix tokens are not turned, which puts them at the origin; without this, attention to them would depend
    on where the patient lies in the frame. Smallest and largest are exact, so that padding and order change
    no bit of the result. attend: (S,) bool or None.
    """
    parts = []
    for start, (n, length) in zip(_starts(layout), layout):
        part = centres[start : start + n * length].view(n, length, 3)
        if n * length:
            low, high = part, part
            if attend is not None:
                away = ~attend[start : start + n * length].view(n, length, 1)
                low, high = part.masked_fill(away, math.inf), part.masked_fill(away, -math.inf)
            middle = (low.amin(1, keepdim=True) + high.amax(1, keepdim=True)) / 2
            part = part - middle.where(middle.isfinite(), 0.0)
        parts.append(part.reshape(n * length, 3))
    return torch.cat(parts)


def _starts(layout: tuple[tuple[int, int], ...]) -> list[int]:
    """First token of each segment."""
    return list(itertools.accumulate((n * length for n, length in layout), initial=0))[:-1]


class LearnedPositions(nn.Module):
    """A learned table over a grid, added to tokens; other grids sample it linearly, as when a ViT's table is
    resized.

    Sequence of grid g, token index i -> table coordinate (i + 1/2) * G / g - 1/2, clamped; its own grid gives
    the table.
    """

    def __init__(self, grid: tuple[int, int, int], width: int) -> None:
        super().__init__()
        self.grid = grid
        self.table = nn.Parameter(torch.empty(math.prod(grid), width))

    def forward(self, index: Tensor, grid: Tensor) -> Tensor:
        """index: (n, m, 3) token index; grid: (n, 3) -> (n, m, width)."""
        size = constant(self.grid, index.device)
        place = (index + 0.5) * (size / grid.clamp(min=1))[:, None] - 0.5
        place = place.clamp(min=0).minimum(size - 1.0)
        lower = place.floor()
        weight = place - lower
        lower = lower.long()
        upper = (lower + 1).minimum(size - 1)
        stride = constant((self.grid[1] * self.grid[2], self.grid[2], 1), index.device)
        total = self.table.new_zeros(())
        for corner in itertools.product((False, True), repeat=3):
            up = constant(corner, index.device, torch.bool)
            share = torch.where(up, weight, 1 - weight).prod(-1, keepdim=True).to(self.table.dtype)
            total = total + share * self.table[(torch.where(up, upper, lower) * stride).sum(-1)]
        return total
