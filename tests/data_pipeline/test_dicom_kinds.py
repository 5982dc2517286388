"""What DICOM objects and frames are: images, or left out under a code."""

from __future__ import annotations

import pytest
from pydicom.dataset import Dataset

from data_pipeline.errors import REASONS
from data_pipeline.readers import dicom_kinds
from data_pipeline.readers.dicom_kinds import frame_refusal, refusal, words

MR, CT = "1.2.840.10008.5.1.4.1.1.4", "1.2.840.10008.5.1.4.1.1.2"


def header(kind: str, modality: str = "MR", **tags) -> Dataset:
    ds = Dataset()
    ds.Modality, ds.SOPClassUID, ds.ImageType = modality, MR if modality == "MR" else CT, kind.split("\\")
    for name, value in tags.items():
        setattr(ds, name, value)
    return ds


@pytest.mark.parametrize(
    ("kind", "modality", "code"),
    [
        # images
        (r"ORIGINAL\PRIMARY\AXIAL", "CT", None),
        (r"ORIGINAL\PRIMARY\M\ND\NORM", "MR", None),
        (r"ORIGINAL\PRIMARY\M_FFE\M\FFE", "MR", None),
        (r"DERIVED\PRIMARY\AXIAL", "MR", None),
        (r"DERIVED\PRIMARY\MPR", "CT", None),  # a reformat on a grid of its own
        (r"DERIVED\PRIMARY\REFORMATTED\AVERAGE", "CT", None),
        (r"DERIVED\PRIMARY\DIFFUSION\TRACEW\DIS2D", "MR", None),  # a signal, the usual clinical DWI
        (r"ORIGINAL\PRIMARY\DIXON\IN_PHASE", "MR", None),
        (r"ORIGINAL\PRIMARY\DIXON\OPP_PHASE", "MR", None),
        (r"ORIGINAL\PRIMARY\DIXON\W", "MR", None),
        (r"ORIGINAL\PRIMARY\M\SWI\NORM", "MR", None),
        (r"ORIGINAL\PRIMARY\R", "CT", None),  # parts of a complex signal are those of MR
        # localizers
        (r"ORIGINAL\PRIMARY\LOCALIZER", "CT", "localizer"),
        (r"ORIGINAL\PRIMARY\AXIAL\CT_SOM5 TOP", "CT", "localizer"),
        # projections and renderings
        (r"DERIVED\PRIMARY\PROJECTION IMAGE", "MR", "projection"),
        (r"DERIVED\PRIMARY\PROJECTION IMAGE\COLLAPSE", "MR", "projection"),
        (r"DERIVED\SECONDARY\MIP", "CT", "projection"),
        (r"DERIVED\PRIMARY\MNIP", "MR", "projection"),
        (r"DERIVED\PRIMARY\AXIAL\MIN_IP", "CT", "projection"),
        (r"DERIVED\PRIMARY\ANGIO\MAXIMUM", "MR", "projection"),
        (r"DERIVED\SECONDARY\VRT", "CT", "projection"),
        (r"DERIVED\SECONDARY\CURVED_MPR", "CT", "projection"),
        # other parts of the signal
        (r"ORIGINAL\PRIMARY\P\ND", "MR", "phase_image"),
        (r"ORIGINAL\PRIMARY\PHASE MAP\P\FFE", "MR", "phase_image"),
        (r"ORIGINAL\PRIMARY\R_FFE\R\FFE", "MR", "phase_image"),
        (r"ORIGINAL\PRIMARY\I", "MR", "phase_image"),
        (r"ORIGINAL\PRIMARY\VELOCITY MAP\P\PCA", "MR", "phase_image"),
        # derived maps
        (r"DERIVED\PRIMARY\DIFFUSION\ADC\DIS2D", "MR", "derived_map"),
        (r"DERIVED\SECONDARY\ADC", "MR", "derived_map"),
        (r"ORIGINAL\PRIMARY\ADC_UNSPECIFIED", "MR", "derived_map"),
        (r"DERIVED\PRIMARY\DIFFUSION\FA", "MR", "derived_map"),
        (r"DERIVED\PRIMARY\DIFFUSION\EXP_ADC", "MR", "derived_map"),
        (r"DERIVED\PRIMARY\DIFFUSION\CALC_BVALUE", "MR", "derived_map"),
        (r"DERIVED\PRIMARY\PERFUSION\RELCBF", "MR", "derived_map"),
        (r"DERIVED\PRIMARY\T1 MAP", "MR", "derived_map"),
        (r"DERIVED\PRIMARY\M\T2_STAR_MAP", "MR", "derived_map"),
        (r"DERIVED\PRIMARY\SUBTRACTION", "MR", "derived_map"),
        (r"DERIVED\PRIMARY\IODINE MAP", "CT", "derived_map"),
        # made afterwards, captured
        (r"DERIVED\SECONDARY\MPR", "CT", "secondary"),
        (r"DERIVED\SECONDARY\OTHER\CT_SOM5 PROT", "CT", "secondary_capture"),
        (r"DERIVED\PRIMARY\SCREEN SAVE", "CT", "secondary_capture"),
    ],
)
def test_image_types(kind: str, modality: str, code: str | None) -> None:
    assert refusal(header(kind, modality), accept_secondary=False) == code
    assert code is None or code in REASONS


@pytest.mark.parametrize(
    ("sop_class", "code"),
    [
        ("1.2.840.10008.5.1.4.1.1.66", "not_an_image"),  # raw data
        ("1.2.840.10008.5.1.4.1.1.66.1", "not_an_image"),  # spatial registration
        ("1.2.840.10008.5.1.4.1.1.66.4", "not_an_image"),  # segmentation
        ("1.2.840.10008.5.1.4.1.1.4.2", "not_an_image"),  # spectroscopy
        ("1.2.840.10008.5.1.4.1.1.88.22", "not_an_image"),  # report
        ("1.2.840.10008.5.1.4.1.1.11.1", "not_an_image"),  # presentation state
        ("1.2.840.10008.5.1.4.1.1.104.1", "not_an_image"),  # encapsulated PDF
        ("1.2.840.10008.5.1.4.1.1.481.2", "not_an_image"),  # dose
        ("1.3.12.2.1107.5.9.1", "not_an_image"),  # Siemens CSA non-image
        ("1.2.840.10008.5.1.4.1.1.30", "derived_map"),  # parametric map
        ("1.2.840.10008.5.1.4.1.1.7.2", "secondary_capture"),
        ("1.2.840.10008.5.1.4.1.1.4.1", None),  # enhanced MR
        ("1.2.840.10008.5.1.4.1.1.4.4", None),  # legacy converted enhanced MR
    ],
)
def test_classes_that_are_no_images_leave_whatever_their_modality(sop_class: str, code: str | None) -> None:
    assert refusal(header(r"ORIGINAL\PRIMARY\OTHER", SOPClassUID=sop_class)) == code


@pytest.mark.parametrize("value", [0, 1, 2, 3])
@pytest.mark.parametrize("maker", ["GE MEDICAL SYSTEMS", "SIEMENS"])
def test_the_part_of_the_signal_that_ge_states_privately(value: int, maker: str) -> None:
    ds = header(r"ORIGINAL\PRIMARY\OTHER", Manufacturer=maker)
    ds.private_block(0x0043, "GEMS_PARM_01", create=True).add_new(0x2F, "SS", value)
    assert refusal(ds) == ("phase_image" if value and maker.startswith("GE") else None)


def test_frames_are_judged_by_their_own_type() -> None:
    plain = words(["ORIGINAL", "PRIMARY", "T1", "NONE"])
    assert frame_refusal(plain, "MR", "MAGNITUDE", "NONE") is None
    assert frame_refusal(plain, "MR", "MIXED") is None
    for part in ("PHASE", "REAL", "IMAGINARY"):
        assert frame_refusal(plain, "MR", part) == "phase_image"
    for technique in ("MAX_IP", "MIN_IP", "VOLUME_RENDER", "SURFACE_RENDER", "CURVED_MPR"):
        assert frame_refusal(plain, "CT", None, technique) == "projection"
    assert frame_refusal(plain, "CT", None, "MPR") is None
    assert frame_refusal(words(["DERIVED", "PRIMARY", "DIFFUSION", "ADC"]), "MR") == "derived_map"


@pytest.mark.parametrize(
    ("sop_class", "modality", "code"),
    [
        ("7", "CT", "secondary_capture"),
        ("7.2", "MR", "secondary_capture"),
        ("77.1.6", "SM", "unsupported_modality"),  # whole slide, which only begins like a capture
        ("67", "MR", "not_an_image"),  # real world value mapping
        ("9.1.2", "CT", "not_an_image"),  # waveform
    ],
)
def test_storage_classes(sop_class: str, modality: str, code: str) -> None:
    ds = Dataset()
    ds.SOPClassUID, ds.Modality = f"1.2.840.10008.5.1.4.1.1.{sop_class}", modality
    assert refusal(ds) == code


def test_no_word_has_two_meanings_and_all_are_as_words_writes_them() -> None:
    sets = [
        dicom_kinds.CAPTURES,
        dicom_kinds.LOCALIZERS,
        dicom_kinds.PROJECTIONS,
        dicom_kinds.PHASES,
        dicom_kinds.MAPS,
    ]
    every = [word for names in sets for word in names]
    assert len(every) == len(set(every))
    assert words(every) == every
