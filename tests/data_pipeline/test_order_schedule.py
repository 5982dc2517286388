"""Composition of a group, source tables and epochs: the parts the order is made of."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.epochs import Cell, shard_starts
from data_pipeline.errors import UserError
from data_pipeline.schedule import compose, lane_table, largest_remainder, source_table, stratum_shares

shares = st.lists(st.floats(0.001, 1.0), min_size=1, max_size=12)


@settings(deadline=None)
@given(shares, st.integers(0, 3), st.integers(0, 500))
def test_largest_remainder_sums_and_leaves_nobody_out(weights: list[float], least: int, extra: int) -> None:
    total = least * len(weights) + extra
    counts = largest_remainder(weights, total, least)
    assert sum(counts) == total
    assert min(counts) >= least
    if least == 0:
        quota = np.array(weights) / sum(weights) * total
        assert np.abs(np.array(counts) - quota).max() < 1


def test_largest_remainder_is_exact_where_the_shares_are() -> None:
    assert largest_remainder([0.5, 0.3, 0.2], 3000) == [1500, 900, 600]


def test_a_group_too_small_for_its_strata_is_refused() -> None:
    with pytest.raises(UserError, match="set 3 or more"):
        compose([0.5, 0.3, 0.2], [1, 1, 1], 2)
    assert compose([0.5, 0.3, 0.2], [1, 8, 16], None) == [1, 1, 1]
    assert compose([0.5, 0.5], [1, 16], 17) == [16, 1]


def test_weights_are_met_where_the_composition_leaves_room() -> None:
    wanted = np.array([0.6, 0.4])
    counts = np.array([[10.0, 90.0], [50.0, 50.0]])
    crops = np.array([4.0, 4.0])
    share = stratum_shares(wanted, counts, crops)
    np.testing.assert_allclose(share.sum(axis=0), 1.0)
    np.testing.assert_allclose(share @ (crops / crops.sum()), wanted, atol=1e-6)


@settings(deadline=None, max_examples=40)
@given(shares, st.integers(0, 2**31), st.integers(0, 63))
def test_every_prefix_of_a_lane_is_within_one_crop_of_its_share(
    weights: list[float], seed: int, lane: int
) -> None:
    share = np.array(weights) / sum(weights)
    base = source_table(share)
    table = lane_table(*base, seed, lane, "0")
    n = np.arange(1, 2 * len(table) + 1)
    twice = np.concatenate([table, table])
    for source in range(len(share)):
        drawn = np.cumsum(twice == source)
        exact = (table == source).mean()
        assert abs(exact - share[source]) < 1.5 / len(table) + 1 / 3000
        assert np.abs(drawn - exact * n).max() < 1.0


def test_lanes_do_not_draw_the_same_source_at_the_same_time() -> None:
    base = source_table(np.array([0.5, 0.3, 0.2]))
    tables = np.stack([lane_table(*base, 1, lane, "0") for lane in range(32)])
    spread = (tables == 0).mean(axis=0)
    # Independent lanes would give a standard deviation of 0.088 around 0.5; lanes in step would give 0.5.
    assert spread.std() < 0.2


cells = st.tuples(
    st.lists(st.integers(1, 40), min_size=1, max_size=30),
    st.integers(1, 12),
    st.integers(1, 20),
    st.integers(0, 1000),
)


def make(sizes: list[int], groups: int, window: int, seed: int) -> Cell:
    codes = np.repeat(np.arange(len(sizes)), sizes)
    rows = (np.arange(len(codes)) * 3 + 5).astype(np.int32)
    return Cell(rows, shard_starts(codes), groups, window, seed, "CT")


@settings(deadline=None, max_examples=150)
@given(cells)
def test_every_sample_comes_once_an_epoch(args: tuple[list[int], int, int, int]) -> None:
    cell = make(*args)
    n, groups = len(cell.rows), cell.groups
    if cell.by_shard:
        ranges = [cell.lane_range(lane) for lane in range(groups)]
        assert [r[0] for r in ranges[1:]] == [r[1] for r in ranges[:-1]]
        assert (ranges[0][0], ranges[-1][1]) == (0, n)
        for lane, (low, high) in enumerate(ranges):
            for epoch in range(2):
                drawn = [cell.sample(lane, epoch * (high - low) + i) for i in range(high - low)]
                assert sorted(row for row, _ in drawn) == cell.rows[low:high].tolist()
                assert {e for _, e in drawn} == {epoch}
    else:
        steps = -(-2 * n // groups)
        merged = [cell.sample(lane, step) for step in range(steps) for lane in range(groups)]
        for epoch in range(2):
            drawn = merged[epoch * n : (epoch + 1) * n]
            assert sorted(row for row, _ in drawn) == cell.rows.tolist()
            assert {e for _, e in drawn} == {epoch}


@settings(deadline=None, max_examples=50)
@given(cells, st.lists(st.tuples(st.integers(0, 11), st.integers(0, 500)), min_size=1, max_size=30))
def test_a_draw_does_not_depend_on_what_was_drawn_before(
    args: tuple[list[int], int, int, int], asked: list[tuple[int, int]]
) -> None:
    used = make(*args)
    for lane, n in asked:
        lane %= used.groups
        assert used.sample(lane, n) == make(*args).sample(lane, n)


def test_epochs_differ_and_stay_inside_their_window() -> None:
    cell = make([10] * 40, 2, 4, 0)
    assert cell.by_shard
    first, second = ([cell.sample(0, e * 200 + i)[0] for i in range(200)] for e in range(2))
    assert first != second
    assert sorted(first) == sorted(second)
    for start in range(0, 200, 40):  # 4 shards of 10: each window holds whole shards
        shards = {(row - 5) // 3 // 10 for row in first[start : start + 40]}
        assert len(shards) == 4


def test_a_lane_reads_only_its_own_shards() -> None:
    sizes = [10] * 43
    cell = make(sizes, 4, 4, 0)
    seen = [{(cell.sample(lane, i)[0] - 5) // 3 // 10 for i in range(300)} for lane in range(4)]
    assert set().union(*seen) == set(range(43))
    for one in seen:
        assert len(one) <= 43 / 4 + 2
        assert one == set(range(min(one), max(one) + 1))
    assert all(len(a & b) <= 1 for a, b in itertools.combinations(seen, 2))


def test_the_cache_does_not_grow_with_what_is_drawn() -> None:
    cell = make([5] * 200, 4, 3, 0)
    for i in range(3000):
        for lane in range(4):
            cell.sample(lane, i)
    assert len(cell._windows) <= 8
    assert len(cell._epochs) <= 8
