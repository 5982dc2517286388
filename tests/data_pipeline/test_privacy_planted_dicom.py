"""Nothing planted in a DICOM file is in any byte of the dataset or of what its build prints.

Every element of the data dictionary, private groups, overlays, unused bits of pixels, file names and folders,
RTSTRUCT and SEG, and files made to fail. One build with a worker, run as a user runs it.
"""

from __future__ import annotations

import json
import re
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pydicom
import pytest
from planted import (
    ADDRESS,
    DATE,
    FAMILY,
    GIVEN,
    HOSPITAL,
    NAME,
    PATIENT,
    SENTENCE,
    Built,
    finds,
    leaks,
    run_build,
)
from planted_dicom import (
    CHARSETS,
    READ,
    every_element,
    multi_frame,
    one_by_one,
    plant,
    put,
    save,
    true_header,
    unused_bits,
    voxels,
)
from pydicom import Dataset, Sequence
from pydicom.encaps import encapsulate
from pydicom.uid import JPEG2000Lossless, JPEGBaseline8Bit, RLELossless

from data_pipeline.storage import decode

OTHERS = {  # objects that are no images -> SOP class
    "SR": "1.2.840.10008.5.1.4.1.1.88.11",
    "PR": "1.2.840.10008.5.1.4.1.1.11.1",
    "KO": "1.2.840.10008.5.1.4.1.1.88.59",
    "OT": "1.2.840.10008.5.1.4.1.1.7",
    "DOC": "1.2.840.10008.5.1.4.1.1.104.1",
    "RTDOSE": "1.2.840.10008.5.1.4.1.1.481.2",
    "NM": "1.2.840.10008.5.1.4.1.1.20",
    "US": "1.2.840.10008.5.1.4.1.1.6.1",
}


def whole(root: Path) -> int:
    """Series that must be read: every modality, every character set. Returns their number."""
    series = [("CT", charset) for charset in CHARSETS]
    series += [(m, c) for m, c in zip(("MR", "PT", "DX", "MG"), [*CHARSETS, *CHARSETS])]
    for n, (modality, charset) in enumerate(series):
        for z in range(2 if n == 0 else 1):
            array = unused_bits(voxels(10 * n + z))
            header = plant(true_header(modality, array, 2.0 * z, f"{modality} {charset}"), charset)
            name = f"{FAMILY}^{GIVEN}_{DATE}_{n}_{z}.dcm"
            save(header, root / f"{HOSPITAL} {ADDRESS}" / f"{modality}-{PATIENT}" / name)
    save(multi_frame("unicode"), root / f"{HOSPITAL} {ADDRESS}" / f"{FAMILY}_frames.dcm")
    return len(series) + 1


def refused(root: Path) -> None:
    """Objects that are no images, and images made to fail in each way a file can."""
    for n, (modality, sop_class) in enumerate(OTHERS.items()):
        header = true_header("CT", voxels(n), 0.0, f"other {n}")
        header.Modality, header.SOPClassUID = modality, sop_class
        header.PatientName, header.SeriesDescription = NAME, SENTENCE
        save(header, root / "others" / f"{NAME}{n}.dcm")
    good = save(
        plant(true_header("CT", voxels(77), 0.0, "cut"), "latin"), root / "cut" / "0.dcm"
    ).read_bytes()
    for n, share in enumerate((0.001, 0.3, 0.6, 0.95, 0.999)):
        path = root / f"cut{n}" / f"{FAMILY}.dcm"
        path.parent.mkdir(parents=True)
        path.write_bytes(good[: int(len(good) * share)])
    (root / f"cut/{FAMILY}.dcm").write_bytes(SENTENCE.encode() * 9)
    (root / "cut" / "magic.dcm").write_bytes(SENTENCE.encode().ljust(128) + b"DICM" + SENTENCE.encode() * 3)
    for n, (tag, vr) in enumerate(((b"\x10\x00\x10\x00", b"ZZ"), (b"\x28\x00\x10\x00", b"PN"))):
        path = root / f"vr{n}" / f"{PATIENT}.dcm"
        path.parent.mkdir()
        at = good.index(tag, 400)
        path.write_bytes(good[: at + 4] + vr + good[at + 6 :])
    for n, (keyword, vr) in enumerate(
        [
            ("Rows", "LO"),
            ("PixelSpacing", "PN"),
            ("ImagePositionPatient", "LO"),
            ("RescaleSlope", "SH"),
            ("BitsStored", "LT"),
        ]
    ):
        header = true_header("CT", voxels(n), 0.0, f"type {n}")
        put(header, pydicom.datadict.tag_for_keyword(keyword), vr, SENTENCE)
        save(header, root / f"type{n}" / f"{NAME}.dcm")
    for n, syntax in enumerate((JPEGBaseline8Bit, JPEG2000Lossless, RLELossless)):
        header = true_header("CT", voxels(n), 0.0, f"codec {n}")
        header.file_meta.TransferSyntaxUID = syntax
        comment = b"\xff\xd8\xff\xfe\x00\x40" + SENTENCE.encode()
        header.PixelData = encapsulate([comment + bytes(len(comment) % 2)])
        header["PixelData"].VR = "OB"
        save(header, root / f"codec{n}" / f"{FAMILY}.dcm", trailing=SENTENCE.encode())
    header = true_header("CT", voxels(5), 0.0, "charset")
    header.PatientName = NAME
    put(header, 0x00080005, "CS", f"{FAMILY} {PATIENT}")
    save(header, root / "charset" / f"{FAMILY}.dcm")


def behind_the_pixels(root: Path) -> None:
    """A valid series with text after its pixels, in padding and in trailing bytes."""
    for z in range(3):
        header = true_header("CT", voxels(500 + z), 2.0 * z, "behind")
        header.PixelData += SENTENCE.encode() * 3 + bytes(len(SENTENCE * 3) % 2)
        put(header, 0xFFFCFFFC, "OB", SENTENCE.encode() + bytes(len(SENTENCE) % 2))
        save(header, root / f"{z}.dcm", trailing=SENTENCE.encode())


def regions(root: Path) -> None:
    """A series with an RTSTRUCT and a SEG whose every name identifies."""
    images = []
    for z in range(4):
        header = true_header("CT", voxels(600 + z), 2.0 * z, "regions")
        header.PatientID, header.PatientName, header.StudyInstanceUID = PATIENT, NAME, "1.2.3.4"
        header.FrameOfReferenceUID, header.PatientBirthDate, header.StudyID = "1.2.3.5", DATE, PATIENT
        header.PatientSex, header.StudyDate, header.StudyTime, header.AccessionNumber = (
            "F",
            DATE,
            "101010",
            PATIENT,
        )
        images.append(pydicom.dcmread(save(header, root / "ct" / f"{z}.dcm")))
    structures(images, root / "rs" / f"{FAMILY}.dcm")
    segments(images, root / "seg" / f"{GIVEN}.dcm")


def structures(images: list[Dataset], path: Path) -> None:
    header = true_header("CT", voxels(0), 0.0, "structures")
    for keyword in ("PixelData", "Rows", "Columns", "ImagePositionPatient", "ImageOrientationPatient"):
        delattr(header, keyword)
    header.Modality = "RTSTRUCT"
    header.SOPClassUID = header.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.481.3"
    header.StructureSetLabel, header.StructureSetName, header.PatientID = SENTENCE, NAME, PATIENT
    series = Dataset()
    series.SeriesInstanceUID = images[0].SeriesInstanceUID
    series.ContourImageSequence = Sequence([reference(image) for image in images])
    study, frame = Dataset(), Dataset()
    study.ReferencedSOPInstanceUID, study.RTReferencedSeriesSequence = "1.2.3.4", Sequence([series])
    frame.FrameOfReferenceUID, frame.RTReferencedStudySequence = "1.2.3.5", Sequence([study])
    header.ReferencedFrameOfReferenceSequence = Sequence([frame])
    names = (NAME, f"GTV {FAMILY} {DATE}", f"Liver {PATIENT}", "Liver", ADDRESS)
    rois, contours, observed = [], [], []
    for number, name in enumerate(names, 1):
        roi, contour, observation = Dataset(), Dataset(), Dataset()
        roi.ROINumber, roi.ROIName, roi.ROIDescription = number, name, SENTENCE
        roi.ReferencedFrameOfReferenceUID, roi.ROIGenerationAlgorithm = "1.2.3.5", "MANUAL"
        contour.ReferencedROINumber = number
        planes = []
        for image in images[1:3]:
            plane = Dataset()
            z, low, high = float(image.ImagePositionPatient[2]), 4.0, 5.0 + number
            plane.ContourImageSequence = Sequence([reference(image)])
            plane.ContourGeometricType, plane.NumberOfContourPoints = "CLOSED_PLANAR", 4
            plane.ContourData = [low, low, z, high, low, z, high, high, z, low, high, z]
            planes.append(plane)
        contour.ContourSequence = Sequence(planes)
        observation.ObservationNumber = observation.ReferencedROINumber = number
        observation.RTROIInterpretedType, observation.ROIInterpreter = "ORGAN", NAME
        observation.ROIObservationLabel = SENTENCE[:16]
        rois.append(roi)
        contours.append(contour)
        observed.append(observation)
    header.StructureSetROISequence, header.ROIContourSequence = Sequence(rois), Sequence(contours)
    header.RTROIObservationsSequence = Sequence(observed)
    save(header, path)


def reference(image: Dataset) -> Dataset:
    item = Dataset()
    item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = image.SOPClassUID, image.SOPInstanceUID
    return item


def segments(images: list[Dataset], path: Path) -> None:
    import highdicom as hd
    from highdicom.seg import SegmentationTypeValues, SegmentDescription
    from pydicom.sr.codedict import codes

    described = [
        SegmentDescription(
            segment_number=n,
            segment_label=label,
            segmented_property_category=codes.SCT.AnatomicalStructure,
            segmented_property_type=codes.SCT.Liver,
            algorithm_type="MANUAL",
            tracking_id=f"{PATIENT} {n}",
            tracking_uid=hd.UID(),
        )
        for n, label in enumerate((f"{FAMILY} lesion", f"{GIVEN} {DATE}"), 1)
    ]
    masks = np.zeros((len(images), 24, 20, 2), np.uint8)
    masks[1:3, 5:9, 5:9, 0] = masks[1:3, 12:16, 5:9, 1] = 1
    with warnings.catch_warnings(action="ignore"):
        seg = hd.seg.Segmentation(
            images, masks, SegmentationTypeValues.BINARY, described, hd.UID(), 1, hd.UID(), 1,
            HOSPITAL, FAMILY, PATIENT, PATIENT, content_creator_name=NAME, content_description=SENTENCE[:60],
            series_description=SENTENCE[:60],
        )  # fmt: skip
    save(seg, path)


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Built, dict[str, int]]:
    root = tmp_path_factory.mktemp("in") / f"{HOSPITAL}_{NAME}_{DATE}"
    expected = {"whole": whole(root / "whole")}
    refused(root / "refused")
    behind_the_pixels(root / "behind" / PATIENT)
    regions(root / "regions")
    expected["one by one"] = sum(1 for _ in one_by_one(root / "single"))
    stated = {"layout": "dicom", "burned_in": "accept", "label_origin": "human"}
    sources = [
        {"path": str(folder), "name": f"s{n}", **stated} for n, folder in enumerate(sorted(root.iterdir()))
    ]
    return run_build({"sources": sources}, tmp_path_factory.mktemp("out")), expected


def test_the_planting_is_complete(tmp_path: Path) -> None:
    """Nearly every element of the dictionary is planted, and a file of it is full of finds."""
    assert len(every_element()) + len(READ) > 5000
    header = plant(true_header("CT", voxels(1), 0.0, "x"), "unicode")
    assert not [e.keyword for e in every_element() if e.tag not in header]
    assert len(finds(save(header, tmp_path / "a.dcm").read_bytes())) > 20


def test_the_build_reads_what_it_should(planted: tuple[Built, dict[str, int]]) -> None:
    """Planting hides no image: otherwise the search below would search nothing."""
    built, expected = planted
    assert built.code == 0, built.printed.decode()
    rows = built.manifest()
    by_source = Counter(str(row["source"]) for row in rows)
    names = {str(e["source"]): Path(str(e["paths"][0])) for e in built.index()}  # type: ignore[index]
    found = {
        part: by_source[s]
        for s, path in names.items()
        for part in path.parts
        if part in ("whole", "behind", "single")
    }
    assert found["whole"] == expected["whole"]
    assert found["behind"] == 1
    assert found["single"] > expected["one by one"] // 2
    refused = Counter(entry["code"] for entry in built.quarantine())
    assert {"truncated", "unreadable", "not_an_image", "secondary_capture", "unsupported_modality"} <= set(
        refused
    )


def test_nothing_planted_is_in_the_dataset(planted: tuple[Built, dict[str, int]]) -> None:
    assert leaks(planted[0].out) == []


def test_nothing_planted_is_printed(planted: tuple[Built, dict[str, int]]) -> None:
    """Neither by the build nor by its worker, nor by a library in either."""
    assert finds(planted[0].printed) == []


def test_the_unused_bits_are_gone(planted: tuple[Built, dict[str, int]]) -> None:
    """Every stored value of the series with text above bit 11 has 12 bits, and is what was written below."""
    from planted import everything

    checked = 0
    for place, data in everything(planted[0].out):
        if place.endswith(".b2nd") and ".seg." not in place and ".hide." not in place:
            array = decode(data)
            if array.dtype != np.float32:
                assert int(array.max()) - int(array.min()) < 4096, place
                checked += 1
    assert checked > 10


def test_names_of_structures_are_anatomy_or_hashes(planted: tuple[Built, dict[str, int]]) -> None:
    """One ROI is called Liver; the other four and the two segments are called after the patient."""
    labels = json.loads((planted[0].out / "dataset.json").read_text())["labels"].values()
    assert sorted(name for name in labels if not re.fullmatch(r"roi_[0-9a-f]{12}", name)) == ["liver"]
    assert len(labels) == 7
