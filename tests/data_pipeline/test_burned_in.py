"""Burned-in text: what is masked, what is not, and the rules that hold for any picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

from data_pipeline.burned_in import text_mask
from data_pipeline.readers import read
from data_pipeline.volume import Channel, Volume
from launch.planted_text import Planted, drawn, plant


def picture_of(plane: np.ndarray, axis: int = 0) -> Volume:
    return Volume.on_grid(np.expand_dims(plane, axis)[None], (Channel("XR", "XR", "arbitrary"),), np.eye(4))


def body(side: int, seed: int = 0) -> np.ndarray:
    """A smooth picture in 0..1 with broad bands, a dark border and noise."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[0:side, 0:side] / side
    ribs = 0.06 * np.sin(2 * np.pi * 9 * (y + 0.3 * (x - 0.5) ** 2))
    trunk = ndimage.gaussian_filter((np.abs(x - 0.5) < 0.38).astype(float), side / 40)
    return (0.05 + trunk * (0.5 + ribs) + random.normal(0, 0.005, (side, side))).clip(0, 1)


def write(plane: np.ndarray, text: str, at: tuple[int, int], size: int, value: float) -> np.ndarray:
    """Draws on `plane`; returns the ink (rows, columns) bool."""
    ink = drawn(text, "DejaVuSans.ttf", size).max(0)
    box = tuple(slice(a, a + n) for a, n in zip(at, ink.shape))
    plane[box] += ink * (value - plane[box])
    where = np.zeros(plane.shape, bool)
    where[box] = ink > 0.5
    return where


@pytest.mark.parametrize("side", [256, 700, 1200])
@pytest.mark.parametrize("value", [1.0, 0.0])
def test_a_name_and_a_marker_go(side: int, value: float) -> None:
    for size in (max(9, side // 60), max(14, side // 16)):
        plane = body(side)
        ink = write(plane, "DOE, JANE 1964-03-17", (side // 2, side // 5), min(size, side // 22), value)
        ink |= write(plane, "R", (side // 5, side // 4), size, value)
        mask = text_mask(picture_of(plane))[0]
        assert mask[ink].mean() > 0.98
        assert mask.mean() < 0.25


def test_text_up_the_side_and_low_contrast() -> None:
    plane = body(400)
    ink = write(plane, "ST. MARY HOSPITAL", (200, 60), 16, plane[200, 100] + 0.2)
    mask = text_mask(picture_of(plane))[0]
    assert mask[ink].mean() > 0.98
    turned = text_mask(picture_of(np.rot90(plane).copy()))[0]
    assert turned[np.rot90(ink)].mean() > 0.98


def test_a_picture_without_text_is_left_alone() -> None:
    for side in (256, 800):
        assert text_mask(picture_of(body(side))).mean() < 0.002
    assert not text_mask(picture_of(np.full((300, 300), 7.0))).any()
    assert not text_mask(picture_of(np.full((300, 300), np.nan))).any()
    assert not text_mask(picture_of(np.array([[1.0]]))).any()
    smooth = ndimage.gaussian_filter(np.random.default_rng(0).normal(size=(512, 512)), 12)
    assert text_mask(picture_of(smooth)).mean() < 0.002


@pytest.mark.parametrize("kind", ["u1", "u2", "i2", "f4"])
def test_depth_offset_and_polarity_are_of_no_account(kind: str) -> None:
    plane = body(300)
    ink = write(plane, "ID 4418273", (20, 20), 14, 1.0)
    wanted = text_mask(picture_of(plane))[0]
    scale = {"u1": 255, "u2": 4095, "i2": 30000, "f4": 1e-3}[kind]
    values = plane * scale if kind == "f4" else np.rint(plane * scale)
    for stored in (values, values.max() - values):
        mask = text_mask(picture_of(stored.astype(kind)))[0]
        assert mask[ink].mean() > 0.98
        assert (mask ^ wanted).mean() < 0.01


def test_rescale_and_invalid_voxels() -> None:
    plane = body(300)
    ink = write(plane, "17.03.64", (40, 60), 14, 1.0)
    volume = picture_of(np.rint(plane * 1000).astype(np.int16))
    invalid = np.zeros(volume.voxels.shape, bool)
    invalid[..., :30] = True
    shifted = Volume.on_grid(
        volume.voxels, volume.channels, np.eye(4), slope=(-0.5,), intercept=(300.0,), invalid=invalid
    )
    assert text_mask(shifted)[0][ink].mean() > 0.98


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_the_thin_axis_may_be_any(axis: int) -> None:
    plane = body(280)
    write(plane, "DOE JANE", (30, 40), 14, 1.0)
    mask = text_mask(picture_of(plane, axis))
    assert mask.shape == np.expand_dims(plane, axis).shape
    np.testing.assert_array_equal(mask.squeeze(axis), text_mask(picture_of(plane))[0])
    assert mask.any()


@pytest.mark.real_data
def test_planted_text_in_real_radiographs(real_data: Path) -> None:
    """Pictures on which no threshold was chosen. Measured on all: benchmarks/privacy.py."""
    missed = characters = strong_missed = 0
    cost = []
    for number, path in enumerate(sorted((real_data / "xray_lungs" / "test" / "images").glob("*.png"))):
        volume = read(path, modality="XR", field_mm=350)
        plane = volume.real(0)[0] / 255.0
        cost.append(text_mask(volume).mean())
        generator, taken = np.random.default_rng(number), np.zeros(plane.shape, bool)
        lines: list[Planted] = []
        for _ in range(3):
            plane, line = plant(plane, generator, (8, 24), taken)
            lines += [line] if line is not None else []
        mask = text_mask(picture_of(plane))[0]
        for line in lines:
            gone = [float(mask[line.box][ink].mean()) >= 0.8 for ink in line.characters]
            characters, missed = characters + len(gone), missed + gone.count(False)
            strong_missed += gone.count(False) if line.contrast >= 0.5 else 0
    assert characters > 200
    assert missed / characters < 0.06
    assert strong_missed == 0
    assert np.mean(cost) < 0.05
