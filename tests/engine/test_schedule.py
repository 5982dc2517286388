"""The learning rate: a pure function of the update count."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.recipe import EngineConfig
from engine.schedule import agree_until, decay_start, learning_rate


def config(**fields: Any) -> EngineConfig:
    return EngineConfig(**{"lr": 1e-3, "warmup": 10, "updates": 100, "schedule": "wsd", **fields})


def rates(of: EngineConfig) -> list[float]:
    return [learning_rate(update, of) for update in range(of.updates)]


@pytest.mark.parametrize("schedule", ["wsd", "cosine", "constant"])
def test_the_warm_up_is_linear_and_reaches_the_peak(schedule: str) -> None:
    assert rates(config(schedule=schedule))[:10] == pytest.approx([1e-4 * n for n in range(1, 11)])


def test_wsd_is_constant_then_falls_as_one_minus_a_square_root() -> None:
    of = config(decay=16, min_lr=1e-5)
    assert decay_start(of) == 84
    seen = rates(of)
    assert set(seen[10:85]) == {1e-3}
    assert seen[88] == pytest.approx(1e-5 + (1e-3 - 1e-5) * (1 - math.sqrt(4 / 16)))
    assert seen[93] == pytest.approx(1e-5 + (1e-3 - 1e-5) * (1 - math.sqrt(9 / 16)))
    assert learning_rate(100, of) == learning_rate(1000, of) == 1e-5
    assert all(a > b for a, b in itertools.pairwise(seen[84:]))


def test_the_decay_takes_a_tenth_and_never_the_warm_up() -> None:
    assert decay_start(config()) == 90
    assert decay_start(config(updates=5, warmup=0)) == 4
    assert decay_start(config(updates=12, decay=8)) == 10
    assert rates(config(updates=12, decay=8))[:10] == pytest.approx([1e-4 * n for n in range(1, 11)])


@given(st.integers(1, 60), st.integers(0, 30), st.integers(0, 40), st.integers(1, 60), st.integers(0, 40))
def test_recipes_agree_exactly_until_they_part(
    old: int, warmup: int, decay: int, new: int, new_decay: int
) -> None:
    a = config(updates=old, warmup=warmup, decay=decay, min_lr=1e-5)
    b = config(updates=new, warmup=warmup, decay=new_decay, min_lr=1e-5)
    agree = agree_until(a, b)
    assert agree == agree_until(b, a)
    assert all(learning_rate(u, a) == learning_rate(u, b) for u in range(agree))
    assert agree == max(old, new) or learning_rate(agree, a) != learning_rate(agree, b)


def test_an_extension_keeps_all_that_came_before_the_decay() -> None:
    old, new = config(updates=100, decay=20), config(updates=300, decay=20)
    assert agree_until(old, new) >= decay_start(old) == 80
    assert agree_until(old, config(updates=300, decay=20, lr=2e-3)) == 0
