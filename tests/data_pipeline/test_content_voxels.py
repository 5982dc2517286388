"""Voxels of content: never air, table, padding or hidden ones; evenly drawn; the same again for a key."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scan_files import phantom, write_nifti

from data_pipeline.build import build
from data_pipeline.content_voxels import CONTENT, COUNT, content_voxels
from data_pipeline.geometry import TokenConfig
from data_pipeline.inspect import inspect
from data_pipeline.manifest import Manifest
from data_pipeline.order import Order
from data_pipeline.quantise import Stored, quantise
from data_pipeline.schedule import MixtureConfig
from data_pipeline.sources import SourceConfig
from data_pipeline.storage import ShardReader
from data_pipeline.volume import Channel

CT = (Channel("CT", "CT", "HU"),)
MR = (Channel("T1w", "MR", "arbitrary"),)
XR = (Channel("XR", "XR", "arbitrary"),)
PT = (Channel("PT", "PT", "SUV"),)
MM = (2.0, 2.0, 2.0)


def stored(real: np.ndarray, invalid: np.ndarray | None = None) -> Stored:
    voxels = real if real.ndim == 4 else real[None]
    c = len(voxels)
    return quantise(voxels, (1.0,) * c, (0.0,) * c, None if invalid is None else invalid[None])


def places(found: np.ndarray, shape: tuple[int, ...]) -> tuple[np.ndarray, ...]:
    assert found.dtype == np.int32
    assert (np.diff(found) > 0).all()
    assert len(found) <= COUNT
    return np.unravel_index(found, shape)


def patient_on_a_table() -> tuple[np.ndarray, np.ndarray]:
    """HU of a body (60 × 60 mm) on a table of foam between two shells of 4 mm, and where the body is."""
    real = np.full((20, 60, 60), -1000, np.int16)
    real[:, 44:46, 2:58] = real[:, 56:58, 2:58] = -50
    real[:, 46:56, 2:58] = -900
    body = np.zeros(real.shape, bool)
    body[:, 6:36, 15:45] = True
    real[body] = 40
    lungs = np.zeros(real.shape, bool)
    lungs[4:16, 12:24, 19:29] = True
    real[lungs] = -850
    return real, body & ~lungs


def test_ct_is_tissue_of_the_body_not_air_lung_or_table() -> None:
    real, body = patient_on_a_table()
    seen = np.zeros(real.shape, bool)
    for n in range(40):
        found = content_voxels(stored(real), CT, MM, f"key-{n}")
        assert len(found) == COUNT
        seen.ravel()[found] = True
    assert not (seen & ~body).any()
    at = np.argwhere(seen)
    np.testing.assert_array_less(at.min(axis=0), [2, 9, 18])  # and it reaches into every corner
    np.testing.assert_array_less([17, 32, 41], at.max(axis=0))


def test_a_ct_too_thin_for_a_cube_has_content_nevertheless() -> None:
    real = np.full((8, 40, 40), -1000, np.int16)
    real[:, 20, 5:35] = 30
    found = content_voxels(stored(real), CT, (5.0, 5.0, 5.0), "thin")
    assert len(found) == COUNT
    assert (real.ravel()[found] == 30).all()


@pytest.mark.parametrize("channels", [MR, PT])
def test_air_of_mr_and_pet_is_no_content(channels: tuple[Channel, ...]) -> None:
    generator = np.random.default_rng(0)
    real = generator.uniform(0, 0.4, (24, 24, 24)).astype(np.float32)
    real[8:16, 8:16, 8:16] = generator.uniform(6, 12, (8, 8, 8))
    found = content_voxels(stored(real), channels, MM, "k")
    assert len(found) == COUNT
    z, y, x = places(found, real.shape)
    assert all(((a >= 8) & (a < 16)).all() for a in (z, y, x))


def test_a_radiograph_is_content_all_over_but_for_what_is_not_there() -> None:
    real = np.random.default_rng(1).integers(0, 255, (1, 64, 64)).astype(np.int16)
    invalid = np.zeros(real.shape, bool)
    invalid[:, :, :40] = True
    seen = np.zeros(real.size, bool)
    for n in range(400):
        seen[content_voxels(stored(real, invalid), XR, MM, str(n))] = True
    np.testing.assert_array_equal(seen.reshape(real.shape), ~invalid)


@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 9), st.integers(1, 40), st.integers(1, 40)),
    share=st.floats(0.0, 1.0),
    seed=st.integers(0, 9),
    as_float=st.booleans(),
)
def test_never_invalid_never_hidden_and_all_where_there_are_few(
    shape: tuple[int, int, int], share: float, seed: int, as_float: bool
) -> None:
    generator = np.random.default_rng(seed)
    real = generator.normal(100, 10, (1, *shape)).astype(np.float32 if as_float else np.int16)
    invalid, hidden = generator.random((2, *shape)) < share / 2
    exact = quantise(real, (1.0,), (0.0,), invalid[None], exact=True)
    found = content_voxels(exact, XR, MM, "k", hidden)
    places(found, shape)
    allowed = np.flatnonzero(~(invalid | hidden))
    assert np.isin(found, allowed).all()
    assert len(found) == min(COUNT, len(allowed))


def test_content_of_one_voxel_in_a_hundred_thousand_is_found() -> None:
    real = np.zeros((50, 100, 100), np.int16)
    real[17, 23, 42:47] = 500
    hidden = np.zeros(real.shape, bool)
    hidden[17, 23, 42] = True
    found = content_voxels(stored(real), CT, MM, "k", hidden=None)
    assert len(found) == COUNT  # water everywhere
    real -= 1000
    found = content_voxels(stored(real), CT, MM, "k", hidden)
    np.testing.assert_array_equal(np.argwhere(real[17, 23] == -500).ravel()[1:], places(found, real.shape)[2])


def test_it_is_uniform_over_the_content() -> None:
    real = np.full((16, 32, 32), 200, np.int16)
    real[:, :, :8] = 0
    counts = np.zeros(real.size)
    for n in range(600):
        counts[content_voxels(stored(real), MR, MM, str(n))] += 1
    octants = counts.reshape(real.shape)[:, :, 8:].reshape(4, 4, 4, 8, 3, 8).sum(axis=(1, 3, 5)).ravel()
    assert counts.sum() == 600 * COUNT
    expected = 600 * COUNT / octants.size
    assert (np.abs(octants - expected) < 5 * np.sqrt(expected)).all()


def test_the_key_decides() -> None:
    real, _ = patient_on_a_table()
    one, again, other = (content_voxels(stored(real), CT, MM, key) for key in ("a", "a", "b"))
    np.testing.assert_array_equal(one, again)
    assert not np.array_equal(one, other)


def test_content_of_any_channel_valid_in_all() -> None:
    real = np.zeros((2, 6, 20, 20), np.int16)
    real[0, :, :6, :6] = real[1, :, 10:16, 10:16] = 300
    bad = np.zeros(real.shape, bool)
    bad[0, :, 10:13] = True
    both = quantise(real, (1.0, 1.0), (0.0, 0.0), bad)
    seen = np.zeros(real.shape[1:], bool)
    for n in range(60):
        seen.ravel()[content_voxels(both, MR * 2, MM, str(n))] = True
    want = np.zeros(seen.shape, bool)
    want[:, :6, :6] = want[:, 13:16, 10:16] = True
    np.testing.assert_array_equal(seen, want)


def test_every_sample_of_a_build_has_it_labelled_ones_beside_their_classes(tmp_path: Path) -> None:
    for n in range(3):
        write_nifti(tmp_path / f"in/p{n}_img.nii.gz", phantom(n))
    bone, air = np.zeros((2, *phantom(0).shape), np.uint8)
    bone[4:7, 4:7, 2:5] = air[:3, :3, :3] = 1  # in a corner: most content is far from either
    write_nifti(tmp_path / "in/p0_lab.nii.gz", bone)
    write_nifti(tmp_path / "in/copy_img.nii.gz", phantom(0))  # one image, a second label of another name
    write_nifti(tmp_path / "other/copy_img.nii.gz", phantom(0))
    write_nifti(tmp_path / "other/copy_lab.nii.gz", air)
    sources = [
        SourceConfig(
            path=tmp_path / folder, name=folder, modality="CT", include=("*_img.nii.gz",),
            label_glob="*_lab.nii.gz", labels={1: name},
        )
        for folder, name in (("in", "bone"), ("other", "air"))
    ]  # fmt: skip
    build(sources, tmp_path / "o", progress=False)
    manifest = Manifest.open(tmp_path / "o")
    reader = ShardReader(tmp_path / "o", manifest)
    listed = {}
    for i in range(len(manifest)):
        row = manifest.row(i)
        first, *classes = row["foreground"]
        assert (first["class"], first["layer"], len(first["voxels"])) == (CONTENT, 0, COUNT)
        image = reader.read_box(i, "image", 0, (0, 0, 0), row["shape"][1:])
        slope, intercept = row["norm"][0][:2]
        assert (image.ravel()[first["voxels"]] * slope + intercept >= -500).all()
        listed[row["key"]] = [entry["class"] for entry in classes]
        assert len(row["classes"]) == len(classes)
    assert sorted(listed.values()) == [[], [], [1, 2]]
    assert "bone, air" in inspect(tmp_path / "o").text()
    tokens, mixture = TokenConfig(slots=64, classes=(1,)), MixtureConfig(foreground=1.0)
    order = Order(manifest, np.arange(3), tokens, mixture, 0, (4, 4, 4))
    for draw in map(order.draw, range(200)):
        row = manifest.row(draw.row)
        wanted = [entry for entry in row["foreground"] if entry["class"] > 0] or row["foreground"]
        at = np.stack(np.unravel_index(np.concatenate([e["voxels"] for e in wanted]), row["shape"][1:]), 1)
        inside = (at >= draw.origin) & (at < np.add(draw.origin, draw.extent))
        assert inside.all(axis=1).any()
    for key in listed:
        assert inspect(tmp_path / "o", key).png.startswith(b"\x89PNG")
