"""The encoder: three stems, one trunk, features at several depths."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from model.attention_entropy import attention_entropy
from model.block import Block, LayerNorm, Layout, Rotary, joined, key_masks, per_token, segments, tokens_in
from model.config import KINDS, PATCH, SIZES, EncoderConfig, Kind
from model.errors import UserError
from model.patches import constant, patchify, token_centres, token_index
from model.positions import LearnedPositions, from_middle, rotary

if TYPE_CHECKING:
    from model.plan import AdaptationPlan
    from model.weights import LoadReport

__all__ = ["KINDS", "PATCH", "SIZES", "Encoder", "EncoderConfig", "Layout"]


class PrefixTokens(nn.Module):
    """Learned tokens (class token first, then registers) put before each sequence; they have no position."""

    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.tokens = nn.Parameter(torch.empty(count, width))

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        """(S, D) -> (S + sequences * count, D)."""
        width = x.shape[1]
        parts = []
        for part, (n, length) in zip(segments(x, layout), layout):
            prefix = self.tokens.to(x.dtype).expand(n, -1, -1)
            parts.append(torch.cat((prefix, part.view(n, length, width)), 1).view(-1, width))
        return joined(parts)


def _with_prefix(x: Tensor, layout: Layout, count: int, value: float) -> Tensor:
    """Insert `count` rows of `value` before each sequence of x (S, ...)."""
    parts = []
    for part, (n, length) in zip(segments(x, layout), layout):
        rows = part.view(n, length, *x.shape[1:])
        parts.append(torch.cat((rows.new_full((n, count, *x.shape[1:]), value), rows), 1).flatten(0, 1))
    return joined(parts)


def _without_prefix(x: Tensor, layout: Layout, count: int) -> Tensor:
    """Undo `PrefixTokens`; `layout` is the one without prefix."""
    parts = []
    inner = tuple((n, length + count) for n, length in layout)
    for part, (n, length) in zip(segments(x, inner), layout):
        parts.append(part.view(n, length + count, x.shape[1])[:, count:].reshape(n * length, x.shape[1]))
    return joined(parts)


class Encoder(nn.Module):
    """Plain ViT that sees volumes, thick-slice slabs and radiographs through three stems (see
    `EncoderConfig`).

    Pretraining calls `stem` and `trunk` on packed tokens; everybody else calls the module on an image.
    Attributes: `config`; `width`, `depth`, `heads`; `drop_rates` drop-path rate of each block; `plan`
    and `load_report`, set by `load_encoder`.
    """

    plan: AdaptationPlan | None = None
    load_report: LoadReport | None = None

    def __init__(self, config: EncoderConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or EncoderConfig()
        self.width, self.depth, self.heads = config.shape
        self.prefix_count = config.registers + config.class_token
        self.drop_rates = tuple(config.drop_path * i / max(1, self.depth - 1) for i in range(self.depth))
        self.checkpointing = False
        self.stems = nn.ModuleDict(
            {
                kind: nn.Linear(config.channels * patch[0] * patch[1] * patch[2], self.width)
                for kind, patch in config.patch.items()
            }
        )
        self.positions = (
            LearnedPositions(config.learned_positions, self.width) if config.learned_positions else None
        )
        self.prefix = PrefixTokens(self.prefix_count, self.width) if self.prefix_count else None
        self.blocks = nn.ModuleList(Block(config) for _ in range(self.depth))
        self.norm = LayerNorm(self.width, config.norm_eps)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Truncated normal (std 0.02) weights, zero biases; norms and LayerScale keep their own start."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
            elif isinstance(module, LearnedPositions):
                nn.init.trunc_normal_(module.table, std=0.02)
            elif isinstance(module, PrefixTokens):
                nn.init.trunc_normal_(module.tokens, std=0.02)

    def set_checkpointing(self, on: bool) -> None:
        """Recompute each block in the backward pass instead of keeping its activations."""
        self.checkpointing = on

    def patch(self, kind: Kind) -> tuple[int, int, int]:
        """Patch of a stem, in stem axis order; UserError when the encoder has no such stem."""
        try:
            return self.config.patch[kind]
        except KeyError:
            raise UserError(
                f"this encoder has no {kind!r} stem, only {', '.join(self.config.patch)}; change geometry"
            ) from None

    def stem(
        self, kind: Kind, patches: Tensor, grid: Tensor | None = None, tokens: Tensor | None = None
    ) -> Tensor:
        """Tokens (n, m, D) from normalised patches (n, m, c * P), in the dtype of the weights.

        With learned positions also grid (n, 3), and tokens (n, m) int64 where patches are not the tokens
        0..m-1.
        """
        self.patch(kind)
        layer = cast(nn.Linear, self.stems[kind])
        x = layer(patches.to(layer.weight.dtype))
        if self.positions is not None:
            if grid is None:
                raise ValueError("an encoder with learned positions needs the grid (n, 3) in stem()")
            index, _ = token_index(grid, patches.shape[1] if tokens is None else tokens)
            x = x + self.positions(index, grid)
        return x

    def trunk(
        self,
        tokens: Tensor,
        centres: Tensor,
        layout: Layout,
        attend: Tensor | None = None,
        drop: Tensor | None = None,
        depths: Sequence[int] | None = None,
    ) -> list[Tensor]:
        """Features of packed tokens.

        tokens: (S, D) sequences one after another as `layout` ((n, length), ...) says. centres: (S, 3)
        float32, patient axes, in mm, or for rotary "index" in voxels of the crop. attend: (S,) bool, False
        for tokens nobody may attend to; their own outputs mean nothing but are finite. drop: (sequences,
        depth) bool, True drops that block for that sequence (keyed drop-path; what stays is scaled by
        1 / (1 - rate)); None drops nothing. depths: numbers of blocks passed, each in 0..depth; None for
        (depth,).

        Returns one (S, D) tensor a depth, in the order asked for, each after the final norm. Class token and
        registers live in here only.
        """
        depths = (self.depth,) if depths is None else tuple(depths)
        if any(not 0 <= d <= self.depth for d in depths):
            raise ValueError(f"depths {depths} must lie in 0..{self.depth}")
        if len(tokens) != tokens_in(layout):
            raise ValueError(f"{len(tokens)} tokens do not fill the layout {layout}")
        if drop is not None and drop.shape != (sum(n for n, _ in layout), self.depth):
            raise ValueError(f"drop must be (sequences, {self.depth}), not {tuple(drop.shape)}")
        x, inner, tables, masks = self._packed(tokens, centres, layout, attend)
        kept = None if drop is None else self._kept(drop, inner, x.dtype)
        features: dict[int, Tensor] = {}
        for number in range(max(depths, default=0) + 1):
            if number:
                block, keep = self.blocks[number - 1], None if kept is None else kept[number - 1]
                if self.checkpointing and torch.is_grad_enabled():
                    x = checkpoint(
                        block, x, inner, tables, masks, keep, use_reentrant=False, preserve_rng_state=False
                    )
                else:
                    x = block(x, inner, tables, masks, keep)
            if number in depths:
                out = self.norm(x)
                features[number] = (
                    out if self.prefix is None else _without_prefix(out, layout, self.prefix_count)
                )
        return [features[d] for d in depths]

    def _packed(
        self, tokens: Tensor, centres: Tensor, layout: Layout, attend: Tensor | None
    ) -> tuple[Tensor, Layout, Rotary | None, list[Tensor | None]]:
        """What every block gets: tokens with prefix, their layout, rotary tables and key masks."""
        tables: Rotary | None = None
        if self.config.rotary != "off":
            local = from_middle(centres, layout, attend)
            tables = rotary(local, self.width // self.heads, self.config.rotary_wavelengths)
        if self.prefix is None:
            return tokens, layout, tables, key_masks(attend, layout)
        count = self.prefix_count
        inner = tuple((n, length + count) for n, length in layout)
        if tables is not None:  # cos 1, sin 0: prefix tokens stand in the middle of their sequence
            tables = (
                _with_prefix(tables[0], layout, count, 1.0),
                _with_prefix(tables[1], layout, count, 0.0),
            )
        attend = None if attend is None else _with_prefix(attend, layout, count, True)
        return self.prefix(tokens, layout), inner, tables, key_masks(attend, inner)

    @torch.no_grad()
    def attention_entropy(
        self, tokens: Tensor, centres: Tensor, layout: Layout, attend: Tensor | None = None
    ) -> Tensor:
        """How widely each head looks, float32 (depth, heads): 0 where every token looks at one key, 1 where
        at all keys alike.

        The entropy of each attended token's attention over the log of the number of keys it may attend to,
        averaged over those tokens. Class token and registers count as keys and not as tokens; sequences of a
        single key, which have no choice, are left out (nan when nothing else is there). Arguments as in
        `trunk`.
        """
        x, inner, tables, masks = self._packed(tokens, centres, layout, attend)
        if attend is None:
            attend = torch.ones(len(tokens), dtype=torch.bool, device=tokens.device)
        counted = attend if self.prefix is None else _with_prefix(attend, layout, self.prefix_count, False)
        found = []
        for block in self.blocks:
            found.append(attention_entropy(cast(Block, block), x, inner, tables, masks, counted))
            x = block(x, inner, tables, masks)
        return torch.stack(found)

    def _kept(self, drop: Tensor, layout: Layout, dtype: torch.dtype) -> Sequence[Tensor]:
        """For each block the factor (S, 1) of its branches: 0 where dropped, else 1 / (1 - rate)."""
        scale = constant([1 / (1 - rate) for rate in self.drop_rates], drop.device, torch.float32)
        return per_token((~drop * scale).to(dtype), layout).unsqueeze(-1).unbind(1)

    def forward(
        self,
        image: Tensor,
        spacing: Tensor,
        geometry: Kind = "volume",
        depths: Sequence[int] | None = None,
        *,
        valid: Tensor | None = None,
        fill: Tensor | None = None,
        axes: Sequence[int] = (0, 1, 2),
    ) -> list[Tensor]:
        """Feature maps (B, D, gz, gy, gx), one a depth, of normalised images.

        image: (B, c, z, y, x) float32 in the stem's axis order (slab: thick axis first). spacing: (B, 3) mm,
        same order. axes: patient axis (0 z, 1 y, 2 x) of each image axis. valid: (B, z, y, x) bool, False
        where there is no image; such voxels, and those added to reach a multiple of the patch, take `fill`
        (B, c), by default each channel's smallest valid value (air), and tokens without a valid voxel are not
        attended to.
        """
        patch = self.patch(geometry)
        if image.ndim != 5 or image.shape[1] != self.config.channels:
            raise ValueError(f"image must be (B, {self.config.channels}, z, y, x), not {tuple(image.shape)}")
        batch, _, *size = image.shape
        missing = [-s % p for s, p in zip(size, patch)]
        tail = (0, missing[2], 0, missing[1], 0, missing[0])
        padded = any(missing)
        if valid is not None or padded:
            there = image.new_ones((batch, *size), dtype=torch.bool) if valid is None else valid
            if fill is None:
                lowest = image if valid is None else image.masked_fill(~there[:, None], torch.inf)
                fill = lowest.flatten(2).amin(2)
                fill = fill.where(fill.isfinite(), 0.0)
            there = functional.pad(there, tail)
            image = torch.where(there[:, None], functional.pad(image, tail), fill[:, :, None, None, None])
        grid = tuple((s + m) // p for s, m, p in zip(size, missing, patch))
        length = grid[0] * grid[1] * grid[2]
        attend = None
        if valid is not None:
            attend = patchify(there[:, None], patch).any(2).flatten()
        grids = constant(grid, image.device).expand(batch, 3)
        order = constant(axes, image.device).expand(batch, 3)
        spacing = spacing.to(image.device)
        if self.config.rotary == "index":
            spacing = torch.ones_like(spacing)
        centres = token_centres(grids, torch.zeros_like(spacing), spacing, patch, order, capacity=length)
        tokens = self.stem(geometry, patchify(image, patch), grids)
        outputs = self.trunk(
            tokens.flatten(0, 1), centres.flatten(0, 1), ((batch, length),), attend, depths=depths
        )
        return [out.view(batch, *grid, self.width).permute(0, 4, 1, 2, 3) for out in outputs]
