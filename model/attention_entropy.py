"""How widely attention looks: its entropy, which falls to 0 or rises to 1 in every head when features
collapse."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from model.block import Block, Layout, Rotary

SCORES = 2**23  # attention scores held at a time: 64 MiB, and as much again for their softmax


def attention_entropy(
    block: Block,
    x: Tensor,
    layout: Layout,
    rotary: Rotary | None,
    masks: Sequence[Tensor | None],
    counted: Tensor,
) -> Tensor:
    """Mean entropy of a block's attention over the log of the number of keys, float32 (heads,).

    Arguments as those of the block, and counted (S,) bool: the tokens whose attention enters the mean, but
    for sequences of a single key. nan when no token counts. Computed in float64, which autocast leaves alone.
    """
    query, key, _ = block.attn.heads_of(block.norm1(x), rotary)
    heads, width = query.shape[1:]
    total = query.new_zeros(heads, dtype=torch.float64)
    number = total.new_zeros(())
    sizes = [n * length for n, length in layout]
    for (n, length), mask, *parts in zip(
        layout, masks, query.split(sizes), key.split(sizes), counted.split(sizes)
    ):
        if n * length == 0:
            continue
        q, k = (part.double().view(n, length, heads, width).transpose(1, 2) for part in parts[:2])
        keys = q.new_full((n,), length) if mask is None else mask.sum((1, 2, 3))
        mine = parts[2].view(n, length) & (keys > 1)[:, None]
        most = keys.clamp(min=2).log()[:, None, None]
        rows = max(1, SCORES // (n * heads * length))
        for some, of_mine in zip(q.split(rows, 2), mine.split(rows, 1)):
            score = some @ k.transpose(2, 3) / math.sqrt(width)
            if mask is not None:
                score = score.masked_fill(~mask, -math.inf)
            share = torch.special.entr(score.softmax(-1)).sum(-1) / most
            total += share.masked_fill(~of_mine[:, None], 0.0).sum((0, 2))
        number += mine.sum()
    return (total / number).float()
