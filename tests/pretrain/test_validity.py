"""Which tokens hold a voxel: the loader's worker and the device agree on every crop."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import pretrain.validity
from model.patches import gather_patches
from pretrain.validity import missing_voxels, valid_tokens

PATCH = {"volume": (8, 8, 8), "slab": (2, 16, 16), "planar": (1, 16, 16)}
SIZES = {"volume": (24, 30, 20), "slab": (6, 50, 40), "planar": (1, 60, 40)}


def on_the_device(
    voxels: np.ndarray, grid: Any, residual: Any, flip: Any, patch: Any, resample: bool | None
) -> list[bool]:
    row = torch.from_numpy(np.concatenate([voxels.ravel(), np.full(7, -32768, voxels.dtype)]))[None]
    extent, size, turned = (torch.tensor([each]) for each in (voxels.shape, grid, flip))
    steps = torch.tensor([residual], dtype=torch.float32)
    _, inside = gather_patches(row, extent, size, steps, turned, patch, int(np.prod(grid)), resample=resample)
    return inside[0].any(dim=1).tolist()


@st.composite
def crops(draw: st.DrawFn) -> tuple[np.ndarray, Any, Any, Any, Any]:
    kind = draw(st.sampled_from(sorted(PATCH)))
    patch = PATCH[kind]
    shape = [draw(st.integers(1, size)) for size in SIZES[kind]]
    step = draw(st.sampled_from([1.0, 0.5, 0.75, 0.7071, 1.1, 1.25, 1.4142]))
    residual = (step if kind == "volume" else 1.0, step, step)
    most = [int(np.ceil(n / (p * r) - 1e-6)) for n, p, r in zip(shape, patch, residual)]
    grid = tuple(draw(st.integers(1, n)) for n in most)
    generator = np.random.default_rng(draw(st.integers(0, 10**6)))
    voxels = generator.integers(-2000, 2000, shape).astype(np.int16)
    for _ in range(draw(st.integers(0, 3))):  # boxes of nothing
        low = [int(generator.integers(n)) for n in shape]
        voxels[tuple(slice(a, a + int(generator.integers(1, 25))) for a in low)] = -32768
    voxels[generator.random(shape) < draw(st.sampled_from([0.0, 0.0, 0.1, 0.5, 0.97, 1.0]))] = -32768
    if draw(st.booleans()):
        voxels = np.where(voxels == -32768, np.float32(np.nan), voxels.astype(np.float32))
        voxels[voxels == 7.0] = np.inf
    return voxels, grid, residual, tuple(draw(st.booleans()) for _ in range(3)), patch


@settings(max_examples=120, deadline=None)
@given(crops(), st.booleans())
def test_worker_and_device_find_the_same_tokens(crop: Any, neighbour_is_resampled: bool) -> None:
    found = valid_tokens(*crop)
    assert found.tolist() == on_the_device(*crop, True if neighbour_is_resampled else None)


def test_a_tie_of_the_weights_counts_as_inside() -> None:
    """At half a voxel a step every second output voxel lies between a valid and an invalid one."""
    voxels = np.full((1, 1, 34), -32768, np.int16)
    for first in (8, 9, 10):
        voxels[...] = -32768
        voxels[..., first] = 5
        crop = (voxels, (1, 1, 8), (1.0, 1.0, 0.5), (False, False, True), (8, 8, 8))
        assert valid_tokens(*crop).tolist() == on_the_device(*crop, True)


def test_crops_without_invalid_voxels_are_never_cut_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrain.validity, "_cut_out", None)
    voxels = np.ones((20, 30, 40), np.int16)
    assert valid_tokens(voxels, (2, 3, 4), (1.2, 1.2, 1.2), (True, False, False), (8, 8, 8)).all()
    assert missing_voxels(voxels) is None
    assert missing_voxels(np.full((3, 3, 3), 3e38, np.float32)).any() == np.False_  # the sum overflows


def test_the_last_layer_of_tokens_may_hold_no_voxel() -> None:
    """A grid is rounded up, and the last output voxel's centre may lie outside."""
    voxels = np.ones((8, 8, 9), np.int16)
    assert valid_tokens(voxels, (1, 1, 2), (1.0, 1.0, 1.1), (False,) * 3, (8, 8, 8)).tolist() == [True, False]


@pytest.mark.parametrize("away", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("step", [1.0, 0.8])
def test_float_voxels_that_are_not_finite_are_not_there(away: float, step: float) -> None:
    voxels = np.ones((8, 8, 24), np.float32)
    voxels[..., :12] = away
    crop = (voxels, (1, 1, 3), (1.0, 1.0, step), (False,) * 3, (8, 8, 8))
    assert valid_tokens(*crop).tolist() == on_the_device(*crop, None) == [False, True, True]
