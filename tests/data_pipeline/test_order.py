"""The order as a whole: a pure function of i, the same for every split of the work."""

from __future__ import annotations

import itertools
import math
import os
import pickle
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.crops import MAX_RESIDUAL, zoom_range
from data_pipeline.errors import UserError
from data_pipeline.geometry import PATCH, ZOOMED, TokenConfig, geometry_of, level_factors, token_count
from data_pipeline.order import Draw, Order, lanes_of
from data_pipeline.schedule import MixtureConfig


class Columns:
    """A manifest of columns alone, as large as memory allows."""

    hash = "light"

    def __init__(self, n: int, seed: int = 0, per_shard: int = 32, largest: int = 220) -> None:
        g = np.random.default_rng(seed)
        modality = np.sort(g.choice(3, n, p=(0.5, 0.3, 0.2)))
        modality[-3:] = (0, 1, 2)
        modality.sort()
        shape = np.ones((n, 4), np.int32)
        shape[:, 0] = g.integers(1, 3, n)
        shape[:, 1:] = g.integers(4, largest, (n, 3))
        shape[modality == 2, 1] = 1
        spacing = np.full((n, 3), 1.0, np.float32)
        thick = (modality == 1) & (g.random(n) < 0.5)
        spacing[thick, g.integers(0, 3, n)[thick]] = 5.0
        geometry, axes = np.empty(n, object), np.zeros((n, 3), np.int8)
        for i in range(min(n, 5000)):
            geometry[i], axes[i] = geometry_of(shape[i, 1:].tolist(), spacing[i].tolist())
        if n > 5000:
            geometry[:], axes[:] = "volume", (0, 1, 2)
            geometry[modality == 2] = "planar"
        levels = g.integers(0, 3, n)
        names = np.array(["CT", "MR", "XR"], object)[modality]
        self.columns: dict[str, np.ndarray] = {
            "modality": names,
            "source": np.where(g.random(n) < 0.5, "a", "b").astype(object),
            "shard": np.array([f"{m}-{i // per_shard:06d}" for i, m in enumerate(names)], object),
            "shape": shape,
            "spacing": spacing,
            "axes": axes,
            "geometry": geometry,
            "l1_offset": np.where(levels >= 1, 512, -1),
            "l2_offset": np.where(levels >= 2, 512, -1),
        }

    def __len__(self) -> int:
        return len(self.columns["shape"])

    def column(self, name: str) -> np.ndarray:
        return self.columns[name]

    def value(self, i: int, name: str) -> Any:
        assert name == "foreground"
        n = int(np.prod(self.columns["shape"][i, 1:]))
        return [
            {"class": 0, "layer": 0, "voxels": [1, n // 3]},
            {"class": 1, "layer": 0, "voxels": [0, n // 2, n - 1]},
            {"class": 2, "layer": 0, "voxels": []},
        ]


TOKENS = TokenConfig(slots=512, classes=(1, 4, 16))


def make(n: int = 400, **mixture: Any) -> Order:
    return Order(Columns(n), np.arange(n), TOKENS, MixtureConfig(**mixture), seed=3)


@pytest.fixture(scope="module")
def order() -> Order:
    return make(groups=6)


def test_the_composition_is_constant_and_holds_every_stratum(order: Order) -> None:
    expected = Counter({s: spec.crops for s, spec in enumerate(order.composition)})
    assert len({(spec.geometry, spec.k) for spec in order.composition}) == len(order.composition)
    assert order.batch_size == 6 * order.group_size == 6 * sum(expected.values())
    for update, group in itertools.product((0, 1, 999), range(6)):
        draws = order.group_draws(update, group)
        assert Counter(draw.spec for draw in draws) == expected
        assert {draw.group for draw in draws} == {group}
        first = (update * 6 + group) * order.group_size
        assert [draw.index for draw in draws] == list(range(first, first + order.group_size))
        for s, spec in enumerate(order.composition):
            assert sorted(draw.slot for draw in draws if draw.spec == s) == list(range(spec.crops))


def level_shape(order: Order, draw: Draw) -> list[int]:
    columns = order.manifest
    stored = columns.column("shape")[draw.row, 1:].tolist()
    kind = order.composition[draw.spec].geometry
    factors = level_factors(kind, draw.axes)[draw.level]
    return [math.ceil(n / f) for n, f in zip(stored, factors)]


@settings(deadline=None, max_examples=12)
@given(
    st.integers(0, 1000),
    st.sampled_from([(0.5, 4.0), (1.0, 1.0), (0.3, 0.7), (2.0, 6.0), (1.0, 1.2)]),
    st.sampled_from([0.0, 1.0]),
    st.sampled_from([64, 500, 4096]),
)
def test_every_crop_fits_its_volume_its_row_and_its_buffer(
    seed: int, scale: tuple[float, float], foreground: float, slots: int
) -> None:
    columns = Columns(150, seed, largest=500)
    mixture = MixtureConfig(groups=3, scale=scale, foreground=foreground)
    order = Order(columns, np.arange(150), TokenConfig(slots=slots), mixture, seed)
    for i in range(seed * 7, seed * 7 + 300):
        draw = order.draw(i)
        spec = order.composition[draw.spec]
        kind = spec.geometry
        assert columns.column("geometry")[draw.row] == kind
        size = level_shape(order, draw)
        assert all(o >= 0 and e >= 1 and o + e <= n for o, e, n in zip(draw.origin, draw.extent, size))
        assert 0 <= draw.channel < columns.column("shape")[draw.row, 0]
        assert draw.level == 0 or columns.column(f"l{draw.level}_offset")[draw.row] >= 0
        assert math.prod(draw.grid) <= spec.capacity == slots // spec.k
        assert math.prod(draw.extent) <= spec.voxels
        stem = [draw.extent[a] for a in draw.axes]
        for n, g, p, r, zoom in zip(stem, draw.grid, PATCH[kind], draw.residual, ZOOMED[kind]):
            assert r <= MAX_RESIDUAL
            assert zoom or r == 1.0
            assert n <= math.ceil(g * p * r)  # nothing is read that no token covers
            assert g <= math.ceil(n / (p * r) + 1e-3)  # no token lies wholly outside
        native = columns.column("spacing")[draw.row][list(draw.axes)]
        factors = np.array(level_factors(kind, draw.axes)[draw.level])[list(draw.axes)]
        origin = np.array(draw.origin)[list(draw.axes)]
        np.testing.assert_allclose(draw.start_mm, origin * factors * native, rtol=1e-6)
        np.testing.assert_allclose(draw.spacing, np.array(draw.residual) * factors * native, rtol=1e-6)


def test_a_crop_never_zooms_out_beyond_the_whole_volume_and_covers_the_range() -> None:
    columns = Columns(200, 1, largest=400)
    order = Order(columns, np.arange(200), TOKENS, MixtureConfig(groups=2), 0)
    zooms = []
    for i in range(3000):
        draw = order.draw(i)
        spec = order.composition[draw.spec]
        stored = columns.column("shape")[draw.row, 1:].tolist()
        stem = [stored[a] for a in draw.axes]
        levels = 1 + int(columns.column("l1_offset")[draw.row] >= 0)
        levels += int(levels == 2 and columns.column("l2_offset")[draw.row] >= 0)
        low, high = zoom_range(stem, spec.geometry, spec.capacity, (0.5, 4.0), levels)
        zoom = max(draw.residual[1:]) * 2**draw.level
        assert low * 0.999 <= zoom <= high * 1.001
        fits = token_count(stem, PATCH[spec.geometry]) <= spec.capacity
        assert not fits or zoom <= 1.0
        if spec.k == 1 and high > 3.9:
            zooms.append(math.log(zoom / 0.5) / math.log(high / 0.5))
    assert len(zooms) > 30
    assert abs(np.mean(zooms) - 0.5) < 0.15


@settings(deadline=None, max_examples=6)
@given(
    st.dictionaries(st.sampled_from(["CT", "MR", "XR"]), st.floats(0.05, 1.0), min_size=3), st.integers(0, 99)
)
def test_sources_keep_to_their_weights_on_every_prefix_of_a_lane(
    weights: dict[str, float], seed: int
) -> None:
    order = Order(Columns(300), np.arange(300), TOKENS, MixtureConfig(groups=4, weights=weights), seed)
    updates = 1200 // order.group_size
    for lane in range(4):
        names = [
            order.source_of((update * 4 + lane) * order.group_size + j)
            for update in range(updates)
            for j in range(order.group_size)
        ]
        n = np.arange(1, len(names) + 1)
        for source, share in zip(order.sources, order.weights):
            away = np.abs(np.cumsum([name == source for name in names]) - share * n)
            assert away[order.group_size - 1 :: order.group_size].max() < 1.0
            assert away.max() < 2.0


def test_the_kinds_of_rows_take_turns_inside_a_group(order: Order) -> None:
    draws = order.group_draws(3, 1)
    geometries = [order.composition[draw.spec].geometry for draw in draws]
    n = np.arange(1, len(draws) + 1)
    for geometry in set(geometries):
        here = np.array([g == geometry for g in geometries])
        assert np.abs(np.cumsum(here) - here.mean() * n).max() < 1
    for s in range(len(order.composition)):
        slots = [draw.slot for draw in draws if draw.spec == s]
        assert slots == list(range(len(slots)))


def test_weights_are_exact_where_the_composition_leaves_room() -> None:
    columns = Columns(300)
    columns.columns["geometry"][:] = "volume"
    columns.columns["axes"][:] = (0, 1, 2)
    weights = {"CT": 0.5, "MR": 0.3, "XR": 0.2}
    order = Order(
        columns, np.arange(300), TokenConfig(slots=64, classes=(1,)), MixtureConfig(weights=weights), 0
    )
    assert dict(zip(order.sources, order.weights.round(6).tolist())) == weights
    for lane in range(8):
        names = [order.source_of(update * 8 + lane) for update in range(1000)]
        for source, weight in weights.items():
            drawn = np.cumsum([name == source for name in names])
            assert np.abs(drawn - weight * np.arange(1, 1001)).max() < 1.0


def test_every_sample_comes_once_an_epoch_of_its_source() -> None:
    order = make(groups=4)
    drawn: dict[int, Counter[int]] = {}
    epoch_of: Counter[tuple[str, int, int]] = (
        Counter()
    )  # the last one a lane has begun, by source and stratum
    for i in range(60 * order.batch_size):
        draw = order.draw(i)
        drawn.setdefault(draw.repeat, Counter())[draw.row] += 1
        place = order.source_of(i), draw.spec, draw.group
        assert draw.repeat >= epoch_of[place]
        epoch_of[place] = draw.repeat
    assert all(max(count.values()) == 1 for count in drawn.values())
    complete = Counter[bool]()
    for (source, s), cell in order._cells.items():
        begun = [epoch_of[order.sources[source], s, lane] for lane in range(4)]
        parts = [slice(*cell.lane_range(lane)) for lane in range(4)]
        if not cell.dealt:  # the lanes share their epochs
            begun, parts = [min(begun)], [slice(None)]
        for last, part in zip(begun, parts):
            for epoch in range(last):
                assert all(drawn[epoch][row] == 1 for row in cell.rows[part].tolist())
                complete[cell.dealt] += 1
    assert complete[False] > 0
    assert complete[True] > 0


def test_crops_per_volume_takes_neighbouring_crops_from_one_volume() -> None:
    order = make(groups=2, crops_per_volume=2)
    by_cell: dict[tuple[int, int, str], list[Draw]] = {}
    for i in range(4 * order.batch_size):
        draw = order.draw(i)
        by_cell.setdefault((draw.group, draw.spec, order.source_of(i)), []).append(draw)
    for draws in by_cell.values():
        for first, second in zip(draws[::2], draws[1::2]):
            assert first.row == second.row
    assert any(a.origin != b.origin for d in by_cell.values() for a, b in zip(d[::2], d[1::2]))


@pytest.mark.parametrize("groups", [1, 5, 8, 64])
def test_lanes_are_partitioned(groups: int) -> None:
    for world in range(1, 65):
        lanes = [lanes_of(rank, world, groups) for rank in range(world)]
        assert [lane for own in lanes for lane in own if lane is not None] == list(range(groups))
        assert {len(own) for own in lanes} == {-(-groups // world)}


@pytest.mark.parametrize("groups", [1, 8, 12])
@pytest.mark.parametrize("start", [0, 7])
def test_the_sequence_is_the_same_for_every_ranks_and_workers_split(groups: int, start: int) -> None:
    from data_pipeline.stream import work_of  # here, since it imports torch

    updates = 5
    expected = [(update, group) for update in range(start, start + updates) for group in range(groups)]
    for world, workers in itertools.product(range(1, 65), range(9)):
        taken = []
        for rank in range(world):
            lanes = lanes_of(rank, world, groups)
            steps = updates * len(lanes)
            shares = [work_of(lanes, start, w, max(1, workers)) for w in range(max(1, workers))]
            own = [next(shares[m % len(shares)]) for m in range(steps)]  # the loader visits workers in turn
            assert own == list(itertools.islice(work_of(lanes, start), steps))
            taken += [(work.update, work.group) for work in own if work.group is not None]
        assert sorted(taken) == expected


@settings(deadline=None, max_examples=10)
@given(st.lists(st.integers(0, 200_000), min_size=1, max_size=40))
def test_a_draw_is_a_function_of_i_alone(indices: list[int]) -> None:
    used, copied = make(100), pickle.loads(pickle.dumps(make(100)))
    for i in indices:
        assert used.draw(i) == copied.draw(i)
    assert used.draw(indices[0]) == make(100).draw(indices[0])


def test_the_order_is_pinned_for_good() -> None:
    # A change here means that runs saved before it cannot be resumed.
    order = make(groups=2)
    assert [order.draw(i).row for i in (0, 1, 2, 50, 51, 1000, 10**9)] == [109, 385, 286, 293, 326, 323, 391]


def test_seeds_differ() -> None:
    columns = Columns(300)
    first, second = (Order(columns, np.arange(300), TOKENS, MixtureConfig(), seed) for seed in (0, 1))
    assert [first.draw(i).row for i in range(50)] != [second.draw(i).row for i in range(50)]


def test_another_process_with_another_hash_seed_draws_the_same() -> None:
    code = (
        "import importlib.util as u, sys; s = u.spec_from_file_location('t', sys.argv[1]);"
        "m = u.module_from_spec(s); s.loader.exec_module(m); o = m.make();"
        "print([o.draw(i) for i in range(0, 3000, 100)])"
    )
    here = repr([make().draw(i) for i in range(0, 3000, 100)])
    for hash_seed in ("0", "99"):
        done = subprocess.run(
            [sys.executable, "-c", code, str(Path(__file__))],
            env=os.environ | {"PYTHONHASHSEED": hash_seed, "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True, text=True, check=True, timeout=120,
        )  # fmt: skip
        assert done.stdout.strip() == here


def test_foreground_crops_hold_a_listed_voxel() -> None:
    columns = Columns(200, largest=400)
    order = Order(columns, np.arange(200), TOKENS, MixtureConfig(foreground=1.0), 0)
    levels = Counter()
    for i in range(1500):
        draw = order.draw(i)
        stored = columns.column("shape")[draw.row, 1:].tolist()
        factors = level_factors(order.composition[draw.spec].geometry, draw.axes)[draw.level]
        held = 0
        for voxel in columns.value(draw.row, "foreground")[1]["voxels"]:
            place = [v // f for v, f in zip(np.unravel_index(voxel, stored), factors)]
            # The last voxel of a reduced level may be a partial one, which no crop needs to reach.
            held += all(o <= p <= o + e for o, e, p in zip(draw.origin, draw.extent, place))
        assert held >= 1
        levels[draw.level] += 1
    assert set(levels) == {0, 1, 2}


def test_a_window_gives_native_crops_of_at_most_its_size() -> None:
    columns = Columns(200)
    mixture = MixtureConfig(groups=2, foreground=0.5, rows_per_group=4)
    order = Order(columns, np.arange(200), TOKENS, mixture, 0, window=(32, 48, 40))
    assert {spec.k for spec in order.composition} == {1}
    touched = 0
    for i in range(400):
        draw = order.draw(i)
        stem_shape = [columns.column("shape")[draw.row, 1:].tolist()[a] for a in draw.axes]
        stem_extent = [draw.extent[a] for a in draw.axes]
        assert stem_extent == [min(n, w) for n, w in zip(stem_shape, (32, 48, 40))]
        assert (draw.level, draw.residual) == (0, (1.0, 1.0, 1.0))
        assert math.prod(draw.extent) <= order.composition[draw.spec].voxels
        assert math.prod(draw.grid) <= order.composition[draw.spec].capacity
        touched += all(o == 0 for o in draw.origin)
    assert 0 < touched < 400


def test_a_substitute_is_of_the_same_source_stratum_and_lane() -> None:
    order = make(600, groups=2)
    different = 0
    for i in range(0, 20 * order.batch_size, 7):
        draw, other = order.draw(i), order.substitute(i, 1)
        assert (other.index, other.group, other.spec, other.slot) == (
            draw.index,
            draw.group,
            draw.spec,
            draw.slot,
        )
        column = order.manifest.column("modality")
        assert column[other.row] == column[draw.row] == order.source_of(i)
        assert other == order.substitute(i, 1) != order.substitute(i, 2)
        different += other.row != draw.row
    assert different > 0


@pytest.mark.parametrize(
    ("mixture", "message"),
    [
        ({"weights": {"CT": 1.0, "MR": 1.0}}, "'XR' has no weight"),
        ({"weights": {"CT": 1.0, "MR": 1.0, "XR": 1.0, "PET": 1.0}}, "'PET' is not in the data"),
        ({"by": "colour"}, "mixture.by is 'colour', which is no column"),
        ({"by": "shape"}, "mixture.by is 'shape': it holds neither texts nor numbers"),
        ({"rows_per_group": 2}, "mixture.rows_per_group is 2"),
    ],
)
def test_an_impossible_mixture_is_one_line(mixture: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        make(**mixture)
    assert "\n" not in str(error.value)


def test_nothing_to_draw_is_one_line() -> None:
    with pytest.raises(UserError, match="no sample"):
        Order(Columns(10), np.array([], int), TOKENS, MixtureConfig(), 0)


def test_one_sample_is_enough() -> None:
    order = Order(Columns(20), np.array([4]), TOKENS, MixtureConfig(), 0)
    assert {order.draw(i).row for i in range(50)} == {4}
    assert order.draw(order.batch_size).repeat >= 1


def test_weight_zero_leaves_a_source_out_and_says_so() -> None:
    order = make(weights={"CT": 1, "MR": 1, "XR": 0})
    assert "XR" not in {order.source_of(i) for i in range(2 * order.batch_size)}
    assert "XR: weight 0, left out" in order.describe()
    assert all(spec.geometry != "planar" for spec in order.composition)


def test_description_states_composition_rounding_and_repeats(order: Order) -> None:
    text = order.describe()
    assert f"{order.group_size} crops" in text
    assert all(f"source {name}" in text for name in ("CT", "MR", "XR"))
    assert "wanted" in text
    assert "epoch every" in text
    assert "every prefix of a lane is within" in text
    assert "epoch of a source: each of its samples once" in text
    assert "times as often as the rarest" in text
    assert order.merged
    assert all(f"{n} samples of {kind} rows of {k} go into" in text for n, kind, k, _ in order.merged)


def test_samples_of_merged_row_kinds_are_drawn(order: Order) -> None:
    left = {(spec.geometry, spec.k) for spec in order.composition}
    assert not left & {(kind, k) for _, kind, k, _ in order.merged}
    assert sorted(order.rows) == list(range(400))


@pytest.mark.parametrize(
    ("values", "names"),
    [
        ([3, 1, 2], ["1", "2", "3"]),
        ([0.5, None, 1.5], ["0.5", "1.5", "none"]),
        ([["CT"], ["CT", "PT"], None], ["CT", "CT+PT", "none"]),
        ([True, False, True], ["false", "true"]),
    ],
)
def test_a_mixture_may_weigh_any_column(values: list[Any], names: list[str]) -> None:
    columns = Columns(300)
    columns.columns["site"] = np.empty(300, object)
    columns.columns["site"][:] = values * 100
    weights = {name: 1.0 + number for number, name in enumerate(names)}
    order = Order(columns, np.arange(300), TOKENS, MixtureConfig(by="site", weights=weights), 0)
    assert order.sources == names
    text = {None: "none", True: "true", False: "false"}
    for i in range(200):
        value = values[order.draw(i).row % 3]
        shown = "+".join(value) if isinstance(value, list) else text.get(value, str(value))
        assert shown == order.source_of(i) or value == 1


def test_too_many_sources_are_one_line() -> None:
    columns = Columns(1500)
    columns.columns["key"] = np.array([f"k{i}" for i in range(1500)], object)
    with pytest.raises(UserError, match="'key': it holds more than 1000 different values"):
        Order(columns, np.arange(1500), TOKENS, MixtureConfig(by="key"), 0)


def test_content_is_in_focus_where_nothing_is_labelled() -> None:
    columns = Columns(60)
    plain = columns.value
    columns.value = lambda i, name: [e for e in plain(i, name) if e["class"] == 0]  # type: ignore[method-assign]
    order = Order(columns, np.arange(60), TOKENS, MixtureConfig(foreground=1.0), 0)
    shape = columns.column("shape")
    for i in range(100):
        row = order.draw(i).row
        focus = order._focus(row, (0.7, 0.9))
        assert focus == tuple(np.unravel_index(int(np.prod(shape[row, 1:])) // 3, shape[row, 1:]))
    columns.value = lambda i, name: None  # type: ignore[method-assign]
    assert order._focus(0, (0.5, 0.5)) is None


def test_half_a_million_rows_draw_as_fast_as_two_hundred() -> None:
    n = 500_000
    order = Order(Columns(n), np.arange(n), TOKENS, MixtureConfig(), 0)
    assert sum(cell.rows.nbytes for cell in order._cells.values()) == 4 * n
    for i in range(2 * order.batch_size):
        order.draw(i)
    started = time.process_time()
    for i in range(100_000, 103_000):
        order.draw(i)
    assert (time.process_time() - started) / 3000 < 500e-6  # measured 60 µs; the bound is for a busy machine
