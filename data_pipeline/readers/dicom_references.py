"""What an RTSTRUCT or a segmentation says of itself: its structures, and which images it was made on.

Sources: DICOM PS3.3 C.8.8.5 and C.8.8.6 (structure set, ROI contour), C.8.20.2 (segmentation image),
C.7.6.16.2.6 (derivation image).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from pydicom import Dataset

RTSTRUCT = "1.2.840.10008.5.1.4.1.1.481.3"
SEGMENTATIONS = (
    "1.2.840.10008.5.1.4.1.1.66.4",
    "1.2.840.10008.5.1.4.1.1.66.7",
)  # bits or fractions, label map
#: RTROIInterpretedType of what is neither anatomy nor lesion.
NOT_ANATOMY = frozenset(
    [
        "EXTERNAL",
        "PTV",
        "TREATED_VOLUME",
        "IRRAD_VOLUME",
        "BOLUS",
        "MARKER",
        "REGISTRATION",
        "ISOCENTER",
        "CONTROL",
        "SUPPORT",
        "FIXATION",
        "DOSE_REGION",
        "DOSE_MEASUREMENT",
        "BRACHY_CHANNEL",
        "BRACHY_ACCESSORY",
        "BRACHY_SRC_APP",
        "BRACHY_CHNL_SHLD",
    ]
)


@dataclass(frozen=True)
class Structure:
    """One ROI or segment. ``name`` is free text and may identify; ``automatic``: an algorithm drew it alone;
    ``anatomy`` is False where the file says that it is a couch, the body's outline or a planning volume."""

    number: int
    name: str
    automatic: bool
    frame_of_reference: str = ""
    anatomy: bool = True


@dataclass(frozen=True)
class References:
    """Structures of one file and the UIDs of the series, images and frames of reference it refers to. All of
    it identifies: memory only."""

    kind: Literal["rtstruct", "seg"]
    structures: tuple[Structure, ...]
    series: frozenset[str]
    instances: frozenset[str]
    frames_of_reference: frozenset[str]


def kind_of(sop_class: str, modality: str) -> Literal["rtstruct", "seg"] | None:
    """Whether an object is a structure set or a segmentation of voxels, by class, else by modality."""
    if sop_class == RTSTRUCT or (not sop_class and modality == "RTSTRUCT"):
        return "rtstruct"
    return "seg" if sop_class in SEGMENTATIONS or (not sop_class and modality == "SEG") else None


def references(ds: Dataset, kind: Literal["rtstruct", "seg"]) -> References:
    """What a whole object refers to; any error of pydicom where it is damaged."""
    return _rtstruct(ds) if kind == "rtstruct" else _seg(ds)


def contour_instances(contour: Dataset) -> set[str]:
    """SOPInstanceUIDs of the images that one contour was drawn on."""
    return {
        str(item.get("ReferencedSOPInstanceUID", "")) for item in items(contour, "ContourImageSequence")
    } - {""}


def items(ds: Dataset | None, name: str) -> list[Any]:
    """The items of a sequence; none where it is absent or empty."""
    value = ds.get(name) if ds is not None else None
    return list(value) if value else []


def _rtstruct(ds: Dataset) -> References:
    series: set[str] = set()
    instances: set[str] = set()
    frames: set[str] = set()
    for frame in items(ds, "ReferencedFrameOfReferenceSequence"):
        frames.add(str(frame.get("FrameOfReferenceUID", "")))
        for study in items(frame, "RTReferencedStudySequence"):
            for one in items(study, "RTReferencedSeriesSequence"):
                series.add(str(one.get("SeriesInstanceUID", "")))
                instances |= contour_instances(one)
    for roi in items(ds, "ROIContourSequence"):
        for contour in items(roi, "ContourSequence"):
            instances |= contour_instances(contour)
    kinds = {
        str(o.get("ReferencedROINumber", "")): str(o.get("RTROIInterpretedType", "") or "")
        for o in items(ds, "RTROIObservationsSequence")
    }
    structures = []
    for roi in items(ds, "StructureSetROISequence"):
        own = str(roi.get("ReferencedFrameOfReferenceUID", "") or "")
        frames.add(own)
        structures.append(
            Structure(
                int(roi.ROINumber),
                str(roi.get("ROIName", "") or ""),
                str(roi.get("ROIGenerationAlgorithm", "") or "").strip().upper() == "AUTOMATIC",
                own,
                kinds.get(str(roi.ROINumber), "").strip().upper() not in NOT_ANATOMY,
            )
        )
    return References("rtstruct", tuple(structures), _known(series), _known(instances), _known(frames))


def _seg(ds: Dataset) -> References:
    series: set[str] = set()
    instances: set[str] = set()
    for one in items(ds, "ReferencedSeriesSequence"):
        series.add(str(one.get("SeriesInstanceUID", "")))
        instances |= _instances(items(one, "ReferencedInstanceSequence"))
    groups = [*items(ds, "SharedFunctionalGroupsSequence"), *items(ds, "PerFrameFunctionalGroupsSequence")]
    instances.update(_sources(groups))
    structures = tuple(
        Structure(
            int(s.SegmentNumber),
            str(s.get("SegmentLabel", "") or ""),
            str(s.get("SegmentAlgorithmType", "") or "").strip().upper() == "AUTOMATIC",
        )
        for s in items(ds, "SegmentSequence")
        if int(s.SegmentNumber) != 0  # the background of a label map
    )
    frame = str(ds.get("FrameOfReferenceUID", "") or "")
    return References("seg", structures, _known(series), _known(instances), _known({frame}))


def _sources(groups: Iterable[Dataset]) -> Iterator[str]:
    for group in groups:
        for derivation in items(group, "DerivationImageSequence"):
            yield from _instances(items(derivation, "SourceImageSequence"))


def _instances(found: Iterable[Dataset]) -> set[str]:
    return {str(item.get("ReferencedSOPInstanceUID", "")) for item in found}


def _known(found: set[str]) -> frozenset[str]:
    return frozenset(found - {"", "None"})
