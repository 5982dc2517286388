"""Labels onto the grid of their image, by every rule."""

from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data_pipeline.errors import Quarantined, UserError
from data_pipeline.labels import IGNORE, foreground, layers_of, read_label
from data_pipeline.readers import read
from data_pipeline.volume import Volume

SHAPE = (6, 7, 8)  # x, y, z
AFFINE = np.diag([-2.0, 3.0, 4.0, 1.0])
ORGANS = {"liver": (1,), "spleen": (2,)}


def save(path: Path, data: np.ndarray, affine: np.ndarray = AFFINE) -> Path:
    nibabel.save(nibabel.Nifti1Image(data, affine), path)
    return path


@pytest.fixture
def image(tmp_path: Path) -> Volume:
    random = np.random.default_rng(0)
    return read(save(tmp_path / "image.nii", random.integers(1, 500, SHAPE).astype(np.int16)), modality="MR")


def organs() -> np.ndarray:
    data = np.zeros(SHAPE, np.uint8)
    data[1:3, 2:5, 2:6] = 1
    data[4, 2:5, 2:6] = 2
    return data


def code_of(path: Path, volume: Volume, **options) -> str:
    with pytest.raises(Quarantined) as refused:
        read_label(path, volume, **{"regions": ORGANS, **options})
    assert str(path) not in refused.value.detail
    return refused.value.code


def test_a_label_on_the_grid_comes_voxel_for_voxel(tmp_path: Path, image: Volume) -> None:
    label = read_label(
        save(tmp_path / "l.nii.gz", organs()), image, regions=ORGANS, ids={"liver": 9, "spleen": 4}
    )
    assert (label.placed, label.classes, label.layers.dtype) == ("grid", (4, 9), np.uint8)
    back = image.to_source(label.layers[0]).T
    np.testing.assert_array_equal(back, np.array([0, 9, 4])[organs()])


def test_another_axis_order_of_the_same_grid_is_the_same_label(tmp_path: Path, image: Volume) -> None:
    plain = read_label(save(tmp_path / "a.nii", organs()), image, regions=ORGANS)
    turned = sitk.DICOMOrient(sitk.ReadImage(str(tmp_path / "a.nii")), "PIR")
    sitk.WriteImage(turned, str(tmp_path / "b.nrrd"))
    other = read_label(tmp_path / "b.nrrd", image, regions=ORGANS)
    assert other.placed == "grid"
    np.testing.assert_array_equal(other.layers, plain.layers)


def test_a_tenth_of_a_voxel_is_the_same_grid_and_more_is_refused(tmp_path: Path, image: Volume) -> None:
    near, far = AFFINE.copy(), AFFINE.copy()
    near[0, 3], far[0, 3] = 0.15, 0.3
    assert read_label(save(tmp_path / "a.nii", organs(), near), image, regions=ORGANS).placed == "grid"
    path = save(tmp_path / "b.nii", organs(), far)
    assert code_of(path, image) == "label_geometry"


def test_a_lost_header_is_answered_by_label_geometry(tmp_path: Path, image: Volume) -> None:
    path = save(tmp_path / "a.nii", organs(), np.eye(4))
    assert code_of(path, image) == "label_geometry"
    as_image = read_label(path, image, regions=ORGANS, geometry="image")
    assert as_image.placed == "image"
    np.testing.assert_array_equal(image.to_source(as_image.layers[0]).T, organs())
    shifted = AFFINE.copy()
    shifted[2, 3] = 4.0  # one slice
    by_header = read_label(
        save(tmp_path / "b.nii", organs(), shifted), image, regions=ORGANS, geometry="header"
    )
    assert by_header.placed == "resampled"
    np.testing.assert_array_equal(image.to_source(by_header.layers[0]).T[:, :, 1:], organs()[:, :, :-1])


def test_another_size_is_resampled_like_simpleitk(tmp_path: Path, image: Volume) -> None:
    fine = sitk.GetImageFromArray(np.repeat(np.repeat(organs().T, 2, 1), 3, 2))
    reference = sitk.ReadImage(str(tmp_path / "image.nii"))
    fine.SetDirection(reference.GetDirection())
    fine.SetSpacing((2 / 3, 1.5, 4.0))
    origin = np.array(reference.GetOrigin()) + np.array(reference.GetDirection()).reshape(3, 3) @ (
        -2 / 3,
        -0.75,
        0.0,
    )
    fine.SetOrigin(origin.tolist())
    sitk.WriteImage(fine, str(tmp_path / "fine.nii.gz"))
    label = read_label(tmp_path / "fine.nii.gz", image, regions=ORGANS)
    expected = sitk.GetArrayFromImage(
        sitk.Resample(fine, reference, sitk.Transform(), sitk.sitkNearestNeighbor)
    )
    assert label.placed == "resampled"
    np.testing.assert_array_equal(image.to_source(label.layers[0]), expected)
    assert label.lost == {1: 0.0, 2: 0.0}
    assert label.volume_change[1] == pytest.approx(0.0, abs=1e-6)


def test_an_oblique_label_is_resampled_like_simpleitk(tmp_path: Path, image: Volume) -> None:
    c, s = np.cos(0.2), np.sin(0.2)
    turned = np.array([[-2 * c, 3 * s, 0, -1], [2 * s, 3 * c, 0, 2], [0, 0, 4, 0], [0, 0, 0, 1.0]])
    data = np.zeros((8, 9, 8), np.uint8)
    data[2:5, 3:6, 2:6] = 1
    label = read_label(save(tmp_path / "a.nii", data, turned), image, regions=ORGANS)
    reference, moving = sitk.ReadImage(str(tmp_path / "image.nii")), sitk.ReadImage(str(tmp_path / "a.nii"))
    expected = sitk.GetArrayFromImage(
        sitk.Resample(moving, reference, sitk.Transform(), sitk.sitkNearestNeighbor)
    )
    assert (image.to_source(label.layers[0]) != expected).mean() < 0.01  # ties aside
    assert label.layers.any()


def test_a_label_mostly_outside_is_refused_and_a_little_loss_is_recorded(
    tmp_path: Path, image: Volume
) -> None:
    away, half, little = (np.diag([-2.0, 3.0, 4.0, 1.0]) for _ in range(3))
    away[0, 3], half[2, 3], little[2, 3] = 500.0, 20.0, 4.0
    data = np.zeros((*SHAPE[:2], 9), np.uint8)
    data[1:3, 2:5, 1:7] = 1
    assert code_of(save(tmp_path / "a.nii", data, away), image) == "label_outside"
    assert code_of(save(tmp_path / "b.nii", data, half), image) == "label_outside"
    data[1, 2, 7] = 1  # lands one slice beyond the image
    label = read_label(save(tmp_path / "c.nii", data, little), image, regions=ORGANS)
    assert label.lost[1] == pytest.approx(1 / 37)
    assert label.volume_change[1] == pytest.approx(-1 / 37)


def test_undeclared_and_grey_values_are_refused(tmp_path: Path, image: Volume) -> None:
    data = organs()
    data[0, 0, 0] = 7
    with pytest.raises(Quarantined, match="label_values") as refused:
        read_label(save(tmp_path / "a.nii", data), image, regions=ORGANS)
    assert "7" in refused.value.detail
    label = read_label(tmp_path / "a.nii", image, regions=ORGANS, ignore=frozenset({7}))
    assert (label.layers == IGNORE).sum() == 1
    assert label.classes == (1, 2)
    probability = organs() * np.float32(0.35)
    path = save(tmp_path / "b.nii", probability)
    one = {"liver": (1,)}
    assert code_of(path, image, regions=one) == "label_grey"
    np.testing.assert_array_equal(
        image.to_source(read_label(path, image, regions=one, threshold=0.7).layers[0]).T, organs() == 2
    )
    holes = read_label(
        save(tmp_path / "f.nii", -data.astype(np.int16)),
        image,
        regions={"a": (-1,)},
        ignore=frozenset({-2, -7}),
    )
    assert holes.classes == (1,)
    assert (holes.layers == 1).sum() == (data == 1).sum()
    whole = read_label(save(tmp_path / "c.nii", organs().astype(np.float64)), image, regions=ORGANS)
    assert whole.classes == (1, 2)
    assert code_of(save(tmp_path / "d.nii", organs().astype(np.float32) * np.nan), image) == "label_grey"
    assert code_of(save(tmp_path / "e.nii", -organs().astype(np.int16)), image) == "label_values"
    with pytest.raises(UserError, match="one class"):
        read_label(path, image, regions=ORGANS, threshold=0.5)


def test_grey_masks_of_radiographs_need_a_threshold(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    Image.fromarray(random.integers(0, 255, (16, 20)).astype(np.uint8)).save(tmp_path / "x.png")
    mask = random.integers(0, 256, (16, 20)).astype(np.uint8)
    Image.fromarray(mask).save(tmp_path / "m.png")
    volume = read(tmp_path / "x.png", modality="XR", field_mm=300)
    assert code_of(tmp_path / "m.png", volume, regions={"lungs": (1,)}) == "label_grey"
    label = read_label(tmp_path / "m.png", volume, regions={"lungs": (1,)}, threshold=128)
    np.testing.assert_array_equal(label.layers, (mask >= 128)[np.newaxis, np.newaxis])
    Image.fromarray(mask[:8]).save(tmp_path / "small.png")
    assert code_of(tmp_path / "small.png", volume, regions={"lungs": (1,)}, threshold=128) == "label_shape"


def test_regions_that_overlap_lie_in_layers(tmp_path: Path, image: Volume) -> None:
    regions = {"whole": (1, 2, 3), "core": (2, 3), "enhancing": (3,), "bone": (4,)}
    assert layers_of(regions) == {"whole": 0, "core": 1, "enhancing": 2, "bone": 0}
    data = np.zeros(SHAPE, np.uint8)
    data[0, 0, :5] = range(5)
    label = read_label(save(tmp_path / "a.nii", data), image, regions=regions)
    back = image.to_source(label.layers).transpose(0, 3, 2, 1)[:, 0, 0, :5]
    np.testing.assert_array_equal(back, [[0, 1, 1, 1, 4], [0, 0, 2, 2, 0], [0, 0, 0, 3, 0]])


def test_unreadable_labels_are_refused_as_labels(tmp_path: Path, image: Volume) -> None:
    (tmp_path / "a.nii").write_bytes(b"nothing")
    assert code_of(tmp_path / "a.nii", image) == "label_unreadable"
    assert code_of(tmp_path / "none.nii", image) == "label_unreadable"


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), per_class=st.integers(1, 70))
def test_foreground_voxels_are_of_their_class_and_repeat(seed: int, per_class: int) -> None:
    layers = np.random.default_rng(seed).choice(np.array([0, 0, 0, 1, 5, IGNORE], np.uint8), (2, 4, 5, 6))
    found = foreground(layers, per_class)
    for again, entry in zip(foreground(layers.copy(), per_class), found):
        np.testing.assert_array_equal(again.voxels, entry.voxels)
        own = layers[entry.layer].ravel()
        assert entry.voxels.dtype == np.int32
        assert (own[entry.voxels] == entry.label).all()
        assert (
            len(np.unique(entry.voxels))
            == len(entry.voxels)
            == min(per_class, int((own == entry.label).sum()))
        )
    assert {(f.layer, f.label) for f in found} == {
        (n, v) for n in range(2) for v in (1, 5) if (layers[n] == v).any()
    }


def test_foreground_of_an_empty_label_is_empty() -> None:
    assert foreground(np.zeros((1, 2, 2, 2), np.uint8)) == []


@pytest.mark.real_data
def test_real_labels_match_their_images(real_data: Path) -> None:
    for modality, name in (("CT", "CT"), ("MR", "MR_T1"), ("PT", "PET")):
        folder = real_data / "ct_mr_pet_sarcoma/STS_019"
        volume = read(folder / f"{name}_image.nii.gz", modality=modality)
        label = read_label(folder / f"{name}_mask.nii.gz", volume, regions={"tumour": (1,)})
        expected = sitk.GetArrayFromImage(sitk.ReadImage(str(folder / f"{name}_mask.nii.gz")))
        np.testing.assert_array_equal(volume.to_source(label.layers[0]), expected)
        assert label.placed == "grid"
    series = read(real_data / "dicom_sarcoma/STS_019/CT")
    label = read_label(
        real_data / "ct_mr_pet_sarcoma/STS_019/CT_mask.nii.gz", series, regions={"tumour": (1,)}
    )
    assert label.placed == "grid"
