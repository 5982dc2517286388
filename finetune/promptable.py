"""The promptable model: image half once per window, prompt half once per click.

Image half: encoder tokens of three depths enter a U-Net trunk (network.py); the result is kept. Prompt
half: dense prompt maps walk down a light path that reads the kept features at each scale, prompt tokens
exchange with the coarsest scale in two-way attention (Kirillov et al. 2023, Segment Anything), and a
decoder climbs back to full resolution. Mask tokens make the weights of the last 1x1x1 layer and predict
each mask's IoU. Mask 0 answers corrections; masks 1 to 3 answer a first prompt, which may mean more than
one thing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn
from torch.nn import functional as F

from finetune.network import (
    SCALES,
    Conv,
    InstanceNorm,
    Scale,
    TokenEntry,
    Trunk,
    channels_last,
    repeat,
    scales_for,
)
from finetune.prompts import MAPS, Fourier, Prompts, SparsePrompts, prompt_maps

MASKS = 4
FIRST = slice(1, 4)  # the masks that answer a first prompt
LATER = slice(0, 1)


class HeadConfig(BaseModel):
    """Shape of the promptable head; it stands in the adaptation plan under `head`.

    `widths` are the channels at 1, 1/2, 1/4, 1/8; `window` (z, y, x) is the size in voxels the head was
    trained on.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: str = "promptable"
    encoder: bool = False
    channels: int = 1
    widths: tuple[int, int, int, int] = (16, 32, 64, 128)
    heads: int = 4
    layers: int = 2
    window: tuple[int, int, int] = (48, 64, 48)


@dataclass
class Features:
    """The kept half of a window: one map a scale, the scales themselves and the voxel spacing (B, 3) in
    mm."""

    maps: list[Tensor]
    scales: tuple[Scale, ...]
    spacing: Tensor

    @property
    def shape(self) -> tuple[int, int, int]:
        """Window size in voxels, stem order."""
        z, y, x = self.maps[0].shape[2:]
        return z, y, x


class Attention(nn.Module):
    """Multi-head attention of `query` over `context`, with an optional mask of the context rows that are
    real."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, real: Tensor | None = None) -> Tensor:
        q, k, v = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer, x in ((self.query, query), (self.key, key), (self.value, value))
        )
        mask = None if real is None else real[:, None, None, :]
        return self.out(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2))


class TwoWayLayer(nn.Module):
    """Tokens attend to themselves and to the image, then the image attends to the tokens; pre-norm
    throughout."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(width) for _ in range(5)])
        self.to_self = Attention(width, heads)
        self.to_image = Attention(width, heads)
        self.to_tokens = Attention(width, heads)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, tokens: Tensor, real: Tensor, image: Tensor, where: Tensor) -> tuple[Tensor, Tensor]:
        own = self.norms[0](tokens)
        tokens = tokens + self.to_self(own, own, own, real)
        seen = self.norms[1](image)
        tokens = tokens + self.to_image(self.norms[2](tokens), seen + where, seen)
        tokens = tokens + self.mlp(self.norms[3](tokens))
        told = self.norms[4](tokens)
        return tokens, image + self.to_tokens(seen + where, told, told, real)


class PromptHalf(nn.Module):
    """Everything a click costs: prompt maps, two-way attention, decoder, masks and their predicted IoU."""

    def __init__(self, config: HeadConfig) -> None:
        super().__init__()
        widths, width = config.widths, config.widths[-1]
        self.enter = Conv(MAPS, widths[0], bias=True)
        self.down = nn.ModuleList([Conv(widths[i], widths[i + 1]) for i in range(SCALES - 1)])
        self.down_norm = nn.ModuleList([InstanceNorm(widths[i + 1]) for i in range(SCALES - 1)])
        self.mix = nn.ModuleList([Conv(widths[i + 1], widths[i + 1], bias=True) for i in range(SCALES - 1)])
        self.up = nn.ModuleList([nn.Conv3d(widths[i + 1], widths[i], 1) for i in range(SCALES - 1)])
        self.merge = nn.ModuleList([Conv(widths[i], widths[i]) for i in range(SCALES - 1)])
        self.merge_norm = nn.ModuleList([InstanceNorm(widths[i]) for i in range(SCALES - 1)])
        self.sparse = SparsePrompts(width)
        self.grid_position = Fourier(width)
        self.outputs = nn.Parameter(torch.randn(MASKS + 1, width) * 0.02)
        self.layers = nn.ModuleList([TwoWayLayer(width, config.heads) for _ in range(config.layers)])
        self.output_norm = nn.LayerNorm(width)
        self.hyper = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, widths[0]))
        self.base = nn.Parameter(torch.randn(MASKS, widths[0]) * widths[0] ** -0.5)
        self.bias = nn.Parameter(torch.zeros(MASKS))
        self.iou = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, MASKS))

    def forward(self, features: Features, prompts: Prompts, previous: Tensor | None) -> tuple[Tensor, Tensor]:
        scales = features.scales
        maps = channels_last(prompt_maps(prompts, features.shape, previous).to(features.maps[0].dtype))
        path = [F.leaky_relu(self.enter(maps, scales[0].kernel) + features.maps[0], 0.01)]
        for i in range(1, SCALES):
            stride, kernel = scales[i].stride, scales[i].kernel
            x = self.down_norm[i - 1](self.down[i - 1](path[-1], scales[i].reach, stride)) + features.maps[i]
            path.append(x + self.mix[i - 1](F.leaky_relu(x, 0.01), kernel))
        x, answers = self._exchange(path[-1], prompts, features)
        for i in reversed(range(SCALES - 1)):
            x = repeat(self.up[i](x), scales[i + 1].stride) + path[i]
            x = F.leaky_relu(self.merge_norm[i](self.merge[i](x, scales[i].kernel)), 0.01)
        weights = self.base + self.hyper(answers[:, :MASKS])
        logits = (
            torch.einsum("bmc,bczyx->bmzyx", weights.to(x.dtype), x).float()
            + self.bias.float()[:, None, None, None]
        )
        return logits, self.iou(answers[:, MASKS]).float().sigmoid()

    def _exchange(self, coarse: Tensor, prompts: Prompts, features: Features) -> tuple[Tensor, Tensor]:
        """Two-way attention between prompt tokens and the coarsest map: the new map, and the MASKS + 1
        output tokens."""
        batch, _, *grid = coarse.shape
        given, real = self.sparse(prompts)
        outputs = self.outputs.to(given.dtype).expand(batch, -1, -1)
        tokens = torch.cat([outputs, given], dim=1)
        real = torch.cat([real.new_ones(batch, MASKS + 1), real], dim=1)
        cell = [n / g for n, g in zip(features.shape, grid)]
        centres = [
            (torch.arange(g, device=coarse.device, dtype=torch.float32) + 0.5) * c - 0.5
            for g, c in zip(grid, cell)
        ]
        voxel = torch.stack(torch.meshgrid(*centres, indexing="ij"), dim=-1).reshape(1, -1, 3)
        where = self.grid_position(voxel * features.spacing[:, None])
        image = coarse.flatten(2).transpose(1, 2)
        for layer in self.layers:
            tokens, image = layer(tokens, real, image, where)
        back = image.transpose(1, 2).unflatten(2, grid)
        return channels_last(back), self.output_norm(tokens)


class PromptableModel(nn.Module):
    """Encoder (or none), trunk and prompt half.

    Args:
        config: shape of the head.
        encoder: a `model.Encoder` whose `forward(image, spacing, geometry, depths)` gives feature maps (B,
        D, z, y, x), or
            None for the plain U-Net.
        frozen: the encoder gets no gradient and its drop-path is off.
    """

    def __init__(self, config: HeadConfig, encoder: nn.Module | None = None, frozen: bool = False) -> None:
        super().__init__()
        self.config = config
        self.encoder = encoder
        self.frozen = frozen
        self.trunk = Trunk(config.channels, config.widths)
        self.prompt = PromptHalf(config)
        self.depths: tuple[int, ...] = ()
        if encoder is not None:
            sized: Any = encoder
            self.depths = three_depths(sized.depth)
            self.entry = TokenEntry(sized.width, len(self.depths), config.widths)
            if frozen:
                encoder.requires_grad_(False)

    def train(self, mode: bool = True) -> PromptableModel:
        """Training mode, except for a frozen encoder."""
        super().train(mode)
        if self.frozen and self.encoder is not None:
            self.encoder.eval()
        return self

    def encode(
        self,
        image: Tensor,
        spacing: Tensor,
        geometry: str = "volume",
        axes: Sequence[int] = (0, 1, 2),
        valid: Tensor | None = None,
        scales: tuple[Scale, ...] | None = None,
    ) -> Features:
        """The image half of a window.

        Args:
            image: (B, c, Z, Y, X) normalised float32, stem order, lengths multiples of `window_multiple`.
            spacing: (B, 3) mm, stem order.
            geometry: which stem of the encoder reads it: volume, slab or planar.
            axes: patient axis (0 z, 1 y, 2 x) of each image axis.
            valid: (B, Z, Y, X) bool, False where the window reaches beyond the image; None for all True.
            scales: where they are known; `window_scales` otherwise.

        Raises:
            ValueError: the rows do not share their strides; batch windows by `window_scales`.
        """
        scales = scales or window_scales(spacing, image.shape[2:])
        maps = self.trunk(channels_last(image), scales)
        if self.encoder is not None:
            with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
                tokens = self.encoder(image, spacing, geometry, depths=self.depths, valid=valid, axes=axes)
            maps = self.entry(maps, tokens)
        return Features(maps, scales, spacing.float())

    def decode(
        self, features: Features, prompts: Prompts, previous: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The prompt half: all MASKS logits (B, MASKS, Z, Y, X) float32 and their predicted IoU (B, MASKS).

        Take `[:, FIRST]` after a first prompt (`previous` is None) and `[:, LATER]` after that.
        """
        logits, iou = self.prompt(features, prompts, previous)
        return logits, iou

    def answer(
        self, features: Features, prompts: Prompts, previous: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The one mask to show: (B, 1, Z, Y, X) logits and (B,) predicted IoU, the best of three on a first
        prompt."""
        logits, iou = self.decode(features, prompts, previous)
        part = FIRST if previous is None else LATER
        logits, iou = logits[:, part], iou[:, part]
        best = iou.argmax(dim=1)
        rows = torch.arange(len(best), device=best.device)
        return logits[rows, best][:, None], iou[rows, best]


def window_scales(spacing: Tensor, shape: Sequence[int]) -> tuple[Scale, ...]:
    """The scales that every row of `spacing` (B, 3) mm asks for in a window of `shape` voxels."""
    flat = [n == 1 for n in shape]
    found = {scales_for(row, flat) for row in spacing.tolist()}
    if len(found) != 1:
        raise ValueError(f"{len(found)} sets of strides in one batch; batch windows of like spacing together")
    return found.pop()


def three_depths(depth: int) -> tuple[int, ...]:
    """Block numbers (1-based) a third, two thirds and all of the way up an encoder of `depth` blocks."""
    return tuple(sorted({max(1, round(depth * part / 3)) for part in (1, 2, 3)}))
