"""NIfTI, NRRD, MetaImage and pictures: written by one library, read by ours, compared with SimpleITK."""

from __future__ import annotations

import gzip
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from data_pipeline.errors import Quarantined, UserError
from data_pipeline.readers import read, read_all, read_channels
from data_pipeline.volume import Volume

RAS_TO_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])


def nifti(
    path: Path, data: np.ndarray, affine: np.ndarray | None = None, sform: int = 1, qform: int = 0, **scl
) -> Path:
    image = nibabel.Nifti1Image(data, np.diag([2.0, 3.0, 4.0, 1.0]) if affine is None else affine)
    image.header.set_xyzt_units("mm")
    image.set_sform(image.affine, sform)
    image.set_qform(image.affine, qform)
    if scl:
        image.header.set_slope_inter(scl["slope"], scl["inter"])
    nibabel.save(image, path)
    return path


def code_of(path: Path, **options) -> str:
    with pytest.raises(Quarantined) as refused:
        read(path, **options)
    assert str(path) in str(refused.value)
    assert str(path) not in refused.value.detail
    return refused.value.code


def assert_same_as_simpleitk(volume: Volume, image: sitk.Image, atol: float = 1e-5) -> None:
    """Voxels in source order and the source affine, as SimpleITK sees them."""
    np.testing.assert_allclose(
        volume.to_source(volume.voxels[0]) * volume.slope[0] + volume.intercept[0],
        sitk.GetArrayFromImage(image),
    )
    affine = np.eye(4)
    affine[:3, :3] = np.array(image.GetDirection()).reshape(3, 3) * np.array(image.GetSpacing())
    affine[:3, 3] = image.GetOrigin()
    np.testing.assert_allclose(volume.source_affine, affine, atol=atol)


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".nrrd", ".mha", ".mhd", ".nhdr"])
@pytest.mark.parametrize("kind", [np.uint8, np.int16, np.int32, np.float32])
def test_every_format_gives_simpleitks_voxels_and_place(tmp_path: Path, suffix: str, kind: type) -> None:
    random = np.random.default_rng(0)
    image = sitk.GetImageFromArray(random.integers(0, 200, (3, 4, 5)).astype(kind))
    image.SetSpacing((0.5, 0.75, 3.0))
    image.SetOrigin((-10.0, 20.0, 30.5))
    image.SetDirection((0, -1, 0, -0.6, 0, 0.8, -0.8, 0, -0.6))
    path = tmp_path / f"image{suffix}"
    sitk.WriteImage(image, str(path))
    volume = read(path, modality="MR")
    assert volume.voxels.dtype == kind
    assert volume.spacing_source == "header"
    assert_same_as_simpleitk(volume, sitk.ReadImage(str(path)))
    direction = volume.affine[:3, :3] / np.array(volume.spacing[::-1])
    assert (np.diag(direction) > 0.5).all()


def test_slope_and_intercept_are_kept_beside_the_stored_integers(tmp_path: Path) -> None:
    image = nibabel.Nifti1Image(np.arange(24, dtype=np.uint16).reshape(2, 3, 4), np.eye(4))
    image.header["scl_slope"], image.header["scl_inter"] = 1, 0
    path = tmp_path / "a.nii"
    nibabel.save(image, path)
    raw = bytearray(path.read_bytes())
    raw[112:120] = np.array([0.5, -1024], "<f4").tobytes()
    path.write_bytes(raw)
    volume = read(path, modality="CT")
    assert (volume.slope, volume.intercept) == ((0.5,), (-1024.0,))
    assert volume.voxels.dtype == np.uint16
    assert_same_as_simpleitk(volume, sitk.ReadImage(str(path)))


def test_sform_wins_over_qform_and_a_difference_is_noted(tmp_path: Path) -> None:
    path = nifti(tmp_path / "a.nii", np.zeros((4, 4, 4), np.int16) + np.arange(4, dtype=np.int16), qform=1)
    image = nibabel.load(path)
    moved = image.affine.copy()
    moved[:3, 3] = 50
    image.set_sform(moved, 2)
    nibabel.save(image, path)
    volume = read(path, modality="MR")
    np.testing.assert_allclose(volume.source_affine, RAS_TO_LPS @ moved)
    assert volume.provenance["qform_differs"] == "true"
    image.set_sform(moved, 0)
    nibabel.save(image, path)
    np.testing.assert_allclose(read(path, modality="MR").source_affine[:3, 3], 0)


def test_no_form_is_refused_unless_accepted_by_spacing(tmp_path: Path) -> None:
    path = nifti(tmp_path / "a.nii.gz", np.eye(4, dtype=np.int16)[..., None], sform=0, qform=0)
    assert code_of(path, modality="MR") == "no_geometry"
    assert read(path, modality="MR", accept_no_form=True).spacing == (4.0, 3.0, 2.0)


def test_sheared_and_senseless_grids_are_refused(tmp_path: Path) -> None:
    affine = np.diag([1.0, 1.0, 1.0, 1.0])
    affine[0, 1] = 0.3
    data = np.eye(4, dtype=np.int16)[..., None]
    assert code_of(nifti(tmp_path / "a.nii", data, affine), modality="MR", shear="quarantine") == "sheared"
    path = nifti(tmp_path / "b.nii", data, qform=1)
    raw = bytearray(path.read_bytes())
    raw[280:296] = bytes(16)  # srow_x
    path.write_bytes(raw)
    assert code_of(path, modality="MR") == "bad_geometry"


def test_nan_is_invalid_and_replaced_by_the_lowest_value(tmp_path: Path) -> None:
    data = np.arange(24, dtype=np.float32).reshape(2, 3, 4) + 5
    data[0, 0, 0], data[1, 2, 3], data[1, 0, 0] = np.nan, np.inf, -np.inf
    volume = read(nifti(tmp_path / "a.nii", data, np.diag([-1.0, -1.0, 1.0, 1.0])), modality="MR")
    assert volume.invalid is not None
    assert volume.invalid[0].T[0, 0, 0]
    assert volume.invalid.sum() == 3
    assert np.isfinite(volume.voxels).all()
    assert (volume.voxels[volume.invalid] == 6).all()
    data[:] = np.nan
    assert code_of(nifti(tmp_path / "b.nii", data), modality="MR") == "no_valid_voxels"


@pytest.mark.parametrize("kind", [np.int16, np.float32])
def test_ct_fill_outside_the_field_of_view_is_invalid(tmp_path: Path, kind: type) -> None:
    data = np.full((3, 3, 3), -1000, kind)
    data[0] = -3024
    data[1, 1, 1] = 40
    volume = read(nifti(tmp_path / "a.nii", data), modality="CT")
    assert volume.invalid is not None
    assert volume.invalid.sum() == 9
    assert volume.voxels.min() == -1000
    assert read(tmp_path / "a.nii", modality="MR").invalid is None


def test_frames_are_time_unless_channels_are_named(tmp_path: Path) -> None:
    data = np.arange(2 * 3 * 4 * 6, dtype=np.int16).reshape(2, 3, 4, 6)
    path = nifti(tmp_path / "a.nii.gz", data, np.diag([-1.0, -1.0, 1.0, 1.0]))
    np.testing.assert_array_equal(read(path, modality="MR").voxels[0], data[..., 0].T)
    frames = read_all(path, modality="MR", seed=3)
    assert len(frames) == 4
    numbers = [int(f.provenance["frame"].split()[0]) for f in frames]
    assert numbers[0] == 0
    assert numbers == sorted(set(numbers))
    for number, frame in zip(numbers, frames):
        np.testing.assert_array_equal(frame.voxels[0], data[..., number].T)
    assert numbers == [int(f.provenance["frame"].split()[0]) for f in read_all(path, modality="MR", seed=3)]
    names = [str(n) for n in range(6)]
    np.testing.assert_array_equal(read(path, modality="MR", channel_names=names).voxels, data.T)
    assert code_of(path, modality="MR", channel_names=["a", "b"]) == "channel_count"
    trailing = nifti(tmp_path / "b.nii", data[..., :1], np.eye(4))
    assert len(read_all(trailing, modality="MR")) == 1


def test_channels_are_stacked_on_one_grid_only(tmp_path: Path) -> None:
    a = nifti(tmp_path / "a.nii", np.arange(24, dtype=np.uint8).reshape(2, 3, 4))
    b = nifti(tmp_path / "b.nii", np.arange(24, dtype=np.int16).reshape(2, 3, 4) * -100)
    volume = read_channels([a, b], modality=("MR", "PT"), channel_names=("t1", "pet"))
    assert [(c.name, c.modality) for c in volume.channels] == [("t1", "MR"), ("pet", "PT")]
    np.testing.assert_array_equal(volume.voxels[0], read(a, modality="MR").voxels[0])
    np.testing.assert_array_equal(volume.voxels[1], read(b, modality="MR").voxels[0])
    moved = np.diag([2.0, 3.0, 4.0, 1.0])
    moved[0, 3] = 1.0
    c = nifti(tmp_path / "c.nii", np.zeros((2, 3, 4), np.int16), moved)
    with pytest.raises(Quarantined, match="channel_grid"):
        read_channels([a, c], modality="MR")


def test_modality_must_be_stated_and_known(tmp_path: Path) -> None:
    path = nifti(tmp_path / "a.nii", np.eye(3, dtype=np.int16)[..., None])
    with pytest.raises(UserError, match="state modality"):
        read(path)
    with pytest.raises(UserError, match="not known"):
        read(path, modality="US")


def test_metaimage_without_spacing_is_not_one_millimetre(tmp_path: Path) -> None:
    header = (
        "ObjectType = Image\nNDims = 3\nDimSize = 2 2 2\nElementType = MET_UCHAR\nElementDataFile = LOCAL\n"
    )
    path = tmp_path / "a.mha"
    path.write_bytes(header.encode() + bytes(range(8)))
    assert code_of(path, modality="MR") == "no_spacing"
    volume = read(path, modality="MR", spacing=(3.0, 2.0, 1.0))
    assert (volume.spacing, volume.spacing_source) == ((3.0, 2.0, 1.0), "declared")
    path = tmp_path / "a.nrrd"
    path.write_bytes(
        b"NRRD0004\ntype: uint8\ndimension: 3\nsizes: 2 2 2\nencoding: raw\n\n" + bytes(range(8))
    )
    assert code_of(path, modality="MR") == "no_spacing"


def test_pictures_are_depth_one_with_declared_or_assumed_spacing(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    for name, array in {
        "a.png": random.integers(0, 255, (6, 8)).astype(np.uint8),
        "b.png": random.integers(0, 65535, (6, 8)).astype(np.uint16),
        "c.tif": random.integers(0, 65535, (6, 8)).astype(np.uint16),
        "d.tiff": random.random((6, 8)).astype(np.float32),
    }.items():
        Image.fromarray(array).save(tmp_path / name, dpi=(72, 72))
        assert code_of(tmp_path / name, modality="XR") == "no_spacing"
        volume = read(tmp_path / name, modality="XR", field_mm=400)
        np.testing.assert_array_equal(volume.voxels, array[np.newaxis, np.newaxis])
        assert volume.voxels.dtype == array.dtype
        assert (volume.spacing[1:], volume.spacing_source) == ((50.0, 50.0), "assumed")
        assert read(tmp_path / name, modality="XR", spacing=(1, 0.2, 0.3)).spacing[1:] == (0.2, 0.3)


def test_colour_is_refused_unless_it_is_grey(tmp_path: Path) -> None:
    grey = np.random.default_rng(0).integers(0, 255, (5, 4)).astype(np.uint8)
    Image.fromarray(np.stack([grey] * 3, -1)).save(tmp_path / "grey.png")
    np.testing.assert_array_equal(read(tmp_path / "grey.png", modality="XR", field_mm=1).voxels[0, 0], grey)
    Image.fromarray(np.stack([grey, grey, 255 - grey], -1)).save(tmp_path / "colour.png")
    assert code_of(tmp_path / "colour.png", modality="XR", field_mm=1) == "colour"
    Image.fromarray(np.stack([grey] * 4, -1)).save(tmp_path / "glass.png")
    assert code_of(tmp_path / "glass.png", modality="XR", field_mm=1) == "colour"
    for last, code in ((7, None), (None, "colour")):  # four components: an even last one is opacity
        array = np.stack([grey, grey, grey, 255 - grey if last is None else np.full_like(grey, last)], -1)
        sitk.WriteImage(sitk.GetImageFromArray(array[np.newaxis], isVector=True), tmp_path / "four.mha")
        if code is None:
            np.testing.assert_array_equal(read(tmp_path / "four.mha", modality="MR").voxels.size, grey.size)
        else:
            assert code_of(tmp_path / "four.mha", modality="MR") == code
    tensor = np.stack([grey] * 3 + [255 - grey] * 3, -1)
    sitk.WriteImage(sitk.GetImageFromArray(tensor[np.newaxis], isVector=True), tmp_path / "six.mha")
    assert code_of(tmp_path / "six.mha", modality="MR") == "unsupported_layout"
    Image.fromarray(grey).convert("P").save(tmp_path / "palette.png")
    np.testing.assert_array_equal(
        read(tmp_path / "palette.png", modality="XR", field_mm=1).voxels[0, 0], grey
    )


def test_missing_unknown_and_cut_files_are_named(tmp_path: Path) -> None:
    assert code_of(tmp_path / "none.nii", modality="MR") == "missing"
    (tmp_path / "a.txt").write_text("no image")
    assert code_of(tmp_path / "a.txt", modality="MR") == "unsupported_format"
    for name in ("a.nii", "a.nii.gz", "a.nrrd", "a.mha", "a.png", "a.dcm"):
        (tmp_path / name).write_bytes(b"no image at all" * 30)
        assert code_of(tmp_path / name, modality="MR", field_mm=1) in ("unreadable", "truncated")
    noise = np.random.default_rng(0).integers(0, 1000, (16, 16, 16)).astype(np.int16)
    for suffix in (".nii", ".nii.gz", ".mha", ".nrrd"):
        sitk.WriteImage(sitk.GetImageFromArray(noise), str(tmp_path / f"whole{suffix}"))
        whole = (tmp_path / f"whole{suffix}").read_bytes()
        (tmp_path / f"cut{suffix}").write_bytes(whole[: len(whole) * 6 // 10])
        assert code_of(tmp_path / f"cut{suffix}", modality="MR") in ("truncated", "unreadable"), suffix


KINDS = [".nii", ".nrrd", ".mha", ".nii.gz", ".png", ".tif", ".jpg", ".npz"]


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("samples")
    image = sitk.GetImageFromArray(np.random.default_rng(0).integers(0, 300, (4, 5, 6)).astype(np.int16))
    found = {}
    for suffix in (".nii", ".nrrd", ".mha"):
        sitk.WriteImage(image, str(folder / f"a{suffix}"))
        found[suffix] = (folder / f"a{suffix}").read_bytes()
    found[".nii.gz"] = gzip.compress(found[".nii"], mtime=0)
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(folder / "a.png")
    found[".png"] = (folder / "a.png").read_bytes()
    for suffix in (".tif", ".jpg"):
        Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(folder / f"a{suffix}")
        found[suffix] = (folder / f"a{suffix}").read_bytes()
    np.savez_compressed(folder / "a.npz", image=np.arange(60).reshape(3, 4, 5), spacing=np.array([1.0, 2, 3]))
    found[".npz"] = (folder / "a.npz").read_bytes()
    return found


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(suffix=st.sampled_from(KINDS), data=st.data())
def test_damaged_headers_never_raise_anything_but_a_refusal(
    samples: dict[str, bytes], tmp_path: Path, suffix: str, data: st.DataObject
) -> None:
    content = bytearray(samples[suffix])
    reach = min(len(content), 400)
    for position in data.draw(st.lists(st.integers(0, reach - 1), min_size=1, max_size=4)):
        content[position] = data.draw(st.integers(0, 255))
    path = tmp_path / f"damaged{suffix}"
    path.write_bytes(content)
    try:
        volume = read(path, modality="MR", field_mm=100.0)
    except Quarantined:
        return
    assert np.isfinite(volume.affine).all()
    assert np.isfinite(volume.voxels).all()
