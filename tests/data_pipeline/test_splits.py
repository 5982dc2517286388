"""Splits: fractions hold, nothing moves when subjects come, small sources get every split."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.errors import UserError
from data_pipeline.splits import Groups, assign, strictest

FRACTIONS = {"train": 0.7, "val": 0.1, "test": 0.2}


def test_fractions_hold() -> None:
    chosen = assign(range(5000), FRACTIONS, 0)
    for name, fraction in FRACTIONS.items():
        assert abs(list(chosen.values()).count(name) / 5000 - fraction) < 0.02


def test_adding_subjects_moves_none() -> None:
    few, many = assign(range(100), FRACTIONS, 1), assign(range(300), FRACTIONS, 1)
    assert all(many[s] == few[s] for s in few)
    assert assign(range(100), FRACTIONS, 2) != few


@given(st.integers(3, 12), st.integers(0, 500))
def test_small_sources_get_every_split(n: int, seed: int) -> None:
    chosen = assign([f"s{i}" for i in range(n)], FRACTIONS, seed)
    assert set(chosen.values()) == set(FRACTIONS)
    assert assign([f"s{i}" for i in reversed(range(n))], FRACTIONS, seed) == chosen


def test_what_cannot_be() -> None:
    with pytest.raises(UserError, match="sum to 1"):
        assign("ab", {"train": 0.5}, 0)
    with pytest.raises(UserError, match="letters and digits"):
        assign("ab", {"tr/ain": 1.0}, 0)
    assert set(assign("ab", {"train": 1.0, "val": 0.0}, 0).values()) == {"train"}


def test_stated_splits() -> None:
    assert strictest(["train", "test", "val"]) == "test"
    assert strictest(["train", "val"]) == "val"
    assert strictest(["fold1"]) == "fold1"


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), max_size=40))
def test_groups_are_the_connected_parts(pairs: list[tuple[int, int]]) -> None:
    groups = Groups()
    part = {i: {i} for i in range(31)}
    for i in range(31):
        groups.join([i])
    for a, b in pairs:
        groups.join([a, b])
        joined = part[a] | part[b]
        for i in joined:
            part[i] = joined
    for i in range(31):
        assert groups.find(i) == min(part[i])
