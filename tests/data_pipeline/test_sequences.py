"""The MR sequence of typical protocols, from timing alone and through DICOM headers, classic and enhanced."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dicom_files import ORIGIN, dataset, enhanced, sequence_of, write
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.privacy import allowed
from data_pipeline.readers.dicom import decode_all
from data_pipeline.sequences import SEQUENCES
from data_pipeline.sequences import sequence_of as decide

SE, IR, GR, EP, RM = "SE", "IR", "GR", "EP", "RM"
FLIP, KIND = "flip_degrees", "flavours"
#: Protocol: TR, TE, TI (ms), ScanningSequence, SequenceVariant, contrast, b-value, more arguments, sequence.
#: Timings are those of published protocols (ADNI, HCP, UK Biobank, BraTS, PI-RADS, fastMRI) and vendors' own.
PROTOCOLS: list[tuple] = [
    ("T1w spin echo, brain", 500, 14, None, (SE,), ("SK",), False, None, {}, "T1w"),
    ("T1w spin echo, contrast", 550, 11, None, (SE,), ("SK",), True, None, {}, "T1w-ce"),
    ("T1w TSE, spine", 650, 10, None, (SE,), ("SK", "SP"), False, None, {}, "T1w"),
    ("MPRAGE, ADNI 3 T", 2300, 2.98, 900, (GR, IR), ("SP", "MP"), False, None, {FLIP: 9}, "T1w"),
    ("MPRAGE, contrast", 1900, 2.5, 900, (GR, IR), ("SK", "SP", "MP"), True, None, {FLIP: 9}, "T1w-ce"),
    ("BRAVO (IR-SPGR)", 8.2, 3.2, 450, (GR,), ("SS", "SK"), False, None, {FLIP: 12}, "T1w"),
    ("3D TFE, Philips", 8.1, 3.7, None, (GR,), ("MP",), False, None, {FLIP: 8}, "T1w"),
    ("SPGR", 35, 5, None, (GR,), ("SS", "SP"), False, None, {FLIP: 45}, "T1w"),
    ("VIBE, liver", 4.2, 1.9, None, (GR,), ("SP",), False, None, {FLIP: 10}, "T1w"),
    ("VIBE, liver, contrast", 4.2, 1.9, None, (GR,), ("SP",), True, None, {FLIP: 10}, "T1w-ce"),
    ("FLASH 2D in phase", 180, 4.8, None, (GR,), ("SP",), False, None, {FLIP: 70}, "T1w"),
    ("T1 FLAIR", 2000, 9, 780, (SE, IR), ("SK",), False, None, {}, "T1w"),
    ("T2w TSE, brain", 5000, 100, None, (SE,), ("SK", "SP"), False, None, {}, "T2w"),
    ("T2w TSE, prostate", 4000, 104, None, (SE,), ("SK", "SP"), False, None, {}, "T2w"),
    ("T2w HASTE", 1200, 92, None, (SE,), ("SK", "SP", "OSP"), False, None, {}, "T2w"),
    ("T2w SPACE", 3200, 408, None, (SE,), ("SK", "SP"), False, None, {}, "T2w"),
    ("T2w TSE after contrast", 4500, 95, None, (SE,), ("SK",), True, None, {}, "T2w"),
    ("PDw TSE, knee", 2800, 30, None, (SE,), ("SK",), False, None, {}, "PDw"),
    ("PDw, first echo of a dual echo", 2500, 15, None, (SE,), ("SK",), False, None, {}, "PDw"),
    ("FLAIR", 9000, 90, 2500, (SE, IR), ("SK", "SP", "MP"), False, None, {}, "FLAIR"),
    ("FLAIR SPACE", 6000, 394, 2200, (SE, IR), ("SK", "SP", "MP"), False, None, {}, "FLAIR"),
    ("FLAIR 3 T, short TI", 5000, 389, 1650, (IR,), ("SK",), False, None, {}, "FLAIR"),
    ("FLAIR after contrast", 9000, 120, 2500, (SE, IR), ("SK",), True, None, {}, "FLAIR"),
    ("STIR, spine", 4000, 60, 160, (SE, IR), ("SK",), False, None, {}, "STIR"),
    ("STIR, 3 T", 5500, 45, 220, (IR,), ("SK", "MP"), False, None, {}, "STIR"),
    ("inversion without its time", 9000, 90, None, (SE, IR), ("SK",), False, None, {}, "unknown"),
    ("T2* gradient echo", 620, 20, None, (GR,), ("SP",), False, None, {FLIP: 20}, "T2star"),
    ("T2* MEDIC, cord", 700, 17, None, (GR,), ("SP", "OSP"), False, None, {FLIP: 30}, "T2star"),
    ("SWI", 28, 20, None, (GR,), ("SP",), False, None, {FLIP: 15}, "SWI"),
    ("SWI by ImageType", 27, 9.4, None, (GR,), ("SP",), False, None, {KIND: {"SWI"}}, "SWI"),
    ("DWI", 5000, 80, None, (EP, SE), ("SK", "SP"), False, 1000.0, {}, "DWI"),
    ("b = 0 of a diffusion series", 5000, 80, None, (EP,), ("SK", "SP"), False, 0.0, {}, "DWI"),
    ("DWI with TSE readout", 4000, 70, None, (SE,), ("SK",), False, 800.0, {}, "DWI"),
    ("BOLD", 2000, 30, None, (EP, GR), ("SK",), False, None, {"frames": 200}, "BOLD"),
    ("BOLD, Siemens codes", 735, 39, None, (EP,), ("SK", "SS"), False, None, {"frames": 490}, "BOLD"),
    ("single EPI volume, SBRef", 735, 39, None, (EP, GR), ("SK",), False, None, {}, "T2star"),
    ("spin echo EPI field map", 7700, 60, None, (EP, SE), ("SK",), False, None, {}, "T2w"),
    ("DSC perfusion", 1500, 30, None, (EP, GR), ("SK",), True, None, {"frames": 60}, "PWI"),
    ("ASL", 4600, 16, 1800, (EP, GR), ("SK",), False, None, {KIND: {"PERFUSION"}, "frames": 40}, "PWI"),
    ("MRA TOF", 22, 3.7, None, (GR,), ("SP",), False, None, {KIND: {"ANGIO"}, FLIP: 18}, "MRA"),
    ("TrueFISP, heart", 3.2, 1.5, None, (GR,), ("SS", "SK"), False, None, {FLIP: 60}, "bSSFP"),
    ("DESS-like spoiled steady state", 16, 5, None, (GR,), ("SS", "SP"), False, None, {FLIP: 25}, "T1w"),
    ("PDw gradient echo", 30, 4, None, (GR,), ("SP",), False, None, {FLIP: 6}, "PDw"),
    ("double inversion", 7500, 320, 3000, (SE, IR), ("MP",), False, None, {}, "FLAIR"),
    ("no echo time", 500, None, None, (SE,), (), False, None, {}, "unknown"),
    ("no codes", 500, 14, None, (), (), False, None, {}, "unknown"),
    ("research mode only", 6.2, 3.4, None, (RM,), ("NONE",), False, None, {}, "unknown"),
]  # fmt: skip


@pytest.mark.parametrize("row", PROTOCOLS, ids=[row[0] for row in PROTOCOLS])
def test_typical_protocols(row: tuple[Any, ...]) -> None:
    _, tr, te, ti, scanning, variant, contrast, b_value, more, expected = row
    assert decide(tr, te, ti, frozenset(scanning), frozenset(variant), contrast, b_value, **more) == expected


number = st.none() | st.floats(allow_nan=True, allow_infinity=True)


@given(
    number, number, number,
    st.frozensets(st.sampled_from([SE, IR, GR, EP, RM, "S", ""])),
    st.frozensets(st.sampled_from(["SK", "MTC", "SS", "TRSS", "SP", "MP", "OSP", "NONE"])),
    st.booleans(), st.none() | st.floats(0, 1e4), number, st.integers(0, 500),
)  # fmt: skip
def test_any_header_gives_a_word_of_the_list(
    tr, te, ti, scanning, variant, contrast, b, flip, frames
) -> None:
    found = decide(tr, te, ti, scanning, variant, contrast, b, flip_degrees=flip, frames=frames)
    assert found in SEQUENCES
    assert allowed({"sequence": found}) == {"sequence": found}


def plane() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 999, (6, 7)).astype(np.uint16)


def found(folder: Path, slices: list[dict], **tags) -> list[str]:
    made = [(k, plane(), own) for own in slices for k in range(3)]
    return [raw.provenance["sequence"] for raw in decode_all(write(folder, made, **tags))]


SPIN = {"ScanningSequence": "SE", "SequenceVariant": ["SK", "SP"], "RepetitionTime": 2500.0}
PLANAR = {
    "ScanningSequence": ["EP", "SE"],
    "SequenceVariant": "SK",
    "RepetitionTime": 5000.0,
    "EchoTime": 80.0,
}


def test_classic_headers(tmp_path: Path) -> None:
    echoes = [{"EchoNumbers": 1, "EchoTime": 15.0}, {"EchoNumbers": 2, "EchoTime": 90.0}]
    assert found(tmp_path / "dual", echoes, **SPIN) == ["PDw", "T2w"]
    diffusion = [{"DiffusionBValue": 0.0}, {"DiffusionBValue": 800.0}]
    assert found(tmp_path / "dwi", diffusion, **PLANAR) == ["DWI", "DWI"]
    # Philips writes a b-value of 0 into images that are none of diffusion.
    assert found(tmp_path / "zero", [{"DiffusionBValue": 0.0}], **SPIN, EchoTime=90.0) == ["T2w"]
    assert found(
        tmp_path / "trace", [{}], **PLANAR, ImageType=["DERIVED", "PRIMARY", "DIFFUSION", "TRACEW"]
    ) == ["DWI"]
    t1 = {"ScanningSequence": "SE", "RepetitionTime": 500.0, "EchoTime": 12.0}
    assert found(tmp_path / "t1", [{}], **t1, ContrastBolusAgent="") == ["T1w"]
    assert found(tmp_path / "none", [{}], **t1, ContrastBolusAgent="None") == ["T1w"]
    assert found(tmp_path / "ce", [{}], **t1, ContrastBolusAgent="Gadovist for Jane Doe") == ["T1w-ce"]
    tof = {
        "ScanningSequence": "GR",
        "SequenceVariant": "SP",
        "RepetitionTime": 22.0,
        "EchoTime": 3.7,
        "FlipAngle": 18,
    }
    assert found(tmp_path / "tof", [{}], **tof, AngioFlag="Y") == ["MRA"]
    bold = {"ScanningSequence": "EP", "SequenceVariant": "SK", "RepetitionTime": 2000.0, "EchoTime": 30.0}
    times = [{"TemporalPositionIdentifier": n} for n in (1, 2, 3)]
    assert found(tmp_path / "bold", times, **bold) == ["BOLD"]
    assert found(tmp_path / "bare", [{}]) == ["unknown"]


def test_no_word_of_the_contrast_agent_is_kept(tmp_path: Path) -> None:
    folder = write(
        tmp_path, [(k, plane(), {}) for k in range(3)], ContrastBolusAgent="Doe", **SPIN, EchoTime=90.0
    )
    assert "doe" not in repr(decode_all(folder)[0].provenance).lower()


def test_a_ct_has_no_sequence(tmp_path: Path) -> None:
    dataset(plane(), ORIGIN, "1.2.3").save_as(tmp_path / "a.dcm", enforce_file_format=True)
    assert "sequence" not in decode_all(tmp_path)[0].provenance


@pytest.mark.parametrize(
    ("pulse", "timing", "echo", "inversion", "expected"),
    [
        ({"EchoPulseSequence": "SPIN"}, {"RepetitionTime": 5000.0}, 100.0, None, "T2w"),
        ({"EchoPulseSequence": "SPIN"}, {"RepetitionTime": 9000.0}, 120.0, 2500.0, "FLAIR"),
        ({"EchoPulseSequence": "GRADIENT"}, {"RepetitionTime": 7.0, "FlipAngle": 8.0}, 3.0, 900.0, "T1w"),
        (
            {"EchoPulseSequence": "GRADIENT", "EchoPlanarPulseSequence": "YES"},
            {"RepetitionTime": 2000.0},
            30.0,
            None,
            "T2star",
        ),
        (
            {"EchoPulseSequence": "GRADIENT", "SteadyStatePulseSequence": "TIME_REVERSED"},
            {"RepetitionTime": 22.0, "FlipAngle": 18.0},
            3.7,
            None,
            "T1w",
        ),
        (
            {"EchoPulseSequence": "GRADIENT", "TimeOfFlightContrast": "YES"},
            {"RepetitionTime": 22.0, "FlipAngle": 18.0},
            3.7,
            None,
            "MRA",
        ),
        # Philips states trains in place of a pulse sequence.
        (
            {},
            {"RepetitionTime": 3000.0, "RFEchoTrainLength": 0, "GradientEchoTrainLength": 63},
            30.0,
            None,
            "T2star",
        ),
        (
            {},
            {"RepetitionTime": 6.8, "RFEchoTrainLength": 0, "GradientEchoTrainLength": 240, "FlipAngle": 9.0},
            3.1,
            None,
            "T1w",
        ),
        (
            {},
            {"RepetitionTime": 4000.0, "RFEchoTrainLength": 15, "GradientEchoTrainLength": 1},
            100.0,
            None,
            "T2w",
        ),
        ({"AcquisitionContrast": "FLUID_ATTENUATED"}, {"RepetitionTime": 9000.0}, 120.0, None, "FLAIR"),
    ],
)
def test_enhanced_headers(
    tmp_path: Path, pulse: dict, timing: dict, echo: float, inversion: float | None, expected: str
) -> None:
    shared = {
        "MRTimingAndRelatedParametersSequence": sequence_of(**timing),
        "MREchoSequence": sequence_of(EffectiveEchoTime=echo),
        "MRModifierSequence": sequence_of(InversionRecovery="NO")
        if inversion is None
        else sequence_of(InversionRecovery="YES", InversionTimes=inversion),
    }
    ds = enhanced(np.stack([plane()] * 3), range(3), shared=shared, **pulse)
    ds.save_as(tmp_path / "a.dcm", enforce_file_format=True)
    (raw,) = decode_all(tmp_path / "a.dcm")
    assert raw.provenance["sequence"] == expected
    assert raw.provenance["EchoTime"] == f"{echo:g}"
