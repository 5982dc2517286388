"""DICOM pixel values: lookup tables, windows, polarity, padding, sign, against pydicom and SimpleITK."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from dicom_files import ORIGIN, dataset, sequence_of, series_of
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.pixels import apply_modality_lut, apply_voi_lut
from pydicom.uid import ExplicitVRBigEndian, ImplicitVRLittleEndian, RLELossless

from data_pipeline.errors import Quarantined
from data_pipeline.readers import read, read_all
from data_pipeline.readers.dicom import decode_all, radiograph_spacing

RADIOGRAPH = {"Modality": "DX", "ImageOrientationPatient": None, "ImagePositionPatient": None,
              "RescaleSlope": None, "RescaleIntercept": None}  # fmt: skip


def values(dtype: type = np.uint16, bits: int = 12) -> np.ndarray:
    low = -(1 << (bits - 1)) if np.dtype(dtype).kind == "i" else 0
    return np.random.default_rng(3).integers(low, low + (1 << bits), (9, 11)).astype(dtype)


def saved(path: Path, array: np.ndarray, bits: int = 12, **tags) -> Path:
    ds = dataset(array, ORIGIN, "1.2.3", BitsStored=bits, HighBit=bits - 1, **tags)
    ds.save_as(path, enforce_file_format=True)
    return path


def lut(
    first: int, table: np.ndarray, bits: int, signed: bool = False, kind: str | None = None
) -> list[Dataset]:
    (item,) = sequence_of()
    item.add_new(0x00283002, "SS" if signed else "US", [len(table) % 65536, first, bits])
    item.add_new(0x00283006, "US", [int(v) for v in table])
    if kind is not None:
        item.ModalityLUTType = kind
    return [item]


@pytest.mark.parametrize(("dtype", "first"), [(np.uint16, 0), (np.uint16, 700), (np.int16, -500)])
def test_a_modality_lut_is_applied_as_pydicom_does(tmp_path: Path, dtype: type, first: int) -> None:
    table = (np.sqrt(np.arange(3000)) * 1000).astype(np.uint16)
    item = lut(first, table, 16, dtype is np.int16, "HU")
    path = saved(tmp_path / "a.dcm", values(dtype), RescaleSlope=None, RescaleIntercept=None,
                 ModalityLUTSequence=item)  # fmt: skip
    volume = read(path)
    ds = dcmread(path)
    np.testing.assert_array_equal(volume.voxels[0, 0], apply_modality_lut(ds.pixel_array, ds))
    expected = table[np.clip(values(dtype).astype(int) - first, 0, len(table) - 1)]
    np.testing.assert_array_equal(volume.voxels[0, 0], expected)
    assert volume.provenance["modality_lut"] == "applied"


def test_a_modality_lut_of_no_hounsfield_units_is_no_ct(tmp_path: Path) -> None:
    item = lut(0, np.arange(4096), 16, kind="OD")
    path = saved(
        tmp_path / "a.dcm", values(), RescaleSlope=None, RescaleIntercept=None, ModalityLUTSequence=item
    )
    with pytest.raises(Quarantined, match="not_hounsfield"):
        read(path)


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("big", [False, True])
def test_lut_data_as_words_of_any_order(tmp_path: Path, bits: int, big: bool) -> None:
    table = np.arange(256)[::-1] % 250
    (item,) = sequence_of()
    item.add_new(0x00283002, "US", [256, 0, bits])
    order = ">" if big else "<"
    packed = table.astype("u1").tobytes() if bits == 8 else table.astype(f"{order}u2").tobytes()
    if big and bits == 8:
        packed = np.frombuffer(packed, "<u2").byteswap().tobytes()  # two entries a word
    item.add_new(0x00283006, "OW", packed)
    array = values(np.uint16, 8)
    ds = dataset(array, ORIGIN, "1.2.3", BitsStored=8, HighBit=7, **RADIOGRAPH, ModalityLUTSequence=[item])
    if big:
        ds.PixelData = array.astype(">u2").tobytes()
    ds.file_meta.TransferSyntaxUID = ExplicitVRBigEndian if big else ImplicitVRLittleEndian
    ds["PixelData"].VR = "OW"
    ds.save_as(tmp_path / "a.dcm", enforce_file_format=True)
    (raw,) = decode_all(tmp_path / "a.dcm")
    np.testing.assert_array_equal(raw.frames[0, 0], table[array])


def test_a_damaged_lut_is_refused(tmp_path: Path) -> None:
    item = lut(0, np.arange(100), 16)
    item[0].LUTDescriptor = [4096, 0, 16]
    path = saved(tmp_path / "a.dcm", values(), **RADIOGRAPH, ModalityLUTSequence=item)
    with pytest.raises(Quarantined, match="lookup table"):
        decode_all(path)


WINDOWS = [
    {"WindowCenter": 2000, "WindowWidth": 800},
    {"WindowCenter": [2000, 100], "WindowWidth": [800, 50]},
    {"WindowCenter": 2000.5, "WindowWidth": 801, "VOILUTFunction": "LINEAR_EXACT"},
    {"WindowCenter": 2000, "WindowWidth": 800, "VOILUTFunction": "SIGMOID"},
    {"WindowCenter": 2000, "WindowWidth": 800, "RescaleSlope": 2.0, "RescaleIntercept": 10.0},
    {"VOILUTSequence": "table"},
]


@pytest.mark.parametrize("tags", WINDOWS, ids=lambda t: "-".join(map(str, t.values())))
@pytest.mark.parametrize("mono", ["MONOCHROME1", "MONOCHROME2"])
def test_a_window_or_voi_lut_is_applied_where_the_recipe_asks(tmp_path: Path, tags: dict, mono: str) -> None:
    if tags.get("VOILUTSequence") == "table":
        tags = {"VOILUTSequence": lut(500, np.linspace(0, 1023, 3000).astype(int), 10)}
    path = saved(tmp_path / "a.dcm", values(), **{**RADIOGRAPH, **tags, "PhotometricInterpretation": mono})
    (raw,) = decode_all(path, voi_lut=True)
    ds = dcmread(path)
    theirs = apply_voi_lut(apply_modality_lut(ds.pixel_array, ds), ds).astype(float)
    table = "VOILUTSequence" in tags
    slope, intercept = (float(tags.get(n, d)) for n, d in (("RescaleSlope", 1), ("RescaleIntercept", 0)))
    top = 1023.0 if table else 4095.0
    ours = (raw.frames[0, 0] * raw.slope + raw.intercept).astype(float)
    expected = (
        theirs if table else (theirs - intercept) / slope
    )  # pydicom scales a window to the rescaled range
    np.testing.assert_allclose(top - ours if mono == "MONOCHROME1" else ours, expected, atol=1e-3 * top / 100)
    assert raw.provenance["voi_lut"] == "applied"
    (untouched,) = decode_all(path)
    assert "voi_lut" not in untouched.provenance
    stored = values() if mono == "MONOCHROME2" else 4095 - values()
    np.testing.assert_array_equal(untouched.frames[0, 0], stored)


def test_a_radiograph_without_window_says_so_and_a_ct_never_has_one(tmp_path: Path) -> None:
    (raw,) = decode_all(saved(tmp_path / "a.dcm", values(), **RADIOGRAPH), voi_lut=True)
    assert raw.provenance["voi_lut"] == "none"
    np.testing.assert_array_equal(raw.frames[0, 0], values())
    (raw,) = decode_all(saved(tmp_path / "b.dcm", values(), WindowCenter=40, WindowWidth=10), voi_lut=True)
    np.testing.assert_array_equal(raw.frames[0, 0], values())


@pytest.mark.parametrize(
    ("tags", "inverted"),
    [
        ({"PhotometricInterpretation": "MONOCHROME1"}, True),
        ({"PhotometricInterpretation": "MONOCHROME1", "PresentationLUTShape": "INVERSE"}, True),
        ({"PhotometricInterpretation": "MONOCHROME2", "PresentationLUTShape": "INVERSE"}, True),
        ({"PhotometricInterpretation": "MONOCHROME2", "PresentationLUTShape": "IDENTITY"}, False),
    ],
)
@pytest.mark.parametrize("dtype", [np.uint16, np.int16])
def test_polarity_is_turned_once_and_keeps_the_range(
    tmp_path: Path, tags: dict, inverted: bool, dtype: type
) -> None:
    array = values(dtype)
    rescale = {"RescaleSlope": 2.0, "RescaleIntercept": 5.0}
    (raw,) = decode_all(saved(tmp_path / "a.dcm", array, **{**RADIOGRAPH, **rescale, **tags}))
    real = raw.frames[0, 0] * raw.slope + raw.intercept
    ends = np.array([0, 4095] if dtype is np.uint16 else [-2048, 2047]) * 2.0 + 5.0
    shown = array * 2.0 + 5.0
    np.testing.assert_array_equal(real, ends.sum() - shown if inverted else shown)
    assert (raw.provenance.get("inverted") == "true") == inverted
    assert raw.frames.dtype == dtype


def test_polarity_comes_after_the_modality_lut(tmp_path: Path) -> None:
    table = (np.arange(4096) ** 2 // 4096).astype(int)
    path = saved(tmp_path / "a.dcm", values(), **{**RADIOGRAPH, "PhotometricInterpretation": "MONOCHROME1"},
                 ModalityLUTSequence=lut(0, table, 12))  # fmt: skip
    (raw,) = decode_all(path)
    np.testing.assert_array_equal(raw.frames[0, 0], 4095 - table[values()])


def test_hounsfield_units_do_not_depend_on_how_a_ct_is_shown(tmp_path: Path) -> None:
    volume = read(saved(tmp_path / "a.dcm", values(), PhotometricInterpretation="MONOCHROME1"))
    np.testing.assert_array_equal(volume.real(0)[0], values() - 1024.0)
    assert "inverted" not in volume.provenance


def test_plain_values_equal_simpleitks(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.dcm", values(np.int16), RescaleSlope=0.5, RescaleIntercept=-3)
    image = sitk.GetArrayFromImage(sitk.ReadImage(str(path)))
    np.testing.assert_allclose(read(path).real(0), image)


@pytest.mark.parametrize(
    ("signed", "value", "limit"),
    [(True, 63536, None), (True, -2000, None), (False, 5, 9), (False, 9, 5), (True, -2000, -1900)],
)
def test_padding_is_found_whatever_the_sign_of_its_tag(
    tmp_path: Path, signed: bool, value: int, limit: int | None
) -> None:
    array = np.full((4, 6), 1000, np.int16 if signed else np.uint16)
    array[0], array[1] = (-2000, -1950) if signed else (5, 7)
    ds = dataset(array, ORIGIN, "1.2.3", RescaleIntercept=0 if signed else -3000)
    kind = "SS" if value < 0 else "US"
    ds.add_new(0x00280120, kind, value)
    if limit is not None:
        ds.add_new(0x00280121, kind, limit)
    ds.save_as(tmp_path / "a.dcm", enforce_file_format=True)
    (raw,) = decode_all(tmp_path / "a.dcm")
    assert raw.padding is not None
    np.testing.assert_array_equal(raw.padding[0, 0].all(axis=1), [True, limit is not None, False, False])


def test_slices_of_other_sign_or_width_are_stacked_without_loss(tmp_path: Path) -> None:
    series_of(tmp_path, np.full((1, 4, 4), 60000, np.uint16), uid="1.2.3")
    low = np.full((1, 4, 4), -30000, np.int16)
    positions = [np.array([5.0, 6.0, 7.0]) + 2.0 * np.cross((0.8, 0.6, 0.0), (-0.48, 0.64, 0.6))]
    series_of(tmp_path / "2", low, positions, uid="1.2.3")
    (raw,) = decode_all(tmp_path)
    assert raw.frames[0, :, 0, 0].tolist() == [60000, -30000]


def test_float_pixels_are_read(tmp_path: Path) -> None:
    array = np.linspace(-3, 5, 24, dtype=np.float32).reshape(4, 6)
    ds = dataset(
        array.view(np.uint32), ORIGIN, "1.2.3", Modality="MR", RescaleSlope=None, RescaleIntercept=None
    )
    del ds.PixelData
    for name in ("BitsStored", "HighBit", "PixelRepresentation"):
        del ds[name]
    ds.FloatPixelData = array.tobytes()
    ds.save_as(tmp_path / "a.dcm", enforce_file_format=True)
    np.testing.assert_array_equal(read(tmp_path / "a.dcm").voxels[0, 0], array)


@pytest.mark.parametrize(
    ("tags", "spacing", "how"),
    [
        ({"PixelSpacing": [0.2, 0.3]}, (0.2, 0.3), "calibrated"),
        ({"PixelSpacing": [0.2, 0.2], "ImagerPixelSpacing": [0.3, 0.3]}, (0.2, 0.2), "calibrated"),
        ({"PixelSpacing": [0.3, 0.3], "ImagerPixelSpacing": [0.3, 0.3]}, (0.3, 0.3), "detector"),
        (
            {
                "PixelSpacing": [0.3, 0.3],
                "ImagerPixelSpacing": [0.3, 0.3],
                "PixelSpacingCalibrationType": "FIDUCIAL",
            },
            (0.3, 0.3),
            "calibrated",
        ),
        (
            {
                "PixelSpacing": [0.3, 0.3],
                "ImagerPixelSpacing": [0.3, 0.3],
                "EstimatedRadiographicMagnificationFactor": 1.5,
            },
            (0.2, 0.2),
            "magnification",
        ),
        ({"ImagerPixelSpacing": [0.3, 0.6]}, (0.3, 0.6), "detector"),
        (
            {"ImagerPixelSpacing": [0.3, 0.6], "EstimatedRadiographicMagnificationFactor": 1.5},
            (0.2, 0.4),
            "magnification",
        ),
        (
            {"ImagerPixelSpacing": [0.3, 0.3], "EstimatedRadiographicMagnificationFactor": 0},
            (0.3, 0.3),
            "detector",
        ),
        ({"NominalScannedPixelSpacing": [0.1, 0.1]}, (0.1, 0.1), "detector"),
        ({"PixelSpacing": [0, 0]}, None, ""),
        ({}, None, ""),
    ],
)
def test_spacing_of_a_radiograph(tags: dict, spacing: tuple | None, how: str) -> None:
    ds = Dataset()
    for name, value in tags.items():
        setattr(ds, name, value)
    found, said = radiograph_spacing(ds)
    assert said == how
    assert found == (None if spacing is None else pytest.approx(spacing))


def test_radiographs_of_a_series_stay_separate_and_one_bad_does_not_spoil_them(tmp_path: Path) -> None:
    array = np.random.default_rng(0).integers(0, 4096, (3, 6, 7)).astype(np.uint16)
    tags = {name: value for name, value in RADIOGRAPH.items() if value is not None}

    def own(k: int) -> dict:
        return {"PixelData": b"\0"} if k == 1 else {}

    folder = series_of(tmp_path, array, per_slice=own, **tags, RescaleIntercept=0)
    volumes = read_all(folder)
    assert [v.shape for v in volumes] == [(1, 6, 7)] * 2
    np.testing.assert_array_equal(volumes[1].voxels[0, 0], array[2])
    assert volumes[0].provenance["acquisitions_refused"] == "1"
    assert all(len(v.instances) == 1 for v in volumes)
    with pytest.raises(Quarantined, match="several_acquisitions"):
        read(folder)


def test_a_radiograph_of_several_frames_is_refused(tmp_path: Path) -> None:
    ds = dataset(values(), ORIGIN, "1.2.3", **RADIOGRAPH, NumberOfFrames=2)
    ds.PixelData = values().tobytes() * 2
    ds.save_as(tmp_path / "a.dcm", enforce_file_format=True)
    with pytest.raises(Quarantined, match="unsupported_layout"):
        decode_all(tmp_path / "a.dcm")


def test_a_single_slice_without_thickness_says_that_it_is_assumed(tmp_path: Path) -> None:
    volume = read(saved(tmp_path / "a.dcm", values(), SliceThickness=None))
    assert volume.provenance["slice_thickness"] == "assumed"
    assert "slice_thickness" not in read(saved(tmp_path / "b.dcm", values())).provenance


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, RLELossless])
def test_a_header_that_states_more_than_the_file_holds_takes_no_memory(tmp_path: Path, syntax: str) -> None:
    ds = dataset(values(), ORIGIN, "1.2.3")
    if syntax == RLELossless:
        ds.compress(RLELossless)
    ds.file_meta.TransferSyntaxUID = syntax
    ds.Rows = ds.Columns = 65535
    ds.save_as(tmp_path / "a.dcm", enforce_file_format=True)
    tracemalloc.start()
    with pytest.raises(Quarantined) as refused:
        decode_all(tmp_path / "a.dcm")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert refused.value.code == "truncated"
    assert peak < 100e6
