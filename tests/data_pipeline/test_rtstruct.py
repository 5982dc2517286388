"""RTSTRUCT contours to voxels, against independent rasterisers and real masks."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from dicom_label_files import contour, headers, images, rtstruct
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.path import Path as Outline
from PIL import Image, ImageDraw

from data_pipeline.errors import Quarantined
from data_pipeline.labels import label_of
from data_pipeline.layouts import Case, discover, read_case
from data_pipeline.privacy import KeyedHash
from data_pipeline.rtstruct import fill
from data_pipeline.sources import SourceConfig

SQUARE = np.array([[2.5, 1.5], [2.5, 6.5], [8.5, 6.5], [8.5, 1.5]])  # rows 3 to 8, columns 2 to 6
HOLE = np.array([[4.5, 2.5], [4.5, 4.5], [6.5, 4.5], [6.5, 2.5]])  # rows 5, 6, columns 3, 4


def slow(polygons: list[np.ndarray], shape: tuple[int, int]) -> np.ndarray:
    """The rule itself: count, for each centre, the edges that its row crosses at or left of it."""
    mask = np.zeros(shape, bool)
    for r in range(shape[0]):
        for c in range(shape[1]):
            count = 0
            for polygon in polygons:
                for (r0, c0), (r1, c1) in zip(polygon, np.roll(polygon, -1, axis=0)):
                    if (r0 <= r) != (r1 <= r):
                        count += bool(c0 + (r - r0) * (c1 - c0) / (r1 - r0) <= c + 1e-9)
            mask[r, c] = count % 2 == 1
    return mask


coordinate = st.integers(-300, 1500).map(lambda n: n / 100)
polygon = st.lists(st.tuples(coordinate, coordinate), min_size=3, max_size=8).map(
    lambda p: np.array(p, float)
)


@settings(max_examples=150, deadline=None)
@given(st.lists(polygon, min_size=1, max_size=3))
def test_fill_is_the_slow_reference_on_any_polygons(polygons: list[np.ndarray]) -> None:
    mask, total = fill(polygons, (11, 13))
    np.testing.assert_array_equal(mask, slow(polygons, (11, 13)))
    wide, _ = fill([p + 10 for p in polygons], (40, 40))
    assert total == wide.sum()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(3, 40))
def test_fill_is_matplotlibs_even_odd_rule_away_from_edges(seed: int, corners: int) -> None:
    random = np.random.default_rng(seed)
    angles = np.sort(random.uniform(0, 2 * np.pi, corners))
    radii = random.uniform(4, 14, corners)
    star = np.stack([15.3 + radii * np.sin(angles), 16.1 + radii * np.cos(angles)], axis=1)
    centres = np.stack(np.meshgrid(np.arange(32), np.arange(30), indexing="ij"), axis=-1).reshape(-1, 2)
    if (np.diff(np.append(angles, angles[0] + 2 * np.pi)) > np.pi - 0.01).any():
        return  # not a star around its centre: matplotlib's winding rule may differ
    outline = Outline(np.vstack([star, star[:1]]), closed=True)
    sure = outline.contains_points(centres, radius=1e-6) == outline.contains_points(centres, radius=-1e-6)
    mask, _ = fill([star], (32, 30))
    np.testing.assert_array_equal(mask.ravel()[sure], outline.contains_points(centres)[sure])


def test_structures_that_share_an_edge_through_centres_share_no_voxel() -> None:
    left = np.array([[1.0, 1.0], [1.0, 4.0], [6.0, 4.0], [6.0, 1.0]])
    right = left + np.array([0, 3])
    a, b = fill([left], (9, 9))[0], fill([right], (9, 9))[0]
    assert not (a & b).any()
    both = np.array([[1.0, 1.0], [1.0, 7.0], [6.0, 7.0], [6.0, 1.0]])
    np.testing.assert_array_equal(a | b, fill([both], (9, 9))[0])
    assert a.sum() == 15


def test_fill_agrees_with_a_picture_library_on_a_large_shape() -> None:
    t = np.linspace(0, 2 * np.pi, 400, endpoint=False)
    shape = np.stack([200 + 120 * np.sin(t) + 0.3, 200 + 150 * np.cos(t) + 20 * np.cos(5 * t)], axis=1)
    picture = Image.new("1", (400, 400))
    ImageDraw.Draw(picture).polygon([(c, r) for r, c in shape], fill=1)
    mask, drawn = fill([shape], (400, 400))[0], np.array(picture)
    assert 2 * (mask & drawn).sum() / (mask.sum() + drawn.sum()) > 0.99  # it paints the outline's pixels too


def built(folder: Path, **stated: object) -> tuple[Case, SourceConfig]:
    src = SourceConfig(path=folder, layout="dicom", **stated)
    cases = discover(src, hashes=KeyedHash(b"k" * 32))
    assert sum(case.refused is None for case in cases) == 1
    return next(case for case in cases if case.refused is None), src


def labelled(folder: Path, **stated: object):
    case, src = built(folder, **stated)
    (volume,) = read_case(case, src)
    names = dict.fromkeys(name for label in case.dicom_labels for name in label.regions)
    ids = {name: n for n, name in enumerate(names, 1)}
    label, refused = label_of(case, src, volume, 0, ids)
    on_source = None if label is None else volume.to_source(label.layers)
    return label, on_source, refused, ids


def test_an_oblique_structure_with_a_hole_lies_where_it_was_drawn(tmp_path: Path) -> None:
    source = headers(images(tmp_path / "ct"))
    drawn = [contour(SQUARE, k) for k in (1, 2, 3)] + [contour(HOLE, 2)]
    rtstruct(tmp_path / "elsewhere" / "deep" / "rs.dcm", source, {"GTV": drawn})
    label, voxels, refused, ids = labelled(tmp_path)
    expected = np.zeros((5, 12, 10), np.uint8)
    expected[1:4, 3:9, 2:7] = 1
    expected[2, 5:7, 3:5] = 0
    np.testing.assert_array_equal(voxels, expected[np.newaxis])
    assert (label.placed, label.classes, label.annotated) == ("contours", (1,), ("gtv",))
    assert (label.notes, label.lost, refused, ids) == ({}, {}, [], {"gtv": 1})


def test_what_is_left_out_is_counted(tmp_path: Path) -> None:
    source = headers(images(tmp_path / "ct"))
    rois = {
        "liver": [contour(SQUARE, 0), contour(SQUARE, 0), contour(SQUARE, 3), contour(HOLE, 2.9)],
        "spleen": [
            contour(SQUARE[:1], 1, "POINT"),
            contour(SQUARE, 1, "OPEN_PLANAR"),
            contour(SQUARE[:2], 1),
        ],
        "kidney": [],
        "heart": [contour(HOLE, 1), contour(SQUARE, 1, "OPEN_NONPLANAR")],
    }
    rtstruct(tmp_path / "rs.dcm", source, rois)
    label, voxels, _, ids = labelled(tmp_path)
    assert label.annotated == ("liver", "heart")  # an empty ROI says nothing
    assert dict(label.notes) == {
        "contours_repeated": "1",
        "contours_between_slices": "1",
        "contours_skipped": "4",
        "slices_without_contour": "2",
        "structures_without_contour": "2",
    }
    counts = {k: int((voxels[:, k] == ids["liver"]).sum()) for k in range(5)}
    assert counts == {0: 30, 1: 0, 2: 0, 3: 30, 4: 0}  # nothing is filled between slices


@pytest.mark.parametrize(
    "again",
    [
        SQUARE[::-1],
        np.roll(SQUARE, 1, axis=0),
        np.roll(SQUARE, 2, axis=0)[::-1],
        np.vstack([SQUARE, SQUARE[:1]]),
    ],
    ids=["reversed", "rotated", "both", "closed"],
)
def test_one_outline_written_twice_does_not_undo_itself(tmp_path: Path, again: np.ndarray) -> None:
    source = headers(images(tmp_path / "ct"))
    rtstruct(tmp_path / "rs.dcm", source, {"liver": [contour(SQUARE, 2), contour(again, 2)]})
    label, voxels, _, _ = labelled(tmp_path)
    assert int((voxels == 1).sum()) == 30
    assert dict(label.notes) == {"contours_repeated": "1"}


def test_a_structure_smaller_than_a_voxel_is_not_called_absent(tmp_path: Path) -> None:
    source = headers(images(tmp_path / "ct"))
    speck = np.array([[2.1, 2.1], [2.1, 2.3], [2.3, 2.3]])
    rtstruct(tmp_path / "rs.dcm", source, {"liver": [contour(SQUARE, 2)], "tumour": [contour(speck, 2)]})
    label, _, _, _ = labelled(tmp_path)
    assert label.annotated == ("liver",)
    assert dict(label.notes) == {"structures_without_voxel": "1"}


def test_two_structures_of_one_number_are_refused(tmp_path: Path) -> None:
    source = headers(images(tmp_path / "ct"))
    path = rtstruct(
        tmp_path / "rs.dcm", source, {"liver": [contour(SQUARE, 2)], "spleen": [contour(SQUARE, 3)]}
    )
    ds = pydicom.dcmread(path)
    ds.StructureSetROISequence[1].ROINumber = ds.ROIContourSequence[1].ReferencedROINumber = 1
    ds.save_as(path)
    label, _, (refused,), _ = labelled(tmp_path)
    assert (label, refused.code) == (None, "label_unreadable")


def test_overlaps_go_to_layers_and_neighbours_share_one(tmp_path: Path) -> None:
    source = headers(images(tmp_path / "ct"))
    rois = {"liver": [contour(SQUARE, 2)], "tumour": [contour(HOLE, 2)], "kidney": [contour(SQUARE, 3)]}
    rtstruct(tmp_path / "rs.dcm", source, rois)
    _, voxels, _, ids = labelled(tmp_path)
    assert len(voxels) == 2
    assert (voxels == ids["liver"]).sum() == (voxels == ids["kidney"]).sum() == 30
    assert (voxels[1] == ids["tumour"]).sum() == 4
    assert set(np.unique(voxels[0])) == {0, ids["liver"], ids["kidney"]}


def test_contours_off_the_image_are_lost_and_more_than_a_twentieth_is_refused(tmp_path: Path) -> None:
    source = headers(images(tmp_path / "a" / "ct", (30, 12, 10)))
    rtstruct(tmp_path / "a" / "rs.dcm", source, {"liver": [contour(SQUARE, k) for k in range(31)]})
    label, _, _, _ = labelled(tmp_path / "a")
    assert label.lost == {1: pytest.approx(1 / 31)}
    near = headers(images(tmp_path / "b" / "ct"))
    rtstruct(tmp_path / "b" / "rs.dcm", near, {"liver": [contour(SQUARE, k) for k in (3, 4, 5)]})
    label, _, (refused,), _ = labelled(tmp_path / "b")
    assert (label, refused.code) == (None, "label_outside")
    far = headers(images(tmp_path / "c" / "ct"))
    rtstruct(tmp_path / "c" / "rs.dcm", far, {"liver": [contour(SQUARE + 1000, 2)]})
    assert labelled(tmp_path / "c")[2][0].code == "label_outside"


def test_contours_across_the_slices_are_refused(tmp_path: Path) -> None:
    source = headers(images(tmp_path / "ct"))
    kind, points = contour(SQUARE, 2)
    leaning = points + np.linspace(0, 4, 4)[:, None] * np.cross((0.8, 0.6, 0), (-0.48, 0.64, 0.6))
    rtstruct(tmp_path / "rs.dcm", source, {"liver": [(kind, leaning)]})
    label, _, (refused,), _ = labelled(tmp_path)
    assert (label, refused.code) == (None, "label_contours")
    rtstruct(tmp_path / "rs.dcm", source, {"liver": [(kind, points * 1e9)]})
    assert labelled(tmp_path)[2][0].code == "label_contours"


def test_couches_outlines_and_planning_volumes_are_excluded_unless_the_recipe_names_them(
    tmp_path: Path,
) -> None:
    source = headers(images(tmp_path / "ct"))
    square = [contour(SQUARE, 2)]
    rois = dict.fromkeys(("BODY", "Couch Surface", "PTV_60", "outline", "liver"), square)
    rtstruct(tmp_path / "rs.dcm", source, rois, kinds={"outline": "EXTERNAL"})
    assert labelled(tmp_path)[0].annotated == ("liver",)
    assert labelled(tmp_path, label_names={"body": "trunk"})[0].annotated == ("trunk", "liver")
    everything = labelled(tmp_path, exclude_rois=())[0].annotated
    assert (len(everything), everything[2:]) == (4, ("ptv_60", "liver"))
    rtstruct(tmp_path / "rs.dcm", source, {"BODY": square})
    case = next(c for c in discover(SourceConfig(path=tmp_path)) if c.refused)
    assert (case.refused.code, case.refused.detail) == ("label_empty", "1 structures, all left out")


def test_several_structures_of_one_name_are_one_and_an_algorithm_is_a_model(tmp_path: Path) -> None:
    source = headers(images(tmp_path / "ct"))
    rois = {"GTV Smith": [contour(SQUARE, 2)], "GTV Jones": [contour(SQUARE, 3)]}
    rtstruct(tmp_path / "rs.dcm", source, rois, algorithm="AUTOMATIC")
    mapped = {"GTV Smith": "tumour", "gtv jones": "tumour"}
    label, voxels, _, _ = labelled(tmp_path, label_names=mapped)
    assert (label.annotated, label.origin, int((voxels == 1).sum())) == (("tumour",), "model", 60)
    assert labelled(tmp_path, label_names=mapped, label_origin="human")[0].origin == "human"
    hashed = labelled(tmp_path)[0].annotated
    assert all(name.startswith("roi_") and len(name) == 16 for name in hashed)


def test_damaged_contours_are_refused_without_a_word_of_the_file(tmp_path: Path) -> None:
    source = headers(images(tmp_path / "ct"))
    path = rtstruct(tmp_path / "rs.dcm", source, {"liver": [contour(SQUARE, 2)]})
    raw = path.read_bytes()
    value = raw.index(b"\\", raw.index(b"CLOSED_PLANAR"))
    path.write_bytes(raw[: value - 4] + b"Jane" + raw[value:])
    label, _, (refused,), _ = labelled(tmp_path)
    assert (label, refused.code) == (None, "label_unreadable")
    assert "Jane" not in refused.detail


def test_notes_of_labels_are_on_the_allow_list() -> None:
    from data_pipeline.privacy import NOTES, allowed

    notes = {
        name: "12"
        for name in NOTES
        if name.startswith(("contours_", "slices_without", "structures_", "label_"))
    }
    assert len(notes) == 8
    assert allowed(notes) == notes


@pytest.mark.real_data
@pytest.mark.parametrize(("modality", "name", "dice"), [("CT", "CT", 0.999), ("MR", "MR_T1", 1.0)])
def test_a_real_structure_set_gives_the_mask_that_others_made_of_it(
    real_data: Path, modality: str, name: str, dice: float
) -> None:
    src = SourceConfig(path=real_data / "dicom_sarcoma")
    case = next(case for case in discover(src) if case.modality == (modality,))
    (volume,) = read_case(case, src)
    (dicom,) = case.dicom_labels
    label, refused = label_of(case, src, volume, 0, dict.fromkeys(dicom.regions, 1))
    assert label is not None
    assert not refused
    ours = volume.to_source(label.layers)[0] > 0
    mask = sitk.ReadImage(str(real_data / f"ct_mr_pet_sarcoma/STS_019/{name}_mask.nii.gz"))
    theirs = sitk.GetArrayFromImage(mask) > 0
    theirs = (
        theirs
        if np.allclose(np.array(mask.GetDirection())[[0, 4, 8]], 1)
        else sitk.GetArrayFromImage(sitk.DICOMOrient(mask, "LPS")).astype(bool)
    )
    assert 2 * (ours & theirs).sum() / (ours.sum() + theirs.sum()) >= dice
    assert Counter(label.notes) == Counter()


@pytest.mark.real_data
def test_a_structure_set_without_its_images_is_counted_by_name(real_data: Path, tmp_path: Path) -> None:
    (tmp_path / "rs.dcm").write_bytes((real_data / "hard/pydicom/rtstruct.dcm").read_bytes())
    (case,) = discover(SourceConfig(path=tmp_path))
    assert isinstance(case.refused, Quarantined)
    assert (case.refused.code, case.refused.detail) == ("label_no_image", "3 structures")
