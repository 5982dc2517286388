"""Any split of the work over ranks and workers, and any chain of resumes, gives one global sequence; at any
size of the dataset.
"""

from __future__ import annotations

import time
from collections import Counter
from functools import lru_cache
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.geometry import TokenConfig
from data_pipeline.order import Draw, Order, lanes_of
from data_pipeline.schedule import MixtureConfig
from data_pipeline.stream import work_of

#: Modality, source, geometry, shape of the samples, which repeat for ever.
PATTERN = [
    ("CT", "a", "volume", (1, 64, 64, 64)),
    ("CT", "b", "volume", (1, 20, 20, 20)),
    ("CT", "a", "slab", (1, 30, 128, 128)),
    ("MR", "b", "volume", (2, 90, 90, 90)),
    ("MR", "c", "slab", (1, 20, 64, 64)),
    ("MR", "c", "volume", (1, 64, 64, 64)),
    ("XR", "a", "planar", (1, 1, 300, 300)),
]


class Repeated:
    """A column of n rows that takes the memory of its pattern."""

    def __init__(self, pattern: Any, run: int) -> None:
        self.pattern, self.run = np.array(pattern), run

    def __getitem__(self, at: Any) -> np.ndarray:
        row, *rest = at if isinstance(at, tuple) else (at,)
        value = self.pattern[np.asarray(row) // self.run % len(self.pattern)]
        return value[(..., *rest[-1:])] if rest else value


class Table:
    """What `Manifest.table` gives of a column: rows taken as an Arrow array."""

    def __init__(self, texts: dict[str, tuple[list[str], int]]) -> None:
        self.texts, self.name = texts, ""

    def column(self, name: str) -> Table:
        table = Table(self.texts)
        table.name = name
        return table

    def take(self, rows: pa.Array) -> Table:
        names, run = self.texts[self.name]
        index = np.asarray(rows) // run
        found = Table(self.texts)
        if self.name == "shard":
            first = int(index.min())
            names = [f"s{number:08d}" for number in range(first, int(index.max()) + 1)]
            index = index - first
        found.array = pa.DictionaryArray.from_arrays(
            pa.array(index % len(names), pa.int32()), pa.array(names)
        )
        return found

    def combine_chunks(self) -> pa.Array:
        return self.array

    array: pa.Array


class Cheap:
    """A manifest of n rows in runs of `run` alike, 100 to a shard."""

    hash = "cheap"

    def __init__(self, n: int, run: int = 3) -> None:
        self.n = n
        self.columns = {
            "shape": Repeated([p[3] for p in PATTERN], run),
            "axes": Repeated([(0, 1, 2)], 1),
            "spacing": Repeated([(1.0, 1.0, 1.0)], 1),
            "l1_offset": Repeated([0, -1], 1),
            "l2_offset": Repeated([0, -1, -1], 1),
        }
        texts = {
            name: ([p[at] for p in PATTERN], run)
            for at, name in enumerate(("modality", "source", "geometry"))
        }
        self.table = Table(texts | {"shard": ([], 100)})

    def __len__(self) -> int:
        return self.n

    def column(self, name: str) -> Any:
        return self.columns[name]

    def value(self, i: int, name: str) -> Any:
        return [{"class": 0, "layer": 0, "voxels": [0]}]


@lru_cache(maxsize=64)
def make(n: int, seed: int = 0, **mixture: Any) -> Order:
    return Order(
        Cheap(n), np.arange(n), TokenConfig(slots=512, classes=(1, 4)), MixtureConfig(**mixture), seed
    )


def played(order: Order, start: int, end: int, world: int, workers: int) -> list[Draw]:
    """Updates start … end − 1 as `world` ranks with that many loader workers each draw them, sorted by i."""
    found = []
    for rank in range(world):
        lanes = lanes_of(rank, world, order.groups)
        steps = (end - start) * len(lanes)
        count = max(1, workers)
        for worker in range(count):  # each takes its own steps, whatever the others do
            share = islice(work_of(lanes, start, worker, count), len(range(worker, steps, count)))
            for work in share:
                if work.group is not None:
                    found += order.group_draws(work.update, work.group)
    return sorted(found, key=lambda draw: draw.index)


sizes = st.floats(0.0, 6.0).map(lambda power: int(10**power))
mixtures = st.fixed_dictionaries(
    {
        "groups": st.integers(1, 12),
        "by": st.sampled_from(["modality", "source", "geometry"]),
        "rows_per_group": st.sampled_from([None, 6, 9]),
        "window_shards": st.integers(1, 20),
        "crops_per_volume": st.integers(1, 3),
        "foreground": st.sampled_from([0.0, 0.5]),
    }
)


@settings(deadline=None, max_examples=15)
@given(
    sizes,
    mixtures,
    st.integers(0, 3),
    st.integers(0, 10**7),
    st.lists(st.tuples(st.integers(1, 64), st.integers(0, 8), st.integers(1, 2)), min_size=1, max_size=4),
)
def test_a_resume_of_a_resume_at_other_worlds_draws_one_sequence(
    n: int, mixture: dict[str, Any], seed: int, start: int, runs: list[tuple[int, int, int]]
) -> None:
    order = make(n, seed, **mixture)
    found, update = [], start
    for world, workers, updates in runs:
        found += played(order, update, update + updates, world, workers)
        update += updates
    assert [draw.index for draw in found] == list(range(start * order.batch_size, update * order.batch_size))
    fresh = Order(Cheap(n), np.arange(n), order.tokens, order.mixture, seed)
    for draw in found[:: max(1, len(found) // 40)]:
        assert fresh.draw(draw.index) == draw


@settings(deadline=None, max_examples=10)
@given(st.integers(1, 700), mixtures, st.integers(0, 3), st.integers(0, 5))
def test_each_epoch_of_a_cell_is_drawn_exactly_once(
    n: int, mixture: dict[str, Any], seed: int, epoch: int
) -> None:
    order = make(n, seed, **mixture)
    for cell in order._cells.values():
        for lane in range(order.groups if cell.dealt else 1):
            low, high = cell.lane_range(lane)
            size = high - low
            steps = range(epoch * size, (epoch + 1) * size)
            walks = [(lane, t) if cell.dealt else (t % order.groups, t // order.groups) for t in steps]
            drawn = [cell.sample(*walk) for walk in walks]
            assert sorted(row for row, _ in drawn) == sorted(cell.rows[low:high].tolist())
            assert {e for _, e in drawn} == {epoch}
    assert sorted(row for cell in order._cells.values() for row in cell.rows.tolist()) == list(range(n))


@settings(deadline=None, max_examples=8)
@given(sizes, mixtures, st.integers(0, 10**8))
def test_every_group_has_the_same_composition_in_the_same_places(
    n: int, mixture: dict[str, Any], update: int
) -> None:
    order = make(n, **mixture)
    places = [(draw.spec, draw.slot) for draw in order.group_draws(0, 0)]
    expected = Counter({s: spec.crops for s, spec in enumerate(order.composition)})
    assert Counter(s for s, _ in places) == expected
    for group in {0, order.groups - 1}:
        draws = order.group_draws(update, group)
        assert [(draw.spec, draw.slot) for draw in draws] == places
        assert all(draw.group == group for draw in draws)


@settings(deadline=None, max_examples=8)
@given(mixtures, st.integers(0, 3), st.integers(0, 10**6))
def test_sources_follow_their_weights_from_anywhere(mixture: dict[str, Any], seed: int, start: int) -> None:
    order = make(1000, seed, **mixture)
    lane = seed % order.groups
    # A lane is periodic, so a prefix that ends anywhere is checked from the last multiple of the period.
    period = order._table.length // order.group_size
    begin = start // period * period
    updates = 600 // order.group_size + 1
    drawn = [
        order.source_of(update * order.batch_size + lane * order.group_size + j)
        for update in range(begin, begin + updates)
        for j in range(order.group_size)
    ]
    length = np.arange(1, len(drawn) + 1)
    for source, weight in zip(order.sources, order.weights):
        away = np.abs(np.cumsum([name == source for name in drawn]) - weight * length)
        assert away[order.group_size - 1 :: order.group_size].max() < 1
        assert away.max() <= order._table.bound + 1e-6


def test_ten_million_samples() -> None:
    n = 10_000_000
    started = time.perf_counter()
    order = make(n, groups=64, foreground=0.5)
    assert time.perf_counter() - started < 60  # measured: 6 s
    assert sum(len(cell.rows) for cell in order._cells.values()) == n
    started = time.process_time()
    order.draw(10**9)
    assert time.process_time() - started < 0.05  # measured: 2 ms
    found = played(order, 10**6, 10**6 + 1, 31, 3)
    assert found == played(order, 10**6, 10**6 + 1, 64, 1)
    cell = max(order._cells.values(), key=lambda cell: len(cell.rows))
    low, high = cell.lane_range(7)
    drawn = [cell.sample(7, 2 * (high - low) + i)[0] for i in range(high - low)]
    assert sorted(drawn) == sorted(cell.rows[low:high].tolist())
