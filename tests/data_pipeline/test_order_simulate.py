"""The simulated run: shards by node, mixing, shares."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from data_pipeline.errors import UserError
from data_pipeline.geometry import TokenConfig
from data_pipeline.order import Order
from data_pipeline.schedule import MixtureConfig
from data_pipeline.simulate import describe, simulate


class Grid:
    """Two modalities, 40 shards of 20 samples each, one row class."""

    hash = "grid"

    def __init__(self) -> None:
        n = 1600
        modality = np.repeat(["CT", "MR"], n // 2).astype(object)
        self.columns: dict[str, np.ndarray] = {
            "modality": modality,
            "shard": np.array([f"{m}-{i // 20}" for i, m in enumerate(modality)], object),
            "shape": np.tile([1, 32, 32, 32], (n, 1)),
            "spacing": np.ones((n, 3), np.float32),
            "axes": np.tile(np.arange(3, dtype=np.int8), (n, 1)),
            "geometry": np.full(n, "volume", object),
        }

    def __len__(self) -> int:
        return len(self.columns["shape"])

    def column(self, name: str) -> np.ndarray:
        return self.columns[name]

    def row(self, i: int) -> dict[str, Any]:
        raise AssertionError("a simulation reads columns, never a whole row")


@pytest.fixture(scope="module")
def grid() -> tuple[Grid, Order]:
    manifest = Grid()
    mixture = MixtureConfig(groups=8, window_shards=2, weights={"CT": 0.75, "MR": 0.25})
    return manifest, Order(manifest, np.arange(1600), TokenConfig(slots=64, classes=(1,)), mixture, 0)


def test_nodes_fetch_their_own_shards(grid: tuple[Grid, Order]) -> None:
    s = simulate(*grid, nodes=4, updates=700)
    assert s.shards == 80
    assert s.fetched == (20, 20, 20, 20)  # 2 of 8 lanes, 5 shards of each source a lane
    assert s.working <= 8  # two windows of two shards for each of two lanes
    assert s.unseen < 0.01
    assert s.crops == 700 * 8
    assert s.sources == pytest.approx({"CT": 0.75, "MR": 0.25}, abs=0.002)


def test_lanes_of_distinct_shards_mix_better_than_chance(grid: tuple[Grid, Order]) -> None:
    s = simulate(*grid, updates=100)
    assert s.in_batch_repeats == 0
    assert s.same_shard_shuffled == pytest.approx(1 / 40, rel=1e-6)
    assert s.same_shard == 0


def test_the_description_names_every_figure(grid: tuple[Grid, Order]) -> None:
    text = describe(*grid, nodes=2, updates=20)
    assert "a node fetches" in text
    assert "of 80" in text
    assert "shuffled: 2.50%" in text


def test_no_nodes_is_one_line(grid: tuple[Grid, Order]) -> None:
    with pytest.raises(UserError, match="0 nodes"):
        simulate(*grid, nodes=0)
