"""Counts, orders and blocks of masking."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from pretrain.masking import (
    block_order,
    masked_count,
    predicted_count,
    random_order,
    valid_first,
    visible_count,
)

ratios = st.sampled_from([0.1, 0.3, 0.5, 0.6, 0.75, 0.8, 0.9, 0.99])
grids = st.tuples(*[st.integers(1, 7)] * 3)


@given(st.integers(0, 5000), ratios, st.sampled_from([0.05, 0.25, 1 / 3, 0.5, 1.0]))
def test_counts_agree_between_numbers_and_tensors_and_grow_slowly(n: int, ratio: float, share: float) -> None:
    hidden, seen, asked = masked_count(n, ratio), visible_count(n, ratio), predicted_count(n, ratio, share)
    assert hidden + seen == n
    assert n == 0 or seen >= 1
    assert abs(hidden - n * ratio) <= 0.5 + 1e-6 or seen == 1
    assert 0 <= asked <= hidden
    assert asked == hidden or share < 1
    assert (asked > 0) == (hidden > 0)
    tensor = torch.tensor([n])
    assert int(masked_count(tensor, ratio)) == hidden
    assert int(predicted_count(tensor, ratio, share)) == asked
    assert 0 <= visible_count(n + 1, ratio) - seen <= 1
    assert 0 <= predicted_count(n + 1, ratio, share) - asked <= 1


@given(grids, st.integers(0, 50), st.integers(0, 10), st.booleans())
def test_orders_are_permutations_with_unused_slots_last(
    grid: tuple[int, int, int], spare: int, seed: int, blocks: bool
) -> None:
    tokens, generator = int(np.prod(grid)), np.random.default_rng(seed)
    if blocks:
        order = block_order(generator, grid, tokens + spare, (2, 2, 2))
    else:
        order = random_order(generator, grid, tokens + spare)
    assert sorted(order[:tokens].tolist()) == list(range(tokens))
    assert order[tokens:].tolist() == list(range(tokens, tokens + spare))


def test_random_orders_are_uniform() -> None:
    firsts = [int(random_order(np.random.default_rng(s), (2, 3, 1), 6)[0]) for s in range(3000)]
    assert np.bincount(firsts, minlength=6).min() > 400


def test_blocks_stay_together() -> None:
    grid, block = (4, 6, 8), (2, 3, 4)
    for seed in range(20):
        order = block_order(np.random.default_rng(seed), grid, 192, block)
        z, y, x = np.unravel_index(order[:48], grid)  # a quarter: at most whole blocks and one more
        boxes = {(a, b, c) for a, b, c in zip(z.tolist(), y.tolist(), x.tolist())}
        scattered = np.unravel_index(np.random.default_rng(seed).permutation(192)[:48], grid)

        def touching(points: set[tuple[int, int, int]]) -> int:
            return sum((a, b, c + 1) in points for a, b, c in points)

        assert touching(boxes) > 1.5 * touching(set(zip(*(axis.tolist() for axis in scattered))))


@given(st.integers(1, 40), st.integers(0, 1000))
def test_valid_first_keeps_the_sequence(n: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    order, valid = generator.permutation(n), generator.random(n) < 0.5
    moved = valid_first(torch.tensor(order)[None], torch.tensor(valid)[None])[0].tolist()
    assert moved == [t for t in order if valid[t]] + [t for t in order if not valid[t]]
