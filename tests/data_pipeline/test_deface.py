"""Faces: what is masked on heads, what never is, and what is no head."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

from data_pipeline.deface import face_mask
from data_pipeline.readers import read
from data_pipeline.volume import Channel, Volume
from launch.head_phantom import Head, head

#: Array axes (z, y, x) of a file as directions in L, P, S letters of its i, j, k axes.
ORIENTATIONS = ("LPS", "RAS", "LAS", "PSR", "LIA", "LPI", "RPI")
COLUMN = {"L": (0, 1.0), "R": (0, -1.0), "P": (1, 1.0), "A": (1, -1.0), "S": (2, 1.0), "I": (2, -1.0)}


@lru_cache(maxsize=16)
def phantom(modality: str, turn: tuple[float, float, float] = (0, 0, 0), face: bool = True) -> Head:
    return head(modality, spacing=2.0, turn=turn, face=face)


def scan_of(values: np.ndarray, modality: str, spacing: tuple[float, ...] = (2.0, 2.0, 2.0)) -> Volume:
    """(z, y, x) in L, P, S order."""
    units = "HU" if modality == "CT" else "arbitrary"
    channel = Channel(modality, modality, units)  # type: ignore[arg-type]
    return Volume.on_grid(values[None], (channel,), np.diag([*spacing[::-1], 1.0]))


def oriented(scan: Volume, code: str) -> Volume:
    """The same scan as a file with axes i, j, k along `code` holds it."""
    axes = [COLUMN[letter][0] for letter in code]
    order = [2 - axes[2 - n] for n in range(3)]  # canonical array axis of each of the file's array axes
    voxels = scan.voxels[0].transpose(order)
    affine = np.eye(4)
    affine[:3, 3] = scan.affine[:3, 3]
    for n in range(3):
        place, sign = COLUMN[code[2 - n]]
        column = scan.affine[:3, place]
        affine[:3, 2 - n] = sign * column
        if sign < 0:
            voxels = np.flip(voxels, n)
            affine[:3, 3] += column * (voxels.shape[n] - 1)
    return Volume.on_grid(np.ascontiguousarray(voxels)[None], scan.channels, affine)


@lru_cache(maxsize=1)
def small() -> tuple[Volume, np.ndarray]:
    """A child's head and its mask."""
    scan = scan_of(phantom("MR").values, "MR", (1.6, 1.6, 1.6))
    mask = face_mask(scan)
    assert mask is not None
    return scan, mask


@pytest.mark.parametrize(
    ("modality", "turn", "least"),
    [
        ("MR", (0, 0, 0), 0.97),
        ("CT", (15, 0, 0), 0.9),
        ("MR", (-15, 0, 0), 0.8),
        pytest.param("CT", (0, 8, 0), 0.95, marks=pytest.mark.slow),
        pytest.param("MR", (0, 0, 10), 0.95, marks=pytest.mark.slow),
    ],
)
def test_a_face_goes_and_no_brain(modality: str, turn: tuple[float, float, float], least: float) -> None:
    made = phantom(modality, turn)
    mask = face_mask(scan_of(made.values, modality))
    assert mask is not None
    assert mask.shape == made.brain.shape
    assert mask.dtype == bool
    assert made.face.sum() > 1000
    assert mask[made.face].mean() >= least
    assert not (mask & made.brain).any()
    assert ndimage.distance_transform_edt(~mask, sampling=2.0)[made.brain].min() >= 2.0
    # A mask is of a face: the back half and the top of the head stay.
    assert not mask[:, mask.shape[1] // 2 :].any()
    assert not mask[np.argwhere(made.brain)[:, 0].max() - 30 :].any()


@pytest.mark.parametrize("code", ORIENTATIONS)
def test_the_same_in_every_orientation(code: str) -> None:
    scan, wanted = small()
    turned = oriented(scan, code)
    np.testing.assert_array_equal(turned.to_lps().voxels, scan.voxels)
    mask = face_mask(turned)
    assert mask is not None
    assert mask.shape == turned.shape
    np.testing.assert_array_equal(replace(turned, voxels=mask[None]).to_lps().voxels[0], wanted)


def test_stored_integers_with_a_slope() -> None:
    scan, wanted = small()
    voxels = np.rint(scan.voxels * 8).astype(np.int16)
    found = face_mask(replace(scan, voxels=voxels, slope=(0.25,), intercept=(0.0,)))
    assert found is not None
    assert (found ^ wanted).sum() < 0.01 * wanted.sum()


def test_a_childs_head() -> None:
    _, mask = small()
    assert mask[phantom("MR").face].mean() > 0.9
    assert not (mask & phantom("MR").brain).any()


def test_thick_slices_and_voxels_without_a_value() -> None:
    made = phantom("CT")
    values = made.values[::2].copy()
    values[:, :4] = np.nan
    mask = face_mask(scan_of(values, "CT", (4.0, 2.0, 2.0)))
    assert mask is not None
    assert mask[made.face[::2]].mean() > 0.9
    assert not (mask & made.brain[::2]).any()


def stripped(made: Head, modality: str) -> np.ndarray:
    return np.where(made.brain, made.values, -1024 if modality == "CT" else 0)


CUTS: dict[str, Callable[[Head, str], np.ndarray]] = {
    "skull-stripped": stripped,
    "cut above the eyes": lambda made, _: made.values[np.argwhere(made.brain)[:, 0].min() + 25 :],
    "without the top": lambda made, _: made.values[: np.argwhere(made.brain)[:, 0].max() - 20],
    "the middle of the brain": lambda made, _: made.values[60:120, 40:110, 30:70],
    "the back half": lambda made, _: made.values[:, made.values.shape[1] // 2 :],
    "the neck": lambda made, _: made.values[:60],
}


@pytest.mark.parametrize(("what", "modality"), list(zip(CUTS, ("MR", "CT") * 3)))
def test_part_of_a_head_has_no_mask(what: str, modality: str) -> None:
    assert face_mask(scan_of(CUTS[what](phantom(modality), modality), modality)) is None


def test_a_head_without_a_face_has_no_mask() -> None:
    assert face_mask(scan_of(phantom("CT", face=False).values, "CT")) is None


def ball(shape: tuple[int, ...], radii: tuple[float, ...]) -> np.ndarray:
    grid = np.ogrid[tuple(slice(0, n) for n in shape)]
    return np.asarray(sum(((g - n / 2) / r) ** 2 for g, n, r in zip(grid, shape, radii)) < 1)


@pytest.mark.parametrize("modality", ["MR", "CT"])
def test_other_bodies_have_no_mask(modality: str) -> None:
    air, tissue, bone = (-1000.0, 40.0, 900.0) if modality == "CT" else (0.0, 120.0, 10.0)
    shape = (60, 90, 100)
    noise = np.random.default_rng(0).normal(0, 5, shape)
    bodies = {
        "trunk": np.where(ball(shape, (500, 40, 48)), tissue, air),
        "leg": np.where(ball(shape, (500, 8, 8)), bone, np.where(ball(shape, (500, 45, 45)), tissue, air)),
        "ball": np.where(ball(shape, (28, 40, 35)), tissue, air),
        "air": np.full(shape, air),
        "full": np.full(shape, tissue),
    }
    for name, body in bodies.items():
        assert face_mask(scan_of((body + noise).astype(np.float32), modality)) is None, name
    assert face_mask(scan_of(np.zeros(shape, np.float32), modality)) is None


def test_other_modalities_and_unknown_sizes_have_no_mask() -> None:
    scan, _ = small()
    for channel in (
        Channel("a", "XR", "arbitrary"),
        Channel("a", "PT", "SUV"),
        Channel("a", "CT", "arbitrary"),
    ):
        assert face_mask(replace(scan, channels=(channel,))) is None
    assert face_mask(replace(scan, spacing_source="assumed")) is None
    assert face_mask(replace(scan, intercept=(-30.0,))) is None  # no magnitudes
    assert face_mask(scan_of(phantom("MR").values, "MR", (0.5, 0.5, 0.5))) is None


@pytest.mark.real_data
def test_real_scans_without_a_face_have_no_mask(real_data: Path) -> None:
    scans = {
        "ct_mr_heads/MR_Gd.nii.gz": "MR",
        "ct_mr_heads/chris_PD.nii.gz": "MR",
        "ct_mr_heads/chris_MRA.nii.gz": "MR",
        "mr_brain_mni152/mni_icbm152_t1_tal_nlin_sym_09a_converted.nii.gz": "MR",
        "hard/papaya/sample_image.nii.gz": "MR",
        "mr_hippocampus/imagesTr/hippocampus_001.nii.gz": "MR",
        "mr_spinalcord/t1/t1w.nii.gz": "MR",
        "mr_spinalcord/t2s/t2s_uncropped.nii.gz": "MR",
        "ct_mr_body/example_ct.nii.gz": "CT",
        "ct_mr_body/example_mr_sm.nii.gz": "MR",
    }
    for name, modality in scans.items():
        units = "HU" if modality == "CT" else None
        assert face_mask(read(real_data / name, modality=modality, units=units)) is None, name
    picture = next((real_data / "xray_lungs" / "train" / "images").glob("*.png"))
    assert face_mask(read(picture, modality="XR", field_mm=350)) is None


@pytest.mark.real_data
def test_no_labelled_voxel_of_a_real_brain_is_lost(real_data: Path) -> None:
    folder = real_data / "mr_brain_mni152"
    grey, white, image = (
        read(folder / f"mni_icbm152_{what}_tal_nlin_sym_09a_converted.nii.gz", modality="MR").voxels[0]
        for what in ("gm", "wm", "t1")
    )
    made = head("MR", grey.astype(int) + white > 127, image, spacing=2.0)
    mask = face_mask(scan_of(made.values, "MR"))
    assert mask is not None
    assert mask[made.face].mean() > 0.95
    assert made.brain.sum() > 100_000
    assert not (mask & made.brain).any()
