"""RTSTRUCT and SEG files made for tests, on a series that lies in a folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pydicom
from dicom_files import NORMAL, OBLIQUE, ORIGIN, sequence_of, series_of
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sr.codedict import codes
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

RTSTRUCT = "1.2.840.10008.5.1.4.1.1.481.3"
FRAME = "1.2.826.0.1.77"
WORN = {  # what highdicom asks of its source images
    "StudyID": "1", "AccessionNumber": "1", "StudyDate": "20190304", "StudyTime": "101010",
    "PatientBirthDate": "", "PatientSex": "", "ReferringPhysicianName": "", "SeriesNumber": 1,
    "FrameOfReferenceUID": FRAME,
}  # fmt: skip


def images(folder: Path, shape: tuple[int, int, int] = (5, 12, 10), **tags) -> Path:
    """An oblique CT series (k, rows, columns), 2 × 0.5 × 0.75 mm."""
    array = np.random.default_rng(0).integers(0, 2000, shape).astype(np.uint16)
    return series_of(folder, array, **{**WORN, **tags})


def headers(folder: Path) -> list[Dataset]:
    """The series' files in the order of its slices."""
    found = [pydicom.dcmread(path) for path in sorted(folder.iterdir())]
    return sorted(found, key=lambda ds: float(np.array(ds.ImagePositionPatient, float) @ NORMAL))


def in_mm(points: np.ndarray, k: float) -> np.ndarray:
    """LPS mm of (row, column) pixel coordinates on slice k of `images`."""
    row, column = np.array(OBLIQUE[:3]), np.array(OBLIQUE[3:])
    return ORIGIN + 2.0 * k * NORMAL + points[:, 1:] * 0.75 * row + points[:, :1] * 0.5 * column


def contour(points: np.ndarray, k: float, kind: str = "CLOSED_PLANAR") -> tuple[str, np.ndarray]:
    """A contour of (row, column) points on slice k."""
    return kind, in_mm(np.asarray(points, float), k)


def rtstruct(
    path: Path,
    source: Sequence[Dataset],
    rois: Mapping[str, Sequence[tuple[str, np.ndarray]]],
    *,
    refer: Sequence[str] = ("series", "images", "frame"),
    kinds: Mapping[str, str] | None = None,
    frame: str = FRAME,
    algorithm: str = "MANUAL",
) -> Path:
    """A structure set; ``refer`` says which references to the series it holds."""
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = RTSTRUCT
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    ds.SeriesInstanceUID, ds.StudyInstanceUID = generate_uid(), "1.2.3"
    ds.PatientName, ds.PatientID, ds.Modality = "Doe^Jane", "MRN-4711", "RTSTRUCT"
    series = Dataset()
    if "series" in refer:
        series.SeriesInstanceUID = source[0].SeriesInstanceUID
    if "images" in refer:
        series.ContourImageSequence = [
            sequence_of(ReferencedSOPInstanceUID=s.SOPInstanceUID)[0] for s in source
        ]
    study = sequence_of(ReferencedSOPInstanceUID="1.2.3", RTReferencedSeriesSequence=[series])
    if "frame" in refer:
        ds.ReferencedFrameOfReferenceSequence = sequence_of(
            FrameOfReferenceUID=frame, RTReferencedStudySequence=study
        )
    ds.StructureSetROISequence, ds.ROIContourSequence, ds.RTROIObservationsSequence = [], [], []
    for number, (name, contours) in enumerate(rois.items(), 1):
        roi = sequence_of(ROINumber=number, ROIName=name, ROIGenerationAlgorithm=algorithm)[0]
        if "frame" in refer:
            roi.ReferencedFrameOfReferenceUID = frame
        ds.StructureSetROISequence.append(roi)
        drawn = [
            sequence_of(
                ContourGeometricType=kind,
                NumberOfContourPoints=len(points),
                ContourData=[f"{v:.6f}" for v in points.ravel()],
            )[0]
            for kind, points in contours
        ]
        ds.ROIContourSequence.append(sequence_of(ReferencedROINumber=number, ContourSequence=drawn)[0])
        interpreted = (kinds or {}).get(name, "ORGAN")
        ds.RTROIObservationsSequence.append(
            sequence_of(
                ObservationNumber=number, ReferencedROINumber=number, RTROIInterpretedType=interpreted
            )[0]
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    ds.save_as(path, enforce_file_format=True)
    return path


def seg(
    path: Path,
    source: Sequence[Dataset],
    pixels: np.ndarray,
    names: Sequence[str],
    kind: str = "BINARY",
    algorithm: str = "MANUAL",
    **options,
) -> Path:
    """A segmentation written by highdicom; ``pixels`` (k, rows, columns) of numbers, or (..., segment)."""
    import highdicom as hd

    described = [
        hd.seg.SegmentDescription(
            n,
            name,
            codes.SCT.AnatomicalStructure,
            codes.SCT.Liver,
            algorithm,
            hd.AlgorithmIdentificationSequence("net", codes.DCM.ArtificialIntelligence, "1")
            if algorithm != "MANUAL"
            else None,
        )
        for n, name in enumerate(names, 1)
    ]
    made = hd.seg.Segmentation(
        list(source),
        pixels,
        kind,
        described,
        generate_uid(),
        9,
        generate_uid(),
        1,
        "maker",
        "model",
        "1",
        "7",
        **options,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    made.save_as(path, enforce_file_format=True)
    return path
