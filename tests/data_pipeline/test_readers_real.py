"""Real scans: every one read as SimpleITK reads it, and every hard input read rightly or refused by the
right code."""

from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk

from data_pipeline.errors import Quarantined
from data_pipeline.readers import read, read_all
from data_pipeline.readers.dicom import decode_all
from data_pipeline.volume import Volume

pytestmark = pytest.mark.real_data


def assert_same(volume: Volume, image: sitk.Image, atol: float = 1e-3) -> None:
    array = sitk.GetArrayFromImage(image)
    valid = slice(None) if volume.invalid is None else ~volume.to_source(volume.invalid[0])
    stored = volume.to_source(volume.voxels[0])
    np.testing.assert_allclose(
        (stored * np.float64(volume.slope[0]) + volume.intercept[0])[valid],
        array[valid],
        rtol=1e-5,
        atol=1e-4,
    )
    affine = np.eye(4)
    affine[:3, :3] = np.array(image.GetDirection()).reshape(3, 3) * np.array(image.GetSpacing())
    affine[:3, 3] = image.GetOrigin()
    np.testing.assert_allclose(volume.source_affine, affine, atol=atol)
    corner = tuple(s - 1 for s in image.GetSize())
    canonical = np.rint(volume.index_of_lps_mm(image.TransformIndexToPhysicalPoint(corner))).astype(int)
    i, j, k = canonical
    real = volume.voxels[0, k, j, i] * volume.slope[0] + volume.intercept[0]
    if volume.invalid is None or not volume.invalid[0, k, j, i]:
        assert real == pytest.approx(float(array[-1, -1, -1]), rel=1e-5, abs=1e-4)


@pytest.mark.parametrize(
    ("folder", "pattern", "modality"),
    [
        ("mr_hippocampus/imagesTr", "hippocampus_0*.nii.gz", "MR"),
        ("ct_mr_pet_sarcoma", "STS_*/CT_image.nii.gz", "CT"),
        ("ct_mr_pet_sarcoma", "STS_*/MR_T1_image.nii.gz", "MR"),
        ("ct_mr_pet_sarcoma", "STS_*/PET_image.nii.gz", "PT"),
        ("ct_mr_body", "example_ct*.nii.gz", "CT"),
        ("ct_mr_body", "example_mr*.nii.gz", "MR"),
        ("ct_mr_heads", "*[AD]*.nii.gz", "MR"),
        ("mr_spinalcord", "*/t*.nii.gz", "MR"),
        ("dicom_ct_liver", "*.nrrd", "MR"),
    ],
)
def test_files_equal_simpleitk(real_data: Path, folder: str, pattern: str, modality: str) -> None:
    paths = sorted((real_data / folder).glob(pattern))[:12]
    assert paths
    for path in paths:
        assert_same(read(path, modality=modality), sitk.ReadImage(str(path)))


@pytest.mark.parametrize(
    "folder",
    [
        "dicom_sarcoma/STS_019/CT/image",
        "dicom_sarcoma/STS_019/MR_T1/image",
        "ct_mr_body/example_ct_dicom",
        "dicom_ct_liver/ct-3slice",
        "hard/dicom2nifti/compressed_jpegls/001",
    ],
)
def test_series_equal_simpleitk(real_data: Path, folder: str) -> None:
    volume = read(real_data / folder)
    reader = sitk.ImageSeriesReader()
    names = reader.GetGDCMSeriesFileNames(str(real_data / folder))
    if (
        len(names) < volume.source_shape[0]
    ):  # no SeriesInstanceUID: order the files ourselves, as the normal says
        files = [str(p) for p in (real_data / folder).iterdir()]
        positions = {f: float(sitk_tag(f, "0020|0032").split("\\")[2]) for f in files}
        names = sorted(files, key=positions.__getitem__)
    reader.SetFileNames(names)
    assert_same(volume, reader.Execute(), atol=2e-2)


def sitk_tag(path: str, tag: str) -> str:
    reader = sitk.ImageFileReader()
    reader.SetFileName(path)
    reader.ReadImageInformation()
    return reader.GetMetaData(tag)


@pytest.mark.parametrize(("series", "nifti"), [("CT", "CT"), ("MR_T1", "MR_T1")])
def test_the_dicom_twin_is_the_nifti(real_data: Path, series: str, nifti: str) -> None:
    dicom = read(real_data / "dicom_sarcoma/STS_019" / series)
    other = read(real_data / f"ct_mr_pet_sarcoma/STS_019/{nifti}_image.nii.gz", modality=series[:2])
    np.testing.assert_allclose(dicom.real(0), other.real(0), atol=1e-3)
    np.testing.assert_allclose(dicom.affine, other.affine, atol=1e-2)
    np.testing.assert_allclose(dicom.spacing, other.spacing, atol=1e-4)


def test_radiographs_have_no_spacing_of_their_own(real_data: Path) -> None:
    paths = sorted((real_data / "xray_lungs").glob("*/images/*.png"))
    assert len(paths) == 56
    for path in paths[:10]:
        volume = read(path, modality="XR", field_mm=300)
        assert (volume.shape, volume.spacing_source) == ((1, 256, 256), "assumed")
    with pytest.raises(Quarantined, match="no_spacing"):
        read(paths[0], modality="XR")


#: What each hard NIfTI must come to: a shape (z, y, x on the grid as read) or a reason code.
HARD: list[tuple[str, str | None, object]] = [
    ("derived/truncated_sts019_ct.nii.gz", "CT", "truncated"),
    ("derived/ts_ct_nan_border.nii.gz", "CT", (30, 101, 122)),
    ("derived/ts_ct_no_form_codes.nii.gz", "CT", "no_geometry"),
    ("derived/ts_ct_qform_ne_sform.nii.gz", "CT", (30, 101, 122)),
    ("derived/ts_ct_uint16_slope0.5_inter-1024.nii.gz", "CT", (30, 101, 122)),
    ("papaya/dti_FA.nii.gz", "MR", (53, 128, 128)),
    ("papaya/sample_image.nii.gz", "MR", (151, 191, 161)),
    ("papaya/series.nii.gz", "MR", (91, 109, 91)),
    ("papaya/zstat1.nii.gz", "MR", (21, 64, 64)),
    ("sct/dmri/dmri.nii.gz", "MR", (5, 42, 40)),
    ("sct/fmri/fmri_r.nii.gz", "MR", (6, 34, 34)),
]

JPEG2000 = "CTImage.dcm_JPEG2000LosslessOnlyTransferSyntax_1.2.840.10008.1.2.4.90.dcm"
#: What each hard DICOM input must come to: the shape (t, z, y, x) of each acquisition, or a reason code; what
#: SimpleITK makes of it: a shape (z, y, x), or None where it cannot read it; and, where the two differ, which
#: is right and why.
HARD_DICOM: list[tuple[str, object, tuple[int, ...] | None, str]] = [
    (f"cornerstone_ct_syntaxes/{JPEG2000}", [(1, 1, 512, 512)], (1, 512, 512), ""),
    ("cornerstone_ct_syntaxes/no-pixel-data.dcm", "not_an_image", None, "a presentation state"),
    (
        "cornerstone_ct_syntaxes/no-pixel-spacing.dcm",
        "unsupported_modality",
        (1, 600, 800),
        "ours: ultrasound in colour, to which SimpleITK gives a spacing of 1 mm",
    ),
    (
        "derived/sts019_ct_gap",
        "missing_slices",
        (44, 134, 136),
        "ours: three slices are gone, SimpleITK stretches the others to 3.498 mm each",
    ),
    ("dicom2nifti/anatomical/002_non_isotropic", [(1, 4, 28, 64)], (4, 28, 64), ""),
    ("dicom2nifti/compressed_jpegls/001", [(1, 4, 256, 256)], (4, 256, 256), ""),
    (
        "dicom2nifti/gantrytilting/001",
        [(1, 4, 512, 512)],
        (4, 512, 512),
        "ours: the affine leans by 14 degrees and is straightened, SimpleITK stacks the slices upright",
    ),
    ("dicom2nifti/philips_enhanced/anatomical/001", [(1, 8, 256, 256)], (8, 256, 256), ""),
    (
        "dicom2nifti/philips_enhanced/dti/001",
        [(1, 8, 128, 128), (3, 8, 128, 128)],
        (32, 128, 128),
        "ours: b = 0 and three directions of b = 1300, SimpleITK makes 32 slices of them",
    ),
    (
        "dicom2nifti/philips_enhanced/fmri/001",
        [(4, 8, 64, 64)],
        (32, 64, 64),
        "ours: four time points, SimpleITK makes 32 slices of them",
    ),
    ("dicom2nifti/slicecount/001", [(1, 2, 256, 256)], (2, 256, 256), ""),
    ("highdicom/ct_image.dcm", [(1, 1, 128, 128)], (1, 128, 128), ""),
    (
        "highdicom/dx_image.dcm",
        [(1, 1, 169, 211)],
        (1, 169, 211),
        "ours: MONOCHROME1 turned over; the stored values agree",
    ),
    (
        "highdicom/seg_image_ct_binary.dcm",
        "not_an_image",
        (3, 16, 16),
        "ours: a segmentation, a label of its series",
    ),
    ("highdicom/seg_image_ct_binary_overlap.dcm", "not_an_image", (8, 16, 16), "ours: a segmentation"),
    ("highdicom/seg_image_ct_true_fractional.dcm", "not_an_image", (3, 16, 16), "ours: a segmentation"),
    (
        "prostatex_localizer_mixed_orient",
        "mixed_orientation",
        (13, 256, 256),
        "ours: 3 + 5 + 5 slices of three planes, SimpleITK stacks them 24.3 mm apart",
    ),
    (
        "prostatex_missing_slice",
        "missing_slices",
        (18, 128, 84),
        "ours: a slice is gone, SimpleITK stretches the others to 3.18 mm each",
    ),
    (
        "pydicom/MR_small_RLE.dcm",
        "secondary",
        (1, 64, 64),
        "a matter of rule: ImageType SECONDARY; see below",
    ),
    ("pydicom/MR_truncated.dcm", "secondary", None, "truncated as well, if SECONDARY is accepted; see below"),
    ("pydicom/badVR.dcm", "not_an_image", (1, 10, 10), "ours: a radiotherapy dose, no image"),
    ("pydicom/rtstruct.dcm", "not_an_image", None, "contours"),
    ("txrv/Fake_MONOHR1.dcm", "secondary_capture", (1, 1024, 1024), "ours: a secondary capture by its class"),
]


@pytest.mark.parametrize(("name", "modality", "expected"), HARD, ids=[name for name, _, _ in HARD])
def test_hard_inputs_are_read_or_refused_by_the_right_code(
    real_data: Path, name: str, modality: str | None, expected: object
) -> None:
    try:
        outcome: object = read(real_data / "hard" / name, modality=modality).source_shape
    except Quarantined as error:
        outcome = error.code
    assert outcome == expected


@pytest.mark.parametrize(
    ("name", "expected", "theirs", "why"), HARD_DICOM, ids=[row[0] for row in HARD_DICOM]
)
def test_hard_dicom_is_taken_apart_rightly_or_refused_by_the_right_code(
    real_data: Path, name: str, expected: object, theirs: tuple[int, ...] | None, why: str
) -> None:
    path = real_data / "hard" / name
    try:
        outcome: object = [raw.frames.shape for raw in decode_all(path)]
    except Quarantined as error:
        outcome = error.code
    assert outcome == expected
    array = sitk_array(path)
    assert (None if array is None else array.shape[:3]) == theirs
    assert why or outcome == [(1, *theirs)]  # type: ignore[misc]


def sitk_array(path: Path) -> np.ndarray | None:
    """What SimpleITK reads of a file or series, or None."""
    files = [path] if path.is_file() else sorted(p for p in path.iterdir() if p.is_file())
    try:
        if len(files) == 1:
            return sitk.GetArrayFromImage(sitk.ReadImage(str(files[0])))
        reader = sitk.ImageSeriesReader()
        reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(path)))
        return sitk.GetArrayFromImage(reader.Execute())
    except RuntimeError:
        return None


@pytest.mark.parametrize(
    ("name", "take"),
    [
        ("dti", lambda a: [a[:32].reshape(8, 4, 128, 128)[:, [0]], a.reshape(8, 4, 128, 128)[:, 1:]]),
        ("fmri", lambda a: [a.reshape(8, 4, 64, 64)]),
    ],
)
def test_frames_of_enhanced_acquisitions_are_those_of_simpleitk(real_data: Path, name: str, take) -> None:
    # SimpleITK keeps the order of the file: slice by slice, the repeats of each.
    path = real_data / "hard/dicom2nifti/philips_enhanced" / name / "001"
    array = sitk_array(path)
    assert array is not None
    for raw, frames in zip(decode_all(path), take(array), strict=True):
        ours = raw.frames * raw.slope + raw.intercept
        theirs = [np.moveaxis(frames, 1, 0), np.moveaxis(frames, 1, 0)[:, ::-1]]
        assert any(np.allclose(ours, other, rtol=1e-5) for other in theirs)


def test_the_tilted_series_is_where_its_slices_are(real_data: Path) -> None:
    folder = real_data / "hard/dicom2nifti/gantrytilting/001"
    volume = read(folder)
    assert volume.provenance["shear"] == "14.0 degrees"
    assert volume.invalid is not None
    slices = sorted(
        (sitk.ReadImage(str(p)) for p in folder.iterdir()), key=lambda image: image.GetOrigin()[2]
    )
    compared, real = 0, volume.real(0)
    for image in slices:  # each slice, resampled by SimpleITK at our voxels' places in its own plane
        values = sitk.GetArrayFromImage(image)[0].astype(float)
        for j, i in np.random.default_rng(0).integers(0, 512, (200, 2)):
            x, y, z = volume.index_of_lps_mm(image.TransformIndexToPhysicalPoint((int(i), int(j), 0)))
            k, row, part = round(z), int(np.floor(y)), y - np.floor(y)
            assert z == pytest.approx(k, abs=1e-2)
            column = real[k, :, round(x)]
            inside = ~volume.invalid[0, k, row : row + 2, round(x)]
            if inside.all() and 1 <= j < 510 and part > 1e-3:
                # Halfway between two voxels of ours lie the values of three of theirs.
                near = values[max(j - 1, 0) : j + 2, i]
                ours = (1 - part) * column[row] + part * column[row + 1]
                assert near.min() - 1 <= ours <= near.max() + 1
                compared += 1
    assert compared > 400


def test_the_table_covers_every_hard_input(real_data: Path) -> None:
    hard = real_data / "hard"
    for path in hard.rglob("*"):
        if path.is_file() and path.name.endswith((".dcm", ".nii.gz", ".dicom")):
            relative = path.relative_to(hard).as_posix()
            names = [row[0] for row in (*HARD, *HARD_DICOM)]
            assert any(relative == name or relative.startswith(f"{name}/") for name in names), relative


def test_secondary_images_are_read_when_accepted(real_data: Path) -> None:
    with pytest.raises(Quarantined, match="truncated"):
        read(real_data / "hard/pydicom/MR_truncated.dcm", accept_secondary=True)
    path = real_data / "hard/pydicom/MR_small_RLE.dcm"
    array = sitk.GetArrayFromImage(sitk.ReadImage(str(path)))
    np.testing.assert_array_equal(read(path, accept_secondary=True).voxels[0], array)


def test_sform_is_taken_where_libraries_differ(real_data: Path) -> None:
    path = real_data / "hard/derived/ts_ct_qform_ne_sform.nii.gz"
    volume = read(path, modality="CT")
    assert volume.provenance["qform_differs"] == "true"
    header = nibabel.load(path).header
    np.testing.assert_allclose(volume.source_affine, np.diag([-1, -1, 1, 1]) @ header.get_sform(), atol=1e-4)
    assert np.abs(volume.source_affine - np.diag([-1, -1, 1, 1]) @ header.get_qform()).max() > 100


def test_slope_and_nan_twins_hold_the_values_of_the_plain_one(real_data: Path) -> None:
    plain = read(real_data / "ct_mr_body/example_ct_sm.nii.gz", modality="CT")
    scaled = read(real_data / "hard/derived/ts_ct_uint16_slope0.5_inter-1024.nii.gz", modality="CT")
    np.testing.assert_allclose(scaled.real(0), np.maximum(plain.real(0), -1024), atol=0.5)
    holed = read(real_data / "hard/derived/ts_ct_nan_border.nii.gz", modality="CT")
    assert holed.invalid is not None
    assert holed.invalid.any()
    valid = ~holed.invalid[0]
    np.testing.assert_allclose(holed.voxels[0][valid], plain.voxels[0][valid], atol=1e-3)


def test_enhanced_frames_equal_simpleitks(real_data: Path) -> None:
    path = real_data / "hard/dicom2nifti/philips_enhanced/anatomical/001"
    volume = read(path)
    array = sitk.GetArrayFromImage(sitk.ReadImage(str(next(path.iterdir()))))
    real = volume.to_source(volume.voxels[0]) * volume.slope[0] + volume.intercept[0]
    same = np.allclose(real, array, rtol=1e-4) or np.allclose(real, array[::-1], rtol=1e-4)
    stored = volume.to_source(volume.voxels[0])
    assert same or np.array_equal(stored, array) or np.array_equal(stored, array[::-1])


def test_four_frames_of_a_series(real_data: Path) -> None:
    frames = read_all(real_data / "hard/papaya/series.nii.gz", modality="MR")
    image = sitk.GetArrayFromImage(sitk.ReadImage(str(real_data / "hard/papaya/series.nii.gz")))
    assert len(frames) == 4
    for frame in frames:
        number = int(frame.provenance["frame"].split()[0])
        stored = frame.to_source(frame.voxels[0])
        np.testing.assert_allclose(stored * frame.slope[0] + frame.intercept[0], image[number], atol=1e-3)
