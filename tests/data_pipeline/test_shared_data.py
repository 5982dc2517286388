"""Every file of the folder of real scans: read as an independent reader reads it, or refused by a code.

A row is a glob and what its files must come to. ``nifti``: values and place equal nibabel's, values also
SimpleITK's. ``nrrd``: equal a reader of a few lines here. ``picture``: libpng's values. ``series``: the
folder's values and place equal GDCM's through SimpleITK. A code: refused. ``text``: no image.
Where readers differ: nibabel is right on ``ts_ct_qform_ne_sform`` (sform before qform, as the NIfTI standard
and its own writers mean it; SimpleITK is 396 mm away), we are right on files without form codes (both others
make up a place).
"""

from __future__ import annotations

import gzip
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from test_readers_real import HARD, HARD_DICOM

from data_pipeline.errors import Quarantined
from data_pipeline.readers import decode, decode_all, read
from data_pipeline.readers.raw import Raw
from data_pipeline.sources import matches

pytestmark = pytest.mark.real_data
RAS_TO_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
#: The first row that fits a file decides.
ROWS: list[tuple[str, str]] = [
    ("**/LICENSE*", "text"),
    ("**/*.md", "text"),
    ("**/*.csv", "text"),
    ("mr_hippocampus/dataset.json", "text"),
    ("hard/**", "hard"),
    ("mr_hippocampus/*/*.nii.gz", "nifti"),
    ("ct_mr_pet_sarcoma/*/*.nii.gz", "nifti"),
    ("ct_mr_body/**/*.nii.gz", "nifti"),
    ("ct_mr_heads/*.nii.gz", "nifti"),
    ("mr_brain_mni152/*.nii.gz", "nifti"),
    ("mr_spinalcord/*/*.nii.gz", "nifti"),
    ("mr_brain_voxelmorph/test_scan.npz", "npz"),
    ("dicom_ct_liver/*.nrrd", "nrrd"),
    ("dicom_ct_liver/liver.dcm", "not_an_image"),
    ("xray_lungs/*/*/*.png", "picture"),
    ("dicom_sarcoma/*/*/mask/*", "not_an_image"),
    ("dicom_sarcoma/*/*/image/*", "series"),
    ("dicom_ct_liver/ct-3slice/*", "series"),
    ("ct_mr_body/example_ct_dicom/*", "series"),
    ("dicom_mr_hippocampus/*/*/*", "secondary"),
]


def row_of(relative: str) -> str | None:
    return next((what for glob, what in ROWS if matches(glob, relative) is not None), None)


def files_of(root: Path, what: str) -> list[Path]:
    every = (path for path in sorted(root.rglob("*")) if path.is_file())
    found = [path for path in every if row_of(path.relative_to(root).as_posix()) == what]
    assert found, f"no file of kind {what}: the folder is not the one that this table is of"
    return found


def real(raw: Raw) -> np.ndarray:
    """Real values (t, z, y, x)."""
    return raw.frames * np.float64(raw.slope) + raw.intercept


def assert_as_nibabel(raw: Raw, path: Path) -> None:
    image = nibabel.load(path)
    theirs = image.get_fdata()
    theirs = theirs.reshape(theirs.shape + (1,) * (4 - theirs.ndim))
    np.testing.assert_allclose(real(raw).T, theirs, rtol=1e-6, err_msg=path.name)
    np.testing.assert_allclose(raw.affine, RAS_TO_LPS @ image.affine, atol=1e-4, err_msg=path.name)


def affine_of(image: sitk.Image) -> np.ndarray:
    affine = np.eye(4)
    affine[:3, :3] = np.array(image.GetDirection()).reshape(3, 3) * np.array(image.GetSpacing())
    affine[:3, 3] = image.GetOrigin()
    return affine


def test_every_file_is_in_a_rows_reach(real_data: Path) -> None:
    hard = [f"hard/{row[0]}" for row in (*HARD, *HARD_DICOM)]
    for path in real_data.rglob("*"):
        if not path.is_file():
            continue
        relative = path.relative_to(real_data).as_posix()
        what = row_of(relative)
        assert what is not None, f"{relative}: in no row"
        if what == "hard":
            assert any(relative == name or relative.startswith(f"{name}/") for name in hard), relative


@pytest.mark.slow
def test_nifti_equals_nibabel_and_simpleitk(real_data: Path) -> None:
    for path in files_of(real_data, "nifti"):
        raw = decode(path)
        assert_as_nibabel(raw, path)
        image = sitk.ReadImage(str(path))
        np.testing.assert_allclose(real(raw)[0], sitk.GetArrayFromImage(image), rtol=1e-5, atol=1e-4)
        np.testing.assert_allclose(raw.affine, affine_of(image), atol=2e-2, err_msg=path.name)


def test_hard_nifti_that_are_read_equal_nibabel(real_data: Path) -> None:
    read_right = [
        name for name, _, outcome in HARD if name.endswith(".nii.gz") and isinstance(outcome, tuple)
    ]
    assert len(read_right) >= 5
    for name in read_right:
        path = real_data / "hard" / name
        assert_as_nibabel(decode(path), path)


def test_nrrd_equals_a_reader_of_a_few_lines(real_data: Path) -> None:
    for path in files_of(real_data, "nrrd"):
        header, _, body = path.read_bytes().partition(b"\n\n")
        fields = dict(line.split(": ", 1) for line in header.decode().split("\n")[1:] if ": " in line)
        assert fields["space"] == "left-posterior-superior"
        assert fields["encoding"] in ("gzip", "raw")
        kind = {"short": "<i2", "unsigned char": "u1", "uint8": "u1", "int16": "<i2", "int": "<i4"}[
            fields["type"]
        ]
        sizes = [int(n) for n in fields["sizes"].split()]
        data = gzip.decompress(body) if fields["encoding"] == "gzip" else body
        numbers = [
            float(v)
            for v in fields["space directions"].replace("(", "").replace(")", " ").replace(",", " ").split()
        ]
        origin = [float(v) for v in fields["space origin"].strip("()").split(",")]
        raw = decode(path, label=True)
        np.testing.assert_array_equal(raw.frames[0].ravel(), np.frombuffer(data, kind))
        assert raw.frames[0].shape == tuple(sizes[::-1])
        np.testing.assert_allclose(raw.affine[:3, :3], np.array(numbers).reshape(3, 3).T, atol=1e-6)
        np.testing.assert_allclose(raw.affine[:3, 3], origin, atol=1e-6)


def test_npz_equals_numpy(real_data: Path) -> None:
    for path in files_of(real_data, "npz"):
        arrays = np.load(path, allow_pickle=False)
        np.testing.assert_array_equal(decode(path).frames[0], arrays["vol"])
        np.testing.assert_array_equal(decode(path, label=True).frames[0], arrays["seg"])
        with pytest.raises(Quarantined, match="no_spacing"):
            read(path, modality="MR")
        assert read(path, modality="MR", spacing=(1, 1, 1)).spacing_source == "declared"


def test_pictures_equal_torchvision(real_data: Path) -> None:
    from torchvision.io import read_image  # libpng; SimpleITK does not read grey with alpha

    for path in files_of(real_data, "picture"):
        theirs = read_image(str(path)).numpy()
        np.testing.assert_array_equal(decode(path).frames[0, 0], theirs[0])
        assert not decode(path).spacing_known


def series_folders(root: Path, what: str) -> list[Path]:
    return sorted({path.parent for path in files_of(root, what)})


def assert_as_gdcm(raws: list[Raw], folder: Path) -> None:
    (raw,) = raws
    files = [str(path) for path in folder.iterdir()]
    positions = {}
    for file in files:  # in the order of the normal: GDCM's own sorting needs a SeriesInstanceUID
        reader = sitk.ImageFileReader()
        reader.SetFileName(file)
        reader.ReadImageInformation()
        turned = [float(v) for v in reader.GetMetaData("0020|0037").split("\\")]
        place = [float(v) for v in reader.GetMetaData("0020|0032").split("\\")]
        positions[file] = float(np.dot(np.cross(turned[:3], turned[3:]), place))
    series = sitk.ImageSeriesReader()
    series.SetFileNames(sorted(files, key=positions.__getitem__))
    image = series.Execute()
    np.testing.assert_allclose(real(raw)[0], sitk.GetArrayFromImage(image), rtol=1e-5, atol=1e-3)
    np.testing.assert_allclose(raw.affine, affine_of(image), atol=2e-2)


def test_series_equal_gdcm(real_data: Path) -> None:
    for folder in series_folders(real_data, "series"):
        assert_as_gdcm(decode_all(folder), folder)


def test_secondary_series_are_refused_and_equal_gdcm_where_accepted(real_data: Path) -> None:
    for folder in series_folders(real_data, "secondary"):
        with pytest.raises(Quarantined, match="secondary"):
            decode(folder)
        assert_as_gdcm(decode_all(folder, accept_secondary=True), folder)


def test_objects_that_are_no_images(real_data: Path) -> None:
    for path in files_of(real_data, "not_an_image"):
        with pytest.raises(Quarantined, match="not_an_image"):
            decode(path)


def test_text_is_no_image(real_data: Path) -> None:
    for path in files_of(real_data, "text"):
        with pytest.raises(Quarantined, match="unsupported_format"):
            decode(path)
