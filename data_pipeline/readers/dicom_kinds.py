"""What a DICOM object or frame is, from its header: an image to train on, or why not.

Sources: DICOM PS3.3 C.7.6.1.1.2 (ImageType), C.8.13.3.1.1 (enhanced MR frame type), C.8.16.2 (volumetric
properties); the conformance statements of Siemens, GE, Philips and Canon for the values they add.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pydicom import Dataset

MODALITIES = {"CT": "CT", "MR": "MR", "PT": "PT", "CR": "XR", "DX": "XR", "RG": "XR", "MG": "XR", "XR": "XR"}
# fmt: off
NOT_IMAGES = {
    "RTSTRUCT", "RTPLAN", "RTDOSE", "RTRECORD", "RTINTENT", "RTRAD", "RTSEGANN", "SEG", "SR", "PR", "KO",
    "REG", "FID", "RWV", "DOC", "AU", "ECG", "EPS", "HD", "RESP", "PLAN", "ANN", "ASMT", "CTPROTOCOL",
    "M3D", "SMR", "STAIN", "TEXTUREMAP",
}
SECONDARY_CAPTURE = re.compile(r"1\.2\.840\.10008\.5\.1\.4\.1\.1\.7(\.[1-4])?")  # .1 to .4: multi-frame
#: Raw data, spatial registration and fiducials, segmentation, real world values, MR spectroscopy, waveforms,
#: structured reports, presentation states, encapsulated documents, radiotherapy, Siemens non-images: whatever
#: their Modality.
NOT_IMAGE_CLASSES = re.compile(
    r"1\.2\.840\.10008\.5\.1\.4\.1\.1\.(66(\.\d+)*|67|4\.2|9(\.\d+)+|88\.\d+|11\.\d+|104\.\d+|481\.(?!1$)\d+)"
    r"|1\.3\.12\.2\.1107\.5\.9\.1"
)
PARAMETRIC_MAP = "1.2.840.10008.5.1.4.1.1.30"

# Values of ImageType (and of the frame type of enhanced objects), any of which decides. Upper case; `_`, `-`
# and runs of spaces are one space.
CAPTURES = {"SCREEN SAVE", "SCREENSAVE", "DOSE INFO", "CT SOM5 PROT", "CT SOM7 PROT", "CT SOM8 PROT"}
LOCALIZERS = {"LOCALIZER", "SCOUT", "SURVEY", "TOPOGRAM", "CT SOM5 TOP", "CT SOM7 TOP", "CT SOM8 TOP"}
PROJECTIONS = {
    "PROJECTION IMAGE", "PROJECTION", "MIP", "MAX IP", "MAXIP", "MIN IP", "MINIP", "MNIP", "MIP SAG",
    "MIP COR", "MIP TRA", "THIN MIP", "MEAN IP", "AVERAGE IP", "AVG IP", "AIP", "MAXIMUM", "MINIMUM",
    "VOLUME RENDER", "VOLUME RENDERED", "VOLUME RENDERING", "VRT", "VR", "SURFACE RENDER", "SSD",
    "CURVED MPR", "CPR", "3D RENDERING",
}
PHASES = {
    "P", "PHASE", "PHASE MAP", "R", "REAL", "I", "IMAGINARY", "R FFE", "I FFE", "P FFE", "R SE", "I SE",
    "P SE", "R IR", "I IR", "P IR", "R TSE", "I TSE", "P TSE", "VELOCITY", "VELOCITY MAP", "VEL MAP",
    "PHASE CONTRAST MAP", "PCA P", "P PCA",
}
MAPS = {
    "ADC", "ADC UNSPECIFIED", "ADC MAP", "AVERAGE DC", "AVDC", "EADC", "EXP ADC", "EXPONENTIAL ADC",
    "EXPADC", "CALC BVALUE", "FA", "FA MAP", "FRACTIONAL ANISOTROPY", "RA", "RA MAP", "COLFA", "COLOR FA",
    "FA COLOR", "TENSOR", "TENSOR B0", "DIFFUSION TENSOR", "EIGENVALUE", "EIGENVECTOR", "AXIAL DIFFUSIVITY",
    "RADIAL DIFFUSIVITY", "MD", "T1 MAP", "T2 MAP", "T2STAR MAP", "T2* MAP", "T2 STAR MAP", "R1 MAP",
    "R2 MAP", "R2STAR MAP", "R2* MAP", "R2 STAR MAP", "PD MAP", "MTR MAP", "B0 MAP", "B1 MAP", "FIELD MAP",
    "FIELDMAP", "S0 MAP", "QUANTITY", "QMAP", "MAP", "STD DEVIATION", "STDDEV", "STD DEV", "DIVISION",
    "MULTIPLICATION", "SUBTRACTION", "SUBTRACT", "SUB", "DIFFERENCE", "CBF", "RCBF", "RELCBF", "REL CBF",
    "CBV", "RCBV", "RELCBV", "REL CBV", "CORRECTED CBV", "RELCCBV", "MTT", "RELMTT", "REL MTT", "TTP",
    "TMAX", "TTD", "PBP", "GBP", "PBV", "PERFUSION MAP", "KTRANS", "KEP", "VE", "VP", "IAUC", "IAUGC",
    "WASH IN", "WASH OUT", "WASHIN", "WASHOUT", "PEI", "T MAP", "T TEST", "Z SCORE", "ACTIVATION",
    "FAT FRACTION", "FAT FRAC", "FATFRAC", "FAT FRACTION MAP", "PDFF", "WATER FRACTION", "STIFFNESS",
    "WAVE", "ELASTOGRAM", "CONFIDENCE MAP", "METABOLITE", "METABOLITE MAP", "IODINE", "IODINE MAP", "EFF Z",
    "Z EFF", "ZEFF", "EFFECTIVE Z", "ELECTRON DENSITY", "RHO", "VELOCITY MAGNITUDE",
}
RENDERED = {"MAX IP", "MIN IP", "VOLUME RENDER", "SURFACE RENDER", "CURVED MPR"}
# fmt: on
GE_RAW_TYPE = (0x0043, 0x102F)  # 0 magnitude, 1 phase, 2 real, 3 imaginary


def refusal(header: Dataset, accept_secondary: bool = True) -> str | None:
    """Reason code if this object is not an image to train on, else None.

    Frames of an enhanced object are judged one by one with `frame_refusal`: the object may hold several
    kinds.
    """
    modality, sop_class = str(header.get("Modality", "")), str(header.get("SOPClassUID", ""))
    kind = words(header.get("ImageType"))
    if modality in NOT_IMAGES or NOT_IMAGE_CLASSES.fullmatch(sop_class):
        return "not_an_image"
    if SECONDARY_CAPTURE.fullmatch(sop_class) or CAPTURES.intersection(kind):
        return "secondary_capture"
    if modality not in MODALITIES:
        return "unsupported_modality"
    if sop_class == PARAMETRIC_MAP:
        return "derived_map"
    component, technique = header.get("ComplexImageComponent"), header.get("VolumeBasedCalculationTechnique")
    code = frame_refusal(kind, modality, component, technique)
    if code is None and modality == "MR" and _ge_raw_type(header) in (1, 2, 3):
        code = "phase_image"
    if code is None and not accept_secondary and "SECONDARY" in kind[:2]:
        code = "secondary"
    return code


def frame_refusal(kind: list[str], modality: str, component: Any = None, technique: Any = None) -> str | None:
    """Reason code of one frame from its `words` of ImageType or FrameType, ComplexImageComponent and
    VolumeBasedCalculationTechnique, or None."""
    if LOCALIZERS.intersection(kind):
        return "localizer"
    flavours = set(kind[2:])
    if PROJECTIONS & flavours or RENDERED.intersection(words(technique)):
        return "projection"
    complex_part = words(component)[:1] in (["PHASE"], ["REAL"], ["IMAGINARY"])
    if modality == "MR" and (complex_part or PHASES & flavours):
        return "phase_image"
    return "derived_map" if MAPS & flavours else None


def words(value: Any) -> list[str]:
    """The values of a coded element, each in upper case with `_`, `-` and runs of spaces as one space."""
    return [re.sub(r"[\s_\-]+", " ", str(v)).strip().upper() for v in listed(value)]


def listed(value: Any) -> list:
    """A multi-valued element as a list, whatever its multiplicity."""
    return [] if value is None else [value] if isinstance(value, str) else list(value)


def _ge_raw_type(header: Dataset) -> int | None:
    if "GE" not in str(header.get("Manufacturer", "") or "").upper().split() or GE_RAW_TYPE not in header:
        return None
    try:
        value = header[GE_RAW_TYPE].value
        return int.from_bytes(value[:2], "little") if isinstance(value, bytes) else int(value)
    except (TypeError, ValueError):
        return None
