"""The two predictors without parameters."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from pretrain.baselines import interpolation, visible_mean
from pretrain.mae import crop_error
from pretrain.tokens import tokenise, voxel_offsets

CASES = [
    ("volume", (32, 40, 24), (0, 1, 2), (1.0, 1.5, 2.0)),
    ("slab", (8, 96, 64), (2, 0, 1), (5.0, 0.7, 0.9)),
    ("planar", (1, 128, 160), (0, 1, 2), (1.0, 0.5, 0.5)),
]


def tokens_of(hand: Any, crop: Any, geometry: str, **changes: Any) -> Any:
    model, batch = hand.build([hand.spec(geometry, 1, 1, 96)], [crop], augment=False, **changes)
    return tokenise(next(iter(batch.values())), model.encoder.patch(geometry))


def errors_of(tokens: Any) -> list[torch.Tensor]:
    """Errors (n,) of the visible mean and of the interpolation."""
    return [crop_error(p(tokens), tokens.target, tokens.scored) for p in (visible_mean, interpolation)]


@pytest.mark.parametrize(("geometry", "shape", "axes", "spacing"), CASES)
def test_interpolation_follows_a_ramp_in_any_orientation(
    geometry: str, shape: Any, axes: Any, spacing: Any, hand: Any
) -> None:
    crop = hand.crop(geometry, shape, axes=axes, spacing=spacing)
    ramp = np.zeros(shape)
    for axis, slope in enumerate((4.0, 3.0, 7.0)):
        along = (np.arange(shape[axis]) + 0.5) * spacing[axis] * slope
        ramp += along.reshape([-1 if a == axis else 1 for a in range(3)])
    crop.voxels = np.round(1000 + ramp).astype(np.int16)
    mean, interpolated = errors_of(tokens_of(hand, crop, geometry))
    assert float(interpolated) < 0.1 * float(mean)


def test_mean_is_that_of_visible_valid_voxels(hand: Any) -> None:
    crop = hand.crop("volume", (20, 40, 24), invalid=0.3)
    tokens = tokens_of(hand, crop, "volume")
    values = [
        v
        for token, there, attend in zip(tokens.visible[0], tokens.visible_inside[0], tokens.attend[0])
        if attend
        for v in token[there].tolist()
    ]
    assert float(visible_mean(tokens)[0, 0, 0]) == pytest.approx(np.mean(values), rel=1e-5)


def test_baselines_see_visible_tokens_only_and_are_finite(hand: Any) -> None:
    crop = hand.crop("volume", (20, 40, 24), invalid=0.3)
    tokens = tokens_of(hand, crop, "volume")
    hidden = crop.voxels.copy()
    for token in tokens.target_ids[0][tokens.predicted[0]].tolist():
        place = np.unravel_index(token, crop.draw.grid)
        cut = tuple(slice(8 * at, 8 * at + 8) for at in place)
        hidden[cut] = np.where(hidden[cut] == -32768, -32768, 2000 - hidden[cut])
    crop.voxels = hidden
    changed = tokens_of(hand, crop, "volume")
    assert torch.equal(interpolation(tokens), interpolation(changed))
    assert torch.equal(visible_mean(tokens), visible_mean(changed))
    assert not torch.equal(tokens.target, changed.target)
    for lonely in (hand.crop("volume", (8, 8, 16)), hand.crop("volume", (8, 8, 8), invalid=1.0)):
        few = tokens_of(hand, lonely, "volume")
        assert bool(torch.stack(errors_of(few)).isfinite().all())


def test_interpolation_beats_the_mean_on_smooth_images_and_not_on_noise(hand: Any) -> None:
    crop = hand.crop("volume", (32, 40, 24))
    mean, interpolated = errors_of(tokens_of(hand, crop, "volume"))
    assert float(interpolated) > float(mean)
    z, y, x = np.meshgrid(*(np.linspace(0, 2.5, n) for n in crop.voxels.shape), indexing="ij")
    crop.voxels = (1000 + 500 * np.sin(z) * np.cos(y + x)).astype(np.int16)
    mean, interpolated = errors_of(tokens_of(hand, crop, "volume"))
    assert float(interpolated) < 0.6 * float(mean)


def test_voxel_offsets_are_in_mm_along_the_patient_axes(hand: Any) -> None:
    axes, spacing, patch = (2, 0, 1), (5.0, 0.7, 0.9), (2, 16, 16)
    crop = hand.crop("slab", (4, 32, 48), axes=axes, spacing=spacing)
    _, batch = hand.build([hand.spec("slab", 1, 1, 96)], [crop])
    expected = np.zeros((512, 3))
    for number, place in enumerate(np.ndindex(*patch)):
        for stem_axis, patient_axis in enumerate(axes):
            middle = (patch[stem_axis] - 1) / 2
            expected[number, patient_axis] = (place[stem_axis] - middle) * spacing[stem_axis]
    found = voxel_offsets(batch["slab-1"], patch)[0]
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5)
