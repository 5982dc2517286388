"""Attention in bfloat16 on the CPU against the formula in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from model import attention as module
from model.attention import attention


def dense(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
    if mask is not None:
        scores = torch.where(mask, scores, -torch.inf)
    return scores.softmax(-1) @ value


def inputs(dtype: torch.dtype, queries: int, keys: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(queries)
    shapes = [(3, 2, queries, 16), (3, 2, keys, 16), (3, 2, keys, 16)]
    rounded = [torch.randn(shape, generator=generator).bfloat16() for shape in shapes]
    return [x.to(dtype).requires_grad_() for x in rounded]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("queries", "keys"), [(40, 40), (7, 33), (1, 5)])
@pytest.mark.parametrize("together", [1, 3 * 40 * 40, 1 << 20])
def test_output_and_gradients(
    masked: bool, queries: int, keys: int, together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SCORES", together)
    mask = None
    if masked:
        mask = torch.arange(keys) < torch.tensor([keys, 2, 4]).view(3, 1, 1, 1)
    ours, exact = inputs(torch.bfloat16, queries, keys), inputs(torch.float64, queries, keys)
    weight = torch.randn(3, 2, queries, 16, generator=torch.Generator().manual_seed(1)).bfloat16()
    found, wanted = attention(*ours, mask), dense(*exact, mask)
    (found * weight).sum().backward()
    (wanted * weight.double()).sum().backward()
    # Scores, weights and output are each rounded to 8 bits once.
    assert (found.double() - wanted).norm() < 0.01 * wanted.norm()
    for one, other in zip(ours, exact):
        assert one.grad is not None
        assert other.grad is not None
        assert (one.grad.double() - other.grad).norm() < 0.015 * other.grad.norm() + 1e-6
    if masked:
        assert not ours[1].grad[1, :, 2:].any()
        assert not ours[2].grad[1, :, 2:].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_other_precisions_are_the_fused_kernel(dtype: torch.dtype) -> None:
    query, key, value = inputs(dtype, 9, 9)
    assert torch.equal(
        attention(query, key, value), functional.scaled_dot_product_attention(query, key, value)
    )


def test_a_sequence_does_not_see_its_neighbours() -> None:
    query, key, value = (x.detach() for x in inputs(torch.bfloat16, 24, 24))
    alone = attention(query[1:2], key[1:2], value[1:2])
    assert torch.equal(attention(query, key, value)[1:2], alone)
