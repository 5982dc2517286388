"""Counter-based randomness."""

from __future__ import annotations

import math
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.rng import permutation, permuted, rng, uniforms


@settings(deadline=None)
@given(st.integers(0, 2**63), st.integers(0, 2**63), st.text(max_size=10))
def test_equal_arguments_give_equal_numbers(seed: int, index: int, purpose: str) -> None:
    assert uniforms(seed, index, purpose, 4) == uniforms(seed, index, purpose, 4)
    assert rng(seed, index, purpose).random() == rng(seed, index, purpose).random()


def test_seed_index_and_purpose_each_change_the_numbers() -> None:
    found = {
        tuple(uniforms(seed, index, purpose, 2))
        for seed in range(5)
        for index in range(5)
        for purpose in ("crop", "mask", "1")
    }
    assert len(found) == 75


def test_neighbouring_indices_do_not_overlap() -> None:
    first = uniforms(0, 7, "crop", 1000)
    second = uniforms(0, 8, "crop", 1000)
    assert not set(first) & set(second)


def test_numbers_are_pinned_for_good() -> None:
    # A change here changes every run's order: these are part of the format.
    assert uniforms(0, 0, "crop", 2) == [0.2728242202582635, 0.10293700761113178]
    assert [permuted(3, 1, "shards", 10**6, i) for i in (0, 1, 999_999)] == [63733, 902751, 470495]
    assert permutation(3, 1, "shards", 8).tolist() == [1, 3, 6, 5, 2, 0, 4, 7]


@settings(deadline=None)
@given(st.integers(1, 300))
def test_permutations_hold_everything_once(n: int) -> None:
    assert sorted(permutation(1, 2, "x", n).tolist()) == list(range(n))


def test_permutations_are_uniform() -> None:
    counts = np.zeros((5, 5))
    for index in range(4000):
        counts[np.arange(5), permutation(0, index, "u", 5)] += 1
    assert np.abs(counts / 4000 - 0.2).max() < 0.03


def test_another_process_with_another_hash_seed_agrees() -> None:
    code = "from data_pipeline.rng import uniforms; print(uniforms(5, 6, 'crop', 3))"
    for hash_seed in ("0", "1234"):
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": hash_seed, "PYTHONPATH": ":".join(sys.path)},
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        )
        assert done.stdout.strip() == repr(uniforms(5, 6, "crop", 3))


def test_an_impossible_index_is_refused() -> None:
    with pytest.raises(ValueError, match="counter"):
        rng(0, -1, "crop")


@settings(deadline=None)
@given(st.integers(0, 2**63), st.integers(0, 2**20), st.integers(1, 3000))
def test_places_of_a_permutation_hold_everything_once(seed: int, index: int, n: int) -> None:
    assert sorted(permuted(seed, index, "x", n, i) for i in range(n)) == list(range(n))


@settings(deadline=None, max_examples=20)
@given(st.integers(2**16, 10**9), st.integers(0, 2**32))
def test_places_of_a_long_permutation_are_distinct_and_inside(n: int, seed: int) -> None:
    asked = np.unique(np.random.default_rng(seed).integers(0, n, 2000)).tolist()
    found = {permuted(seed, 0, "x", n, i) for i in asked}
    assert len(found) == len(asked)
    assert min(found) >= 0
    assert max(found) < n
    # Neighbours land anywhere: the mean of |a − b| / n of independent places is 1/3.
    near = np.array([permuted(seed, 0, "x", n, i) for i in range(2000)])
    assert abs(np.abs(np.diff(near)).mean() / n - 1 / 3) < 0.03


@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_short_permutations_are_equally_likely(n: int) -> None:
    draws = 300 * math.factorial(n)
    drawn = Counter(tuple(permuted(s, 0, "x", n, i) for i in range(n)) for s in range(draws))
    assert len(drawn) == math.factorial(n)
    chi2 = sum((count - 300) ** 2 / 300 for count in drawn.values())
    freedom = math.factorial(n) - 1
    assert chi2 < freedom + 4 * math.sqrt(2 * freedom) + 8


@pytest.mark.parametrize("n", [65, 80, 81, 100, 257])
def test_long_permutations_are_uniform(n: int) -> None:
    seeds = 2000
    drawn = np.array([[permuted(s, 3, "x", n, i) for i in range(0, n, 8)] for s in range(seeds)])
    for column in drawn.T:  # a place is filled by every number alike
        counts = np.bincount(column, minlength=n)
        chi2 = ((counts - seeds / n) ** 2 / (seeds / n)).sum()
        assert abs(chi2 - (n - 1)) < 5.5 * math.sqrt(2 * (n - 1))
    # The distance of two neighbours is every number but 0 alike: no structure is left between places.
    far = [(permuted(s, 3, "x", n, 9) - permuted(s, 3, "x", n, 8)) % n for s in range(4 * seeds)]
    counts = np.bincount(far, minlength=n)
    assert counts[0] == 0
    expected = 4 * seeds / (n - 1)
    assert abs(((counts[1:] - expected) ** 2 / expected).sum() - (n - 2)) < 5.5 * math.sqrt(2 * (n - 2))


def test_an_impossible_place_is_refused() -> None:
    with pytest.raises(IndexError, match="place 7"):
        permuted(0, 0, "x", 7, 7)


def test_the_first_draw_imports_nothing() -> None:
    """NumPy loads `numpy.random` when it is first asked for: 20 ms that a resume would wait for."""
    code = "import sys, data_pipeline.rng; assert 'numpy.random' in sys.modules"
    env = {"PYTHONPATH": ":".join(sys.path)}
    subprocess.run([sys.executable, "-c", code], env=env, check=True, timeout=60)
