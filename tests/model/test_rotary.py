"""Rotary positions in mm."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.positions import LearnedPositions, apply_rotary, rotary


def test_against_complex_numbers() -> None:
    centres = torch.rand(5, 3) * 300
    head = 64
    x = torch.randn(5, 2, head)
    cos, sin = rotary(centres, head)
    assert cos.shape == sin.shape == (5, 32)
    assert cos.dtype == torch.float32
    found = apply_rotary(x, cos, sin)
    lengths = [2.0 * (2048 / 2) ** (i / 9) for i in range(10)]
    expected = x.double().clone()
    for token in range(5):
        for pair in range(30):
            angle = 2 * math.pi * centres[token, pair // 10].item() / lengths[pair % 10]
            turned = torch.complex(x[token, :, pair].double(), x[token, :, pair + 32].double())
            turned = turned * complex(math.cos(angle), math.sin(angle))
            expected[token, :, pair], expected[token, :, pair + 32] = turned.real, turned.imag
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=2e-3)
    assert torch.equal(found[..., 30:32], x[..., 30:32])  # pairs left over are not turned


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_is_that_of_the_written_out_turn(dtype: torch.dtype) -> None:
    cos, sin = rotary(torch.rand(7, 3) * 50, 32)
    x, weight = torch.randn(7, 2, 32).to(dtype), torch.randn(7, 2, 32)
    found, expected = x.clone().requires_grad_(), x.double().requires_grad_()
    (apply_rotary(found, cos, sin) * weight.to(dtype)).sum().backward()
    first, second = expected.chunk(2, -1)
    c, s = cos.double()[:, None], sin.double()[:, None]
    turned = torch.cat((first * c - second * s, second * c + first * s), -1)
    (turned * weight.to(dtype).double()).sum().backward()
    assert found.grad is not None
    assert found.grad.dtype == dtype
    precision = 1e-5 if dtype == torch.float32 else 2**-8
    torch.testing.assert_close(found.grad.double(), expected.grad, rtol=precision, atol=precision)


@given(
    shift=st.tuples(*[st.floats(-500, 500)] * 3),
    head=st.sampled_from([24, 32, 64, 88]),
    seed=st.integers(0, 99),
)
@settings(max_examples=30, deadline=None)
def test_scores_depend_on_differences_of_positions(shift: tuple, head: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    centres = torch.rand(6, 3, generator=generator) * 100
    q, k = torch.randn(2, 6, 1, head, generator=generator)

    def scores(at: torch.Tensor) -> torch.Tensor:
        table = rotary(at, head)
        return apply_rotary(q, *table)[:, 0] @ apply_rotary(k, *table)[:, 0].T

    here = scores(centres)
    torch.testing.assert_close(scores(centres + torch.tensor(shift)), here, rtol=0, atol=0.02)
    assert (scores(centres * 1.5) - here).abs().max() > 0.1  # and on nothing less than the differences


def test_norms_are_kept_and_bf16_positions_refused() -> None:
    x = torch.randn(4, 3, 24)
    turned = apply_rotary(x, *rotary(torch.rand(4, 3) * 50, 24))
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    with pytest.raises(TypeError, match="float32"):
        rotary(torch.zeros(1, 3, dtype=torch.bfloat16), 24)


def test_learned_table_is_exact_on_its_grid_and_linear_between() -> None:
    learned = LearnedPositions((1, 2, 4), 6)
    torch.nn.init.normal_(learned.table)
    index = torch.cartesian_prod(torch.arange(1), torch.arange(2), torch.arange(4))[None]
    with torch.no_grad():
        assert torch.equal(learned(index, torch.tensor([[1, 2, 4]]))[0], learned.table)
        table = learned.table.T.reshape(1, 6, 1, 2, 4)
        resized = torch.nn.functional.interpolate(table, (3, 5, 3), mode="trilinear")
        index = torch.cartesian_prod(torch.arange(3), torch.arange(5), torch.arange(3))[None]
        found = learned(index, torch.tensor([[3, 5, 3]]))[0]
    torch.testing.assert_close(found, resized.flatten(2)[0].T, rtol=1e-5, atol=1e-6)
