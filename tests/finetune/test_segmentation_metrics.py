"""Metrics against MONAI and against slow definitions; the rules for empty masks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from finetune import metrics

SPACING = st.tuples(*[st.floats(0.4, 5.0)] * 3)
PAIRS = st.tuples(*[st.integers(2, 6)] * 3).flatmap(lambda s: st.tuples(*[hnp.arrays(bool, s)] * 2))


def slow_surface(mask):
    """Voxels of the mask with a face neighbour outside the mask or outside the image."""
    found = []
    for voxel in np.argwhere(mask):
        for axis in range(mask.ndim):
            for step in (-1, 1):
                other = voxel.copy()
                other[axis] += step
                if not (0 <= other[axis] < mask.shape[axis]) or not mask[tuple(other)]:
                    found.append(tuple(voxel))
    return np.array(sorted(set(found)))


@given(PAIRS, SPACING)
@settings(max_examples=60, deadline=None)
def test_surface_distances_by_trying_all_pairs(pair, spacing):
    predicted, truth = pair
    if not predicted.any() or not truth.any():
        return
    a, b = slow_surface(predicted) * np.array(spacing), slow_surface(truth) * np.array(spacing)
    all_pairs = np.sqrt(((a[:, None] - b[None]) ** 2).sum(-1))
    there, back = metrics.surface_distances(predicted, truth, spacing)
    np.testing.assert_allclose(np.sort(there), np.sort(all_pairs.min(1)), rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(np.sort(back), np.sort(all_pairs.min(0)), rtol=1e-6, atol=1e-9)


def random_pair(seed, shape=(8, 9, 10)):
    rng = np.random.default_rng(seed)
    return rng.random(shape) < 0.4, rng.random(shape) < 0.4


@pytest.mark.parametrize("seed", range(4))
def test_agrees_with_monai(seed):
    monai = pytest.importorskip("monai.metrics")
    predicted, truth = random_pair(seed)
    spacing = (2.5, 1.0, 0.7)
    a, b = (torch.from_numpy(m)[None, None].float() for m in (predicted, truth))
    theirs = monai.compute_surface_dice(a, b, [1.0], include_background=True, spacing=spacing)
    assert metrics.nsd(predicted, truth, spacing, 1.0) == pytest.approx(float(theirs), abs=1e-6)
    theirs = monai.compute_hausdorff_distance(a, b, include_background=True, percentile=95, spacing=spacing)
    assert metrics.hd95(predicted, truth, spacing) == pytest.approx(float(theirs), rel=1e-4)
    theirs = monai.compute_dice(a, b, include_background=True)
    assert metrics.dsc(predicted, truth) == pytest.approx(float(theirs), abs=1e-6)


def test_empty_masks_follow_the_rules_not_the_library():
    empty, some = np.zeros((2, 3, 4), bool), np.zeros((2, 3, 4), bool)
    some[0, 0, 0] = True
    spacing = (1.0, 2.0, 3.0)
    for function in (
        lambda p, t: metrics.dsc(p, t),
        lambda p, t: metrics.nsd(p, t, spacing, 1.0),
        lambda p, t: metrics.hd95(p, t, spacing),
    ):
        assert function(empty, empty) is None
    for p, t in ((empty, some), (some, empty)):
        assert metrics.dsc(p, t) == 0.0
        assert metrics.nsd(p, t, spacing, 1.0) == 0.0
        assert metrics.hd95(p, t, spacing) == pytest.approx(np.sqrt(2**2 + 6**2 + 12**2))


def test_spacing_matters_to_the_surface():
    """Two one-voxel masks a slice apart: 5 mm, so a tolerance of 2 mm finds nothing."""
    a, b = np.zeros((4, 4, 4), bool), np.zeros((4, 4, 4), bool)
    a[1, 1:3, 1:3], b[2, 1:3, 1:3] = True, True
    assert metrics.nsd(a, b, (5.0, 1.0, 1.0), 2.0) == 0.0
    assert metrics.nsd(a, b, (1.0, 1.0, 1.0), 2.0) == 1.0


def test_a_flat_image_has_an_outline_not_a_full_surface():
    a, b = np.zeros((1, 12, 12), bool), np.zeros((1, 12, 12), bool)
    a[0, 2:10, 2:10], b[0, 2:10, 2:9] = True, True
    there, _ = metrics.surface_distances(a, b, (1.0, 1.0, 1.0))
    assert len(there) == 28  # the outline of an 8 x 8 square


def test_auc_of_five_clicks_is_at_most_four():
    assert metrics.auc([1.0] * 5) == 4.0
    assert metrics.auc([0.0, 1.0, 1.0, 1.0, 1.0]) == 3.5


def test_means_go_over_objects_then_images_then_subjects():
    rows = [("a", "1", 1.0), ("a", "1", 0.0), ("a", "2", 1.0), ("b", "3", 0.0)]
    assert metrics.nested_mean(rows) == pytest.approx((0.75 + 0.0) / 2)
    assert metrics.nested_mean([]) is None
