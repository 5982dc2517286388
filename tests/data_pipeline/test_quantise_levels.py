"""Voxels are worked on a few planes at a time, in narrow types and without sorting: the result is, bit for
bit, that of the plain way over whole arrays in float64.
"""

from __future__ import annotations

from fractions import Fraction
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from data_pipeline import labels, readers
from data_pipeline import quantise as module
from data_pipeline.errors import Quarantined
from data_pipeline.geometry import level_factors
from data_pipeline.levels import block_mean, block_means, level_shape
from data_pipeline.quantise import HIGHEST, INVALID, LOWEST, invalid_of, quantise

SLABS = st.sampled_from([1, 30, 1 << 17])


def slow_quantise(
    voxels: np.ndarray, invalid: np.ndarray | None, exact: bool
) -> tuple[np.ndarray, list[float], list[float], float]:
    """Slope 1 and intercept 0; everything at once in float64; levels by sorting."""
    bad = np.zeros(voxels.shape, bool) if invalid is None else invalid.copy()
    bad |= ~np.isfinite(voxels.astype(np.float64))
    out, slopes, starts, worst = np.zeros(voxels.shape, np.int16), [], [], 0.0
    for values, wrong, target in zip(voxels, bad, out):
        good = values[~wrong]
        step, start, error = 1.0, 0.0, 0.0
        if good.size:
            low, high = good.min(), good.max()
            clean = np.where(wrong, low, values).astype(np.float64)
            span = float(high) - float(low)
            if span <= HIGHEST - LOWEST and (np.rint(good) == good).all():
                start = 0.0 if low >= LOWEST and high <= HIGHEST else float(int(low) - LOWEST)
                target[...] = clean - start
            elif span == 0:
                start = float(low)
            else:
                step = span / (HIGHEST - LOWEST)
                levels = np.unique(good).astype(np.float64)
                few = levels if len(levels) < 65_536 else None
                with mock.patch.object(module, "_levels", return_value=few):
                    lattice = module._lattice(values, None, low)
                if lattice is not None and lattice[2] < step / 2:
                    step, start, error = lattice
                    first, last = (round((float(end) - start) / step) for end in (low, high))
                    offset = 0 if first >= LOWEST and last <= HIGHEST else first - LOWEST
                else:
                    lattice, start, offset = None, float(low), -LOWEST
                place = np.clip(np.rint((clean - start) / step) - offset, LOWEST, HIGHEST)
                target[...] = place
                if lattice is None:
                    error = float(np.abs(place * step + (start + offset * step) - clean).max())
                start += offset * step
        slopes.append(step)
        starts.append(start)
        worst = max(worst, error)
    if worst and exact:
        real = voxels.astype(np.float32)
        difference = np.abs(np.where(bad, 0, voxels) - np.where(bad, 0, real).astype(np.float64))
        real[bad] = np.nan
        return real, [1.0] * len(voxels), [0.0] * len(voxels), float(difference.max())
    out[bad] = INVALID
    return out, slopes, starts, worst


@st.composite
def images(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray | None]:
    dtype = draw(st.sampled_from([np.uint8, np.int16, np.uint16, np.int32, np.float32, np.float64]))
    shape = (draw(st.integers(1, 2)), *draw(st.tuples(*[st.integers(1, 7)] * 3)))
    random = np.random.default_rng(draw(st.integers(0, 2**31)))
    voxels = random.integers(0, draw(st.sampled_from([2, 200, 60_000])), shape).astype(np.float64)
    if np.dtype(dtype).kind == "f":
        voxels = voxels * draw(st.sampled_from([1.0, 0.37, 1e-3])) + draw(st.sampled_from([0.0, -1.3, 1e4]))
        if draw(st.booleans()):
            voxels += random.normal(0, 1, shape)
        if draw(st.booleans()):
            voxels[random.random(shape) < 0.1] = draw(st.sampled_from([np.nan, np.inf, -np.inf]))
    else:
        info = np.iinfo(dtype)
        voxels = np.clip(voxels + draw(st.sampled_from([0, -32768, -500, 20_000])), info.min, info.max)
    invalid = random.random(shape) < draw(st.sampled_from([0.0, 0.2, 1.0])) if draw(st.booleans()) else None
    return voxels.astype(dtype), invalid


@settings(max_examples=300, deadline=None)
@given(images(), st.booleans(), SLABS)
def test_quantise_equals_the_plain_way(
    image: tuple[np.ndarray, np.ndarray | None], exact: bool, slab: int
) -> None:
    voxels, invalid = image
    before = voxels.copy()
    c = len(voxels)
    with mock.patch.object(module, "SLAB_VOXELS", slab):
        got = quantise(voxels, (1.0,) * c, (0.0,) * c, invalid, exact=exact)
    out, slopes, starts, worst = slow_quantise(voxels, invalid, exact)
    assert got.voxels.dtype == out.dtype
    assert got.voxels.tobytes() == out.tobytes()
    assert (list(got.slope), list(got.intercept), got.max_error) == (slopes, starts, worst)
    np.testing.assert_array_equal(voxels, before)


@settings(max_examples=80, deadline=None)
@given(
    st.integers(0, 2**31),
    st.sampled_from([1, 3, 700, 30_000, 65_535, 65_536, 200_000]),
    st.sampled_from([np.float32, np.float64]),
)
def test_levels_are_the_distinct_values_or_too_many(seed: int, count: int, dtype: type) -> None:
    random = np.random.default_rng(seed)
    some = np.concatenate([[0.0, -0.0], random.normal(0, 1e3, count)]).astype(dtype)
    values = np.concatenate([some, random.choice(some, 1 + (-len(some) - 1) % 60)])
    random.shuffle(values)
    values = values.reshape(-1, 6, 10)
    expected = np.unique(values)
    found = module._levels(values, None, values.min())
    if len(expected) > 65_535:
        assert found is None
    else:
        assert found is not None
        np.testing.assert_array_equal(found, expected)


def test_what_can_be_stored_as_it_is_is_not_copied() -> None:
    voxels = np.arange(-8, 16, dtype=np.int16).reshape(1, 2, 3, 4)
    assert quantise(voxels, (2.0,), (1.0,)).voxels is voxels
    assert quantise(voxels, (2.0,), (1.0,), np.zeros(voxels.shape, bool)).voxels is voxels
    assert quantise(voxels, (2.0,), (1.0,), voxels > 9).voxels is not voxels
    voxels[0, 0, 0, 0] = INVALID  # a value of its own here, which needs another place
    stored = quantise(voxels, (2.0,), (1.0,))
    assert stored.voxels.min() > INVALID
    assert (stored.voxels * stored.slope[0] + stored.intercept[0] == voxels * 2.0 + 1.0).all()


def slow_mean(voxels: np.ndarray, factors: tuple[int, ...]) -> np.ndarray:
    """A block at a time; int16 by exact fractions, halves to even."""
    out = np.empty((len(voxels), *level_shape(voxels.shape[1:], factors)), voxels.dtype)
    for place in np.ndindex(out.shape):
        block = voxels[place[0]][tuple(slice(p * f, p * f + f) for p, f in zip(place[1:], factors))]
        good = block[~invalid_of(block)]
        if not good.size:
            out[place] = INVALID if voxels.dtype == np.int16 else np.nan
        elif voxels.dtype == np.int16:
            out[place] = round(Fraction(int(good.sum(dtype=np.int64)), good.size))
        else:
            out[place] = good.astype(np.float64).sum() / good.size
    return out


@settings(max_examples=120, deadline=None)
@given(
    hnp.arrays(
        np.int16,
        st.tuples(st.integers(1, 2), *[st.integers(1, 9)] * 3),
        elements=st.integers(-32767, 32767) | st.integers(-2, 2) | st.just(INVALID),
        fill=st.nothing(),
    ),
    st.sampled_from([("volume", (0, 1, 2)), ("slab", (0, 1, 2)), ("slab", (2, 0, 1)), ("planar", (1, 0, 2))]),
    SLABS,
)
def test_levels_equal_exact_means(voxels: np.ndarray, geometry: tuple[str, tuple], slab: int) -> None:
    factors = level_factors(*geometry)[1:]
    with mock.patch.object(module, "SLAB_VOXELS", slab):
        got = block_means(voxels, factors)
        for mean, by in zip(got, factors):
            np.testing.assert_array_equal(mean, slow_mean(voxels, by))
            np.testing.assert_array_equal(mean, block_mean(voxels, by))


@settings(max_examples=40, deadline=None)
@given(st.tuples(*[st.integers(1, 9)] * 3), st.integers(0, 99), st.sampled_from([0.0, 0.3]), SLABS)
def test_levels_of_floats(shape: tuple[int, ...], seed: int, holes: float, slab: int) -> None:
    random = np.random.default_rng(seed)
    voxels = random.normal(0, 1e3, (2, *shape)).astype(np.float32)
    voxels[random.random(voxels.shape) < holes] = np.nan
    with mock.patch.object(module, "SLAB_VOXELS", slab):
        for mean, by in zip(block_means(voxels, [(2, 2, 2), (4, 4, 4)]), (2, 4)):
            np.testing.assert_allclose(mean, slow_mean(voxels, (by,) * 3), rtol=2e-7)


def test_levels_go_up_in_whole_steps() -> None:
    with pytest.raises(ValueError, match="multiples"):
        block_means(np.zeros((1, 6, 6, 6), np.int16), [(2, 2, 2), (3, 3, 3)])


@settings(max_examples=100, deadline=None)
@given(
    hnp.arrays(np.uint8, hnp.array_shapes(min_dims=3, max_dims=3, max_side=5), elements=st.integers(0, 4)),
    st.sampled_from([np.uint8, np.uint16, np.int32]),
    st.sampled_from([frozenset(), frozenset({0}), frozenset({3})]),
)
def test_coded_labels_equal_a_look_up_of_every_voxel(
    values: np.ndarray, dtype: type, ignore: frozenset[int]
) -> None:
    regions = {"whole": (1, 2), "part": (2,), "other": (4, 3)}
    coded = labels._coded(values.astype(dtype), regions, {"whole": 7, "part": 8, "other": 9}, ignore)
    first = {0: 0, 1: 7, 2: 7, 3: 9, 4: 9} | dict.fromkeys(ignore, 255)
    second = {0: 0, 1: 0, 2: 8, 3: 0, 4: 0} | dict.fromkeys(ignore, 255)
    expected = np.stack([np.vectorize(table.get)(values) for table in (first, second)])
    np.testing.assert_array_equal(coded, expected)
    assert labels.classes_of(coded) == tuple(v for v in np.unique(expected).tolist() if v not in (0, 255))


@settings(max_examples=100, deadline=None)
@given(
    images(),
    st.sampled_from([(1.0, 0.0), (0.5, -1024.0), (-1.0, 30.0), (1.0, -32768.0)]),
    st.sampled_from(["CT", "MR"]),
)
def test_what_is_no_measurement_equals_a_mask_of_every_voxel(
    image: tuple[np.ndarray, np.ndarray | None], scale: tuple[float, float], modality: str
) -> None:
    voxels, padding = image
    c = len(voxels)
    real = voxels.astype(np.float64) * scale[0] + scale[1]
    expected = ~np.isfinite(real)
    if padding is not None:
        expected |= padding
    if modality == "CT":
        expected |= real < readers.CT_PADDING_BELOW
    arguments = (voxels, padding, [modality] * c, *scale, ["HU" if modality == "CT" else "arbitrary"] * c)
    if expected.all(axis=(1, 2, 3)).any():
        with pytest.raises(Quarantined):
            readers._separate_invalid(*arguments)
        return
    got, invalid = readers._separate_invalid(*arguments)
    np.testing.assert_array_equal(np.zeros(voxels.shape, bool) if invalid is None else invalid, expected)
    for channel, bad, source in zip(got.astype(np.float64) * scale[0] + scale[1], expected, real):
        assert (channel[bad] == source[~bad].min()).all()
        np.testing.assert_array_equal(channel[~bad], source[~bad])
