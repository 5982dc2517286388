"""Which DICOM files belong together: headers, and files grouped by series."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from data_pipeline.errors import Quarantined
from data_pipeline.readers.dicom_kinds import MODALITIES, refusal

if TYPE_CHECKING:
    from pydicom import Dataset


@dataclass(frozen=True)
class Series:
    """Files of one SeriesInstanceUID. ``code`` is why it is not an image, or None. The UID identifies:
    memory only."""

    uid: str
    study: str
    patient: str
    modality: str | None
    files: tuple[Path, ...]
    code: str | None


def series_in(paths: Iterable[Path]) -> tuple[list[Series], list[tuple[Path, Quarantined]]]:
    """Group files by SeriesInstanceUID (by folder where it was removed) from their headers, skipping other
    formats.

    Also returns the files that claim to be DICOM (by suffix or magic) and cannot be read.
    """
    groups: dict[str, list[tuple[Path, Dataset]]] = defaultdict(list)
    bad = []
    for path in sorted(paths):
        if path.name.upper() == "DICOMDIR" or not _claims_dicom(path):
            continue
        try:
            header = read_header(path)
        except Quarantined as error:
            bad.append((path, error))
            continue
        groups[str(header.get("SeriesInstanceUID", "") or f"files of {path.parent}")].append((path, header))
    found = []
    for uid, members in groups.items():
        header = members[0][1]
        codes = [refusal(h) for _, h in members]
        images = [path for (path, _), code in zip(members, codes) if code is None]
        code = codes[0] if not images else None
        files = tuple(images) if images else tuple(path for path, _ in members)
        modality = MODALITIES.get(str(header.get("Modality", "")))
        study, patient = str(header.get("StudyInstanceUID", "")), str(header.get("PatientID", ""))
        found.append(Series(uid, study, patient, modality, files, code))
    return sorted(found, key=lambda s: s.files[0]), bad


def files_of_series(folder: Path, series: str | None) -> tuple[Path, ...]:
    """The files of the one image series below a folder, or of the series of that UID."""
    found, bad = series_in(p for p in folder.rglob("*") if p.is_file())
    if series is not None:
        found = [s for s in found if s.uid == series]
    images = [s for s in found if s.code is None]
    if len(images) > 1:
        raise Quarantined(
            "several_series", f"{len(images)} image series; name one, or build the folder as layout dicom"
        )
    if images:
        return images[0].files
    if found:
        raise Quarantined(found[0].code or "not_an_image")
    if bad:
        raise bad[0][1]
    raise Quarantined("no_pixel_data", "no DICOM image in the folder")


def _claims_dicom(path: Path) -> bool:
    if path.suffix.lower() in (".dcm", ".ima", ".dicom"):
        return True
    try:
        with path.open("rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False


def read_header(path: Path, with_pixels: bool = False) -> Dataset:
    """A parsed DICOM file, without its pixels unless asked; `Quarantined` where it is none."""
    import pydicom

    try:
        pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE  # its warnings quote values
        header = pydicom.dcmread(path, stop_before_pixels=not with_pixels, force=True)
        if "SOPClassUID" not in header and "Modality" not in header:
            raise Quarantined("unreadable", "no DICOM header", path)
        for name in (
            "Modality",
            "ImageType",
            "ImageOrientationPatient",
            "ImagePositionPatient",
            "PixelSpacing",
        ):
            header.get(name)  # values are parsed when first touched, and may not parse
    except Quarantined:
        raise
    except (EOFError, OSError) as error:
        raise Quarantined("truncated" if isinstance(error, EOFError) else "unreadable", "", path) from error
    except Exception as error:  # a damaged header fails in any of pydicom's conversions
        raise Quarantined("unreadable", type(error).__name__, path) from error
    return header
