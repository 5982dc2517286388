"""Composition of a group, the lanes' table of sources and epochs: the parts the order is made of."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.epochs import Cell, samples_per_shard
from data_pipeline.errors import UserError
from data_pipeline.lane_table import LaneTable, cell_counts, interleave, period
from data_pipeline.matching import Jobs, match
from data_pipeline.schedule import compose, largest_remainder, merge_rare, share_windows, stratum_shares

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
    assert compose([0.5, 0.3, 0.2], [1, 8, 16], 3) == [1, 1, 1]
    assert compose([0.5, 0.5], [1, 16], 17) == [16, 1]


def test_weights_are_met_where_the_composition_leaves_room() -> None:
    wanted = np.array([0.6, 0.4])
    counts = np.array([[10.0, 90.0], [50.0, 50.0]])
    crops = np.array([4.0, 4.0])
    share = stratum_shares(wanted, counts, crops)
    np.testing.assert_allclose(share.sum(axis=0), 1.0)
    np.testing.assert_allclose(share @ (crops / crops.sum()), wanted, atol=1e-6)


def test_a_rare_row_class_joins_the_next_lower_one_of_its_geometry() -> None:
    kinds = ["volume", "volume", "volume", "slab", "planar"]
    ks = [1, 4, 16, 16, 1]
    # Rows: 10, 2, 0.1, 0.1, 3 of 15.2; a slab has no lower class and stays.
    assert merge_rare(kinds, ks, [10, 8, 1.6, 1.6, 3], 15) == [0, 1, 1, 3, 4]
    # In 4 rows the second class would have 0.55 rows with what it takes over, in 3 only 0.41.
    assert merge_rare(kinds, ks, [10, 8, 1.6, 1.6, 3], 4) == [0, 1, 1, 3, 4]
    assert merge_rare(kinds, ks, [10, 8, 1.6, 1.6, 3], 3) == [0, 0, 0, 3, 4]
    assert merge_rare(kinds, ks, [1, 4, 16, 16, 1], None) == [0, 1, 2, 3, 4]


@given(
    st.lists(st.tuples(st.floats(0.0, 1.0), st.integers(1, 30)), min_size=1, max_size=20), st.integers(1, 40)
)
def test_the_windows_of_a_lane_keep_to_its_budget(cells: list[tuple[float, int]], budget: int) -> None:
    share, pieces = [c[0] for c in cells], [c[1] for c in cells]
    windows = share_windows(share, pieces, budget)
    assert all(1 <= w <= n for w, n in zip(windows, pieces))
    assert sum(windows) == max(len(cells), min(budget, sum(pieces)))


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 20)), min_size=1, max_size=8))
def test_row_kinds_are_spread_evenly_over_a_group(kinds: list[tuple[str, int]]) -> None:
    names, crops = [k[0] for k in kinds], [k[1] for k in kinds]
    row = np.array(interleave(names, crops))
    assert np.bincount(row).tolist() == crops
    n = np.arange(1, len(row) + 1)
    of = np.array(names)[row]
    for name in set(names):
        inside = of == name
        assert np.abs(np.cumsum(inside) - inside.mean() * n).max() < 1
        for c in {c for c in range(len(names)) if names[c] == name}:
            among = row[inside] == c
            assert np.abs(np.cumsum(among) - among.mean() * np.arange(1, len(among) + 1)).max() < 1


@st.composite
def mixtures(draw: st.DrawFn) -> tuple[np.ndarray, list[int], list[str]]:
    """Shares of each source in each stratum, crops and geometry of the strata."""
    seed = draw(st.integers(0, 2**32 - 1))
    sources, strata = draw(st.integers(1, 12)), draw(st.integers(1, 8))
    g = np.random.default_rng(seed)
    counts = np.where(
        g.random((sources, strata)) < draw(st.floats(0.2, 1.0)), np.exp(g.normal(3, 2, (sources, strata))), 0
    )
    counts[np.arange(sources), g.integers(0, strata, sources)] += 20
    counts[g.integers(0, sources, strata), np.arange(strata)] += 20
    crops = g.choice([1, 2, 4, 8], strata)
    shares = stratum_shares(g.dirichlet(np.full(sources, 2.0)), counts, crops.astype(float))
    return shares, crops.tolist(), sorted(g.choice(["planar", "slab", "volume"], strata).tolist())


def walk(table: LaneTable, lane: int, start: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    found = np.array([table.at(lane, position) for position in range(start, start + n)])
    return found[:, 0], found[:, 1]


@settings(deadline=None, max_examples=15)
@given(mixtures(), st.integers(0, 2**31), st.integers(0, 63))
def test_every_prefix_of_a_lane_is_within_the_stated_bound(
    mixture: tuple[np.ndarray, list[int], list[str]], seed: int, lane: int
) -> None:
    shares, crops, kinds = mixture
    table = LaneTable(shares, crops, kinds, seed, 64)
    length, size = table.length, table.group_size
    source, before = walk(table, lane, 0, length + 2 * size)
    n = np.arange(1, len(source) + 1)
    at_group_ends = slice(size - 1, None, size)
    assert table.weights.sum() == pytest.approx(1)
    strata = np.array([table.places[p % size][0] for p in range(len(source))])
    np.testing.assert_array_equal((table.cells > 0), shares > 0)  # every sample is drawn some time
    for s, weight in enumerate(table.weights):
        away = np.abs(np.cumsum(source == s) - weight * n)
        assert away.max() <= table.bound + 1e-6
        assert away[at_group_ends].max() <= table.group_bound + 1e-6
        assert (source[:length] == s).sum() == round(weight * length)
        for c in range(len(crops)):
            here = (source == s) & (strata == c)
            np.testing.assert_array_equal(before[here], np.arange(here.sum()))
            assert not here.any() or shares[s, c] > 0
    assert table.group_bound < 1 or (np.round(shares * np.array(crops) * (length // size)) <= 1).any()
    far = 10**9 // size * size
    again = walk(table, lane, far // length * length, size)[0]
    assert np.abs(np.cumsum(again == 0) - table.weights[0] * n[:size]).max() <= table.bound + 1e-6


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(1, 400), min_size=1, max_size=9), st.integers(0, 100))
def test_with_one_kind_of_row_every_prefix_is_within_one_crop_of_the_weight(
    weights: list[int], seed: int
) -> None:
    share = np.array(weights) / sum(weights)
    table = LaneTable(share[:, None], [1], ["volume"], seed, 8)
    assert table.bound < 1
    source = walk(table, seed % 8, 0, 2 * table.length)[0]
    n = np.arange(1, len(source) + 1)
    for s, weight in enumerate(table.weights):
        assert abs(weight - share[s]) < 1 / 1000
        assert np.abs(np.cumsum(source == s) - weight * n).max() < 1


def test_weights_of_three_decimals_are_exact() -> None:
    for crops in ([1], [1, 2, 4], [1, 2, 4, 8, 16], [3, 7]):
        shares = np.tile(np.array([[0.35], [0.301], [0.349]]), (1, len(crops)))
        table = LaneTable(shares, crops, ["volume"] * len(crops), 0, 1)
        np.testing.assert_allclose(table.weights, [0.35, 0.301, 0.349], rtol=0, atol=1e-12)
        assert table.bound < 1


def realistic(seed: int) -> tuple[np.ndarray, np.ndarray, list[int], list[str]]:
    """Samples and shares of 2 to 12 sources, each of one or two geometries, in up to 6 kinds of rows."""
    g = np.random.default_rng(seed)
    kinds = ["volume", "volume", "volume", "slab", "slab", "planar"]
    strata = np.sort(g.choice(6, g.integers(1, 7), replace=False))
    geometry = [kinds[i] for i in strata]
    counts = np.zeros((g.integers(2, 13), len(strata)), dtype=np.int64)
    for row in counts:
        own = g.choice(np.unique(geometry), min(len(set(geometry)), g.integers(1, 3)), replace=False)
        part = np.where(np.isin(geometry, own), g.dirichlet(np.full(len(strata), 0.7)), 0)
        row[:] = g.multinomial(int(10 ** g.uniform(1.5, 5)), part / part.sum())
    there = counts.any(axis=0)
    counts, geometry = counts[:, there], [name for name, any_ in zip(geometry, there) if any_]
    wanted = np.maximum(g.dirichlet(np.full(len(counts), 2.0)).round(2), 0.01)
    wanted /= wanted.sum()
    crops = compose((wanted @ (counts / counts.sum(axis=1)[:, None])).tolist(), [1] * len(geometry), 24)
    return counts, stratum_shares(wanted, counts.astype(float), np.array(crops, float)), crops, geometry


def test_realistic_mixtures_keep_sources_and_cells() -> None:
    """After each group within a crop, always; at every crop in most; cells near what is planned of them."""
    beyond = 0
    for seed in range(20):
        _, shares, crops, geometry = realistic(seed)
        table = LaneTable(shares, crops, geometry, seed, 8)
        assert table.group_bound < 1 + 1e-9
        assert table.bound < 2
        beyond += table.bound > 1 + 1e-9
        planned = cell_counts(shares, crops, table.length // table.group_size)
        assert (table.cells <= 1.5 * planned + 2).all()
        assert (table.cells >= 0.6 * planned - 2).all()
    assert beyond <= 8


def test_hundreds_of_sources_find_their_place() -> None:
    g = np.random.default_rng(0)
    counts = np.where(g.random((300, 6)) < 0.5, 100.0, 0.0)
    counts[:, 0] += 1
    crops = np.array([1.0, 2, 4, 1, 2, 4])
    shares = stratum_shares(g.dirichlet(np.full(300, 3.0)), counts, crops)
    table = LaneTable(shares, crops.astype(int).tolist(), ["slab"] * 3 + ["volume"] * 3, 0, 8)
    assert table.bound < 2.5
    np.testing.assert_array_equal(table.cells > 0, shares > 0)


def test_cells_are_rounded_with_both_sums_kept() -> None:
    g = np.random.default_rng(1)
    shares = g.dirichlet(np.ones(40), 5).T
    crops = [1, 2, 4, 8, 16]
    groups = period(shares, crops)
    cells = cell_counts(shares, crops, groups)
    exact = shares * np.array(crops) * groups
    assert cells.sum(axis=0).tolist() == [groups * c for c in crops]
    assert np.abs(cells.sum(axis=1) - exact.sum(axis=1)).max() < 1
    assert np.abs(cells - exact).max() < 2.5


@settings(deadline=None, max_examples=200)
@given(st.integers(0, 2**32 - 1))
def test_a_matching_is_found_exactly_where_there_is_one(seed: int) -> None:
    g = np.random.default_rng(seed)
    length, kinds, sources = int(g.integers(2, 9)), int(g.integers(1, 3)), int(g.integers(1, 4))
    strata = g.integers(0, kinds, length).astype(np.int32)
    cells = g.integers(0, 2, (sources, kinds)) * length
    owner = np.sort(g.integers(0, sources, length))
    first, last = g.integers(0, length, (2, length))
    first, last = np.minimum(first, last), np.maximum(first, last)
    for s in range(sources):
        first[owner == s], last[owner == s] = np.sort(first[owner == s]), np.sort(last[owner == s])
    jobs = Jobs(np.searchsorted(owner, np.arange(sources + 1)), first, last)
    allowed = [[p for p in range(first[j], last[j] + 1) if cells[owner[j], strata[p]]] for j in range(length)]

    def possible(j: int, free: frozenset[int]) -> bool:
        return j == length or any(possible(j + 1, free - {p}) for p in allowed[j] if p in free)

    found = match(jobs, cells, strata)
    assert (found is not None) == possible(0, frozenset(range(length)))
    if found is not None:
        for s in range(sources):
            at = np.flatnonzero(found == s)  # in time order, as the jobs of a source are
            assert ((first[owner == s] <= at) & (at <= last[owner == s])).all()
            assert all(cells[s, strata[p]] for p in at)


def test_lanes_and_repeats_do_not_draw_the_same_source_at_the_same_time() -> None:
    table = LaneTable(np.array([[0.5], [0.3], [0.2]]), [1], ["volume"], 1, 32)
    for line in ([(lane, 0) for lane in range(32)], [(0, repeat * table.length) for repeat in range(32)]):
        drawn = np.stack([walk(table, lane, start, 900)[0] for lane, start in line])
        # Independent lanes would give a standard deviation of 0.088 around 0.5; lanes in step would give 0.5.
        assert (drawn == 0).mean(axis=0).std() < 0.2


cells = st.tuples(
    st.lists(st.integers(1, 40), min_size=1, max_size=30),
    st.integers(1, 12),
    st.integers(1, 20),
    st.integers(0, 1000),
)


def make(sizes: list[int], groups: int, window: int, seed: int) -> Cell:
    codes = np.repeat(np.arange(len(sizes)), sizes)
    rows = (np.arange(len(codes)) * 3 + 5).astype(np.int32)
    return Cell(rows, samples_per_shard(codes), groups, window, seed, "CT")


@settings(deadline=None, max_examples=150)
@given(cells)
def test_every_sample_comes_once_an_epoch(args: tuple[list[int], int, int, int]) -> None:
    cell = make(*args)
    n, groups = len(cell.rows), cell.groups
    assert cell.dealt == (n >= 8 * groups)
    if cell.dealt:
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


def test_epochs_differ_and_stay_inside_their_window() -> None:
    cell = make([10] * 40, 2, 4, 0)
    assert cell.dealt
    first, second = ([cell.sample(0, e * 200 + i)[0] for i in range(200)] for e in range(2))
    assert first != second
    assert sorted(first) == sorted(second)
    for start in range(0, 200, 40):  # 4 shards of 10: each window holds whole shards
        shards = {(row - 5) // 3 // 10 for row in first[start : start + 40]}
        assert len(shards) == 4


@settings(deadline=None, max_examples=40)
@given(st.integers(100, 3000), st.integers(1, 5), st.integers(1, 30), st.integers(1, 6), st.integers(0, 99))
def test_a_window_holds_few_pieces(n: int, groups: int, piece: int, window: int, epoch: int) -> None:
    cell = Cell(np.arange(n, dtype=np.int32), piece, groups, window, 1, "CT")
    lane = epoch % groups
    low, high = cell.lane_range(lane)
    drawn = np.array([cell.sample(lane, epoch * (high - low) + i)[0] for i in range(high - low)])
    for start in range(0, len(drawn), window * piece):
        # Any stretch as long as a window meets at most two windows, and the odd samples at the ends.
        assert len(set((drawn[start : start + window * piece] // piece).tolist())) <= 2 * window + 2


def test_a_lane_reads_only_its_own_shards() -> None:
    cell = make([10] * 43, 4, 4, 0)
    seen = [{(cell.sample(lane, i)[0] - 5) // 3 // 10 for i in range(300)} for lane in range(4)]
    assert set().union(*seen) == set(range(43))
    for one in seen:
        assert len(one) <= 43 / 4 + 2
        assert one == set(range(min(one), max(one) + 1))
    assert all(len(a & b) <= 1 for a, b in itertools.combinations(seen, 2))


def test_samples_of_one_large_shard_are_dealt_to_the_lanes() -> None:
    cell = make([64], 8, 16, 0)
    seen = [{cell.sample(lane, i)[0] for i in range(8)} for lane in range(8)]
    assert sum(map(len, seen)) == len(set().union(*seen)) == 64


@settings(deadline=None)
@given(cells, st.integers(0, 500), st.integers(1, 8))
def test_another_sample_is_of_the_lane_and_not_the_same(
    args: tuple[list[int], int, int, int], n: int, attempt: int
) -> None:
    cell = make(*args)
    lane = n % cell.groups
    low, high = cell.lane_range(lane)
    row, epoch = cell.instead(lane, n, attempt)
    assert row in cell.rows[low:high]
    assert epoch == cell.sample(lane, n)[1]
    if high - low > 1:
        assert row != cell.sample(lane, n)[0]
        assert len({cell.instead(lane, n, a)[0] for a in range(1, 9)}) == min(8, high - low - 1)


def test_a_place_in_a_large_epoch_is_found_at_once() -> None:
    cell = Cell(np.arange(10_000_000, dtype=np.int32), 37, 1, 16, 0, "CT")
    drawn = [cell.sample(0, 3 * 10_000_000 + i)[0] for i in range(16 * 37)]
    assert len(set(drawn)) == 16 * 37
    assert len({row // 37 for row in drawn}) <= 2 * 16
