"""Labelled phantom scans on disk, as a person's own folder would look: DICOM, NIfTI and PNG with tables.

    FOLDER/ct/SUBJECT/*.dcm          one CT series a subject         ct.csv
    FOLDER/mr/SUBJECT_T1.nii.gz      one file a contrast             mr.csv
    FOLDER/xr/SUBJECT.png            16 bit                          xr.csv
    FOLDER/labels/...                masks on the images' grids
    FOLDER/sources.yaml              what `medfm shards build` needs to know of the three tables

Every file is a pure function of (seed, subject), bytes included. Isotropic and thick-slice grids, seven
header orientations and tilted scans are among them.
"""

from __future__ import annotations

import csv
import gzip
import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from launch.acquisition import Grid, Scan, grid, scan_ct, scan_mr, scan_xr
from launch.anatomy import LABELS, ORGANS, grow

XR_PIXEL_MM = 0.8
_SIZE_MM = (124.0, 92.0, 96.0)  # left, posterior, superior
_MR_CODES = ("RAS", "LPS", "LAS", "PSR", "LIA", "LPI", "RPI")
_COLUMNS = ("case", "image", "label", "subject", "split", "modality")


@dataclass(frozen=True)
class PhantomSet:
    """What `write` made: the table rows, and the file to build shards from."""

    folder: Path
    sources: Path
    rows: tuple[dict[str, str], ...]  # image and label relative to `folder`

    def of(self, split: str, modality: str | None = None) -> list[dict[str, str]]:
        return [row for row in self.rows if row["split"] == split and modality in (None, row["modality"])]


def scans_of(seed: int, subject: int) -> list[Scan]:
    """All scans of one subject: a CT, two MR contrasts on one grid, a radiograph."""
    anatomy = grow(seed, subject)
    random = np.random.default_rng([seed, subject, 1])
    if subject % 4 == 1:
        ct = scan_ct(anatomy, grid(_SIZE_MM, (1.6, 1.6, 5.0), "LPS"), random)
    else:
        ct = scan_ct(anatomy, grid(_SIZE_MM, (2.0, 2.0, 2.0), "LIP" if subject % 4 == 3 else "LPS"), random)
    code, tilt = _MR_CODES[subject % len(_MR_CODES)], 7.0 if subject % 3 == 2 else 0.0
    if subject % 2 == 0:
        where = grid(_SIZE_MM, (5.0, 1.6, 1.6) if code == "PSR" else (1.6, 1.6, 5.0), code, tilt)
    else:
        where = grid(_SIZE_MM, (2.0, 2.0, 2.0), code, tilt)
    return [
        ct,
        *scan_mr(anatomy, where, ("T1", "T2"), random),
        scan_xr(anatomy, XR_PIXEL_MM, (96.0, 124.0), random),
    ]


def write_nifti(path: Path, array: np.ndarray, where: Grid) -> None:
    """(z, y, x) on `where` as NIfTI; sform and qform both stand, codes 1; the same bytes every time."""
    import nibabel

    ras = np.diag([-1.0, -1.0, 1.0, 1.0]) @ where.affine
    image = nibabel.Nifti1Image(np.ascontiguousarray(array.transpose(2, 1, 0)), ras)
    image.header.set_xyzt_units("mm")
    image.set_qform(ras, code=1)
    image.set_sform(ras, code=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(image.to_bytes(), compresslevel=1, mtime=0))


def write_dicom(folder: Path, scan: Scan, identity: str) -> None:
    """A CT series, one file a slice, stored with rescale slope 1 and intercept -1024; no patient data."""
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

    folder.mkdir(parents=True, exist_ok=True)
    study, series, frame = (
        generate_uid(entropy_srcs=[identity, what]) for what in ("study", "series", "frame")
    )
    affine, (i_mm, j_mm, k_mm) = scan.grid.affine, scan.grid.spacing
    orientation = [round(float(v), 9) for v in (*(affine[:3, 0] / i_mm), *(affine[:3, 1] / j_mm))]
    for k, plane in enumerate(scan.voxels):
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID = CTImageStorage
        meta.MediaStorageSOPInstanceUID = generate_uid(entropy_srcs=[identity, "slice", str(k)])
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        ds = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
        ds.SOPClassUID, ds.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
        ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.FrameOfReferenceUID = study, series, frame
        ds.Modality, ds.ImageType, ds.PatientName, ds.PatientID = (
            "CT",
            ["ORIGINAL", "PRIMARY", "AXIAL"],
            "",
            "",
        )
        ds.BurnedInAnnotation, ds.SeriesNumber, ds.InstanceNumber = "NO", 1, k + 1
        ds.Rows, ds.Columns = plane.shape
        ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
        ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 16, 15, 0
        ds.PixelSpacing, ds.SliceThickness = [round(j_mm, 6), round(i_mm, 6)], round(k_mm, 6)
        ds.ImageOrientationPatient = orientation
        ds.ImagePositionPatient = [round(float(v), 6) for v in affine[:3, 2] * k + affine[:3, 3]]
        ds.RescaleSlope, ds.RescaleIntercept, ds.RescaleType = 1, -1024, "HU"
        ds.PixelData = (plane.astype(np.int32) + 1024).astype("<u2").tobytes()
        ds.save_as(folder / f"{k:04d}.dcm", enforce_file_format=True)


def write_png(path: Path, plane: np.ndarray) -> None:
    """(rows, columns) uint8 or uint16 as a grey PNG."""
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(plane).save(path)


def _write_subject(folder: Path, seed: int, subject: int, split: str) -> list[dict[str, str]]:
    name = f"S{subject:03d}"
    rows = []
    for scan in scans_of(seed, subject):
        if scan.modality == "CT":
            case, image, label = f"{name}_CT", f"ct/{name}", f"labels/{name}_CT.nii.gz"
            write_dicom(folder / image, scan, f"medfm-phantom-{seed}-{subject}")
            write_nifti(folder / label, scan.labels, scan.grid)
        elif scan.modality == "MR":
            case = f"{name}_{scan.contrast}"
            image, label = f"mr/{case}.nii.gz", f"labels/{name}_MR.nii.gz"
            write_nifti(folder / image, scan.voxels, scan.grid)
            write_nifti(folder / label, scan.labels, scan.grid)
        else:
            case, image, label = f"{name}_XR", f"xr/{name}.png", f"labels/{name}_XR.png"
            write_png(folder / image, scan.voxels[0])
            write_png(folder / label, scan.labels[0])
        rows.append({"case": case, "image": image, "label": label, "subject": name, "split": split,
                     "modality": scan.modality})  # fmt: skip
    return rows


def _write_sources(folder: Path) -> Path:
    import yaml

    common = {"labels": dict(LABELS), "annotated": list(LABELS.values()), "label_origin": "human",
              "licence": "CC0-1.0", "attribution": "phantoms drawn by medfm"}  # fmt: skip
    planar = {value: name for value, name in LABELS.items() if name in ORGANS}
    sources = [
        {"name": "phantom-ct", "path": "ct.csv", "modality": "CT", **common},
        {"name": "phantom-mr", "path": "mr.csv", "modality": "MR", **common},
        {**common, "name": "phantom-xr", "path": "xr.csv", "modality": "XR", "labels": planar,
         "annotated": list(planar.values()), "burned_in": "accept",
         "spacing": [1.0, XR_PIXEL_MM, XR_PIXEL_MM]},
    ]  # fmt: skip
    path = folder / "sources.yaml"
    path.write_text(yaml.safe_dump({"sources": sources}, sort_keys=False), encoding="utf-8")
    return path


def split_of(subject: int, subjects: int) -> str:
    """The last sixth (at least one) of the subjects is the test split, the sixth before them validation."""
    held_out = max(1, round(subjects / 6))
    if subject >= subjects - held_out:
        return "test"
    return "val" if subject >= subjects - 2 * held_out else "train"


def write(folder: Path, subjects: int, *, seed: int = 0, workers: int = 1,
          done: Callable[[int], None] | None = None) -> PhantomSet:  # fmt: skip
    """Write `subjects` subjects under `folder`; `done(n)` is called as they are finished."""
    folder.mkdir(parents=True, exist_ok=True)
    job = partial(_write_subject, folder, seed)
    splits = [split_of(subject, subjects) for subject in range(subjects)]
    rows: list[dict[str, str]] = []
    if workers > 1:
        with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
            for n, part in enumerate(pool.map(job, range(subjects), splits), start=1):
                rows += part
                if done:
                    done(n)
    else:
        for n, (subject, split) in enumerate(zip(range(subjects), splits, strict=True), start=1):
            rows += job(subject, split)
            if done:
                done(n)
    for modality in ("CT", "MR", "XR"):
        _write_table(folder / f"{modality.lower()}.csv", [row for row in rows if row["modality"] == modality])
    return PhantomSet(folder, _write_sources(folder), tuple(rows))


def _write_table(path: Path, rows: Sequence[dict[str, str]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, _COLUMNS)
        table.writeheader()
        table.writerows(rows)


def write_nnunet(folder: Path, cases: int, *, seed: int = 0) -> Path:
    """A two-channel (T1, T2) nnU-Net raw data set, `folder`/Dataset001_Phantom; returns that path."""
    import json

    root = folder / "Dataset001_Phantom"
    for subject in range(cases):
        where = grid(_SIZE_MM, (2.0, 2.0, 2.0), _MR_CODES[subject % 3])
        t1, t2 = scan_mr(grow(seed, subject), where, ("T1", "T2"), np.random.default_rng([seed, subject, 2]))
        for channel, scan in enumerate((t1, t2)):
            write_nifti(root / "imagesTr" / f"phantom_{subject:03d}_{channel:04d}.nii.gz", scan.voxels, where)
        write_nifti(root / "labelsTr" / f"phantom_{subject:03d}.nii.gz", t1.labels, where)
    (root / "dataset.json").write_text(
        json.dumps({
            "channel_names": {"0": "T1", "1": "T2"},
            "labels": {"background": 0, **{name: value for value, name in LABELS.items()}},
            "numTraining": cases, "file_ending": ".nii.gz", "name": "Phantom",
        }, indent=1),
        encoding="utf-8",
    )  # fmt: skip
    return root
