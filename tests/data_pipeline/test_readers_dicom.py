"""DICOM series made in the test: order, geometry, rescale, stored bits, refusals; compared with SimpleITK."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from dicom_files import NORMAL, OBLIQUE, dataset, series_of
from pydicom.dataset import Dataset
from pydicom.uid import RLELossless

from data_pipeline.errors import Quarantined
from data_pipeline.layouts import discover, read_case
from data_pipeline.privacy import technical_fields
from data_pipeline.readers import read, read_all
from data_pipeline.readers.dicom_pixels import significant_bits
from data_pipeline.readers.dicom_series import scan_headers, series_in
from data_pipeline.readers.dicom_suv import suv_factor
from data_pipeline.sources import SourceConfig


@pytest.fixture
def array() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 3000, (5, 6, 7)).astype(np.uint16)


def code_of(path: Path, **options) -> str:
    with pytest.raises(Quarantined) as refused:
        read(path, **options)
    assert "Doe" not in str(refused.value)
    assert "4711" not in str(refused.value)
    return refused.value.code


def test_slices_are_sorted_along_the_normal_like_simpleitk(tmp_path: Path, array: np.ndarray) -> None:
    volume = read(series_of(tmp_path / "s", array))
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(tmp_path / "s")))
    image = reader.Execute()
    stored = volume.to_source(volume.voxels[0])
    np.testing.assert_array_equal(stored, array)
    np.testing.assert_array_equal(
        stored * volume.slope[0] + volume.intercept[0], sitk.GetArrayFromImage(image)
    )
    np.testing.assert_allclose(volume.source_affine[:3, 3], image.GetOrigin(), atol=1e-6)
    np.testing.assert_allclose(
        volume.source_affine[:3, :3],
        np.array(image.GetDirection()).reshape(3, 3) * image.GetSpacing(),
        atol=1e-6,
    )
    assert volume.channels[0].units == "HU"
    point = volume.lps_mm_of_index(volume.index_of_lps_mm(image.TransformIndexToPhysicalPoint((3, 2, 1))))
    i, j, k = np.rint(volume.index_of_lps_mm(point)).astype(int)
    assert volume.voxels[0, k, j, i] == array[1, 2, 3]


def test_a_series_may_lie_across_folders_and_beside_another(tmp_path: Path, array: np.ndarray) -> None:
    series_of(tmp_path / "a" / "1", array[:2], uid="1.9.1")
    series_of(
        tmp_path / "a" / "2",
        array[2:],
        [np.array([5.0, 6, 7]) + 2.0 * k * NORMAL for k in (2, 3, 4)],
        uid="1.9.1",
    )
    np.testing.assert_array_equal(read(tmp_path / "a").to_source(read(tmp_path / "a").voxels[0]), array)
    series_of(tmp_path / "b", array, uid="1.9.2")
    assert code_of(tmp_path) == "several_series"
    assert read(tmp_path, series="1.9.2").voxels.shape[0] == 1
    found, twice = series_in(scan_headers(tuple(p for p in tmp_path.rglob("*") if p.is_file())))
    assert twice == 0
    assert {s.uid: len(s.files) for s in found} == {"1.9.1": 5, "1.9.2": 5}


def test_a_gap_uneven_slices_tilt_and_mixed_slices_are_refused(tmp_path: Path, array: np.ndarray) -> None:
    origin = np.zeros(3)
    gap = [origin + 2.0 * k * NORMAL for k in (0, 1, 2, 4, 5)]
    assert code_of(series_of(tmp_path / "gap", array, gap)) == "missing_slices"
    uneven = [origin + d * NORMAL for d in (0, 2, 4.5, 6.5, 8)]
    assert code_of(series_of(tmp_path / "uneven", array, uneven)) == "uneven_spacing"
    creeping = [origin + d * NORMAL for d in np.cumsum([0, *[1.96] * 10, *[2.04] * 10])]
    many = np.concatenate([array, array, array, array, array[:1]])
    assert code_of(series_of(tmp_path / "creeping", many, creeping)) == "uneven_spacing"
    tilt = [origin + 2.0 * k * NORMAL + 0.4 * k * np.array(OBLIQUE[3:]) for k in range(5)]
    assert code_of(series_of(tmp_path / "tilt", array, tilt), shear="quarantine") == "gantry_tilt"
    flat = {"ImageOrientationPatient": [1, 0, 0, 0, 1, 0]}
    assert (
        code_of(series_of(tmp_path / "mixed", array, per_slice=lambda k: flat if k == 3 else {}))
        == "mixed_orientation"
    )
    wide = {"PixelSpacing": [0.5, 0.8]}
    assert (
        code_of(series_of(tmp_path / "shape", array, per_slice=lambda k: wide if k == 3 else {}))
        == "mixed_shape"
    )
    twice = [origin + 2.0 * k * NORMAL for k in (0, 1, 2, 2, 3)]
    assert code_of(series_of(tmp_path / "twice", array, twice)) == "duplicate_slices"


def test_files_stored_twice_count_once(tmp_path: Path, array: np.ndarray) -> None:
    series_of(tmp_path / "a", array)
    (tmp_path / "b").mkdir()
    for path in (tmp_path / "a").iterdir():
        (tmp_path / "b" / path.name).write_bytes(path.read_bytes())
    volumes = read_all(tmp_path)
    assert len(volumes) == 1
    np.testing.assert_array_equal(volumes[0].to_source(volumes[0].voxels[0]), array)


def test_radiographs_of_one_series_are_cases_of_their_own(tmp_path: Path, array: np.ndarray) -> None:
    src = SourceConfig(path=series_of(tmp_path, array[:2], Modality="DX", RescaleIntercept=0))
    cases = discover(src)
    assert len(cases) == 2
    assert {read_case(c, src)[0].voxels.tobytes() for c in cases} == {array[0].tobytes(), array[1].tobytes()}


def test_jitter_below_the_tolerance_is_read(tmp_path: Path, array: np.ndarray) -> None:
    positions = [d * NORMAL for d in (0, 2.01, 4.0, 5.99, 8.0)]
    assert read(series_of(tmp_path, array, positions)).source_affine[2, 2] == pytest.approx(2.0 * NORMAL[2])


def test_repeated_positions_are_frames_in_time(tmp_path: Path, array: np.ndarray) -> None:
    positions = [2.0 * (k % 2) * NORMAL for k in range(4)]
    frames = read_all(series_of(tmp_path, array[:4], positions))
    assert len(frames) == 2
    np.testing.assert_array_equal(frames[0].to_source(frames[0].voxels[0]), array[:2])
    np.testing.assert_array_equal(frames[1].to_source(frames[1].voxels[0]), array[2:4])


def test_rescale_per_slice_gives_real_values(tmp_path: Path, array: np.ndarray) -> None:
    volume = read(
        series_of(tmp_path, array, per_slice=lambda k: {"RescaleSlope": 0.5 + k, "RescaleIntercept": k})
    )
    expected = array * (0.5 + np.arange(5))[:, None, None] + np.arange(5)[:, None, None]
    np.testing.assert_allclose(volume.to_source(volume.voxels[0]), expected, rtol=1e-6)
    assert (volume.slope, volume.provenance["rescale"]) == ((1.0,), "per slice")


def test_voi_window_is_never_applied(tmp_path: Path, array: np.ndarray) -> None:
    volume = read(series_of(tmp_path, array, WindowCenter=40, WindowWidth=10))
    np.testing.assert_array_equal(volume.to_source(volume.voxels[0]), array)


def test_bits_above_bits_stored_are_masked(tmp_path: Path) -> None:
    array = np.random.default_rng(0).integers(0, 4096, (3, 4, 4)).astype(np.uint16)
    dirty = array | 0xA000
    volume = read(series_of(tmp_path, dirty, BitsStored=12, HighBit=11))
    np.testing.assert_array_equal(volume.to_source(volume.voxels[0]), array)
    signed = np.array([-2048, -1, 0, 5, 2047], np.int16)
    np.testing.assert_array_equal(significant_bits(signed & 0x0FFF, 12, 11, True), signed)
    np.testing.assert_array_equal(significant_bits((signed & 0x0FFF) << 4, 12, 15, True), signed)
    with pytest.raises(Quarantined):
        significant_bits(signed, 12, 17, True)


def test_monochrome1_is_inverted_and_a_radiograph_has_depth_one(tmp_path: Path, array: np.ndarray) -> None:
    image = (array[0] % 1024).astype(np.uint16)
    tags = {
        "Modality": "DX",
        "PhotometricInterpretation": "MONOCHROME1",
        "BitsStored": 10,
        "HighBit": 9,
        "PixelSpacing": None,
        "ImageOrientationPatient": None,
        "ImagePositionPatient": None,
        "RescaleIntercept": 0,
        "ImagerPixelSpacing": [0.3, 0.3],
        "EstimatedRadiographicMagnificationFactor": 1.5,
    }
    volume = read(series_of(tmp_path, image[np.newaxis], **tags) / "000.dcm")
    np.testing.assert_array_equal(volume.voxels[0, 0], 1023 - image)
    assert volume.spacing[1:] == pytest.approx((0.2, 0.2))
    assert (volume.channels[0].modality, volume.spacing_source) == ("XR", "header")
    bare = series_of(
        tmp_path / "bare", image[np.newaxis], **{k: v for k, v in tags.items() if "Imager" not in k}
    )
    assert code_of(bare) == "no_spacing"
    assert read(bare, field_mm=70).spacing[1:] == (10.0, 10.0)


def test_compressed_slices_equal_uncompressed(tmp_path: Path, array: np.ndarray) -> None:
    for k in range(len(array)):
        ds = dataset(array[k], 2.0 * k * NORMAL, "1.2.9", k)
        ds.compress(RLELossless)
        ds.save_as(tmp_path / f"{k}.dcm", enforce_file_format=True)
    volume = read(tmp_path)
    np.testing.assert_array_equal(volume.to_source(volume.voxels[0]), array)


def test_padding_is_invalid_only_where_it_cannot_be_air(tmp_path: Path) -> None:
    array = np.full((2, 3, 3), 1000, np.int16)
    array[:, 0] = -2000
    volume = read(series_of(tmp_path / "a", array, PixelPaddingValue=-2000))
    assert volume.invalid is not None
    assert volume.invalid.sum() == 6
    array[:, 0] = 0
    assert read(series_of(tmp_path / "b", array, PixelPaddingValue=0)).invalid is None


@pytest.mark.parametrize(
    ("tags", "code"),
    [
        ({"Modality": "RTSTRUCT"}, "not_an_image"),
        ({"Modality": "SEG"}, "not_an_image"),
        ({"Modality": "US"}, "unsupported_modality"),
        ({"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]}, "localizer"),
        ({"ImageType": ["DERIVED", "SECONDARY", "AXIAL"]}, "secondary"),
        ({"ImageType": ["DERIVED", "PRIMARY", "SCREEN SAVE"]}, "secondary_capture"),
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.7"}, "secondary_capture"),
        ({"SamplesPerPixel": 3, "PhotometricInterpretation": "RGB"}, "colour"),
        ({"PixelData": None}, "no_pixel_data"),
        ({"PixelSpacing": None}, "no_spacing"),
        ({"ImagePositionPatient": None}, "no_geometry"),
        ({"ImageOrientationPatient": [1, 0, 0, 0.5, 0.5, 0]}, "bad_geometry"),
        ({"PixelSpacing": [-0.5, 0.75]}, "bad_geometry"),
        ({"PixelData": b"\0" * 10}, "truncated"),
        ({"RescaleSlope": 0}, "unreadable"),
    ],
)
def test_what_is_no_trustworthy_image_is_refused_by_code(
    tmp_path: Path, array: np.ndarray, tags: dict, code: str
) -> None:
    assert code_of(series_of(tmp_path, array, **tags)) == code


def test_declared_modality_must_agree_with_the_header(tmp_path: Path, array: np.ndarray) -> None:
    assert code_of(series_of(tmp_path, array), modality="MR") == "modality_mismatch"
    assert read(tmp_path, modality="CT").channels[0].modality == "CT"


def test_ct_without_rescale_is_not_taken_for_hounsfield(tmp_path: Path, array: np.ndarray) -> None:
    assert code_of(series_of(tmp_path, array, RescaleSlope=None, RescaleIntercept=None)) == "not_hounsfield"
    assert read(tmp_path, units="arbitrary").channels[0].units == "arbitrary"


def pet(**tags) -> Dataset:
    isotope = Dataset()
    isotope.RadionuclideTotalDose, isotope.RadionuclideHalfLife = 3.7e8, 6586.2
    isotope.RadiopharmaceuticalStartTime = "090000"
    ds = dataset(np.ones((2, 2), np.uint16), (0, 0, 0), "1.2.7", Modality="PT")
    ds.Units, ds.DecayCorrection, ds.PatientWeight = "BQML", "START", 70
    ds.SeriesDate = ds.AcquisitionDate = "20200102"
    ds.SeriesTime = ds.AcquisitionTime = "100000.5"
    ds.RadiopharmaceuticalInformationSequence = [isotope]
    for name, value in tags.items():
        setattr(ds, name, value)
    return ds


def test_suv_factor_follows_the_formula() -> None:
    decayed = 3.7e8 * 2 ** (-3600 / 6586.2)
    assert suv_factor([pet()], {}) == pytest.approx(70000 / decayed, rel=1e-9)
    assert suv_factor([pet(DecayCorrection="ADMIN")], {}) == pytest.approx(70000 / 3.7e8)
    assert suv_factor([pet(SeriesTime="120000")], {}) == pytest.approx(70000 / decayed)  # later processing
    assert suv_factor([pet(Units="GML")], {}) == 1.0
    for broken in (
        {"PatientWeight": None},
        {"DecayCorrection": "NONE"},
        {"Units": "CNTS"},
        {"SeriesTime": "080000", "AcquisitionTime": "080000"},
    ):
        notes: dict[str, str] = {}
        assert suv_factor([pet(**broken)], notes) is None
        assert notes == {"suv": "tags missing"}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("RadionuclideTotalDose", 370),  # MBq
        ("RadionuclideTotalDose", 0),
        ("RadionuclideHalfLife", 0),
        ("RadionuclideHalfLife", 109.8e9),
        ("PatientWeight", 70000),  # grams
        ("PatientWeight", 0),
    ],
)
def test_suv_is_not_made_of_what_no_patient_weighs_or_is_given(name: str, value: float) -> None:
    ds, notes = pet(), {}
    setattr(ds if name == "PatientWeight" else ds.RadiopharmaceuticalInformationSequence[0], name, value)
    assert suv_factor([ds], notes) is None
    assert notes == {"suv": "tags implausible"}


def test_pet_is_read_as_suv(tmp_path: Path) -> None:
    pet().save_as(tmp_path / "a.dcm", enforce_file_format=True)
    volume = read(tmp_path / "a.dcm")
    factor = suv_factor([pet()], {})
    assert volume.channels[0].units == "SUV"
    assert volume.real(0).ravel()[0] == pytest.approx((1 - 1024) * factor)


def test_no_identifier_of_a_header_reaches_the_provenance(tmp_path: Path, array: np.ndarray) -> None:
    words = {
        "PatientBirthDate": "19400102",
        "InstitutionName": "Clinic Doe",
        "StudyDescription": "Doe knee",
        "PatientAge": "095Y",
        "SeriesDescription": "Jane",
        "ProtocolName": "Jane",
        "Manufacturer": "Jane Doe SIEMENS",
        "BodyPartExamined": "JANE DOE",
        "OperatorsName": "Doe",
        "KVP": 120,
        "PatientSex": "F",
    }
    volume = read(series_of(tmp_path, array, **words))
    text = repr(dict(volume.provenance)).lower()
    assert not any(word in text for word in ("doe", "jane", "4711", "1940", "95", "clinic"))
    assert volume.provenance["PatientAge"] == "89+"
    assert volume.provenance["KVP"] == "120"
    assert volume.provenance["Manufacturer"] == "siemens"


def test_technical_fields_survive_nonsense() -> None:
    ds = Dataset()
    ds.add_new((0x0018, 0x0060), "DS", "")
    ds.PatientAge, ds.PatientSex = "900D", "?"
    assert technical_fields(ds) == {}


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_headers_damaged_anywhere_are_refused_not_raised(tmp_path: Path, array: np.ndarray) -> None:
    whole = (series_of(tmp_path / "s", array[:1]) / "000.dcm").read_bytes()
    random = np.random.default_rng(0)
    path, outcomes = tmp_path / "damaged.dcm", set()
    for _ in range(120):
        content = bytearray(whole)
        for position in random.integers(0, len(whole), random.integers(1, 5)):
            content[position] = random.integers(0, 256)
        path.write_bytes(content[: random.integers(140, len(whole))] if random.random() < 0.3 else content)
        try:
            read(path)
            outcomes.add("read")
        except Quarantined as error:
            outcomes.add(error.code)
    assert {"read", "unreadable"} <= outcomes
