"""The light decoder of masked autoencoding: a few pre-norm transformer blocks over the tokens of each crop.

`self` (He et al. 2022): visible and mask tokens attend to each other. `cross` (CrossMAE, Fu et al. 2024): a
mask token reads the visible tokens only, so the predictions do not depend on each other. Crops of all sizes
lie one after another in flat tensors, as in the encoder, so that each block is called once. Positions enter
as in the encoder: rotary, or by a learned table where the encoder has no rotary positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.attention import attention
from model.block import Block, LayerNorm, Layout, Rotary, joined, key_masks, segments
from model.config import EncoderConfig
from model.errors import UserError
from model.mlp import Mlp
from model.patches import token_index
from model.positions import LearnedPositions, apply_rotary, rotary
from pretrain.objective import ObjectiveConfig

Masks = Sequence[Tensor | None]


class Places(NamedTuple):
    """Where packed tokens lie."""

    centres: Tensor  # (S, 3) float32: along the patient axes, in mm or for rotary "index" in voxels
    ids: Tensor  # (S,) int64: token number, C-order over the grid
    grid: Tensor  # (S, 3) int64: tokens of their crop


class CrossBlock(nn.Module):
    """x + attention(norm(x), norm(memory)), then x + mlp(norm(x)); a query reads its crop's memory only."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        width, _, self.heads = config.shape
        self.norm1 = LayerNorm(width, config.norm_eps)
        self.norm_memory = LayerNorm(width, config.norm_eps)
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)
        self.norm2 = LayerNorm(width, config.norm_eps)
        self.mlp = Mlp(width, config.mlp_hidden)

    def forward(
        self,
        x: Tensor,
        memory: Tensor,
        layout: Layout,
        memory_layout: Layout,
        tables: tuple[Rotary, Rotary] | None,
        masks: Masks,
    ) -> Tensor:
        """x: (S, w) queries; memory: (M, w); their layouts have equal sequences; tables: rotary of both;
        masks: per segment over the memory, see `key_masks`. Gives (S, w)."""
        q = self.query(self.norm1(x)).view(len(x), self.heads, -1)
        k, v = self.key_value(self.norm_memory(memory)).view(len(memory), 2, self.heads, -1).unbind(1)
        if tables is not None:
            q, k = apply_rotary(q, *tables[0]), apply_rotary(k, *tables[1])
        x = x + self.proj(self._attend(q, k, v, layout, memory_layout, masks).flatten(1))
        return x + self.mlp(self.norm2(x))

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, layout: Layout, memory_layout: Layout, masks: Masks
    ) -> Tensor:
        """Attention of packed heads (S, heads, head width) to (M, heads, head width)."""
        parts = zip(
            layout, masks, segments(q, layout), segments(k, memory_layout), segments(v, memory_layout)
        )
        mixed = []
        for (n, length), mask, *heads in parts:
            if n * length == 0:
                mixed.append(heads[0])
                continue
            query, key, value = (part.unflatten(0, (n, -1)).transpose(1, 2) for part in heads)
            out = attention(query, key, value, mask)
            mixed.append(out.transpose(1, 2).flatten(0, 1))
        return joined(mixed)


class Decoder(nn.Module):
    """Predicts features of the masked tokens of each crop from the encoder's features of the visible ones.

    Raises UserError for an encoder without any positions: all predictions of a crop would be the same.
    """

    def __init__(self, encoder: EncoderConfig, objective: ObjectiveConfig) -> None:
        super().__init__()
        if encoder.rotary == "off" and encoder.learned_positions is None:
            raise UserError(
                'encoder.rotary is "off" and encoder.learned_positions is not set: without positions the '
                "decoder cannot tell masked tokens apart; set one of them"
            )
        width, self.cross = objective.decoder_width, objective.decoder == "cross"
        self.config = EncoderConfig(
            size=None, width=width, depth=objective.decoder_depth, heads=objective.decoder_heads,
            rotary=encoder.rotary, rotary_wavelengths=encoder.rotary_wavelengths,
        )  # fmt: skip
        self.checkpointing = False
        self.embed = nn.Linear(encoder.shape.width, width)
        self.mask_token = nn.Parameter(torch.zeros(width))
        table = encoder.learned_positions if encoder.rotary == "off" else None
        self.positions = LearnedPositions(table, width) if table else None
        kind = CrossBlock if self.cross else Block
        self.blocks = nn.ModuleList(kind(self.config) for _ in range(objective.decoder_depth))
        self.norm = LayerNorm(width, self.config.norm_eps)
        self.apply(_initialise)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(
        self,
        features: Tensor,
        seen: Places,
        asked: Places,
        layout: Layout,
        asked_layout: Layout,
        attend: Tensor,
        predicted: Tensor,
    ) -> Tensor:
        """features: (V, D) of the visible tokens, packed by `layout`; places of the visible and of the
        predicted tokens, the latter packed by `asked_layout` with the same sequences; attend (V,), predicted
        (T,): bool, False where no token stands. Gives (T, width) of the predicted tokens."""
        visible = self.embed(features)
        masked = self.mask_token.to(visible.dtype).expand(len(predicted), -1)
        if self.positions is not None:
            grid, ids = torch.cat((seen.grid, asked.grid)), torch.cat((seen.ids, asked.ids))
            index, _ = token_index(grid, ids[:, None])
            added = self.positions(index, grid)[:, 0].to(visible.dtype)
            visible, masked = visible + added[: len(visible)], masked + added[len(visible) :]
        if self.cross:
            tables, other = self._tables(asked.centres), self._tables(seen.centres)
            masks = key_masks(attend, layout)
            both = None if tables is None or other is None else (tables, other)
            x = masked
            for block in self.blocks:
                x = self._call(block, x, visible, asked_layout, layout, both, masks)
            return self.norm(x)
        x = _join(visible, masked, layout, asked_layout)
        whole = tuple((n, v + p) for (n, v), (_, p) in zip(layout, asked_layout))
        masks = key_masks(_join(attend, predicted, layout, asked_layout), whole)
        tables = self._tables(_join(seen.centres, asked.centres, layout, asked_layout))
        for block in self.blocks:
            x = self._call(block, x, whole, tables, masks)
        return self.norm(_second(x, layout, asked_layout))

    def _call(self, block: nn.Module, *args: object) -> Tensor:
        if self.checkpointing and torch.is_grad_enabled():
            return cast(Tensor, checkpoint(block, *args, use_reentrant=False, preserve_rng_state=False))
        return cast(Tensor, block(*args))

    def _tables(self, centres: Tensor) -> Rotary | None:
        width, _, heads = self.config.shape
        if self.config.rotary == "off":
            return None
        return rotary(centres, width // heads, self.config.rotary_wavelengths)


def _join(first: Tensor, second: Tensor, layout: Layout, other: Layout) -> Tensor:
    """Each sequence of `first` (V, ...) followed by the same one of `second` (T, ...): (V + T, ...)."""
    parts = []
    for (n, _), one, two in zip(layout, segments(first, layout), segments(second, other)):
        parts.append(torch.cat((one.unflatten(0, (n, -1)), two.unflatten(0, (n, -1))), 1).flatten(0, 1))
    return joined(parts)


def _second(x: Tensor, layout: Layout, other: Layout) -> Tensor:
    """The second parts (T, ...) of what `_join` joined."""
    whole = tuple((n, v + p) for (n, v), (_, p) in zip(layout, other))
    parts = zip(segments(x, whole), whole, layout)
    return joined([part.unflatten(0, shape)[:, v:].flatten(0, 1) for part, shape, (_, v) in parts])


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)
    elif isinstance(module, LearnedPositions):
        nn.init.trunc_normal_(module.table, std=0.02)
