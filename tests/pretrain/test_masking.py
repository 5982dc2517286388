"""Counts, orders and blocks of masking."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.rng import rng
from pretrain.masking import (
    block_order,
    draw_mask,
    draw_ratio,
    masked_count,
    places,
    predicted_count,
    visible_count,
)
from pretrain.objective import ObjectiveConfig

ratios = st.sampled_from([0.1, 0.3, 0.5, 0.6, 0.75, 0.8, 0.9, 0.99])
shares = st.sampled_from([0.05, 0.25, 1 / 3, 0.5, 1.0])
grids = st.tuples(*[st.integers(1, 7)] * 3)


@settings(deadline=None)
@given(st.integers(0, 5000), ratios, shares)
def test_counts_add_up_and_grow_slowly(n: int, ratio: float, share: float) -> None:
    hidden, seen, asked = masked_count(n, ratio), visible_count(n, ratio), predicted_count(n, ratio, share)
    assert hidden + seen == n
    assert n == 0 or seen >= 1
    assert abs(hidden - n * ratio) <= 0.5 + 1e-6 or seen == 1
    assert 0 <= asked <= hidden
    assert asked == hidden or share < 1
    assert (asked > 0) == (hidden > 0)
    assert 0 <= visible_count(n + 1, ratio) - seen <= 1
    assert 0 <= predicted_count(n + 1, ratio, share) - asked <= 1


@settings(deadline=None)
@given(grids, st.integers(0, 20), ratios, ratios, shares, st.booleans(), st.integers(0, 10**6), st.data())
def test_masks_split_the_valid_tokens_and_fit_their_places(
    grid: tuple[int, int, int], spare: int, one: float, other: float, share: float, blocks: bool, index: int,
    data: st.DataObject,
) -> None:  # fmt: skip
    tokens = int(np.prod(grid))
    objective = ObjectiveConfig(
        mask_ratio=(min(one, other), max(one, other)), masking="block" if blocks else "random",
        predict_share=share,
    )  # fmt: skip
    valid = np.array(data.draw(st.lists(st.booleans(), min_size=tokens, max_size=tokens)))
    visible, target = draw_mask(3, index, grid, valid, objective)
    used = [*visible.tolist(), *target.tolist()]
    assert len(set(used)) == len(used)
    assert valid[used].all()
    ratio, count = draw_ratio(3, index, objective), int(valid.sum())
    assert min(one, other) <= ratio <= max(one, other)
    assert len(visible) == visible_count(count, ratio)
    assert len(target) == predicted_count(count, ratio, share)
    most_visible, most_predicted = places(tokens + spare, objective)
    assert len(visible) <= most_visible
    assert len(target) <= most_predicted


def test_there_are_no_more_places_than_a_full_crop_fills() -> None:
    """A place costs what a token costs: the encoder's are for visible tokens only."""
    assert places(64, ObjectiveConfig()) == (16, 48)
    assert places(100, ObjectiveConfig(mask_ratio=(0.5, 0.9), predict_share=0.5)) == (50, 45)


def test_the_order_of_tokens_does_not_depend_on_which_are_valid() -> None:
    grid, objective = (3, 4, 5), ObjectiveConfig(mask_ratio=0.5)
    every = np.concatenate(draw_mask(0, 7, grid, np.ones(60, bool), objective))
    valid = np.arange(60) % 3 > 0
    some = np.concatenate(draw_mask(0, 7, grid, valid, objective))
    assert some.tolist() == [token for token in every.tolist() if valid[token]]


def test_a_fixed_ratio_masks_what_it_always_has() -> None:
    """Masks are part of what makes a run repeatable; a range of ratios draws from a generator of its own."""
    visible, target = draw_mask(0, 11, (2, 3, 2), np.ones(12, bool), ObjectiveConfig())
    order = rng(0, 11, "mask").permutation(12).tolist()
    assert (visible.tolist(), target.tolist()) == (order[:3], order[3:])
    ranged = np.concatenate(
        draw_mask(0, 11, (2, 3, 2), np.ones(12, bool), ObjectiveConfig(mask_ratio=(0.2, 0.9)))
    )
    assert ranged.tolist() == order


def test_ranged_ratios_are_uniform_and_keyed_by_crop() -> None:
    objective = ObjectiveConfig(mask_ratio=(0.6, 0.9))
    drawn = [draw_ratio(0, index, objective) for index in range(2000)]
    assert np.mean(drawn) == pytest.approx(0.75, abs=0.006)
    assert np.std(drawn) == pytest.approx(0.3 / 12**0.5, abs=0.004)
    assert drawn[5] == draw_ratio(0, 5, objective)
    assert drawn[5] != draw_ratio(1, 5, objective)


@settings(deadline=None)
@given(grids, st.integers(0, 10))
def test_block_orders_are_permutations(grid: tuple[int, int, int], seed: int) -> None:
    order = block_order(np.random.default_rng(seed), grid, (2, 2, 2))
    assert sorted(order.tolist()) == list(range(int(np.prod(grid))))


def test_random_masks_are_uniform() -> None:
    firsts = [int(draw_mask(s, 0, (2, 3, 1), np.ones(6, bool), ObjectiveConfig())[0][0]) for s in range(3000)]
    assert np.bincount(firsts, minlength=6).min() > 400


def test_blocks_stay_together() -> None:
    grid, block = (4, 6, 8), (2, 3, 4)
    for seed in range(20):
        order = block_order(np.random.default_rng(seed), grid, block)
        z, y, x = np.unravel_index(order[:48], grid)  # a quarter: at most whole blocks and one more
        boxes = {(a, b, c) for a, b, c in zip(z.tolist(), y.tolist(), x.tolist())}
        scattered = np.unravel_index(np.random.default_rng(seed).permutation(192)[:48], grid)

        def touching(points: set[tuple[int, int, int]]) -> int:
            return sum((a, b, c + 1) in points for a, b, c in points)

        assert touching(boxes) > 1.5 * touching(set(zip(*(axis.tolist() for axis in scattered))))
