"""Reconstructions in real units: each panel holds what it says, and TensorBoard gets it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pretrain.mae import patch_moments
from pretrain.pictures import Picture, draw, picture_of, save

INVALID = -32768


def picture(hand: Any, modality: str, norm_pix: bool) -> tuple[Picture, np.ndarray, np.ndarray]:
    """A picture of a crop of 2 × 2 × 3 tokens; its true voxels, and what was predicted of masked ones."""
    crop = hand.crop("volume", (16, 16, 24), modality=modality, invalid=0.05)
    model, batch = hand.build(
        [hand.spec("volume", 1, 1, 16)], [crop], augment=False, norm_pix=norm_pix, encoder={"drop_path": 0.0}
    )
    torch.nn.init.normal_(model.heads["volume"].weight, std=0.3)
    with torch.no_grad():
        (result,) = model(batch, reconstruct=True)
    block = batch["volume-1"]
    slope, intercept, low, high, centre, scale, compress = (float(v) for v in crop.norm)
    truth = np.clip(crop.voxels * slope + intercept, low, high)
    truth[crop.voxels == INVALID] = np.nan
    predicted = np.full(truth.shape, np.nan)
    values = result.prediction[0]
    if norm_pix:
        mean, deviation = patch_moments(result.tokens)
        values = values * deviation[0] + mean[0]
    for place in range(int(block.predicted[0])):
        z, y, x = np.unravel_index(int(block.target_ids[0, place]), (2, 2, 3))
        real = values[place].double().numpy().reshape(8, 8, 8) * scale + centre
        real = np.sinh(real) * compress if compress else real
        box = slice(8 * z, 8 * z + 8), slice(8 * y, 8 * y + 8), slice(8 * x, 8 * x + 8)
        predicted[box] = np.clip(real, low, high)
    predicted[np.isnan(truth)] = np.nan
    return picture_of("volume-1", block, result, 0, modality, norm_pix), truth, predicted


@pytest.mark.parametrize(("modality", "norm_pix"), [("CT", False), ("PT", False), ("MR", True)])
def test_panels_hold_the_crop_and_what_was_predicted_of_it(hand: Any, modality: str, norm_pix: bool) -> None:
    found, truth, predicted = picture(hand, modality, norm_pix)
    masked = np.isfinite(predicted)
    assert 0.6 < masked.sum() / np.isfinite(truth).sum() < 0.9
    close: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-2}
    np.testing.assert_allclose(found.image, truth, **close)
    np.testing.assert_allclose(found.visible, np.where(masked, np.nan, truth), **close)
    np.testing.assert_allclose(found.reconstruction, np.where(masked, predicted, truth), **close)
    assert np.abs(found.reconstruction - found.image)[masked].mean() > 1e-3 * np.nanmax(truth)


def test_the_figure_shows_input_visible_reconstruction_and_their_difference(hand: Any) -> None:
    found, _, _ = picture(hand, "CT", False)
    panels = {axes.get_title(): axes.images[0] for axes in draw(found).axes if axes.get_title()}
    place = found.middle()
    expected = {
        "input": found.image,
        "visible": found.visible,
        "reconstruction": found.reconstruction,
        "difference": found.reconstruction - found.image,
    }
    assert list(panels) == list(expected)
    for name, values in expected.items():
        shown: np.ndarray = np.ma.filled(np.ma.asarray(panels[name].get_array(), dtype=float), np.nan)
        np.testing.assert_array_equal(shown, values[place].astype(float))
    assert panels["input"].get_clim() == panels["reconstruction"].get_clim()
    low, high = panels["difference"].get_clim()
    assert -low == high > 0


def test_tensorboard_gets_every_picture(hand: Any, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    found = [picture(hand, modality, False)[0] for modality in ("MR", "CT", "CT")]
    with SummaryWriter(str(tmp_path / "events")) as writer:
        save(found, 7, writer)
    events = EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    assert sorted(events.Tags()["images"]) == [f"pictures/{m}" for m in ("CT-0", "CT-1", "MR-0")]
    (image,) = events.Images("pictures/CT-0")
    assert image.step == 7
