"""The light decoder of masked autoencoding: a few pre-norm transformer blocks over the tokens of each crop.

`self` (He et al. 2022): visible and mask tokens attend to each other. `cross` (CrossMAE, Fu et al. 2024): a
mask token reads the visible tokens only, so the predictions do not depend on each other. Positions enter by
the same rotary tables in mm as in the encoder, computed in float32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from model.block import LayerNorm
from model.positions import apply_rotary, rotary

Table = tuple[Tensor, Tensor]  # rotary cosines and sines, each (n * tokens, head width / 2) float32


class DecoderBlock(nn.Module):
    """Attention and MLP; queries attend to their own crop's keys only."""

    def __init__(self, width: int, heads: int, cross: bool) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = LayerNorm(width, eps=1e-6)
        self.norm_memory = LayerNorm(width, eps=1e-6) if cross else None
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.project = nn.Linear(width, width)
        self.norm2 = LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(
        self, x: Tensor, memory: Tensor | None, tables: tuple[Table, Table], attend: Tensor
    ) -> Tensor:
        """`x` (n, q, w); `memory` (n, k, w), None for self-attention; `attend` (n, k) bool; returns (n, q,
        w).
        """
        normed = self.norm1(x)
        source = normed if memory is None or self.norm_memory is None else self.norm_memory(memory)
        key, value = self.key_value(source).chunk(2, dim=-1)
        mixed = functional.scaled_dot_product_attention(
            self._heads(self.query(normed), tables[0]),
            self._heads(key, tables[1]),
            self._heads(value, None),
            attn_mask=attend[:, None, None, :],
        )
        x = x + self.project(mixed.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))

    def _heads(self, x: Tensor, table: Table | None) -> Tensor:
        """(n, tokens, w) -> (n, heads, tokens, head width), turned by the rotary table where there is one."""
        split = x.unflatten(-1, (self.heads, -1))
        if table is not None:
            split = apply_rotary(split.flatten(0, 1), *table).unflatten(0, x.shape[:2])
        return split.transpose(1, 2)


class Decoder(nn.Module):
    """Predicts features of the masked tokens of each crop from the encoder's features of the visible ones."""

    def __init__(
        self,
        encoder_width: int,
        width: int,
        depth: int,
        heads: int,
        cross: bool,
        wavelengths: tuple[float, float],
    ) -> None:
        super().__init__()
        self.cross = cross
        self.head_width = width // heads
        self.wavelengths = wavelengths
        self.embed = nn.Linear(encoder_width, width)
        self.mask_token = nn.Parameter(torch.zeros(width))
        self.blocks = nn.ModuleList(DecoderBlock(width, heads, cross) for _ in range(depth))
        self.norm = LayerNorm(width, eps=1e-6)
        self.apply(_initialise)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(
        self,
        features: Sequence[Tensor],
        attend: Sequence[Tensor],
        centres: Sequence[Tensor],
        target_centres: Sequence[Tensor],
        predicted: Sequence[Tensor],
    ) -> list[Tensor]:
        """One entry a row block: `features` (n, v, D), `attend` (n, v), `centres` (n, v, 3), `target_centres`
        (n, p, 3), `predicted` (n, p); returns (n, p, width) each."""
        return [
            self._block(*each)
            for each in zip(features, attend, centres, target_centres, predicted, strict=True)
        ]

    def _block(
        self, features: Tensor, attend: Tensor, centres: Tensor, target_centres: Tensor, predicted: Tensor
    ) -> Tensor:
        visible = self.embed(features)
        masked = self.mask_token.to(visible.dtype).expand(*predicted.shape, -1)
        keys = self._table(centres)
        if self.cross:
            x, tables = masked, (self._table(target_centres), keys)
            for block in self.blocks:
                x = block(x, visible, tables, attend)
            return self.norm(x)
        x = torch.cat([visible, masked], dim=1)
        both = self._table(torch.cat([centres, target_centres], dim=1))
        everything = torch.cat([attend, predicted], dim=1)
        for block in self.blocks:
            x = block(x, None, (both, both), everything)
        return self.norm(x[:, visible.shape[1] :])

    def _table(self, centres: Tensor) -> Table:
        return rotary(centres.flatten(0, 1), self.head_width, self.wavelengths)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)
