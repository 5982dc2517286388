"""DICOM files with identifiers planted in every element of the data dictionary, private groups, overlays and
the unused parts of a file."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from planted import (
    ADDRESS,
    DATE,
    DAY,
    FAMILY,
    GIVEN,
    HOSPITAL,
    JAPANESE,
    LATIN,
    MAIL,
    NAME,
    NUMBER,
    PATIENT,
    SENTENCE,
    TIME,
    UID,
)
from pydicom import DataElement, Dataset, Sequence
from pydicom.datadict import (
    DicomDictionary,
    RepeatersDictionary,
    dictionary_VM,
    dictionary_VR,
    tag_for_keyword,
)
from pydicom.dataset import FileMetaDataset
from pydicom.tag import Tag
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

CLASSES = {
    "CT": "1.2.840.10008.5.1.4.1.1.2",
    "MR": "1.2.840.10008.5.1.4.1.1.4",
    "PT": "1.2.840.10008.5.1.4.1.1.128",
    "DX": "1.2.840.10008.5.1.4.1.1.1.1",
    "CR": "1.2.840.10008.5.1.4.1.1.1",
    "MG": "1.2.840.10008.5.1.4.1.1.1.2",
}
CHARSETS = {"latin": "ISO_IR 100", "unicode": "ISO_IR 192", "japanese": ["", "ISO 2022 IR 87"]}
#: Elements that say how the voxels are to be read: true in `plant`, planted one by one in `one_by_one`.
_READ = """
SpecificCharacterSet ImageType SOPClassUID SOPInstanceUID Modality ConversionType SliceThickness
SpacingBetweenSlices PixelSpacing ImagerPixelSpacing NominalScannedPixelSpacing
ImageOrientationPatient ImagePositionPatient SeriesInstanceUID FrameOfReferenceUID
NumberOfFrames Rows Columns BitsAllocated BitsStored HighBit PixelRepresentation SamplesPerPixel
PlanarConfiguration PhotometricInterpretation PixelPaddingValue PixelPaddingRangeLimit
RescaleSlope RescaleIntercept RescaleType PixelData FloatPixelData DoubleFloatPixelData
ModalityLUTSequence VOILUTSequence SharedFunctionalGroupsSequence
PerFrameFunctionalGroupsSequence PixelValueTransformationSequence RealWorldValueMappingSequence
BurnedInAnnotation EstimatedRadiographicMagnificationFactor PixelPresentation
VolumetricProperties PresentationLUTShape PresentationLUTSequence MosaicFlag
NumberOfImagesInMosaic TemporalPositionIdentifier TemporalPositionIndex EchoNumbers EchoTime
AcquisitionNumber InstanceNumber DiffusionBValue DiffusionGradientOrientation TriggerTime
CardiacPhases NominalPercentageOfCardiacPhase ComplexImageComponent StackID
InStackPositionNumber DimensionIndexValues ContentTime AcquisitionTime Units SUVType
DecayCorrection CorrectedImage SeriesType PatientWeight SeriesDate SeriesTime AcquisitionDate
RadiopharmaceuticalInformationSequence DecayFactor NumberOfTimeSlices FrameReferenceTime
SmallestImagePixelValue LargestImagePixelValue ExtendedOffsetTable ExtendedOffsetTableLengths
ScanningSequence SequenceVariant RepetitionTime InversionTime FlipAngle AcquisitionContrast
PixelDataProviderURL RedPaletteColorLookupTableDescriptor LossyImageCompression WindowCenter
WindowWidth DerivationDescription VolumeBasedCalculationTechnique ImageOrientationSlide
PatientPosition GantryDetectorTilt ReconstructionDiameter
"""
READ = tuple(_READ.split())


def value_of(vr: str, number: int) -> Any:
    """What to plant in an element of this value representation; `number` varies case and order."""
    names = (
        NAME,
        f"{GIVEN}^{FAMILY}",
        NAME.upper(),
        f"{FAMILY}^{GIVEN}^^Dr={JAPANESE}".lower(),
        f"{LATIN}^{FAMILY}",
    )
    texts = (
        SENTENCE,
        SENTENCE.upper(),
        f"{PATIENT} {HOSPITAL}",
        f"{ADDRESS} {MAIL}",
        LATIN,
        SENTENCE.lower(),
    )
    blob = b"\0".join(f"{NAME} {ADDRESS}".encode(e) for e in ("utf-8", "utf-16-le", "utf-16-be", "latin-1"))
    inner = Dataset()
    inner.PatientName, inner.PatientID, inner.PatientBirthDate = NAME, PATIENT, DATE
    inner.InstitutionAddress, inner.CodeMeaning, inner.ReferencedSOPInstanceUID = ADDRESS, SENTENCE, UID
    outer = copy.deepcopy(inner)
    outer.ReferencedSeriesSequence = Sequence([inner])
    return {
        "PN": names[number % len(names)],
        "UI": UID,
        "DA": DATE,
        "TM": TIME,
        "DT": DATE + TIME,
        "AS": "104Y",
        "AE": HOSPITAL.upper(),
        "CS": FAMILY.upper(),
        "IS": str(NUMBER),
        "DS": str(DAY),
        "UR": f"https://{HOSPITAL.lower()}.example/{PATIENT}/{FAMILY}",
        "AT": Tag(0x5A59, 0x5851),
        "US": 0x5A59,
        "SS": 0x5A59,
        "SQ": Sequence([outer]),
        **dict.fromkeys(("UL", "SL", "FL", "FD", "UV", "SV"), DAY),
        **dict.fromkeys(("OB", "OW", "UN", "OD", "OF", "OL", "OV"), blob + b"\0" * (-len(blob) % 8)),
    }.get(vr, texts[number % len(texts)])


def put(header: Dataset, tag: int, vr: str, value: Any) -> None:
    """Set an element whatever pydicom thinks of its value."""
    header[Tag(tag)] = DataElement(Tag(tag), vr, value, validation_mode=pydicom.config.IGNORE)


def true_header(modality: str, array: np.ndarray, position: float, series: str) -> Dataset:
    """A valid header and pixels; `array` (y, x) of 16-bit integers."""
    header = Dataset()
    header.file_meta = FileMetaDataset()
    header.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    header.SOPClassUID = header.file_meta.MediaStorageSOPClassUID = CLASSES[modality]
    header.SOPInstanceUID = header.file_meta.MediaStorageSOPInstanceUID = generate_uid(
        entropy_srcs=[series, str(position)]
    )
    header.SeriesInstanceUID = generate_uid(entropy_srcs=[series])
    header.Modality, header.ImageType = modality, ["ORIGINAL", "PRIMARY", "AXIAL"]
    if modality in ("CT", "MR", "PT"):
        header.ImageOrientationPatient, header.ImagePositionPatient = [1, 0, 0, 0, 1, 0], [0.0, 0.0, position]
        header.SliceThickness = 2.0
    if modality in ("CT", "PT"):
        header.RescaleSlope, header.RescaleIntercept = 1, -1024 if modality == "CT" else 0
    if modality == "MR":
        header.ScanningSequence, header.SequenceVariant = "SE", "NONE"
        header.RepetitionTime, header.EchoTime = 500, 10
    if modality == "PT":
        header.Units, header.DecayCorrection, header.CorrectedImage = "BQML", "START", ["ATTN", "DECY"]
        header.SeriesType, header.PatientWeight = ["STATIC", "IMAGE"], 70
        header.SeriesDate = header.AcquisitionDate = DATE
        header.SeriesTime = header.AcquisitionTime = "120000"
        isotope = Dataset()
        isotope.RadiopharmaceuticalStartTime, isotope.RadionuclideTotalDose = "110000", 3e8
        isotope.RadionuclideHalfLife, isotope.Radiopharmaceutical = 6586.2, SENTENCE
        header.RadiopharmaceuticalInformationSequence = Sequence([isotope])
    if modality in ("DX", "CR", "MG"):
        header.BurnedInAnnotation, header.ImagerPixelSpacing = "NO", [0.2, 0.2]
    header.PixelSpacing = [0.8, 0.8]
    header.Rows, header.Columns = array.shape
    header.BitsAllocated, header.BitsStored, header.HighBit = 16, 12, 11
    header.SamplesPerPixel, header.PixelRepresentation = 1, 0
    header.PhotometricInterpretation = "MONOCHROME2"
    header.PixelData = array.astype("<u2").tobytes()
    return header


def plant(header: Dataset, charset: str) -> Dataset:
    """Identifiers in every element that `READ` does not name, and in private groups, overlays and curves."""
    header.SpecificCharacterSet = CHARSETS[charset]
    for element in every_element():
        if element.tag not in header:
            header[element.tag] = element
    overlays(header)
    private(header, charset)
    return header


@cache
def every_element() -> tuple[DataElement, ...]:
    """One planted element for each of the data dictionary that a file may hold and `READ` does not name."""
    planted = Dataset()
    for number, (tag, (vr, *_, keyword)) in enumerate(sorted(DicomDictionary.items())):
        if keyword and keyword not in READ and 0x0004 < tag >> 16 < 0xFFFE:
            put(planted, tag, vr.split(" or ")[0], value_of(vr.split(" or ")[0], number))
    for number, (pattern, (vr, *_)) in enumerate(sorted(RepeatersDictionary.items())):
        for digits in ("00", "1E"):
            tag = int(pattern.replace("xx", digits).replace("x", "0"), 16)
            if vr != "NONE" and tag not in planted and tag >> 16 not in (0x0002, 0x7F00, 0x7FE0):
                put(planted, tag, vr.split(" or ")[0], value_of(vr.split(" or ")[0], number))
    return tuple(planted)


def overlays(header: Dataset) -> None:
    """Two 60xx planes: one in its own element, spelling text; one in the pixels' unused bits 12 to 15."""
    for group, bits in ((0x6000, 1), (0x6002, 16)):
        put(header, (group << 16) | 0x0010, "US", header.Rows)
        put(header, (group << 16) | 0x0011, "US", header.Columns)
        put(header, (group << 16) | 0x0022, "LO", SENTENCE)
        put(header, (group << 16) | 0x0040, "CS", "G")
        put(header, (group << 16) | 0x0050, "SS", [1, 1])
        put(header, (group << 16) | 0x0100, "US", bits)
        put(header, (group << 16) | 0x0102, "US", 0 if bits == 1 else 12)
        put(header, (group << 16) | 0x1500, "LO", NAME)
    text = f"{SENTENCE} {SENTENCE}".encode() * 8
    put(header, 0x60003000, "OW", text[: header.Rows * header.Columns // 8 // 2 * 2])


def private(header: Dataset, charset: str) -> None:
    """Private blocks of unknown and of known makers, with text, bytes and nested sequences."""
    makers = (
        f"{HOSPITAL.upper()} PRIV",
        "SIEMENS CSA HEADER",
        "SIEMENS MR HEADER",
        "GEMS_PARM_01",
        "Philips Imaging DD 001",
    )
    for group, maker in zip((0x0009, 0x0029, 0x0051, 0x0043, 0x2001), makers):
        if Tag(group, 0x0010) in header:
            continue
        put(header, (group << 16) | 0x0010, "LO", maker)
        vrs = ("LO", "PN", "UN", "OB", "SQ", "DA", "ST", "UT", "UI", "DS", "AE")
        for number, vr in enumerate(vrs):
            put(header, (group << 16) | 0x1060 + number, vr, value_of(vr, number))
    for element in (0x1010, 0x1020):  # Siemens' CSA headers are parsed for mosaics
        put(header, 0x00290000 | element, "OB", b"SV10\4\3\2\1" + SENTENCE.encode() * 4)
    text = LATIN if charset == "latin" else JAPANESE if charset == "japanese" else SENTENCE
    put(header, 0x00091080, "LT", text)
    header.file_meta.SourceApplicationEntityTitle = HOSPITAL.upper()
    header.file_meta.ImplementationVersionName = FAMILY.upper()
    header.file_meta.PrivateInformationCreatorUID = UID
    header.file_meta.PrivateInformation = SENTENCE.encode() + b" " * (len(SENTENCE) % 2)


def save(header: Dataset, path: Path, trailing: bytes = b"") -> Path:
    """Write with planted preamble and, behind the last element, planted bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    header.preamble = SENTENCE.encode()[:128].ljust(128, b"Z")
    with warnings.catch_warnings(action="ignore"):
        header.save_as(path, enforce_file_format=True)
    if trailing:
        path.write_bytes(path.read_bytes() + trailing)
    return path


def multi_frame(charset: str) -> Dataset:
    """An enhanced MR of three frames whose functional groups, shared and per frame, are full of finds."""
    planes = [voxels(900 + n) for n in range(3)]
    header = true_header("MR", planes[0], 0.0, f"multi-frame {charset}")
    for keyword in ("ImageOrientationPatient", "ImagePositionPatient", "PixelSpacing", "SliceThickness"):
        delattr(header, keyword)
    header.SOPClassUID = header.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.4.1"
    header.NumberOfFrames, header.PixelData = 3, unused_bits(np.stack(planes)).astype("<u2").tobytes()
    plane, measures, shared = Dataset(), Dataset(), Dataset()
    plane.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    measures.PixelSpacing, measures.SliceThickness = [0.8, 0.8], 2.0
    shared.PlaneOrientationSequence, shared.PixelMeasuresSequence = Sequence([plane]), Sequence([measures])
    frames = []
    for n in range(3):
        content, position, frame = Dataset(), Dataset(), Dataset()
        content.FrameAcquisitionDateTime = content.FrameReferenceDateTime = DATE + TIME
        content.FrameComments, content.FrameLabel = SENTENCE, SENTENCE
        content.StackID, content.InStackPositionNumber = "1", n + 1
        position.ImagePositionPatient = [0.0, 0.0, 2.0 * n]
        frame.FrameContentSequence, frame.PlanePositionSequence = Sequence([content]), Sequence([position])
        frames.append(frame)
    for group in (shared, *frames):
        for element in every_element()[::23]:
            if element.tag not in group:
                group[element.tag] = element
    header.SharedFunctionalGroupsSequence = Sequence([shared])
    header.PerFrameFunctionalGroupsSequence = Sequence(frames)
    return plant(header, charset)


def voxels(seed: int, shape: tuple[int, ...] = (24, 20)) -> np.ndarray:
    """12-bit values with air around a body, so that a CT of them is in HU."""
    array = np.zeros(shape, np.uint16)
    body = tuple(slice(4, n - 4) for n in shape)
    array[body] = np.random.default_rng(seed).integers(900, 1200, array[body].shape)
    return array


def unused_bits(array: np.ndarray) -> np.ndarray:
    """The same 12-bit values with text spelled in the bits above them, four bits a pixel."""
    text = np.frombuffer((SENTENCE * 20).encode()[: array.size // 2], np.uint8)
    nibbles = np.zeros(array.size, np.uint16)
    nibbles[: text.size * 2] = np.stack([text >> 4, text & 15], axis=1).ravel()
    return array | (nibbles.reshape(array.shape) << 12)


def one_by_one(root: Path) -> Iterator[tuple[str, Path]]:
    """Series of two CT slices in each of which one element of `READ` holds what it should not."""
    for number, keyword in enumerate(READ):
        tag = tag_for_keyword(keyword)
        if tag is None or keyword in ("SeriesInstanceUID", "SOPInstanceUID"):
            continue
        vr = dictionary_VR(tag).split(" or ")[0]
        folder = root / f"{number:03d}"
        for z in range(2):
            header = true_header("CT", voxels(1000 + number), 2.0 * z, f"one {number}")
            header.PatientID = f"{PATIENT}{number}"
            value, count = value_of(vr, number), dictionary_VM(tag)
            if count in ("2", "3", "6") and not isinstance(value, (bytes, Sequence)):
                value = [value] * int(count)
            put(header, tag, vr, value)
            try:
                save(header, folder / f"{FAMILY}{z}.dcm")
            except Exception:  # pydicom cannot write it either: as raw bytes of a text element
                put(header, tag, "LO", SENTENCE)
                save(header, folder / f"{FAMILY}{z}.dcm")
        yield keyword, folder
