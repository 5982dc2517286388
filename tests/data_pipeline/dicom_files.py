"""DICOM files made for tests: one slice, a series, an enhanced object."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

CT_IMAGE = "1.2.840.10008.5.1.4.1.1.2"
ENHANCED_MR = "1.2.840.10008.5.1.4.1.1.4.1"
OBLIQUE = (0.8, 0.6, 0.0, -0.48, 0.64, 0.6)  # row direction, column direction
NORMAL = np.cross(OBLIQUE[:3], OBLIQUE[3:])
ORIGIN = np.array([5.0, 6.0, 7.0])


def dataset(array: np.ndarray, position, series: str, number: int = 1, **tags) -> Dataset:
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = CT_IMAGE
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    ds.SeriesInstanceUID, ds.StudyInstanceUID = series, "1.2.3"
    ds.PatientName, ds.PatientID, ds.Modality = "Doe^Jane", "MRN-4711", "CT"
    ds.InstanceNumber, ds.ImageType = number, ["ORIGINAL", "PRIMARY", "AXIAL"]
    ds.Rows, ds.Columns = array.shape
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    ds.BitsAllocated = ds.BitsStored = array.dtype.itemsize * 8
    ds.HighBit, ds.PixelRepresentation = ds.BitsStored - 1, int(array.dtype.kind == "i")
    ds.PixelSpacing, ds.SliceThickness = [0.5, 0.75], 2.0
    ds.ImageOrientationPatient, ds.ImagePositionPatient = (
        list(OBLIQUE),
        [round(float(p), 9) for p in position],
    )
    ds.RescaleSlope, ds.RescaleIntercept = 1, -1024
    ds.PixelData = array.tobytes()
    for name, value in tags.items():
        if value is None:
            del ds[name]
        else:
            setattr(ds, name, value)
    return ds


def series_of(
    folder: Path, array: np.ndarray, positions=None, per_slice=None, uid: str | None = None, **tags
) -> Path:
    """Write slices in shuffled file order."""
    folder.mkdir(parents=True, exist_ok=True)
    uid = uid or generate_uid()
    n = len(array)
    names = np.random.default_rng(0).permutation(n)
    for k in range(n):
        position = np.array([5.0, 6.0, 7.0]) + 2.0 * k * NORMAL if positions is None else positions[k]
        extra = {**tags, **(per_slice(k) if per_slice else {})}
        ds = dataset(array[k], position, uid, k + 1, **extra)
        ds.save_as(folder / f"{names[k]:03d}.dcm", enforce_file_format=True)
    return folder


def write(folder: Path, slices: Sequence[tuple[int, np.ndarray, dict]], **tags) -> Path:
    """An MR series of slices (position in steps of 2 mm, pixels, own elements), in shuffled file order."""
    folder.mkdir(parents=True, exist_ok=True)
    uid = generate_uid()
    names = np.random.default_rng(0).permutation(len(slices))
    common = {"Modality": "MR", "RescaleSlope": None, "RescaleIntercept": None, **tags}
    for n, (k, pixels, own) in enumerate(slices):
        ds = dataset(pixels, ORIGIN + 2.0 * k * NORMAL, uid, n + 1, **{**common, **own})
        ds.save_as(folder / f"{names[n]:04d}.dcm", enforce_file_format=True)
    return folder


def sequence_of(**elements) -> list[Dataset]:
    """A DICOM sequence of one item."""
    item = Dataset()
    for name, value in elements.items():
        setattr(item, name, value)
    return [item]


def enhanced(
    array: np.ndarray,
    positions: Sequence[int],
    groups: Callable[[int], dict] = lambda n: {},
    shared: dict | None = None,
    **tags,
) -> Dataset:
    """An enhanced MR object of frames (n, y, x) at ``positions`` in steps of 2 mm; ``groups`` adds functional
    groups to frame n."""
    ds = dataset(array[0], ORIGIN, generate_uid(), Modality="MR", RescaleSlope=None, RescaleIntercept=None)
    for name in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SliceThickness"):
        del ds[name]
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = ENHANCED_MR
    ds.NumberOfFrames, ds.PixelData = len(array), array.tobytes()
    common = Dataset()
    common.PlaneOrientationSequence = sequence_of(ImageOrientationPatient=list(OBLIQUE))
    common.PixelMeasuresSequence = sequence_of(PixelSpacing=[0.5, 0.75], SliceThickness=2.0)
    for name, value in (shared or {}).items():
        setattr(common, name, value)
    ds.SharedFunctionalGroupsSequence = [common]
    frames = []
    for n, k in enumerate(positions):
        frame = Dataset()
        place = [round(float(p), 9) for p in ORIGIN + 2.0 * k * NORMAL]
        frame.PlanePositionSequence = sequence_of(ImagePositionPatient=place)
        for name, value in groups(n).items():
            setattr(frame, name, value)
        frames.append(frame)
    ds.PerFrameFunctionalGroupsSequence = frames
    for name, value in tags.items():
        setattr(ds, name, value)
    return ds
