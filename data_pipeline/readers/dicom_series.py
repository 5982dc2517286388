"""Which DICOM files belong together: headers, and files grouped by series, whatever the folders."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

from data_pipeline.errors import Quarantined
from data_pipeline.locations import Location
from data_pipeline.quiet import quiet_libraries
from data_pipeline.readers.dicom_kinds import MODALITIES, listed, refusal
from data_pipeline.readers.dicom_references import References, kind_of, references

if TYPE_CHECKING:
    from pydicom import Dataset

SUFFIXES = (".dcm", ".ima", ".dicom", ".dic")
DIRECTORY = "1.2.840.10008.1.3.10"
#: The last element that `refusal` and `Header` need; what follows (contours, frames, voxels) is not read.
LAST = 0x0043_102F
#: Files without preamble begin with an element of group 2 or 8, little endian, or of group 8, big endian.
BARE = (b"\x02\x00", b"\x08\x00", b"\x00\x08")


@dataclass(frozen=True)
class Header:
    """What discovery needs of one DICOM file. All but ``modality`` and ``code`` identifies: memory only.

    ``number`` is the SeriesNumber, which stands in for a SeriesInstanceUID that was removed.
    ``instance`` tells slices apart (SOPInstanceUID, number and position): a file stored twice has it twice.
    ``code`` is why the object is no image, or None; ``bad`` is set where the file cannot be read.
    ``references`` are those of an RTSTRUCT or SEG.
    """

    path: Location
    series: str = ""
    study: str = ""
    patient: str = ""
    sop: str = ""
    instance: str = ""
    frame_of_reference: str = ""
    number: str = ""
    modality: str | None = None
    code: str | None = None
    references: References | None = None
    bad: Quarantined | None = None


@dataclass(frozen=True)
class Series:
    """Files of one SeriesInstanceUID, study and patient that are images, or that are none for one reason:
    ``code``.

    ``instances`` and ``frames_of_reference`` are the UIDs by which labels find it. The UIDs identify: memory
    only.
    """

    uid: str
    study: str
    patient: str
    modality: str | None
    files: tuple[Location, ...]
    code: str | None
    instances: frozenset[str] = frozenset()
    frames_of_reference: frozenset[str] = frozenset()


@quiet_libraries()
def scan_headers(paths: tuple[Location, ...]) -> list[Header]:
    """The headers of the DICOM files among ``paths``; other files and DICOMDIRs are left out.

    Nothing behind the elements needed is read, but in RTSTRUCT and SEG. A file that claims to be DICOM (by
    suffix or magic) and cannot be read comes with ``bad``.
    """
    found = []
    for path in paths:
        if path.name.upper() == "DICOMDIR" or not claims_dicom(path):
            continue
        try:
            header = _scan(path)
        except Quarantined as error:
            header = Header(path, bad=error)
        if header is not None:
            found.append(header)
    return found


def series_in(headers: Iterable[Header]) -> tuple[list[Series], int]:
    """Readable headers grouped by SeriesInstanceUID (by folder and SeriesNumber where it was removed), in the
    order of their first files, and the number of files stored twice, of which the first by path is kept.

    Careless removal of identifiers gives one UID to series of several studies or patients: those are series
    of their own; a file that states neither goes with the commonest. Objects of one series that are no images
    make a `Series` of their own for each reason.
    """
    by_uid: dict[str, list[Header]] = defaultdict(list)
    for header in sorted((h for h in headers if h.bad is None), key=lambda h: str(h.path)):
        by_uid[header.series or f"files of {header.path.parent} {header.number}"].append(header)
    groups: dict[tuple[str, str, str, str | None], list[Header]] = defaultdict(list)
    seen = set()
    twice = 0
    for uid, members in by_uid.items():
        study, patient = _commonest(h.study for h in members), _commonest(h.patient for h in members)
        for header in members:
            own = uid, header.study or study, header.patient or patient
            if header.sop and (*own, header.instance) in seen:
                twice += 1
                continue
            seen.add((*own, header.instance))
            groups[*own, header.code].append(header)
    found = [
        Series(
            uid,
            study,
            patient,
            members[0].modality,
            tuple(h.path for h in members),
            code,
            frozenset(h.sop for h in members) - {""},
            frozenset(h.frame_of_reference for h in members) - {""},
        )
        for (uid, study, patient, code), members in groups.items()
    ]
    return sorted(found, key=lambda s: str(s.files[0])), twice


def files_of_series(folder: Path, series: str | None) -> tuple[Path, ...]:
    """The files of the one image series below a folder, or of the series of that UID."""
    headers = scan_headers(tuple(sorted(p for p in folder.rglob("*") if p.is_file())))
    found, _ = series_in(headers)
    if series is not None:
        found = [s for s in found if s.uid == series]
    images = [s for s in found if s.code is None]
    if len(images) > 1:
        raise Quarantined(
            "several_series", f"{len(images)} image series; name one, or build the folder as layout dicom"
        )
    if images:
        return cast("tuple[Path, ...]", images[0].files)
    if found:
        raise Quarantined(found[0].code or "not_an_image")
    for header in headers:
        if header.bad is not None:
            raise header.bad
    raise Quarantined("no_pixel_data", "no DICOM image in the folder")


def claims_dicom(path: Location) -> bool:
    """Whether a file says that it is DICOM: by suffix, by magic, or, where its name has no suffix of letters,
    by its first element."""
    if path.suffix.lower() in SUFFIXES:
        return True
    try:
        with path.open("rb") as file:
            start = file.read(132)
    except OSError:
        return False
    if start[128:] == b"DICM":
        return True
    bare = not any(c.isalpha() for c in path.suffix)
    return bare and len(start) == 132 and start[:2] in BARE and (start[3] == 0 or start[:2] == BARE[2])


def read_header(path: Path, with_pixels: bool = False) -> Dataset:
    """A parsed DICOM file, without its pixels unless asked; `Quarantined` where it is none."""
    import pydicom

    with _damage_named(path):
        pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE  # its warnings quote values
        header = pydicom.dcmread(path, stop_before_pixels=not with_pixels, force=True)
        _check(header, path)
    return header


@contextmanager
def _damage_named(path: Location) -> Iterator[None]:
    """Whatever pydicom raises for a damaged file as `Quarantined`."""
    try:
        yield
    except Quarantined:
        raise
    except (EOFError, OSError) as error:
        raise Quarantined("truncated" if isinstance(error, EOFError) else "unreadable", "", path) from error
    except Exception as error:  # a damaged header fails in any of pydicom's conversions
        raise Quarantined("unreadable", type(error).__name__, path) from error


def _check(header: Dataset, path: Location) -> None:
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


def _scan(path: Location) -> Header | None:
    import pydicom
    from pydicom.filereader import read_partial

    pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE  # its warnings quote values
    with _damage_named(path):
        with path.open("rb") as file:
            ds = read_partial(file, lambda tag, vr, length: tag > LAST, force=True)
            sop_class = str(ds.get("SOPClassUID", "") or "")
            if DIRECTORY in (sop_class, str(ds.file_meta.get("MediaStorageSOPClassUID", ""))):
                return None
            _check(ds, path)
            kind = kind_of(sop_class, str(ds.get("Modality", "")))
            if kind is not None:
                file.seek(0)
                ds = pydicom.dcmread(file, stop_before_pixels=True, force=True)
        sop = str(ds.get("SOPInstanceUID", "") or "")
        place = [str(ds.get("InstanceNumber", "")), *(str(v) for v in listed(ds.get("ImagePositionPatient")))]
        return Header(
            path,
            str(ds.get("SeriesInstanceUID", "") or ""),
            str(ds.get("StudyInstanceUID", "") or ""),
            str(ds.get("PatientID", "") or "").strip(),
            sop,
            "\\".join([sop, *place]),
            str(ds.get("FrameOfReferenceUID", "") or ""),
            str(ds.get("SeriesNumber", "") or ""),
            MODALITIES.get(str(ds.get("Modality", ""))),
            refusal(ds),
            references(ds, kind) if kind is not None else None,
        )


def _commonest(names: Iterable[str]) -> str:
    """The name that most files state; of equals the first in order of the alphabet, "" where none does."""
    counted = Counter(name for name in names if name)
    return min(counted, key=lambda name: (-counted[name], name), default="")
