"""What may leave the clinic's files: keyed hashes in place of names, and an allow-list of technical fields.

The measure is DICOM PS3.15 Annex E (Basic Application Level Confidentiality Profile): no attribute of its
table E.1-1 is kept but the age, in whole years up to 89, as its Retain Patient Characteristics Option allows.
`docs/privacy.md` states the promise. Voxels can still identify a person (faces, burned-in text); nothing here
changes them.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
import stat
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_pipeline.errors import UserError
from data_pipeline.sequences import SEQUENCES

if TYPE_CHECKING:
    from pydicom import Dataset

    from data_pipeline.locations import Location

KEY_BYTES = 32
KEY_FILE = "hash.key"
KEY_WAIT = 5.0  # seconds for another process to finish writing the key, where no link can be made
OLDEST = 89
# fmt: off
VENDORS = (
    "agfa", "canon", "carestream", "elekta", "fujifilm", "ge", "hitachi", "hologic", "konica", "mediso",
    "philips", "shimadzu", "siemens", "toshiba", "united imaging", "varian",
)
BODY_PARTS = {
    "ABDOMEN", "ABDOMENPELVIS", "ANKLE", "ARM", "BRAIN", "BREAST", "CHEST", "CHESTABDOMEN", "CHESTABDPELVIS",
    "CSPINE", "ELBOW", "EXTREMITY", "FEMUR", "FOOT", "FOREARM", "HAND", "HEAD", "HEADNECK", "HEART", "HIP",
    "KIDNEY", "KNEE", "LEG", "LIVER", "LSPINE", "LUNG", "MEDIASTINUM", "NECK", "ORBIT", "PANCREAS", "PELVIS",
    "PROSTATE", "SHOULDER", "SKULL", "SPINE", "TSPINE", "UTERUS", "WHOLEBODY", "WRIST",
}
# fmt: on
#: Numeric DICOM fields kept, as numbers of at most five digits within a range that a scanner can produce.
NUMBERS = {
    "MagneticFieldStrength": (0.01, 25.0),  # T
    "RepetitionTime": (0.0, 60000.0),  # ms
    "EchoTime": (0.0, 2000.0),  # ms
    "InversionTime": (0.0, 20000.0),  # ms
    "FlipAngle": (0.0, 360.0),  # degrees
    "EchoTrainLength": (0.0, 4096.0),
    "KVP": (5.0, 500.0),  # kV
    "SliceThickness": (0.001, 500.0),  # mm
    "SpacingBetweenSlices": (0.001, 500.0),  # mm
    "ExposureTime": (0.0, 60000.0),  # ms
    "XRayTubeCurrent": (0.0, 5000.0),  # mA
}
#: Coded DICOM fields kept if the value is one of these.
CODES = {
    "ScanningSequence": {"SE", "IR", "GR", "EP", "RM"},
    "MRAcquisitionType": {"2D", "3D"},
    "BurnedInAnnotation": {"YES", "NO"},
    "ViewPosition": {"AP", "PA", "LL", "RL", "RLD", "LLD", "RLO", "LLO", "CC", "MLO", "ML", "LM"},
    "Units": {"BQML", "CNTS", "GML", "PROPCNTS", "CM2ML"},
    "BodyPartExamined": BODY_PARTS,
}
#: Notes of our readers, with the form each must have.
NOTES = {
    "frame": r"\d{1,6} of \d{1,6}",
    "qform_differs": "true",
    "no_form": "true",
    "units_unknown": "true",
    "exif_orientation": "applied",
    "inverted": "true",
    "rescale": "per slice",
    "suv": "tags (missing|implausible)",
    "shear": r"\d{1,2}\.\d degrees",
    "sequence": "|".join(map(re.escape, SEQUENCES)),
    "b_value": r"\d{1,5}",
    "acquisition": r"\d{1,4} of \d{1,4}",
    "acquisitions_refused": r"\d{1,4}",
    "frames_refused": r"\d{1,5}",
    "objects_refused": r"\d{1,5}",
    "pixel_spacing": "calibrated|magnification|detector",
    "modality_lut": "applied",
    "voi_lut": "applied|none",
    "slice_thickness": "assumed",
    "transfer_syntax": "assumed",
    "contours_skipped": r"\d{1,6}",
    "contours_repeated": r"\d{1,6}",
    "contours_between_slices": r"\d{1,6}",
    "slices_without_contour": r"\d{1,6}",
    "structures_without_contour": r"\d{1,4}",
    "structures_without_voxel": r"\d{1,4}",
    "label_files": r"\d{1,4}",
    "label_files_refused": r"\d{1,4}",
    "Manufacturer": "|".join((*VENDORS, "other")),
    "PatientAge": r"[1-8]?\d|89\+",
}


class KeyedHash:
    """HMAC-SHA256 of paths and subjects: the same input gives the same hash under one key, nothing without
    it.

    ``key`` is at least 16 bytes, kept outside the dataset (`open` keeps it in the private folder).
    """

    def __init__(self, key: bytes) -> None:
        if len(key) < 16:
            raise UserError(
                f"the hash key has fewer than 16 bytes; delete {KEY_FILE} in the private folder for a new one"
            )
        self._key = bytes(key)

    @classmethod
    def open(cls, private: Path) -> KeyedHash:
        """The key of ``private/hash.key``, made if absent; only its owner can read it.

        Any number of processes may open one folder at once: all get the same key, whole. Raises `UserError`
        where the folder lies inside a dataset or cannot be used.
        """
        for place in (private / KEY_FILE).resolve().parents:
            if (place / "manifest.parquet").exists() and (place / "dataset.json").exists():
                raise UserError(
                    f"the private folder {private} lies inside the dataset {place}; choose another"
                )
        try:
            private.mkdir(parents=True, exist_ok=True, mode=0o700)
            path = private / KEY_FILE
            if not path.exists():
                _create_key(path)
            _close_to_others(private, 0o700)
            _close_to_others(path, 0o600)
            return cls(_read_key(path))
        except OSError as error:
            raise UserError(
                f"{error.filename or private}: the hash key cannot be kept here ({error.strerror}); "
                "choose another private folder"
            ) from error

    def of(self, kind: str, text: str) -> str:
        """32 hex digits for ``text``; one text gives another hash under another ``kind``."""
        message = f"{kind}\0{text}".encode("utf-8", "surrogateescape")
        return hmac.new(self._key, message, hashlib.sha256).hexdigest()[:32]

    def path(self, path: Location) -> str:
        """Hash of an input's absolute path, or of its address where it is remote."""
        address = str(path)
        return self.of("path", address if "://" in address else Path(os.path.abspath(address)).as_posix())

    def subject(self, source: str, subject: str) -> str:
        """Hash of a subject of a source (two sources may number their subjects alike)."""
        return self.of("subject", f"{source}\0{subject}")


def check_private(out: Path, private: Path) -> None:
    """`UserError` where a folder of real names is the dataset or lies in it, also by way of a symlink."""
    if private.resolve().is_relative_to(out.resolve()):
        raise UserError(f"the private folder {private} must lie outside the dataset {out}")


def allowed(provenance: Mapping[str, str]) -> dict[str, str]:
    """The entries whose name and form are on the allow-list, numbers cut to five digits; all else is
    dropped.
    """
    kept = {}
    for name, value in provenance.items():
        if name in NUMBERS:
            value = _number(name, value)
            fits = value != ""
        elif name in CODES:
            fits = value in CODES[name]
        else:
            fits = name in NOTES and re.fullmatch(NOTES[name], value, re.ASCII) is not None
        if fits:
            kept[name] = value
    return kept


def technical_fields(header: Dataset, notes: Mapping[str, str] | None = None) -> dict[str, str]:
    """Technical fields of a DICOM header, each a number in range, a code of a closed list or a vendor; ages
    above 89 capped. ``notes`` are the reader's own. A field that cannot be read is left out.
    """
    found = dict(notes or {})
    for name in NUMBERS:
        found[name] = _text(header, name)
    for name in CODES:
        found[name] = _text(header, name).upper().replace(" ", "")
    if maker := _text(header, "Manufacturer").lower():
        found["Manufacturer"] = next((v for v in VENDORS if re.search(rf"\b{v}\b", maker)), "other")
    if match := re.fullmatch(r"([0-9]{3})Y", _text(header, "PatientAge").upper()):
        years = int(match.group(1))
        found["PatientAge"] = f"{OLDEST}+" if years > OLDEST else str(years)
    return allowed(found)


def _text(header: Dataset, name: str) -> str:
    try:
        value: Any = header.get(name)
        return "" if value is None else str(value).strip()
    except Exception:  # a damaged element fails in any of pydicom's conversions
        return ""


def _number(name: str, text: str) -> str:
    """The number with at most five digits, four of them decimals, or "" where it is none or out of range."""
    try:
        value = float(text)
    except ValueError:
        return ""
    low, high = NUMBERS[name]
    return f"{round(value, 4) + 0.0:.5g}" if low <= value <= high else ""


def _create_key(path: Path) -> None:
    """Make the key file whole or not at all; one that appears meanwhile stays."""
    key = secrets.token_bytes(KEY_BYTES)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    with suppress(FileExistsError):
        try:
            _write_new(temporary, key)
            os.link(temporary, path)
        except FileExistsError:
            raise
        except (
            OSError
        ):  # a file system without hard links: the name is taken first, readers wait for the bytes
            _write_new(path, key)
        finally:
            temporary.unlink(missing_ok=True)


def _write_new(path: Path, content: bytes) -> None:
    descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _read_key(path: Path) -> bytes:
    until = time.monotonic() + KEY_WAIT
    while len(key := path.read_bytes()) < KEY_BYTES and time.monotonic() < until:
        if len(key) >= 16 and time.time() - path.stat().st_mtime > KEY_WAIT:
            break  # a person's own, shorter key
        time.sleep(0.05)
    return key


def _close_to_others(path: Path, mode: int) -> None:
    """Take away the rights of group and others, where the file is ours to change."""
    found = path.stat()
    if stat.S_IMODE(found.st_mode) & 0o077 and found.st_uid == os.getuid():
        path.chmod(mode)
