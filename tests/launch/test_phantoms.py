"""Phantoms: repeatable, hard for a threshold, and what the files say is what was drawn."""

from __future__ import annotations

import csv
import hashlib
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from scipy import ndimage

from launch.acquisition import Scan, grid
from launch.anatomy import LABELS, ORGANS
from launch.phantoms import PhantomSet, scans_of, split_of, write, write_nnunet

SUBJECTS = 4


@pytest.fixture(scope="module")
def scans() -> list[list[Scan]]:
    return [scans_of(0, subject) for subject in range(SUBJECTS)]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> PhantomSet:
    return write(tmp_path_factory.mktemp("phantoms"), SUBJECTS, seed=0)


def best_threshold_dice(scan: Scan) -> dict[int, float]:
    """By organ: best over 24 thresholds, both sides of each, of the largest connected component's Dice."""
    sizes = np.bincount(scan.labels.ravel(), minlength=max(LABELS) + 1)
    best = {organ: 0.0 for organ in LABELS if sizes[organ]}
    for threshold in np.unique(np.quantile(scan.voxels, np.linspace(0.02, 0.995, 24))):
        for mask in (scan.voxels >= threshold, scan.voxels < threshold):
            parts, count = ndimage.label(mask)
            if count:
                largest = parts == np.bincount(parts.ravel())[1:].argmax() + 1
                hit = np.bincount(scan.labels[largest], minlength=len(sizes))
                for organ in best:
                    best[organ] = max(best[organ], 2.0 * float(hit[organ] / (hit.sum() + sizes[organ])))
    return best


def test_threshold_and_largest_component_is_not_enough(scans: list[list[Scan]]) -> None:
    for contrast in ("CT", "T1", "T2", "XR"):
        found = [best_threshold_dice(s) for subject in scans for s in subject if s.contrast == contrast]
        for value, name in LABELS.items():
            dice = [best[value] for best in found if value in best]
            assert np.mean(dice or [0.0]) < 0.6, f"{contrast} {name}: a threshold reaches {np.mean(dice):.2f}"


def test_every_organ_is_there_and_lesions_have_3_to_10_voxels(scans: list[list[Scan]]) -> None:
    lesions = []
    for subject in scans:
        for scan in subject:
            for value, name in LABELS.items():
                if name in ORGANS:
                    assert (scan.labels == value).sum() >= 50, f"{scan.contrast} {name}"
            if scan.modality != "XR":
                lesion = next(value for value, name in LABELS.items() if name == "lesion")
                parts, _ = ndimage.label(scan.labels == lesion, np.ones((3, 3, 3)))
                lesions += np.bincount(parts.ravel())[1:].tolist()
    assert lesions
    assert min(lesions) >= 3
    assert max(lesions) <= 10


def test_touching_organs_have_like_intensity(scans: list[list[Scan]]) -> None:
    """Liver and stomach touch in every subject, and differ in CT by less than the spread within either."""
    values = {name: value for value, name in LABELS.items()}
    for ct in (subject[0] for subject in scans):
        liver, stomach = ct.labels == values["liver"], ct.labels == values["stomach"]
        assert (ndimage.binary_dilation(liver) & stomach).any()
        assert abs(ct.voxels[liver].mean() - ct.voxels[stomach].mean()) < ct.voxels[liver].std()


def test_radiograph_is_the_projection_of_the_same_body(scans: list[list[Scan]]) -> None:
    """The spine absorbs most and the air beside the body least."""
    for subject in scans:
        image = subject[-1].voxels[0].astype(float)
        middle = image.shape[1] // 2
        assert image[:, middle - 6 : middle + 6].mean() > 1.15 * image[:, middle - 30 : middle - 22].mean()
        assert image[:, :3].mean() < 0.1 * image.max()


def test_geometries_and_orientations_vary(scans: list[list[Scan]]) -> None:
    shapes = {("slab" if max(s.grid.spacing) / sorted(s.grid.spacing)[1] >= 3 else "even", s.modality)
              for subject in scans for s in subject[:3]}  # fmt: skip
    assert shapes == {("slab", "CT"), ("even", "CT"), ("slab", "MR"), ("even", "MR")}
    assert len({tuple(np.rint(np.sign(s[1].grid.affine[:3, :3]).ravel())) for s in scans}) >= 3


def test_grid_spacing_and_middle() -> None:
    for code in ("RAS", "LPS", "PSR", "LIA"):
        where = grid((80, 60, 50), (2.0, 1.5, 5.0), code, tilt_degrees=5)
        points = where.points().reshape(*where.shape, 3)
        assert np.allclose(points.mean((0, 1, 2)), 0, atol=1e-4)
        i_mm, j_mm, k_mm = where.spacing
        assert np.isclose(np.linalg.norm(points[0, 0, 1] - points[0, 0, 0]), i_mm, atol=1e-4)
        assert np.isclose(np.linalg.norm(points[0, 1, 0] - points[0, 0, 0]), j_mm, atol=1e-4)
        assert np.isclose(np.linalg.norm(points[1, 0, 0] - points[0, 0, 0]), k_mm, atol=1e-4)
        fine = where.points(finer=2).reshape(where.shape[0], 2, where.shape[1], 2, where.shape[2], 2, 3)
        assert np.allclose(fine.mean((1, 3, 5)), points, atol=1e-4)


def test_the_same_seed_gives_the_same_bytes(written: PhantomSet, tmp_path: Path) -> None:
    again = write(tmp_path / "again", 2, seed=0)
    other = write(tmp_path / "other", 1, seed=1)
    compared = 0
    for path in sorted(p for p in again.folder.rglob("*") if p.suffix in (".gz", ".dcm", ".png")):
        name = path.relative_to(again.folder)
        digest = [
            hashlib.sha256((root / name).read_bytes()).digest() for root in (again.folder, written.folder)
        ]
        assert digest[0] == digest[1], name
        compared += 1
    assert compared > 50
    first = "mr/S000_T1.nii.gz"
    assert (again.folder / first).read_bytes() != (other.folder / first).read_bytes()


def test_files_read_by_simpleitk_carry_the_drawn_geometry(
    written: PhantomSet, scans: list[list[Scan]]
) -> None:
    for subject, drawn in enumerate(scans):
        rows = [row for row in written.rows if row["subject"] == f"S{subject:03d}"]
        for row, scan in zip(rows, drawn, strict=True):
            if scan.modality == "XR":
                image = sitk.ReadImage(str(written.folder / row["image"]))
                assert np.array_equal(sitk.GetArrayFromImage(image), scan.voxels[0])
                label = sitk.ReadImage(str(written.folder / row["label"]))
                assert np.array_equal(sitk.GetArrayFromImage(label), scan.labels[0])
                continue
            if scan.modality == "CT":
                names = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(written.folder / row["image"]))
                image = sitk.ReadImage(names)
            else:
                image = sitk.ReadImage(str(written.folder / row["image"]))
            label = sitk.ReadImage(str(written.folder / row["label"]))
            assert np.array_equal(sitk.GetArrayFromImage(image), scan.voxels)
            assert np.array_equal(sitk.GetArrayFromImage(label), scan.labels)
            z, y, x = scan.grid.shape
            for index in ((0, 0, 0), (x - 1, 0, 0), (0, y - 1, 0), (0, 0, z - 1), (x - 1, y - 1, z - 1)):
                expected = (scan.grid.affine @ np.array([*index, 1.0]))[:3]
                for read in (image, label):
                    assert np.allclose(read.TransformIndexToPhysicalPoint(index), expected, atol=1e-3)


def test_table_and_splits(written: PhantomSet) -> None:
    for modality, per_subject in (("ct", 1), ("mr", 2), ("xr", 1)):
        rows = list(csv.DictReader((written.folder / f"{modality}.csv").open()))
        assert len(rows) == per_subject * SUBJECTS
        assert all(
            (written.folder / row["image"]).exists() and (written.folder / row["label"]).exists()
            for row in rows
        )
    splits = [split_of(n, 16) for n in range(16)]
    assert [splits.count(name) for name in ("train", "val", "test")] == [10, 3, 3]
    assert {row["split"] for row in written.rows if row["subject"] == "S003"} == {"test"}


def test_nnunet_set_has_two_channels_on_the_label_grid(tmp_path: Path) -> None:
    root = write_nnunet(tmp_path, 2)
    images = [sitk.ReadImage(str(root / "imagesTr" / f"phantom_001_{c:04d}.nii.gz")) for c in (0, 1)]
    label = sitk.ReadImage(str(root / "labelsTr" / "phantom_001.nii.gz"))
    for image in images:
        assert image.GetSize() == label.GetSize()
        assert np.allclose(image.GetDirection(), label.GetDirection())
        assert np.allclose(image.GetOrigin(), label.GetOrigin())
    assert not np.array_equal(*(sitk.GetArrayFromImage(image) for image in images))
