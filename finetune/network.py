"""The convolutional half of a head: a residual U-Net trunk that encoder tokens enter through
zero-initialised projections.

The trunk works at four scales (1, 1/2, 1/4, 1/8 of the window). Which axes are strided at a scale, and
which axes a 3-wide kernel spans, follows the spacing (the nnU-Net rule, Isensee et al. 2021): an axis at
least twice as coarse as the finest one is left alone until the others have caught up, and an axis of length
1 always is. The weights are the same 3x3x3 arrays in every case; an axis that is left alone uses their
middle slice, which is what zero padding would give.

Encoder tokens of three depths are added at 1/4 and 1/8 by projections that start at zero, so before the
first update the network is the plain U-Net whatever the encoder says. Token maps meet a scale by integer
repetition or mean pooling only: both have a deterministic backward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Triple = tuple[int, int, int]
SCALES = 4


@dataclass(frozen=True)
class Scale:
    """How one scale is reached and convolved, per axis in stem order.

    `stride` leads from the scale above to this one (1 or 2), `kernel` is the width of its convolutions (1
    or 3).
    """

    stride: Triple
    kernel: Triple

    @property
    def reach(self) -> Triple:
        """Kernel of the strided convolution that leads here: 3 on strided axes, or every second voxel goes
        unread."""
        return _triple([3 if s > 1 else k for s, k in zip(self.stride, self.kernel)])


def scales_for(spacing: Sequence[float], flat: Sequence[bool] = (False, False, False)) -> tuple[Scale, ...]:
    """The four scales for voxels of `spacing` mm; `flat` marks axes of length 1, which are never strided.

    An axis takes part in a scale when it is less than twice as coarse as the finest axis that is not flat.
    """
    current = [float(s) for s in spacing]
    if len(current) != 3 or min(current) <= 0:
        raise ValueError(f"spacing must be three positive numbers of mm, got {tuple(spacing)}")
    scales = []
    for level in range(SCALES):
        finest = min((s for s, f in zip(current, flat) if not f), default=1.0)
        joins = [not f and s < 2 * finest for s, f in zip(current, flat)]
        stride = tuple(2 if j and level else 1 for j in joins)
        current = [s * k for s, k in zip(current, stride)]
        finest = min((s for s, f in zip(current, flat) if not f), default=1.0)
        kernel = tuple(3 if not f and s < 2 * finest else 1 for s, f in zip(current, flat))
        scales.append(Scale(_triple(stride), _triple(kernel)))
    return tuple(scales)


def window_multiple(scales: Sequence[Scale], patch: Triple) -> Triple:
    """The lengths a window must be multiples of, per axis: the deepest stride and the token patch both
    fit."""
    total = [1, 1, 1]
    for scale in scales:
        total = [t * s for t, s in zip(total, scale.stride)]
    return _triple([max(t, p) for t, p in zip(total, patch)])


def _triple(values: Sequence[int]) -> Triple:
    a, b, c = (int(v) for v in values)
    return a, b, c


class Conv(nn.Conv3d):
    """A 3x3x3 convolution that may use only the middle slice along some axes, with the stride given at call
    time."""

    def __init__(self, channels_in: int, channels_out: int, bias: bool = False) -> None:
        super().__init__(channels_in, channels_out, 3, padding=1, bias=bias)

    def forward(self, x: Tensor, kernel: Triple = (3, 3, 3), stride: Triple = (1, 1, 1)) -> Tensor:
        weight = self.weight
        for axis, width in enumerate(kernel):
            if width == 1 or x.shape[2 + axis] == 1:  # where there is one voxel the outer slices meet padding
                weight = weight.narrow(2 + axis, 1, 1)
        padding = tuple(width // 2 for width in weight.shape[2:])
        tight = any(have < width for have, width in zip(x.shape[2:], kernel))
        if tight and x.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
            # In bf16, oneDNN's gradient of such weights (torch 2.15) reads and writes memory not its own.
            with torch.autocast("cpu", enabled=False):
                y = F.conv3d(x.float(), weight, self.bias, stride, padding)
            return y.to(torch.get_autocast_dtype("cpu"))
        return F.conv3d(x, weight, self.bias, stride, padding)


class InstanceNorm(nn.GroupNorm):
    """Instance normalisation as a group norm with one channel a group, which keeps `channels_last_3d` on
    CPU."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        # Not F.group_norm, which refuses the single voxel that a small image has at the coarsest scale.
        return torch.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)


class Residual(nn.Module):
    """conv, norm, leaky ReLU, conv, plus the input (through a 1x1x1 convolution where the width changes)."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.first = Conv(channels_in, channels_out)
        self.norm = InstanceNorm(channels_out)
        self.second = Conv(channels_out, channels_out, bias=True)
        self.skip = (
            nn.Identity()
            if channels_in == channels_out
            else nn.Conv3d(channels_in, channels_out, 1, bias=False)
        )

    def forward(self, x: Tensor, kernel: Triple) -> Tensor:
        y = F.leaky_relu(self.norm(self.first(x, kernel)), 0.01)
        return F.leaky_relu(self.second(y, kernel) + self.skip(x), 0.01)


class Trunk(nn.Module):
    """The image path: (B, c, Z, Y, X) to one feature map a scale, of `widths` channels.

    It sees no prompt, so its output is computed once per window and kept.
    """

    def __init__(self, channels: int, widths: Sequence[int]) -> None:
        super().__init__()
        if len(widths) != SCALES:
            raise ValueError(f"a trunk has {SCALES} scales, got widths {tuple(widths)}")
        self.blocks = nn.ModuleList(
            [Residual(channels if i == 0 else widths[i], widths[i]) for i in range(SCALES)]
        )
        self.down = nn.ModuleList([Conv(widths[i], widths[i + 1]) for i in range(SCALES - 1)])
        self.norm = nn.ModuleList([InstanceNorm(widths[i + 1]) for i in range(SCALES - 1)])

    def forward(self, image: Tensor, scales: Sequence[Scale]) -> list[Tensor]:
        maps = [self.blocks[0](image, scales[0].kernel)]
        for i in range(1, SCALES):
            x = self.norm[i - 1](self.down[i - 1](maps[-1], scales[i].reach, scales[i].stride))
            maps.append(self.blocks[i](F.leaky_relu(x, 0.01), scales[i].kernel))
        return maps


class TokenEntry(nn.Module):
    """Adds encoder token maps of several depths to the two deepest scales through zero-initialised
    projections."""

    LEVELS = (2, 3)

    def __init__(self, token_width: int, depths: int, widths: Sequence[int]) -> None:
        super().__init__()
        self.project = nn.ModuleList(
            [
                nn.ModuleList([nn.Conv3d(token_width, widths[i], 1, bias=False) for _ in range(depths)])
                for i in self.LEVELS
            ]
        )
        for weight in self.parameters():
            nn.init.zeros_(weight)

    def forward(self, maps: list[Tensor], tokens: Sequence[Tensor]) -> list[Tensor]:
        """`maps`: one (B, width, z, y, x) a scale; `tokens`: one (B, D, gz, gy, gx) a depth. New list, same
        shapes."""
        maps = list(maps)
        whitened = [whiten(t).to(maps[0].dtype) for t in tokens]
        for projections, level in zip(self.project, self.LEVELS):
            grid = maps[level].shape[2:]
            for projection, token_map in zip(cast(nn.ModuleList, projections), whitened):
                maps[level] = maps[level] + meet(projection(token_map), grid)
        return maps


def whiten(tokens: Tensor) -> Tensor:
    """Layer normalisation over the channel axis of (B, D, z, y, x), in float32: depths differ widely in
    magnitude."""
    return F.layer_norm(tokens.float().movedim(1, -1), (tokens.shape[1],)).movedim(-1, 1)


def meet(x: Tensor, grid: Sequence[int]) -> Tensor:
    """(B, C, z, y, x) brought to `grid` by integer repetition or mean pooling per axis.

    Raises ValueError where a ratio is not a whole number.
    """
    pool, grow = [1, 1, 1], [1, 1, 1]
    for axis, (have, want) in enumerate(zip(x.shape[2:], grid)):
        if want % have == 0:
            grow[axis] = want // have
        elif have % want == 0:
            pool[axis] = have // want
        else:
            raise ValueError(
                f"a map of {tuple(x.shape[2:])} cannot meet a grid of {tuple(grid)} by whole factors"
            )
    if pool != [1, 1, 1]:  # not avg_pool3d, whose backward pass on a GPU does not repeat its bits
        (b, c, z, y, w), (pz, py, px) = x.shape, pool
        x = x.reshape(b, c, z // pz, pz, y // py, py, w // px, px).mean((3, 5, 7))
    return repeat(x, _triple(grow))


def repeat(x: Tensor, factors: Triple) -> Tensor:
    """Nearest-neighbour enlargement of (B, C, z, y, x) by whole factors; its backward pass is a plain sum."""
    if factors == (1, 1, 1):
        return x
    b, c, z, y, w = x.shape
    fz, fy, fx = factors
    # Moved to channels-last first, so that the result is contiguous in the layout the convolutions want.
    last = x.permute(0, 2, 3, 4, 1)[:, :, None, :, None, :, None]
    grown = last.expand(b, z, fz, y, fy, w, fx, c).reshape(b, z * fz, y * fy, w * fx, c)
    return grown.permute(0, 4, 1, 2, 3)


def channels_last(x: Tensor) -> Tensor:
    """The layout in which CPU convolutions are about ten times faster."""
    return x.contiguous(memory_format=torch.channels_last_3d)
