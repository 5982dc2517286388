"""Pre-norm transformer block on a flat tensor of tokens.

Sequences of different lengths lie one after another in one (S, D) tensor; a layout says which: ((n, length),
...). Linear layers, norms and MLPs see all tokens at once; attention reshapes each segment to its sequences,
so that a token attends to its own sequence only, with no block mask.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from model.attention import attention
from model.config import EncoderConfig
from model.mlp import LayerScale, Mlp, SwiGlu
from model.positions import apply_rotary

Layout = tuple[tuple[int, int], ...]
Rotary = tuple[Tensor, Tensor]


class LayerNorm(nn.LayerNorm):
    """Layer norm computed in float32 whatever the dtype of input and weights; keeps the input's dtype."""

    def forward(self, input: Tensor) -> Tensor:
        # The CPU's kernel reads bf16 beside float32 weights; elsewhere compiled code fuses the conversions.
        mixed = input.device.type == "cpu" and input.dtype == torch.bfloat16
        x = functional.layer_norm(
            input if mixed else input.float(),
            self.normalized_shape,
            self.weight.float(),
            self.bias.float(),
            self.eps,
        )
        return x.to(input.dtype)


def tokens_in(layout: Layout) -> int:
    """Number of tokens a layout describes."""
    return sum(n * length for n, length in layout)


def segments(x: Tensor, layout: Layout) -> Sequence[Tensor]:
    """The tokens (n * length, ...) of each segment of x (S, ...); views, and x itself where it is the only
    one."""
    return [x] if len(layout) == 1 else x.split([n * length for n, length in layout])


def joined(parts: Sequence[Tensor]) -> Tensor:
    """The inverse of `segments`."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def key_masks(attend: Tensor | None, layout: Layout) -> list[Tensor | None]:
    """Per segment the attention mask (n, 1, 1, length), True = may be attended to, or None where nothing is
    masked.

    A sequence with no valid key at all attends to everything: its output means nothing, but it is finite.
    """
    if attend is None:
        return [None] * len(layout)
    masks: list[Tensor | None] = []
    for part, (n, length) in zip(segments(attend, layout), layout):
        keys = part.view(n, length)
        masks.append((keys | ~keys.any(1, keepdim=True)).view(n, 1, 1, length))
    return masks


def per_token(values: Tensor, layout: Layout) -> Tensor:
    """Spread the values (n_total, ...) of sequences over their tokens: (S, ...)."""
    parts = values.split([n for n, _ in layout])
    return joined(
        [
            part[:, None].expand(-1, length, *part.shape[1:]).flatten(0, 1)
            for part, (_, length) in zip(parts, layout)
        ]
    )


class Attention(nn.Module):
    """Multi-head self-attention inside each sequence of a layout; parameters are named as in timm."""

    def __init__(self, width: int, heads: int, *, qk_norm: bool = False, eps: float = 1e-6) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm = LayerNorm(width // heads, eps) if qk_norm else nn.Identity()
        self.k_norm = LayerNorm(width // heads, eps) if qk_norm else nn.Identity()
        self.proj = nn.Linear(width, width)

    def forward(
        self, x: Tensor, layout: Layout, rotary: Rotary | None, masks: Sequence[Tensor | None]
    ) -> Tensor:
        """x: (S, D); rotary: cos and sin (S, head_dim / 2) or None; masks: see `key_masks`. Gives (S, D)."""
        q, k, v = self.heads_of(x, rotary)
        mixed = []
        for (n, length), mask, *parts in zip(layout, masks, *(segments(part, layout) for part in (q, k, v))):
            if n * length == 0:
                mixed.append(parts[2])
                continue
            query, key, value = (part.view(n, length, self.heads, -1).transpose(1, 2) for part in parts)
            out = attention(query, key, value, mask)
            mixed.append(out.transpose(1, 2).reshape(n * length, self.heads, -1))
        return self.proj(joined(mixed).flatten(1))

    def heads_of(self, x: Tensor, rotary: Rotary | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, each (S, heads, head width)."""
        q, k, v = self.qkv(x).view(len(x), 3, self.heads, -1).unbind(1)
        q, k = self.q_norm(q), self.k_norm(k)
        if rotary is not None:
            # v gets a place of its own, so that the product of qkv does not live until the backward pass
            q, k, v = apply_rotary(q, *rotary), apply_rotary(k, *rotary), v.contiguous()
        return q, k, v


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); LayerScale and whole-block drop-path where asked for."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        width, _, heads = config.shape
        eps = config.norm_eps
        self.norm1 = LayerNorm(width, eps)
        self.attn = Attention(width, heads, qk_norm=config.qk_norm, eps=eps)
        self.ls1 = LayerScale(width, config.layer_scale) if config.layer_scale else nn.Identity()
        self.norm2 = LayerNorm(width, eps)
        hidden = config.mlp_hidden
        self.mlp = SwiGlu(width, hidden) if config.swiglu else Mlp(width, hidden)
        self.ls2 = LayerScale(width, config.layer_scale) if config.layer_scale else nn.Identity()

    def forward(
        self,
        x: Tensor,
        layout: Layout,
        rotary: Rotary | None = None,
        masks: Sequence[Tensor | None] | None = None,
        keep: Tensor | None = None,
    ) -> Tensor:
        """x: (S, D). masks: per segment, or None. keep: (S, 1) factor on both branches, 0 drops the block."""
        masks = masks if masks is not None else [None] * len(layout)
        branch = self.ls1(self.attn(self.norm1(x), layout, rotary, masks))
        x = x + branch if keep is None else torch.addcmul(x, branch, keep)
        branch = self.ls2(self.mlp(self.norm2(x)))
        return x + branch if keep is None else torch.addcmul(x, branch, keep)
