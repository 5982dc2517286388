"""Simulated people: properties, and a slow reference for the distance."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from finetune import simulate

SHAPES = st.tuples(st.integers(1, 5), st.integers(2, 6), st.integers(2, 6))
MASKS = SHAPES.flatmap(lambda s: hnp.arrays(bool, s))
SPACING = st.tuples(*[st.floats(0.4, 5.0)] * 3)
SEEDS = st.integers(0, 2**32 - 1)


def slow_depth(region, spacing):
    """Smallest distance in mm to any voxel outside the region, by trying all."""
    inside, outside = np.argwhere(region), np.argwhere(~region)
    result = np.zeros(region.shape)
    for voxel in inside:
        gaps = np.sqrt((((outside - voxel) * np.array(spacing)) ** 2).sum(1))
        result[tuple(voxel)] = gaps.min() if len(gaps) else 1.0
    return result


@given(MASKS, SPACING)
@settings(max_examples=60, deadline=None)
def test_depth_is_the_distance_in_mm_to_the_outside(region, spacing):
    np.testing.assert_allclose(simulate.depth(region, spacing), slow_depth(region, spacing), rtol=1e-6)


@given(MASKS, SPACING, SEEDS, st.sampled_from([0.0, 1.0, 8.0]))
@settings(max_examples=60, deadline=None)
def test_a_first_click_lies_in_the_object_and_repeats(region, spacing, seed, power):
    clicks = [simulate.first_click(region, spacing, np.random.default_rng(seed), power) for _ in range(2)]
    assert clicks[0] == clicks[1]
    assert (clicks[0] is None) == (not region.any())
    assert clicks[0] is None or region[clicks[0]]


@given(SHAPES.flatmap(lambda s: st.tuples(*[hnp.arrays(bool, s)] * 3)), SPACING, SEEDS)
@settings(max_examples=60, deadline=None)
def test_a_correction_lies_in_a_known_error_and_its_sign_says_which(arrays, spacing, seed):
    predicted, truth, known = arrays
    click = simulate.correction_click(predicted, truth, known, spacing, np.random.default_rng(seed), 1.0)
    wrong = (predicted != truth) & known
    assert (click is None) == (not wrong.any())
    if click is not None:
        where, sign = click
        assert wrong[where]
        assert sign == (1 if truth[where] else -1)


@given(SHAPES.flatmap(lambda s: st.tuples(*[hnp.arrays(bool, s)] * 2)))
@settings(max_examples=60, deadline=None)
def test_the_challenge_click_lies_in_the_largest_error(arrays):
    predicted, truth = arrays
    click = simulate.centre_click(predicted, truth)
    wrong = predicted != truth
    assert (click is None) == (not wrong.any())
    if click is not None:
        where, sign = click
        part = simulate.largest_component(wrong)
        assert part is not None
        assert part[where]
        assert sign == (1 if truth[where] else -1)


def test_the_challenge_click_takes_the_centre_and_the_lowest_index_of_equals():
    truth = np.zeros((1, 9, 9), bool)
    truth[0, 1:4, 1:4] = True
    assert simulate.centre_click(np.zeros_like(truth), truth) == ((0, 2, 2), 1)
    pair = np.zeros((3, 3, 8), bool)
    pair[1, 1, 1] = pair[1, 1, 6] = True
    assert simulate.centre_click(np.zeros_like(pair), pair) == ((1, 1, 1), 1)


def test_the_image_border_is_outside_for_the_challenge_only():
    """An organ cut by the border: people click at the cut, the challenge's transform away from it."""
    truth = np.zeros((1, 5, 8), bool)
    truth[0, :, :4] = True
    assert simulate.depth(truth, (1, 1, 1)).argmax() % 8 == 0
    click = simulate.centre_click(np.zeros_like(truth), truth)
    assert click is not None
    assert click[0] == (0, 1, 1)


def test_diagonal_neighbours_connect_in_a_volume_and_in_a_plane():
    volume = np.zeros((2, 2, 2), bool)
    volume[0, 0, 0] = volume[1, 1, 1] = True
    part = simulate.largest_component(volume)
    assert part is not None
    assert part.sum() == 2
    plane = np.zeros((1, 2, 2), bool)
    plane[0, 0, 0] = plane[0, 1, 1] = True
    assert simulate.connectivity(plane.shape).sum() == 9
    flat = simulate.largest_component(plane)
    assert flat is not None
    assert flat.sum() == 2


def test_high_powers_click_near_the_centre_and_power_zero_everywhere():
    region = np.zeros((9, 9, 9), bool)
    region[1:8, 1:8, 1:8] = True
    middle = np.array([4, 4, 4])

    def spread(power):
        rng = np.random.default_rng(0)
        clicks = [simulate.first_click(region, (1, 1, 1), rng, power) for _ in range(300)]
        return np.abs(np.array(clicks) - middle).max(1).mean()

    # Uniform over a 7-cube the mean Chebyshev distance is 2.53; the centre is at 0.
    assert 2.3 < spread(0.0) < 2.75
    assert spread(8.0) < 1.0


@given(MASKS, SEEDS, st.floats(0, 0.5))
@settings(max_examples=60, deadline=None)
def test_a_jittered_box_stays_inside_and_near_the_tight_one(region, seed, jitter):
    box = simulate.jittered_box(region, np.random.default_rng(seed), jitter)
    tight = simulate.tight_box(region)
    assert (box is None) == (tight is None) == (not region.any())
    if box is None or tight is None:
        return
    for low, high, a, b, n in zip(*box, *tight, region.shape):
        assert 0 <= low <= high < n
        reach = max(1, round(jitter * (b - a + 1))) if jitter else 0
        assert min(abs(low - a), abs(low - b)) <= reach
    if jitter == 0:
        assert box == tight
