"""NIfTI written by nibabel, read by ours, compared with nibabel's own values and with SimpleITK's grid."""

from __future__ import annotations

import gzip
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from data_pipeline.errors import Quarantined
from data_pipeline.labels import read_label
from data_pipeline.readers import read, read_all

RAS_TO_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
SHAPE = (5, 4, 3)


def values(kind: type = np.int16, shape: tuple[int, ...] = SHAPE, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 120, shape).astype(kind)


def save(
    path: Path, data: np.ndarray, affine: np.ndarray | None = None, form=nibabel.Nifti1Image, **codes
) -> Path:
    affine = np.diag([2.0, 3.0, 4.0, 1.0]) if affine is None else affine
    image = form(data, affine, dtype=data.dtype)
    image.set_sform(affine, codes.get("sform", 1))
    image.set_qform(affine, codes.get("qform", 1))
    image.header.set_xyzt_units(codes.get("unit", "mm"))
    nibabel.save(image, path)
    return path


def patch(path: Path, offset: int, kind: str, *numbers: float) -> Path:
    """Overwrite header fields, which nibabel would tidy."""
    packed = path.name.endswith(".gz")
    raw = bytearray(gzip.decompress(path.read_bytes()) if packed else path.read_bytes())
    field = np.array(numbers, kind).tobytes()
    raw[offset : offset + len(field)] = field
    path.write_bytes(gzip.compress(raw) if packed else bytes(raw))
    return path


def code_of(path: Path, **options) -> str:
    with pytest.raises(Quarantined) as refused:
        read(path, modality="MR", **options)
    assert str(path.parent) not in refused.value.detail
    return refused.value.code


def assert_as_nibabel(path: Path) -> None:
    """Values and place of voxels as nibabel scales and places them."""
    volume = read(path, modality="MR")
    image = nibabel.load(path)
    real = volume.to_source(volume.voxels[0]) * np.float64(volume.slope[0]) + volume.intercept[0]
    np.testing.assert_allclose(real.T, image.get_fdata(), rtol=1e-6)
    np.testing.assert_allclose(volume.source_affine, RAS_TO_LPS @ image.affine, atol=1e-4)


@pytest.mark.parametrize(
    "kind", ["u1", "i1", "<i2", ">i2", "<u2", ">i4", "<u4", "<i8", ">u8", "<f4", ">f4", "<f8", ">f8"]
)
@pytest.mark.parametrize("form", [nibabel.Nifti1Image, nibabel.Nifti2Image])
def test_every_number_type_and_byte_order(tmp_path: Path, kind: str, form: type) -> None:
    data = values(np.dtype(kind).type)
    header = form.header_class(endianness=">" if kind.startswith(">") else "<")
    header.set_data_dtype(np.dtype(kind))
    image = form(data, np.diag([2.0, 3.0, 4.0, 1.0]), header)
    nibabel.save(image, tmp_path / "a.nii")
    stored = nibabel.load(tmp_path / "a.nii").header
    assert stored.endianness == (">" if kind.startswith(">") else "<")
    volume = read(tmp_path / "a.nii", modality="MR")
    np.testing.assert_array_equal(volume.to_source(volume.voxels[0]), data.T)
    assert volume.voxels.dtype.isnative
    assert volume.voxels.dtype == np.dtype(kind).newbyteorder("=")
    assert_as_nibabel(tmp_path / "a.nii")


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    turn=st.tuples(*[st.floats(-180, 180)] * 3),
    spacing=st.tuples(*[st.floats(0.3, 7)] * 3),
    origin=st.tuples(*[st.floats(-300, 300)] * 3),
    left_handed=st.booleans(),
)
def test_oblique_grids_lie_where_both_libraries_put_them(
    tmp_path: Path, turn: tuple, spacing: tuple, origin: tuple, left_handed: bool
) -> None:
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("xyz", turn, degrees=True).as_matrix() * spacing
    if left_handed:
        affine[:3, 0] *= -1
    affine[:3, 3] = origin
    path = save(tmp_path / "a.nii", values(), affine)
    volume = read(path, modality="MR")
    image = sitk.ReadImage(str(path))
    assert_as_nibabel(path)
    for index in ((0, 0, 0), (4, 0, 1), (1, 3, 2)):
        point = image.TransformIndexToPhysicalPoint(index)
        i, j, k = np.rint(volume.index_of_lps_mm(point)).astype(int)
        np.testing.assert_allclose(volume.lps_mm_of_index((i, j, k)), point, atol=2e-2)
        assert volume.voxels[0, k, j, i] == sitk.GetArrayFromImage(image)[index[::-1]]


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".hdr"])
def test_pairs_and_compressed_files(tmp_path: Path, suffix: str) -> None:
    form = nibabel.Nifti1Pair if suffix == ".hdr" else nibabel.Nifti1Image
    path = save(tmp_path / f"a{suffix}", values(), form=form)
    assert_as_nibabel(path)
    if suffix == ".hdr":
        assert_as_nibabel(tmp_path / "a.img")
        (tmp_path / "a.img").unlink()
        assert code_of(path) == "missing"


@pytest.mark.parametrize(
    ("slope", "inter", "expected"),
    [(0.5, -1024, (0.5, -1024)), (0, 7, (1, 0)), (np.nan, 0, (1, 0)), (-2, 3, (-2, 3)), (1, 0, (1, 0))],
)
def test_slope_and_intercept(tmp_path: Path, slope: float, inter: float, expected: tuple) -> None:
    path = patch(save(tmp_path / "a.nii.gz", values()), 112, "<f4", slope, inter)
    volume = read(path, modality="MR")
    assert (volume.slope, volume.intercept) == ((expected[0],), (expected[1],))
    assert_as_nibabel(path)


def test_a_label_is_scaled_before_its_values_are_read(tmp_path: Path) -> None:
    image = read(save(tmp_path / "a.nii", values()), modality="MR")
    data = np.zeros(SHAPE, np.uint8)
    data[1, 1, 1], data[2, 2, 2] = 1, 2
    path = patch(save(tmp_path / "l.nii", data), 112, "<f4", 2, 0)
    label = read_label(path, image, regions={"liver": (2,), "spleen": (4,)})
    assert label.classes == (1, 2)
    assert (label.layers == 1).sum() == 1


@pytest.mark.parametrize(
    ("unit", "scale"), [("meter", 1000.0), ("mm", 1.0), ("micron", 0.001), ("unknown", 1.0)]
)
def test_units_of_length(tmp_path: Path, unit: str, scale: float) -> None:
    spacing = np.array([2.0, 3.0, 4.0]) / scale
    path = save(tmp_path / "a.nii", values(), np.diag([*spacing, 1.0]), unit=unit)
    volume = read(path, modality="MR")
    np.testing.assert_allclose(volume.spacing, (4.0, 3.0, 2.0), rtol=1e-5)
    assert ("units_unknown" in volume.provenance) == (unit == "unknown")
    if unit != "meter":  # SimpleITK scales as we do
        np.testing.assert_allclose(sitk.ReadImage(str(path)).GetSpacing(), (2.0, 3.0, 4.0), rtol=1e-4)


@pytest.mark.parametrize("wrong", [0.001, 1000.0])
def test_metres_or_micrometres_called_millimetres_are_refused(tmp_path: Path, wrong: float) -> None:
    affine = np.diag([0.7 * wrong, 0.7 * wrong, 5.0 * wrong, 1.0])
    assert code_of(save(tmp_path / "a.nii", values(shape=(64, 64, 8)), affine)) == "bad_geometry"


def test_a_unit_of_length_that_nifti_does_not_know_is_named(tmp_path: Path) -> None:
    with pytest.raises(Quarantined, match="unit of length") as refused:
        read(patch(save(tmp_path / "a.nii", values()), 123, "u1", 5), modality="MR")
    assert refused.value.code == "bad_geometry"


@pytest.mark.parametrize(
    ("name", "content", "cause"),
    [
        ("a.nii", gzip.compress(b"x" * 400, mtime=0), "gzip under a name without .gz"),
        ("a.nii.gz", b"x" * 400, "a name with .gz and no gzip"),
        ("a.nii", b"", "an empty file"),
        ("a.nii.gz", b"", "an empty file"),
    ],
)
def test_a_name_that_does_not_fit_the_file_is_the_cause_told(
    tmp_path: Path, name: str, content: bytes, cause: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(Quarantined) as refused:
        read(tmp_path / name, modality="MR")
    assert (refused.value.code, refused.value.detail) == ("unreadable", cause)


@pytest.mark.parametrize(
    ("data", "slope"),
    [
        (values(np.float64) * 1e200, 1.0),
        (values(np.int64) * 10**15, 1.0),
        (values(), 1e-38),
        (np.where(values() == 3, np.nan, values()) * 1e20, -1.0),
    ],
    ids=["float64", "int64", "tiny slope", "with nan"],
)
def test_values_that_no_scan_has_are_refused(tmp_path: Path, data: np.ndarray, slope: float) -> None:
    """Their statistics would overflow."""
    assert code_of(patch(save(tmp_path / "a.nii", data), 112, "<f4", slope)) == "value_range"


def test_a_sform_is_not_lost_to_a_broken_qform(tmp_path: Path) -> None:
    path = patch(save(tmp_path / "a.nii", values()), 256, "<f4", 3.0, 3.0, 3.0)  # a quaternion longer than 1
    volume = read(path, modality="MR")
    np.testing.assert_allclose(volume.source_affine, RAS_TO_LPS @ np.diag([2.0, 3.0, 4.0, 1.0]), atol=1e-5)
    assert volume.provenance["qform_differs"] == "true"
    assert code_of(patch(path, 254, "<i2", 0)) == "unreadable"  # nothing else is left to place it by


def test_a_qform_alone_is_taken(tmp_path: Path) -> None:
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("z", 30, degrees=True).as_matrix() * (2, 3, 4)
    path = save(tmp_path / "a.nii", values(), affine, sform=0, qform=1)
    np.testing.assert_allclose(read(path, modality="MR").source_affine, RAS_TO_LPS @ affine, atol=1e-4)


@pytest.mark.parametrize("bad", [0.0, np.nan, np.inf, 1e9])
def test_voxel_sizes_that_no_scan_has(tmp_path: Path, bad: float) -> None:
    path = save(tmp_path / "a.nii", values())
    assert code_of(patch(path, 280, "<f4", bad)) == "bad_geometry"


def test_vectors_are_no_frames_in_time(tmp_path: Path) -> None:
    field = values(np.float32, (5, 4, 3, 1, 3))
    path = save(tmp_path / "a.nii", field)
    assert code_of(path) == "unsupported_layout"
    with pytest.raises(Quarantined, match="3 components"):
        read_all(path, modality="MR")
    channels = read(path, modality="MR", channel_names=["0", "1", "2"])
    assert channels.voxels.shape[0] == 3
    moving = save(tmp_path / "b.nii", values(np.float32, (5, 4, 3, 6)))
    assert len(read_all(moving, modality="MR")) == 4
    patch(moving, 68, "<i2", 1007)  # intent: vector
    with pytest.raises(Quarantined, match="6 components"):
        read_all(moving, modality="MR")
    assert code_of(save(tmp_path / "c.nii", values(np.float32, (5, 4, 3, 2, 2)))) == "unsupported_layout"


def test_kinds_of_voxels_that_are_no_measurement(tmp_path: Path) -> None:
    nibabel.save(nibabel.Nifti1Image(np.ones(SHAPE, np.complex64), np.eye(4)), tmp_path / "c.nii")
    assert code_of(tmp_path / "c.nii") == "unsupported_layout"
    rgb = np.zeros(SHAPE, [("R", "u1"), ("G", "u1"), ("B", "u1")])
    nibabel.save(nibabel.Nifti1Image(rgb, np.eye(4)), tmp_path / "r.nii")
    assert code_of(tmp_path / "r.nii") == "colour"
    analyze = nibabel.AnalyzeImage(values(), np.eye(4))
    nibabel.save(analyze, tmp_path / "old.hdr")
    assert code_of(tmp_path / "old.hdr") in ("unsupported_format", "no_geometry")


def test_a_header_that_states_more_than_the_file_holds_takes_no_memory(tmp_path: Path) -> None:
    for name in ("a.nii", "b.nii.gz"):
        path = patch(save(tmp_path / name, values()), 40, "<i2", 3, 2000, 2000, 1500)
        assert code_of(path) == "truncated"
        patch(path, 40, "<i2", 3, 32767, 32767, 32767)
        assert code_of(path) == "unsupported_layout"


def test_two_axes_and_trailing_ones(tmp_path: Path) -> None:
    flat = save(tmp_path / "a.nii", values(shape=(5, 4)))
    assert read(flat, modality="MR").source_shape == (1, 4, 5)
    assert_as_nibabel(save(tmp_path / "b.nii", values(shape=(5, 4, 1))))
    assert len(read_all(save(tmp_path / "c.nii", values(shape=(5, 4, 3, 1, 1))), modality="MR")) == 1
