"""Intensity constants: fixed for CT and SUV, robust percentiles without background elsewhere."""

from __future__ import annotations

from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline import intensity
from data_pipeline import quantise as quantise_module
from data_pipeline.errors import Quarantined
from data_pipeline.intensity import BACKGROUND, LEAST_FOREGROUND, Norm, _percentile, statistics
from data_pipeline.quantise import Stored, quantise
from data_pipeline.volume import Channel, Volume


def volume(
    array: np.ndarray, modality: str, units: str = "arbitrary", slope=1.0, intercept=0.0, invalid=None
) -> Volume:
    channel = Channel(modality, modality, units)  # type: ignore[arg-type]
    invalid = None if invalid is None else invalid[np.newaxis]
    return Volume.on_grid(
        array[np.newaxis], (channel,), np.eye(4), slope=(slope,), intercept=(intercept,), invalid=invalid
    )  # fmt: skip


def head(random: np.random.Generator, dtype: type = np.int16) -> tuple[np.ndarray, np.ndarray]:
    """A ball of tissue in noisy air."""
    z, y, x = np.indices((24, 24, 24)) - 11.5
    tissue = z**2 + y**2 + x**2 < 64
    image = np.abs(random.normal(0, 8, tissue.shape))
    image[tissue] = random.normal(500, 80, int(tissue.sum()))
    return image.astype(dtype), tissue


@pytest.mark.parametrize("dtype", [np.int16, np.uint16, np.float32])
def test_mr_is_standardised_over_tissue_not_air(dtype: type) -> None:
    image, tissue = head(np.random.default_rng(0), dtype)
    norm = statistics(volume(image, "MR"))[0]
    x = norm.apply(image)[tissue]
    assert abs(x.mean()) < 0.05
    assert 0.9 < x.std() < 1.1
    assert norm.low > 200
    assert norm.compress == 0


def test_integers_and_floats_give_the_same_constants() -> None:
    image, _ = head(np.random.default_rng(1))
    np.testing.assert_allclose(
        statistics(volume(image, "MR"))[0], statistics(volume(image.astype(np.float32), "MR"))[0], rtol=1e-6
    )


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e5])
def test_many_floats_are_binned_without_changing_the_constants(
    monkeypatch: pytest.MonkeyPatch, scale: float
) -> None:
    image = head(np.random.default_rng(1), np.float32)[0] * np.float32(scale)
    image[0, 0, 0], image[5, 5, 5] = -300 * scale, 1e6 * scale  # outliers
    exact = statistics(volume(image, "MR"))[0]
    monkeypatch.setattr(intensity, "MANY", 1 << 10)
    binned = statistics(volume(image, "MR"))[0]
    assert binned != exact
    np.testing.assert_allclose(binned.apply(image), exact.apply(image), atol=2e-3)
    flat = np.zeros((30, 30, 30), np.float32)
    flat[0, 0, 0] = 5
    assert statistics(volume(flat, "MR"))[0].high == 5


def test_constants_follow_real_values_not_stored_ones() -> None:
    image, _ = head(np.random.default_rng(2))
    plain = statistics(volume(image, "MR"))[0]
    scaled = statistics(volume(image, "MR", slope=2.0, intercept=10.0))[0]
    np.testing.assert_allclose(scaled.apply(image), plain.apply(image), atol=1e-9)
    mirrored = statistics(volume((1000 - image).astype(np.int16), "MR", slope=-1.0, intercept=1000.0))[0]
    np.testing.assert_allclose(mirrored.apply(1000 - image), plain.apply(image), atol=1e-9)


def test_ct_has_fixed_constants_whatever_is_in_view() -> None:
    random = np.random.default_rng(3)
    whole = statistics(volume(random.integers(-1024, 2000, (8, 8, 8)).astype(np.int16), "CT", "HU"))[0]
    part = statistics(volume(random.integers(-50, 100, (8, 8, 8)).astype(np.int16), "CT", "HU"))[0]
    assert whole == part == Norm(1, 0, -1024, 3071, -200, 500, 0)
    assert whole.apply(np.array([-5000, -200, 300])).tolist() == [-1.648, 0.0, 1.0]


def test_ct_that_cannot_be_hounsfield_is_refused_unless_declared_arbitrary() -> None:
    image = np.zeros((10, 10, 10), np.uint8)
    image[3:7, 3:7, 3:7] = np.arange(64).reshape(4, 4, 4) + 100
    with pytest.raises(Quarantined) as refused:
        statistics(volume(image, "CT", "HU"))
    assert refused.value.code == "not_hounsfield"
    assert statistics(volume(image, "CT", "arbitrary"))[0].high < 200
    bone = np.random.default_rng(4).normal(800, 200, (10, 10, 10)).clip(1).astype(np.int16)
    assert statistics(volume(bone, "CT", "HU"))[0].low == -1024  # all bone, no air: may be HU


def test_suv_is_compressed_with_fixed_constants() -> None:
    norm = statistics(volume(np.linspace(0, 20, 512, dtype=np.float32).reshape(8, 8, 8), "PT", "SUV"))[0]
    assert (norm.low, norm.high, norm.compress) == (0, 100, 1)
    assert norm.apply(np.array([0.0])) == -norm.center / norm.scale
    assert norm.apply(np.array([1e6])) == pytest.approx((np.arcsinh(100) - norm.center) / norm.scale)


def test_invalid_voxels_have_no_say() -> None:
    image, _ = head(np.random.default_rng(5))
    plain = statistics(volume(image, "MR"))[0]
    bigger = np.concatenate([image, np.full_like(image, 30000)])
    invalid = np.zeros(bigger.shape, bool)
    invalid[len(image) :] = True
    assert statistics(volume(bigger, "MR", invalid=invalid))[0] == plain


def test_constant_and_empty_images_are_refused() -> None:
    with pytest.raises(Quarantined) as refused:
        statistics(volume(np.full((2, 2, 2), 7, np.int16), "MR"))
    assert refused.value.code == "constant"
    with pytest.raises(Quarantined) as refused:
        statistics(volume(np.ones((2, 2, 2), np.int16), "MR", invalid=np.ones((2, 2, 2), bool)))
    assert refused.value.code == "no_valid_voxels"


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(-50, 50), min_size=1, max_size=200), st.floats(0.1, 99.9))
def test_percentile_is_numpys_inverted_cdf(values: list[int], percent: float) -> None:
    ordered = np.sort(np.array(values, np.float64))
    present, counts = np.unique(ordered, return_counts=True)
    expected = np.percentile(ordered, percent, method="inverted_cdf")
    assert _percentile(present, counts, (percent,))[0] == expected
    assert _percentile(ordered, None, (percent,))[0] == expected


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([np.uint8, np.int16, np.int32, np.float32, np.float64]))
def test_any_varied_image_gives_finite_usable_constants(seed: int, dtype: type) -> None:
    random = np.random.default_rng(seed)
    array = (random.normal(0, 1, (4, 5, 6)) ** 3 * random.choice([0.1, 30, 1e4])).clip(
        0, 255 if dtype is np.uint8 else None
    )
    array[random.random(array.shape) < random.random()] = 0
    array = array.astype(dtype)
    if array.min() == array.max():
        return
    norm = statistics(volume(array, random.choice(["MR", "XR", "PT"])))[0]
    assert np.isfinite(norm).all()
    assert norm.scale > 0
    assert norm.low < norm.high
    assert np.isfinite(norm.apply(array)).all()


def stored_form(made: Volume) -> Stored:
    return quantise(made.voxels, made.slope, made.intercept, made.invalid)


def slow_norm(real: np.ndarray, strong: bool) -> tuple[float, float, float, float]:
    """(low, high, center, scale) after the definition, from every valid value, sorted."""
    real = np.sort(real)

    def percentile(of: np.ndarray, percent: float) -> float:
        return float(np.percentile(of, percent, method="inverted_cdf"))

    kept = above = real[real > real[0]]
    if len(kept) >= 0.98 * len(real):
        kept = real
    if strong:
        low, high = percentile(real, 0.1), percentile(real, 99.0)
        above = real[real > low + BACKGROUND * (high - low)]
        if len(above) >= LEAST_FOREGROUND * len(real):
            kept = min(kept, above, key=len)
    if len(kept) < LEAST_FOREGROUND * len(real):
        kept = real
    low, high = percentile(kept, 0.5), percentile(kept, 99.5)
    if high <= low:
        low, high, kept = real[0], real[-1], real
    clipped = np.clip(kept, low, high)
    return low, high, clipped.mean(), max(clipped.std(), 1e-6 * (high - low))


@settings(max_examples=150, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([np.uint8, np.int16, np.uint16, np.int32, np.float32, np.float64]),
    st.sampled_from(["MR", "XR", "PT"]),
    st.sampled_from([(1.0, 0.0), (0.25, -3.0), (-2.0, 100.0)]),
    st.sampled_from([0.0, 0.3]),
    st.sampled_from([1, 20, 1 << 17]),
)
def test_stored_values_are_counted_as_the_definition_says(
    seed: int, dtype: type, modality: str, scale: tuple[float, float], holes: float, slab: int
) -> None:
    random = np.random.default_rng(seed)
    array = np.abs(random.normal(0, 1, (4, 5, 6)) ** 3 * random.choice([30, 1e4])).clip(0, 250)
    array[random.random(array.shape) < random.random()] = 0
    invalid = random.random(array.shape) < holes
    made = volume(array.astype(dtype), modality, slope=scale[0], intercept=scale[1], invalid=invalid)
    stored = stored_form(made)
    real = stored.voxels[0][~invalid] * np.float64(stored.slope[0]) + stored.intercept[0]
    if real.min() == real.max():
        return
    with mock.patch.object(quantise_module, "SLAB_VOXELS", slab):
        norm = statistics(made, stored)[0]
    assert norm[:2] == (stored.slope[0], stored.intercept[0])
    np.testing.assert_allclose(norm[2:6], slow_norm(real, modality != "XR"), rtol=1e-12, atol=1e-12)
    if np.dtype(dtype).kind != "f":
        np.testing.assert_allclose(norm[2:], statistics(made)[0][2:], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [np.int16, np.float32])
def test_fixed_constants_and_refusals_are_the_same_from_stored_values(dtype: type) -> None:
    random = np.random.default_rng(3)
    ct = volume(random.integers(-1024, 2000, (8, 8, 8)).astype(dtype), "CT", "HU", intercept=0.5)
    assert statistics(ct, stored_form(ct))[0][2:] == statistics(ct)[0][2:]
    flat = volume(np.full((2, 2, 2), 7.25, dtype), "CT", "HU")
    nothing = volume(np.ones((2, 2, 2), dtype), "MR", invalid=np.ones((2, 2, 2), bool))
    image = np.zeros((10, 10, 10), dtype)
    image[3:7, 3:7, 3:7] = np.arange(64).reshape(4, 4, 4) + 100
    for bad, code in (
        (flat, "constant"),
        (nothing, "no_valid_voxels"),
        (volume(image, "CT", "HU"), "not_hounsfield"),
    ):
        with pytest.raises(Quarantined) as refused:
            statistics(bad, stored_form(bad))
        assert refused.value.code == code


def test_float32_under_exact_keeps_the_constants_of_the_values_as_they_are() -> None:
    image = np.random.default_rng(0).gamma(2.0, 100.0, (9, 9, 9)).astype(np.float32)
    made = volume(image, "MR")
    stored = quantise(made.voxels, made.slope, made.intercept, exact=True)
    assert stored.voxels.dtype == np.float32
    assert statistics(made, stored) == statistics(made)
