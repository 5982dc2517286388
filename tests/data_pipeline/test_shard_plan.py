"""Which sample goes into which shard: neighbours are drawn together, whatever was found first."""

from __future__ import annotations

import random
from itertools import pairwise
from typing import Any

import pytest

from data_pipeline.geometry import row_class
from data_pipeline.shard_writer import Piece, Staged, plan_shards, size_class


def staged(number: int, source: str, side: int, geometry: str = "volume", size: int = 100) -> Staged:
    row: dict[str, Any] = {
        "key": f"{random.Random(number).getrandbits(64):016x}",
        "split": "train",
        "modality": "CT",
        "geometry": geometry,
        "axes": [0, 1, 2],
        "shape": [1, 1 if geometry == "planar" else side, side, side],
        "source": source,
    }
    return Staged(row, {}, {"image": Piece("folder", f"{number}.image", size)})


def samples(count: int = 120) -> list[Staged]:
    chosen = random.Random(0)
    return [staged(n, chosen.choice("ab"), chosen.choice([16, 40, 100, 200])) for n in range(count)]


def test_samples_of_one_source_and_size_lie_together() -> None:
    plans = plan_shards(samples(), shard_samples=10, shard_bytes=10**9)
    runs = [(s.row["source"], size_class(s.row)) for plan in plans for s in plan.samples]
    changes = sum(a != b for a, b in pairwise(runs))
    assert changes == len(set(runs)) - 1
    for plan in plans:
        for a, b in pairwise(plan.samples):
            if (a.row["source"], size_class(a.row)) == (b.row["source"], size_class(b.row)):
                assert a.row["key"] < b.row["key"]


def test_shards_are_cut_by_count_and_bytes_only() -> None:
    assert [len(p.samples) for p in plan_shards(samples(), 50, 10**9)] == [50, 50, 20]
    assert [len(p.samples) for p in plan_shards(samples(), 50, 4000)] == [40, 40, 40]


def test_the_order_in_which_samples_were_found_does_not_matter() -> None:
    found = samples()
    other = found.copy()
    random.Random(1).shuffle(other)
    assert plan_shards(found, 10, 10**9) == plan_shards(other, 10, 10**9)


def test_numbers_go_on_after_those_that_are_taken() -> None:
    plans = plan_shards(samples(20), 10, 10**9, ["train-ct-volume-000007.tar", "val-ct-volume-000011.tar"])
    assert [p.name for p in plans] == ["train-ct-volume-000008.tar", "train-ct-volume-000009.tar"]


@pytest.mark.parametrize("slots", [1024, 4096])
@pytest.mark.parametrize("geometry", ["volume", "slab", "planar"])
def test_a_size_class_lies_in_one_row_class(slots: int, geometry: str) -> None:
    """With slots that are a power of two, as all recipes have them, samples of a size class share a cell."""
    held: dict[int, set[int]] = {}
    for side in range(1, 1200, 7):
        row = staged(0, "a", side, geometry).row
        patch = {"volume": (8, 8, 8), "slab": (2, 16, 16), "planar": (1, 16, 16)}[geometry]
        tokens = 1
        for n, p in zip(row["shape"][1:], patch):
            tokens *= -(-n // p)
        held.setdefault(size_class(row), set()).add(row_class(tokens, slots))
    assert all(len(classes) == 1 for classes in held.values())
