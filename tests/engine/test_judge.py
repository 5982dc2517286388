"""The judgement of an update: which numbers count as bad."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.judge import FEWEST, objection, spike_limit
from engine.recipe import EngineConfig

CONFIG = EngineConfig(spike=10.0)
finite = st.floats(1e-3, 1e3)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_bad_whatever_came_before(bad: float) -> None:
    off = EngineConfig(spike=0.0)
    for config in (CONFIG, off):
        assert objection(bad, 1.0, [], config) == "the loss is not finite"
        assert objection(1.0, bad, [1.0] * 50, config) == "the gradient is not finite"


def test_a_spike_needs_enough_losses_to_be_told() -> None:
    assert objection(1e6, 1.0, [1.0] * (FEWEST - 1), CONFIG) == ""
    assert "the loss is above 1.5" in objection(1e6, 1.0, [1.0] * FEWEST, CONFIG)
    assert objection(1e6, 1.0, [1.0] * FEWEST, EngineConfig(spike=0.0)) == ""


def test_the_limit_is_that_of_a_normal_distribution() -> None:
    losses = np.random.default_rng(0).normal(5.0, 0.5, 4001).tolist()
    assert spike_limit(losses, 10.0) == pytest.approx(5.0 + 10.0 * 0.5, rel=0.05)


@given(st.lists(finite, min_size=FEWEST, max_size=40), finite)
def test_a_falling_loss_is_never_a_spike(losses: list[float], factor: float) -> None:
    assert objection(min(losses), factor, losses, CONFIG) == ""


@given(st.lists(st.floats(0.9, 1.1), min_size=FEWEST, max_size=40), st.integers(1, 7))
def test_spikes_that_were_let_through_do_not_hide_the_next(losses: list[float], spikes: int) -> None:
    seen = [*losses, *[1e4] * spikes]
    assert objection(1e4, 1.0, seen, CONFIG) != ""
    assert objection(1.1, 1.0, seen, CONFIG) == ""


def test_noise_of_a_loss_that_hardly_moves_is_no_spike() -> None:
    assert objection(1.3, 1.0, [1.0, 1.001] * 20, CONFIG) == ""
