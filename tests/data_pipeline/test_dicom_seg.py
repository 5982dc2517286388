"""DICOM segmentations onto their images, written and read again by highdicom."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from dicom_label_files import headers, images, seg
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.uid import JPEG2000Lossless, RLELossless

from data_pipeline.errors import Quarantined
from data_pipeline.labels import DicomLabel, label_of
from data_pipeline.layouts import Case, discover, read_case
from data_pipeline.sources import SourceConfig
from data_pipeline.volume import Volume

SHAPE = (5, 12, 10)


def blobs(seed: int, segments: int, shape: tuple[int, int, int] = SHAPE) -> np.ndarray:
    """(k, rows, columns, segment) of 0 and 1, overlapping, one slice without any."""
    masks = np.random.default_rng(seed).random((*shape, segments)) < 0.3
    masks[1] = False
    return masks.astype(np.uint8)


def opened(folder: Path, **stated: object) -> tuple[Case, SourceConfig, Volume]:
    src = SourceConfig(path=folder, layout="dicom", **stated)
    (case,) = (case for case in discover(src) if case.refused is None)
    (volume,) = read_case(case, src)
    return case, src, volume


def labelled(folder: Path, **stated: object):
    case, src, volume = opened(folder, **stated)
    names = dict.fromkeys(name for label in case.dicom_labels for name in label.regions)
    ids = {name: n for n, name in enumerate(names, 1)}
    label, refused = label_of(case, src, volume, 0, ids)
    return label, None if label is None else volume.to_source(label.layers), refused, ids


def found(voxels: np.ndarray, label: int) -> np.ndarray:
    return (voxels == label).any(axis=0)


@pytest.mark.parametrize("names", [("liver",), ("liver", "spleen", "kidney")])
def test_binary_segments_come_voxel_for_voxel_and_overlap_in_layers(
    tmp_path: Path, names: tuple[str, ...]
) -> None:
    source = headers(images(tmp_path / "ct"))
    masks = blobs(0, len(names))
    seg(tmp_path / "seg.dcm", source, masks, names)
    label, voxels, refused, ids = labelled(tmp_path)
    for n, name in enumerate(names):
        np.testing.assert_array_equal(found(voxels, ids[name]), masks[..., n] == 1)
    assert (label.placed, label.annotated, label.lost, refused) == ("grid", names, {}, [])
    assert (len(voxels) > 1) == (len(names) > 1)
    assert label.layers.dtype == np.uint8


def test_what_we_read_is_what_highdicom_reads(tmp_path: Path) -> None:
    import highdicom as hd

    source = headers(images(tmp_path / "ct"))
    path = seg(tmp_path / "seg.dcm", source, blobs(3, 2), ("liver", "spleen"))
    _, voxels, _, ids = labelled(tmp_path)
    uids = [ds.SOPInstanceUID for ds in source]
    theirs = hd.seg.segread(path).get_pixels_by_source_instance(uids, ignore_spatial_locations=True)
    np.testing.assert_array_equal(found(voxels, ids["liver"]), theirs[..., 0] == 1)
    np.testing.assert_array_equal(found(voxels, ids["spleen"]), theirs[..., 1] == 1)


def test_a_label_map_is_one_layer(tmp_path: Path) -> None:
    source = headers(images(tmp_path / "ct"))
    values = np.random.default_rng(1).integers(0, 4, SHAPE).astype(np.uint8)
    seg(tmp_path / "seg.dcm", source, values, ("liver", "couch", "spleen"), "LABELMAP")
    label, voxels, _, ids = labelled(tmp_path)
    assert label.annotated == ("liver", "spleen")  # the couch is excluded
    np.testing.assert_array_equal(voxels[0], np.array([0, ids["liver"], 0, ids["spleen"]])[values])
    assert len(voxels) == 1


def test_fractions_need_a_threshold(tmp_path: Path) -> None:
    source = headers(images(tmp_path / "ct"))
    chance = np.round(np.random.default_rng(2).random(SHAPE) * 255) / 255
    seg(tmp_path / "seg.dcm", source, chance, ("liver",), "FRACTIONAL")
    label, _, (refused,), _ = labelled(tmp_path)
    assert (label, refused.code) == (None, "label_grey")
    assert "label_threshold" in refused.detail
    label, voxels, _, _ = labelled(tmp_path, label_threshold=0.6)
    np.testing.assert_array_equal(voxels[0] == 1, chance >= 0.6)
    assert labelled(tmp_path, label_threshold=128)[2][0].code == "label_grey"


@pytest.mark.parametrize("syntax", [RLELossless, JPEG2000Lossless])
def test_compressed_frames_are_read(tmp_path: Path, syntax: str) -> None:
    source = headers(images(tmp_path / "ct", (3, 33, 34)))
    values = np.random.default_rng(1).integers(0, 3, (3, 33, 34)).astype(np.uint8)
    options = {"transfer_syntax_uid": syntax}
    seg(tmp_path / "seg.dcm", source, values, ("liver", "spleen"), "LABELMAP", **options)
    np.testing.assert_array_equal(labelled(tmp_path)[1][0], values)


def test_a_segment_without_a_frame_was_looked_for(tmp_path: Path) -> None:
    source = headers(images(tmp_path / "ct"))
    masks = blobs(0, 2)
    masks[..., 1] = 0
    seg(tmp_path / "seg.dcm", source, masks, ("liver", "spleen"))
    label, _, _, _ = labelled(tmp_path)
    assert (label.annotated, label.classes) == (("liver", "spleen"), (1,))


def test_slices_without_frames_in_any_order_and_number_stay_empty(tmp_path: Path) -> None:
    source = headers(images(tmp_path / "ct"))
    masks = np.zeros(SHAPE, np.uint8)
    masks[[0, 2, 4], 3:6, 2:7] = 1  # every other slice: not a coarser grid
    seg(tmp_path / "seg.dcm", source[::-1], masks[::-1], ("liver",))
    label, voxels, _, _ = labelled(tmp_path)
    np.testing.assert_array_equal(voxels[0], masks)
    assert label.placed == "grid"


def test_several_segmentations_are_several_annotators(tmp_path: Path) -> None:
    source = headers(images(tmp_path / "ct"))
    masks = blobs(5, 2)
    seg(tmp_path / "a.dcm", source, masks[..., :1], ("liver",))
    seg(tmp_path / "b" / "b.dcm", source, masks[..., 1:], ("Liver",), algorithm="AUTOMATIC")
    seg(tmp_path / "c.dcm", source, masks[..., :1] * 0.5, ("liver",), "FRACTIONAL")
    label, voxels, refused, ids = labelled(tmp_path)
    assert ids == {"liver": 1}
    np.testing.assert_array_equal(voxels == 1, masks.transpose(3, 0, 1, 2) == 1)
    assert [error.code for error in refused] == ["label_grey"]
    assert dict(label.notes) == {"label_files": "2", "label_files_refused": "1"}
    assert label.origin == "model"


def moved(path: Path, change) -> None:
    """The segmentation with the place of its frames changed: ``change(measures, orientation, position)``."""
    ds = pydicom.dcmread(path)
    shared = ds.SharedFunctionalGroupsSequence[0]
    for frame in ds.PerFrameFunctionalGroupsSequence:
        change(shared.PixelMeasuresSequence[0], frame.PlanePositionSequence[0])
    ds.save_as(path)


def test_another_grid_is_resampled_like_simpleitk(tmp_path: Path) -> None:
    source = headers(images(tmp_path / "ct"))
    masks = np.zeros(SHAPE, np.uint8)
    masks[1:4, 3:9, 2:8] = 1
    path = seg(tmp_path / "seg.dcm", source, masks, ("liver",))
    shift = 0.4 * np.array((-0.48, 0.64, 0.6)) * 0.5

    def change(measures, position) -> None:
        position.ImagePositionPatient = [
            f"{v:.6f}" for v in np.array(position.ImagePositionPatient, float) + shift
        ]

    moved(path, change)
    label, voxels, _, _ = labelled(tmp_path)
    assert label.placed == "resampled"
    _, _, volume = opened(tmp_path)
    columns = volume.source_affine[:3, :3]
    moving = sitk.GetImageFromArray(masks)
    moving.SetSpacing(np.linalg.norm(columns, axis=0).tolist())
    moving.SetDirection((columns / np.linalg.norm(columns, axis=0)).ravel().tolist())
    reference = sitk.Image(moving)
    reference.SetOrigin(volume.source_affine[:3, 3].tolist())
    moving.SetOrigin((volume.source_affine[:3, 3] + shift).tolist())
    expected = sitk.Resample(moving, reference, sitk.Transform(), sitk.sitkNearestNeighbor)
    np.testing.assert_array_equal(voxels[0], sitk.GetArrayFromImage(expected))
    assert label.volume_change[1] == pytest.approx(0.0)


def test_a_segmentation_beside_the_image_is_refused(tmp_path: Path) -> None:
    source = headers(images(tmp_path / "ct"))
    path = seg(tmp_path / "seg.dcm", source, blobs(0, 1), ("liver",))

    def away(measures, position) -> None:
        position.ImagePositionPatient = [f"{float(v) + 500:.6f}" for v in position.ImagePositionPatient]

    moved(path, away)
    label, _, (refused,), _ = labelled(tmp_path)
    assert (label, refused.code) == (None, "label_outside")


def test_damaged_segmentations_are_refused_by_code(tmp_path: Path) -> None:
    source = headers(images(tmp_path / "ct"))
    path = seg(tmp_path / "seg.dcm", source, blobs(0, 2), ("liver", "spleen"))
    whole = pydicom.dcmread(path)

    def refusal(**changes: object) -> tuple[str, str]:
        ds = pydicom.dcmread(path)
        for name, value in changes.items():
            if value is None:
                del ds[name]
            else:
                setattr(ds, name, value)
        ds.save_as(tmp_path / "seg.dcm")
        (error,) = labelled(tmp_path)[2]
        whole.save_as(path)
        return error.code, error.detail

    assert refusal(PixelData=whole.PixelData[:10]) == ("label_unreadable", "fewer bits than voxels")
    assert refusal(PixelData=None) == ("label_unreadable", "no pixel data")
    assert refusal(SegmentationType="SURFACE")[0] == "label_unreadable"
    assert refusal(PerFrameFunctionalGroupsSequence=None)[0] == "label_unreadable"
    frames = pydicom.dcmread(path).PerFrameFunctionalGroupsSequence
    frames[0].SegmentIdentificationSequence[0].ReferencedSegmentNumber = 7
    assert refusal(PerFrameFunctionalGroupsSequence=frames)[0] == "label_values"
    twice = pydicom.dcmread(path).SegmentSequence
    twice[1].SegmentNumber = 1
    assert refusal(SegmentSequence=twice) == ("label_unreadable", "two segments of one number")
    del frames[0].PlanePositionSequence
    assert refusal(PerFrameFunctionalGroupsSequence=frames)[0] == "label_geometry"


def test_a_label_belongs_to_the_acquisition_it_was_made_on(tmp_path: Path) -> None:
    source = headers(images(tmp_path / "ct"))
    seg(tmp_path / "seg.dcm", source, blobs(0, 1), ("liver",))
    case, src, volume = opened(tmp_path)
    (dicom,) = case.dicom_labels
    assert dicom.instances == {ds.SOPInstanceUID for ds in source} == volume.instances
    other = Volume(**{**vars(volume), "instances": frozenset({"1.2.3"})})
    assert label_of(case, src, other, 0, {"liver": 1}) == (None, [])
    later = Volume(**{**vars(volume), "provenance": {"frame": "2 of 4"}})
    assert label_of(case, src, later, 1, {"liver": 1}) == (None, [])
    unnamed = Case(**{**vars(case), "dicom_labels": (DicomLabel("seg", dicom.path, dicom.regions, 0),)})
    assert label_of(unnamed, src, other, 3, {"liver": 1})[0] is not None


@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 2**16), rows=st.integers(3, 9), columns=st.integers(3, 9), segments=st.integers(1, 3)
)
def test_any_size_of_frame_unpacks(
    tmp_path_factory: pytest.TempPathFactory, seed: int, rows: int, columns: int, segments: int
) -> None:
    """Frames of sizes that are no whole number of bytes begin within a byte. (highdicom 0.28 writes frames of
    fewer than 8 pixels wrongly, and reads them so.)"""
    folder = tmp_path_factory.mktemp("any")
    source = headers(images(folder / "ct", (3, rows, columns)))
    masks = np.random.default_rng(seed).integers(0, 2, (3, rows, columns, segments)).astype(np.uint8)
    masks[0, 0, 0] = 1
    names = ("liver", "spleen", "kidney")[:segments]
    seg(folder / "seg.dcm", source, masks, names)
    _, voxels, _, ids = labelled(folder)
    for n, name in enumerate(names):
        np.testing.assert_array_equal(found(voxels, ids[name]), masks[..., n] == 1)


@pytest.mark.real_data
def test_a_real_segmentation_is_the_mask_stored_beside_it(real_data: Path) -> None:
    label, voxels, refused, ids = labelled(real_data / "dicom_ct_liver")
    expected = sitk.GetArrayFromImage(sitk.ReadImage(str(real_data / "dicom_ct_liver/liver_seg.nrrd")))
    np.testing.assert_array_equal(voxels[0], expected)
    assert (label.placed, label.annotated, refused, ids) == ("grid", ("liver",), [], {"liver": 1})


@pytest.mark.real_data
def test_segmentations_without_their_images_are_counted_by_name(real_data: Path) -> None:
    cases = discover(SourceConfig(path=real_data / "hard/highdicom"))
    refused = {c.images[0].name: c.refused for c in cases if isinstance(c.refused, Quarantined)}
    assert {name: error.code for name, error in refused.items()} == dict.fromkeys(
        ("seg_image_ct_binary.dcm", "seg_image_ct_binary_overlap.dcm", "seg_image_ct_true_fractional.dcm"),
        "label_no_image",
    )
