"""What may leave the clinic's files: keyed hashes in place of names, and an allow-list of technical fields.

Voxels can still identify a person (faces, burned-in text); nothing here changes them.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from data_pipeline.errors import UserError

if TYPE_CHECKING:
    from pydicom import Dataset

KEY_BYTES = 32
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
#: Numeric DICOM fields kept, as numbers.
NUMBERS = (
    "MagneticFieldStrength",
    "RepetitionTime",
    "EchoTime",
    "InversionTime",
    "FlipAngle",
    "EchoTrainLength",
    "KVP",
    "SliceThickness",
    "SpacingBetweenSlices",
    "ExposureTime",
    "XRayTubeCurrent",
)
#: Coded DICOM fields kept if the value is one of these.
CODES = {
    "ScanningSequence": {"SE", "IR", "GR", "EP", "RM"},
    "MRAcquisitionType": {"2D", "3D"},
    "PatientSex": {"M", "F", "O"},
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
    "inverted": "true",
    "rescale": "per slice",
    "suv": "tags missing",
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
                "the hash key is shorter than 16 bytes; delete hash.key in the private folder to make another"
            )
        self._key = bytes(key)

    @classmethod
    def open(cls, private: Path) -> KeyedHash:
        """The key of ``private/hash.key``, created readable by its owner only if absent."""
        private.mkdir(parents=True, exist_ok=True)
        path = private / "hash.key"
        try:
            descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
        except FileExistsError:
            return cls(path.read_bytes())
        with os.fdopen(descriptor, "wb") as file:
            key = secrets.token_bytes(KEY_BYTES)
            file.write(key)
        return cls(key)

    def of(self, kind: str, text: str) -> str:
        """32 hex digits for ``text``; one text gives another hash under another ``kind``."""
        message = f"{kind}\0{text}".encode("utf-8", "surrogateescape")
        return hmac.new(self._key, message, hashlib.sha256).hexdigest()[:32]

    def path(self, path: Path) -> str:
        """Hash of an input's absolute path."""
        return self.of("path", Path(os.path.abspath(path)).as_posix())

    def subject(self, source: str, subject: str) -> str:
        """Hash of a subject of a source (two sources may number their subjects alike)."""
        return self.of("subject", f"{source}\0{subject}")


def allowed(provenance: Mapping[str, str]) -> dict[str, str]:
    """The entries whose name and form are on the allow-list; all else is dropped."""
    kept = {}
    for name, value in provenance.items():
        if name in NUMBERS:
            fits = re.fullmatch(r"-?\d{1,9}(\.\d{1,6})?(e-?\d{1,2})?", value) is not None
        elif name in CODES:
            fits = value in CODES[name]
        else:
            fits = name in NOTES and re.fullmatch(NOTES[name], value) is not None
        if fits:
            kept[name] = value
    return kept


def technical_fields(header: Dataset, notes: Mapping[str, str] | None = None) -> dict[str, str]:
    """Technical fields of a DICOM header, each a number, a code of a closed list or a vendor; ages above 89
    capped."""
    found = dict(notes or {})
    for name in NUMBERS:
        try:
            found[name] = f"{float(header.get(name)):.6g}"
        except (TypeError, ValueError, AttributeError):
            continue
    for name in CODES:
        found[name] = str(header.get(name, "") or "").strip().upper().replace(" ", "")
    if maker := str(header.get("Manufacturer", "") or "").lower():
        found["Manufacturer"] = next((v for v in VENDORS if re.search(rf"\b{v}\b", maker)), "other")
    if match := re.fullmatch(r"(\d{3})Y", str(header.get("PatientAge", "") or "").strip().upper()):
        years = int(match.group(1))
        found["PatientAge"] = f"{OLDEST}+" if years > OLDEST else str(years)
    return allowed(found)
