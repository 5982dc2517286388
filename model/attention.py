"""Softmax attention: PyTorch's fused kernel, and plain matrix products for bf16 on the CPU, where they are
faster."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

SCORES = 2**20  # scores held at a time, 2 MiB: what a core's cache can take


def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(query key^T / sqrt(d)) value, (n, heads, queries, d).

    key, value: (n, heads, keys, d). mask: (n, 1, 1, keys) bool, True = may be attended to, at least one a
    sequence. The flash kernel of the CPU reaches a third of its bf16 matrix products; there a few heads at a
    time go through three plain operations, with scores rounded to bf16, and the backward pass computes the
    scores again.
    """
    plain = query.device.type == "cpu" and query.dtype == torch.bfloat16
    if not plain or torch.compiler.is_compiling():
        return functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    n, heads = query.shape[:2]
    bias = None
    if mask is not None:
        bias = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, -torch.inf)
        bias = bias.expand(-1, heads, -1, -1).flatten(0, 1)
    out: Tensor = _HeadByHead.apply(*(part.flatten(0, 1) for part in (query, key, value)), bias)
    return out.unflatten(0, (n, heads))


class _HeadByHead(torch.autograd.Function):
    """Attention of (n * heads, queries or keys, d), as many heads at a time as SCORES allows."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(query, key, value, bias)
        out = torch.empty_like(query)
        for q, k, v, b, o in _groups(query, key, value, bias, out):
            torch.bmm(_shares(q, k, b), v, out=o)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        query, key, value, bias = ctx.saved_tensors
        grad = grad.contiguous()
        of_query, of_key, of_value = (torch.empty_like(part) for part in (query, key, value))
        scale = query.shape[-1] ** -0.5
        for q, k, v, b, g, dq, dk, dv in _groups(query, key, value, bias, grad, of_query, of_key, of_value):
            share = _shares(q, k, b)
            torch.bmm(share.transpose(1, 2), g, out=dv)
            of_score = torch._softmax_backward_data(g @ v.transpose(1, 2), share, -1, share.dtype)
            torch.baddbmm(dq, of_score, k, beta=0, alpha=scale, out=dq)
            torch.baddbmm(dk, of_score.transpose(1, 2), q, beta=0, alpha=scale, out=dk)
        return of_query, of_key, of_value, None


def _shares(query: Tensor, key: Tensor, bias: Tensor | None) -> Tensor:
    """How a token's attention is shared out: (some heads, queries, keys), rows sum to 1."""
    scale = query.shape[-1] ** -0.5
    start = query.new_zeros(()) if bias is None else bias
    score = torch.baddbmm(start, query, key.transpose(1, 2), beta=0 if bias is None else 1, alpha=scale)
    return score.softmax(-1)


def _groups(query: Tensor, key: Tensor, *others: Tensor | None) -> Iterator[list[Any]]:
    """The same few heads of each tensor at a time."""
    heads = max(1, SCORES // max(1, query.shape[1] * key.shape[1]))
    tensors = (query, key, *others)
    for start in range(0, len(query), heads):
        yield [None if t is None else t[start : start + heads] for t in tensors]
