"""Sheared stacks on a right-angled grid, against SciPy and SimpleITK, and through DICOM and NIfTI."""

from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from dicom_files import NORMAL, OBLIQUE, ORIGIN, series_of
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.ndimage import affine_transform

from data_pipeline.errors import Quarantined
from data_pipeline.labels import read_label
from data_pipeline.privacy import allowed
from data_pipeline.readers import read
from data_pipeline.readers.shear import is_sheared, stacking_axis, straighten
from data_pipeline.volume import Channel, Volume

CT = (Channel("CT", "CT", "HU"),)
#: Leans in mm; none lies within a millionth of a whole pixel, which is taken for one.
THOUSANDTHS = st.integers(-1400, 1400).map(lambda n: n / 1000)


def made(
    affine: np.ndarray, array: np.ndarray, invalid: np.ndarray | None = None, slope: float = 1.0
) -> Volume:
    holes = None if invalid is None else invalid[np.newaxis]
    return Volume.on_grid(array[np.newaxis], CT, affine, invalid=holes, slope=(slope,))


def sheared(lean: tuple[float, float], axis: int = 2) -> np.ndarray:
    """A right-angled oblique grid of 0.75 x 0.5 x 2 mm whose ``axis`` leans by mm a step along the others."""
    rotation = np.column_stack([OBLIQUE[:3], OBLIQUE[3:], NORMAL])
    columns = rotation * np.array([0.75, 0.5, 2.0])
    others = [a for a in range(3) if a != axis]
    columns[:, axis] += rotation[:, others[0]] * lean[0] + rotation[:, others[1]] * lean[1]
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = columns, ORIGIN
    return affine


def noise(shape: tuple[int, ...] = (6, 9, 11), dtype: type = np.float64) -> np.ndarray:
    return np.random.default_rng(0).integers(-1000, 1000, shape).astype(dtype)


@settings(max_examples=30, deadline=None)
@given(x=THOUSANDTHS, y=THOUSANDTHS, axis=st.integers(0, 2))
@example(x=1.0, y=0.001953125, axis=0)  # stacked along z within a header's rounding, but leaning along x
def test_values_are_those_of_a_linear_resample_in_scipy(x: float, y: float, axis: int) -> None:
    affine, array = sheared((x, y), axis), noise()
    if not is_sheared(affine):
        return
    result = straighten(made(affine, array))
    assert not is_sheared(result.affine)
    to_source = np.linalg.inv(affine) @ result.affine  # x, y, z of the result to x, y, z of the source
    turn = to_source[:3, :3][::-1, ::-1]
    shift = to_source[:3, 3][::-1]
    expected = affine_transform(array, turn, shift, result.shape, order=1, cval=np.nan)
    valid = ~result.invalid[0] if result.invalid is not None else np.ones(result.shape, bool)
    inside = valid & np.isfinite(expected)
    np.testing.assert_allclose(result.voxels[0][inside], expected[inside], atol=1e-6)
    # What lies inside the source is valid, all else is not.
    index = np.indices(result.shape).reshape(3, -1)
    source = turn @ index + shift[:, np.newaxis]
    beyond = np.maximum(-source, source - (np.array(array.shape)[:, np.newaxis] - 1)).max(axis=0)
    clear = np.abs(beyond) > 1e-4
    np.testing.assert_array_equal(valid.ravel()[clear], beyond[clear] < 0)


def test_values_are_those_of_a_linear_resample_in_simpleitk() -> None:
    # SimpleITK knows no sheared grid: the shear goes into the transform.
    affine, array = sheared((0.0, 0.53)), noise()
    result = straighten(made(affine, array))
    image = sitk.GetImageFromArray(array)
    to_index = sitk.AffineTransform(3)
    matrix = np.linalg.inv(affine) @ result.affine
    to_index.SetMatrix(matrix[:3, :3].ravel())
    to_index.SetTranslation(matrix[:3, 3])
    grid = sitk.Image(*(int(n) for n in result.shape[::-1]), sitk.sitkFloat64)
    theirs = sitk.GetArrayFromImage(sitk.Resample(image, grid, to_index, sitk.sitkLinear, np.nan))
    assert result.invalid is not None
    inside = ~result.invalid[0] & np.isfinite(theirs)
    assert inside.sum() > 0.8 * array.size
    np.testing.assert_allclose(result.voxels[0][inside], theirs[inside], atol=1e-6)


def test_every_source_voxel_is_inside_and_keeps_its_place() -> None:
    affine = sheared((0.0, -0.5))  # one pixel a slice, exactly: no interpolation
    array = noise(dtype=np.int16)
    result = straighten(made(affine, array))
    for k, j, i in np.ndindex(array.shape):
        there = np.rint(result.index_of_lps_mm(affine @ [i, j, k, 1.0] @ np.eye(4, 3))).astype(int)
        assert result.voxels[0, there[2], there[1], there[0]] == array[k, j, i]
    assert result.invalid is not None
    assert (~result.invalid).sum() == array.size
    np.testing.assert_array_equal(result.voxels[0][result.invalid[0]], array.min())
    assert result.spacing == pytest.approx((2.0, 0.5, 0.75))
    assert result.provenance["shear"] == "14.0 degrees"
    assert allowed(result.provenance) == {"shear": "14.0 degrees"}


def test_a_voxel_mixed_with_an_invalid_one_is_invalid_and_the_fill_is_the_lowest_real_value() -> None:
    array = np.full((3, 5, 5), 100, np.int16)
    array[:, 2, 2] = 7
    holes = array == 7
    array[0, 0, 0], array[1, 1, 1] = 50, 150
    result = straighten(made(sheared((0.0, 0.25)), array, holes, slope=-1.0))
    assert result.invalid is not None
    assert set(np.unique(result.voxels[0][result.invalid[0]])) == {150}  # the slope is negative
    assert result.voxels[0][~result.invalid[0]].min() >= 50
    assert result.invalid[0, 1, :, 2].sum() == 2 + 1 + 1 - 1 + 1  # the rims, and the hole grown by one


def test_the_axis_of_stacking_is_the_one_beside_a_right_angle() -> None:
    assert [stacking_axis(sheared((0.4, 0.3), axis)) for axis in range(3)] == [0, 1, 2]
    assert not is_sheared(sheared((0.0, 0.001)))
    every = sheared((0.3, 0.4))
    every[:3, 0] += 0.2 * every[:3, 1]
    with pytest.raises(Quarantined, match="sheared"):
        stacking_axis(every)


def tilted(folder: Path, array: np.ndarray, degrees: float, **tags) -> Path:
    shift = 2.0 * np.tan(np.radians(degrees))
    positions = [ORIGIN + k * (2.0 * NORMAL + shift * np.array(OBLIQUE[3:])) for k in range(len(array))]
    return series_of(folder, array, positions, **tags)


@pytest.mark.parametrize("degrees", [-20.0, -3.0, 5.0, 15.0, 25.0])
def test_a_tilted_gantry_is_straightened_and_counted(tmp_path: Path, degrees: float) -> None:
    y, x = np.mgrid[:24, :20]
    ramp = np.stack([1000 + 10 * x + 7 * y + 31 * k for k in range(10)]).astype(np.uint16)
    folder = tilted(tmp_path, ramp, degrees)
    volume = read(folder)
    assert volume.provenance["shear"] == f"{abs(degrees):.1f} degrees"
    np.testing.assert_allclose(volume.source_affine[:3, 2], 2.0 * NORMAL, atol=1e-6)
    # A ramp in patient space stays that ramp: check real values at their places.
    tilt = sheared((0.0, 2.0 * np.tan(np.radians(degrees))))
    index = np.argwhere(~volume.invalid[0])
    places = volume.lps_mm_of_index(index[:, ::-1])
    i, j, k = (np.linalg.inv(tilt) @ np.column_stack([places, np.ones(len(places))]).T)[:3]
    real = volume.real(0)[tuple(index.T)]
    np.testing.assert_allclose(real, 1000 + 10 * i + 7 * j + 31 * k - 1024, atol=0.51)  # whole HU
    assert volume.voxels.dtype == np.uint16
    with pytest.raises(Quarantined) as refused:
        read(folder, shear="quarantine")
    assert (refused.value.code, refused.value.detail) == (
        "gantry_tilt",
        f"slices lean by {abs(degrees):.1f} degrees",
    )


def test_an_uneven_or_impossible_tilt_is_refused(tmp_path: Path) -> None:
    array = noise((8, 6, 7), np.int16)
    jumps = [ORIGIN + 2.0 * k * NORMAL + 3.0 * (k == 4) * np.array(OBLIQUE[3:]) for k in range(8)]
    with pytest.raises(Quarantined, match="uneven_spacing"):
        read(series_of(tmp_path / "a", array, jumps))
    with pytest.raises(Quarantined, match="uneven_spacing"):
        read(tilted(tmp_path / "b", array, 70.0))


def test_a_gap_in_a_tilted_series_is_still_a_gap(tmp_path: Path) -> None:
    folder = tilted(tmp_path, noise((9, 6, 7), np.int16), 15.0)
    middle = sorted(folder.iterdir(), key=lambda p: sitk_position(p))[4]
    middle.unlink()
    with pytest.raises(Quarantined, match="missing_slices"):
        read(folder)


def sitk_position(path: Path) -> float:
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    reader.ReadImageInformation()
    return float(np.dot([float(v) for v in reader.GetMetaData("0020|0032").split("\\")], NORMAL))


def test_a_sheared_nifti_is_straightened_or_refused(tmp_path: Path) -> None:
    array = noise((6, 9, 11), np.int16)
    affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ sheared((0.0, 0.4))
    nibabel.Nifti1Image(array.T, affine).to_filename(tmp_path / "a.nii.gz")
    volume = read(tmp_path / "a.nii.gz", modality="CT")
    assert volume.provenance["shear"] == "11.3 degrees"
    expected = straighten(made(sheared((0.0, 0.4)), array))
    np.testing.assert_array_equal(volume.to_source(volume.voxels[0]), expected.voxels[0])
    with pytest.raises(Quarantined, match="sheared"):
        read(tmp_path / "a.nii.gz", modality="CT", shear="quarantine")


@pytest.mark.parametrize("lean", [(0.0, 0.4), (-0.3, 0.7)])
def test_a_label_on_the_sheared_grid_follows_its_image(tmp_path: Path, lean: tuple[float, float]) -> None:
    block = np.zeros((8, 20, 22), np.int16)
    block[2:6, 5:14, 6:15] = 1
    affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ sheared(lean)
    for name, array in (("image", block * 1000), ("label", block)):
        nibabel.Nifti1Image(array.T, affine).to_filename(tmp_path / f"{name}.nii.gz")
    volume = read(tmp_path / "image.nii.gz", modality="CT")
    label = read_label(tmp_path / "label.nii.gz", volume, regions={"organ": (1,)})
    (layer,) = label.layers
    np.testing.assert_array_equal(layer[volume.voxels[0] > 760], 1)
    np.testing.assert_array_equal(layer[volume.voxels[0] < 240], 0)
    assert (label.lost, label.placed) == ({1: 0.0}, "resampled")
