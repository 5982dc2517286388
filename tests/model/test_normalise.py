"""Intensity to network range and back."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from model.config import EncoderConfig
from model.errors import UserError
from model.normalise import background, denormalise, normalise
from model.plan import AdaptationPlan, norm_for, normalise_for

CT = (1.0, -8192.0, -1024.0, 3071.0, -200.0, 500.0, 0.0)
PT = (0.01, 0.0, 0.0, 100.0, 1.0, 2.0, 1.0)


def slow(stored: float, norm: tuple) -> float:
    slope, intercept, low, high, center, scale, compress = norm
    value = min(max(stored * slope + intercept, low), high)
    value = np.arcsinh(value / compress) if compress > 0 else value
    return (value - center) / scale


def test_formula_per_sample_and_air_where_nothing_is() -> None:
    raw = torch.randint(-5000, 20000, (2, 7, 3)).to(torch.int16)
    inside = torch.rand(2, 7, 3) > 0.3
    norm = torch.tensor([CT, PT], dtype=torch.float64)
    x = normalise(raw, norm, inside)
    assert x.dtype == torch.float32
    for sample, own in enumerate((CT, PT)):
        for place in np.ndindex(7, 3):
            at = (sample, *place)
            air = slow((own[2] - own[1]) / own[0], own)
            expected = slow(float(raw[at]), own) if inside[at] else air
            assert x[at].item() == pytest.approx(expected, rel=1e-5, abs=1e-5)
    assert background(norm)[0].item() == pytest.approx((-1024 + 200) / 500)
    nothing = normalise(raw, norm, torch.zeros_like(inside))
    assert torch.equal(nothing, background(norm)[:, None, None].expand_as(nothing))


def test_inverse_within_the_window() -> None:
    real = torch.tensor([[-1024.0, -200.0, 40.0, 3071.0], [0.0, 0.5, 20.0, 100.0]])
    norm = torch.tensor([CT, PT], dtype=torch.float64)
    stored = (real - norm[:, 1:2]) / norm[:, 0:1]
    torch.testing.assert_close(denormalise(normalise(stored, norm), norm), real, rtol=1e-4, atol=1e-2)


def test_bf16_input_is_not_rounded_before_it_is_scaled() -> None:
    hu = torch.tensor([[1003.0, 1005.0]])
    norm = torch.tensor([(1.0, 0.0, *CT[2:])])
    x = normalise(hu, norm)
    assert (x[0, 1] - x[0, 0]).item() == pytest.approx(2 / 500, rel=1e-3)


def test_plan_normalises_as_the_device_does() -> None:
    plan = AdaptationPlan(architecture=EncoderConfig(size="nano"))
    values = np.array([[-3000.0, 0.0, 12.5, 9999.0, np.nan]])
    for modality in ("CT", "PT"):
        norm = norm_for(plan, modality)
        assert norm is not None
        expected = normalise(
            torch.from_numpy(np.nan_to_num(values)),
            torch.tensor([norm]),
            torch.from_numpy(np.isfinite(values)),
        )
        found = normalise_for(plan, modality, values)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected.numpy(), rtol=1e-5, atol=1e-6)
    with pytest.raises(UserError, match="whole volume"):
        normalise_for(plan, "MR", values)
    mr = (
        7.0,
        5.0,
        10.0,
        900.0,
        300.0,
        150.0,
        0.0,
    )  # slope and intercept are of stored values, not of real ones
    np.testing.assert_allclose(normalise_for(plan, "MR", np.array([450.0]), mr), [1.0])
    with pytest.raises(UserError, match="US"):
        normalise_for(plan, "US", values)


def test_wrong_shape_of_norm() -> None:
    with pytest.raises(ValueError, match=r"\(2, 7\)"):
        normalise(torch.zeros(2, 4), torch.zeros(3, 7))


def test_the_plans_defaults_are_what_the_shards_are_built_with() -> None:
    from data_pipeline import intensity
    from model.plan import DEFAULT_NORMALISATION as RULES

    ct, pt = RULES["CT"], RULES["PT"]
    assert (ct.low, ct.high) == intensity.CT_RANGE
    assert (ct.center, ct.scale, ct.compress) == (intensity.CT_CENTER, intensity.CT_SCALE, 0)
    assert (pt.low, pt.high) == intensity.SUV_RANGE
    assert (pt.center, pt.scale, pt.compress) == (
        intensity.SUV_CENTER,
        intensity.SUV_SCALE,
        intensity.SUV_COMPRESS,
    )
    for modality in ("MR", "XR"):
        assert RULES[modality].kind == "percentile"
        assert (RULES[modality].low, RULES[modality].high) == intensity.PERCENTILES
