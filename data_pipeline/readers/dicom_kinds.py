"""What a DICOM object is, from its header: an image to train on, or why not. Source: DICOM PS3.3."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pydicom import Dataset

MODALITIES = {"CT": "CT", "MR": "MR", "PT": "PT", "CR": "XR", "DX": "XR", "RG": "XR", "MG": "XR", "XR": "XR"}
NOT_IMAGES = {
    "RTSTRUCT",
    "RTPLAN",
    "RTDOSE",
    "RTRECORD",
    "SEG",
    "SR",
    "PR",
    "KO",
    "REG",
    "FID",
    "RWV",
    "DOC",
    "AU",
    "ECG",
}
SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"  # and its multi-frame children .1 to .4


def refusal(header: Dataset, accept_secondary: bool = True) -> str | None:
    """Reason code if this object is not an image to train on, else None."""
    modality = str(header.get("Modality", ""))
    kind = [str(v).upper() for v in listed(header.get("ImageType"))]
    if modality in NOT_IMAGES:
        return "not_an_image"
    if str(header.get("SOPClassUID", "")).startswith(SECONDARY_CAPTURE) or "SCREEN SAVE" in kind:
        return "secondary_capture"
    if modality not in MODALITIES:
        return "unsupported_modality"
    if "LOCALIZER" in kind or "SCOUT" in kind:
        return "localizer"
    if not accept_secondary and "SECONDARY" in kind[:2]:
        return "secondary"
    return None


def listed(value: Any) -> list:
    """A multi-valued element as a list, whatever its multiplicity."""
    return [] if value is None else [value] if isinstance(value, str) else list(value)
