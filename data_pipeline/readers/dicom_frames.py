"""`Frame`: one image plane of a DICOM object and where it lies, whatever object it comes from.

A classic object is one frame, an enhanced object one per item of its functional groups (DICOM PS3.3
C.7.6.16), a Siemens mosaic one per tile.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from data_pipeline.errors import Quarantined
from data_pipeline.readers.dicom_kinds import frame_refusal, listed, words
from data_pipeline.readers.dicom_mosaic import is_mosaic, tiles

if TYPE_CHECKING:
    from pydicom import Dataset

FRAME_TYPES = (
    "MRImageFrameTypeSequence",
    "CTImageFrameTypeSequence",
    "PETFrameTypeSequence",
    "XRay3DFrameTypeSequence",
)
Box = tuple[slice, slice]


@dataclass(frozen=True, eq=False)
class Frame:
    """One plane. ``number`` is its place in a multi-frame object, ``tile`` its rows and columns in a mosaic;
    ``groups`` are the functional groups that hold for it, its own first."""

    dataset: Dataset
    shape: tuple[int, int]
    orientation: np.ndarray  # (2, 3): unit vectors along a row (x) and along a column (y), LPS
    position: np.ndarray  # LPS mm of the first pixel's centre
    pixel: tuple[float, float]  # mm between rows (y), between columns (x)
    thickness: float | None  # mm to the next slice, as the header states it
    number: int | None = None
    groups: tuple[Dataset, ...] = ()
    tile: Box | None = None

    @property
    def normal(self) -> np.ndarray:
        """Unit normal of the plane: row direction × column direction."""
        return np.cross(*self.orientation)

    def get(self, name: str, *sequences: str) -> Any:
        """The value of an element: in one of ``sequences`` of the frame's functional groups, else of the
        object; None where absent or empty."""
        for sequence in sequences:
            value = functional(self.groups, sequence, name)
            if value is not None:
                return value
        value = self.dataset.get(name)
        return None if value is None or value == "" else value


def frames_of(ds: Dataset, modality: str) -> tuple[list[Frame], list[str]]:
    """The frames of an object that are images, and the reason codes of those that are not."""
    if "PerFrameFunctionalGroupsSequence" in ds:
        return _enhanced(ds, modality)
    if is_mosaic(ds):
        return _mosaic(ds), []
    if int(ds.get("NumberOfFrames", 1) or 1) > 1:
        raise Quarantined("unsupported_layout", "several frames without a place for each")
    place = (ds.get("ImageOrientationPatient"), ds.get("ImagePositionPatient"), ds.get("PixelSpacing"))
    return [_frame(ds, *place, ds.get("SpacingBetweenSlices") or ds.get("SliceThickness"))], []


def functional(groups: tuple[Dataset, ...], sequence: str, name: str) -> Any:
    """The first value of ``name`` in ``sequence`` of the groups, or None."""
    for group in groups:
        items = group.get(sequence)
        if items and items[0].get(name) not in (None, ""):
            return items[0].get(name)
    return None


def _enhanced(ds: Dataset, modality: str) -> tuple[list[Frame], list[str]]:
    shared = ds.get("SharedFunctionalGroupsSequence") or [None]
    described, stated = len(ds.PerFrameFunctionalGroupsSequence), int(ds.get("NumberOfFrames", 1) or 1)
    if described != stated:
        raise Quarantined("unreadable", f"{described:d} frames are described where {stated:d} are stated")
    frames, refused = [], []
    for n, own in enumerate(ds.PerFrameFunctionalGroupsSequence):
        groups = tuple(group for group in (own, shared[0]) if group is not None)
        code = _refusal(groups, modality)
        if code is not None:
            refused.append(code)
            continue
        measures = "PixelMeasuresSequence"
        frames.append(
            _frame(
                ds,
                functional(groups, "PlaneOrientationSequence", "ImageOrientationPatient"),
                functional(groups, "PlanePositionSequence", "ImagePositionPatient"),
                functional(groups, measures, "PixelSpacing"),
                functional(groups, measures, "SpacingBetweenSlices")
                or functional(groups, measures, "SliceThickness"),
                n,
                groups,
            )
        )
    return frames, refused


def _refusal(groups: tuple[Dataset, ...], modality: str) -> str | None:
    for sequence in FRAME_TYPES:
        code = frame_refusal(
            words(functional(groups, sequence, "FrameType")),
            modality,
            functional(groups, sequence, "ComplexImageComponent"),
            functional(groups, sequence, "VolumeBasedCalculationTechnique"),
        )
        if code is not None:
            return code
    return None


def _mosaic(ds: Dataset) -> list[Frame]:
    place = (ds.get("ImageOrientationPatient"), ds.get("ImagePositionPatient"), ds.get("PixelSpacing"))
    whole = _frame(ds, *place, ds.get("SpacingBetweenSlices") or ds.get("SliceThickness"))
    made = []
    for box, offset in tiles(ds, whole.orientation, whole.pixel):
        shape = (box[0].stop - box[0].start, box[1].stop - box[1].start)
        position = whole.position + offset
        made.append(
            Frame(ds, shape, whole.orientation, position, whole.pixel, whole.thickness, None, (), box)
        )
    return made


def _frame(
    ds: Dataset,
    orientation: Any,
    position: Any,
    spacing: Any,
    thickness: Any,
    number: int | None = None,
    groups: tuple[Dataset, ...] = (),
) -> Frame:
    if spacing is None or len(listed(spacing)) != 2:
        raise Quarantined("no_spacing", "no PixelSpacing")
    if orientation is None or position is None or len(orientation) != 6 or len(position) != 3:
        raise Quarantined("no_geometry", "no image orientation or position")
    vectors = np.array([float(v) for v in orientation]).reshape(2, 3)
    place = np.array([float(v) for v in position])
    pixel = (float(spacing[0]), float(spacing[1]))
    if not (np.isfinite(vectors).all() and np.isfinite(place).all() and np.isfinite(pixel).all()):
        raise Quarantined("bad_geometry", "a position, direction or spacing that is no number")
    if min(pixel) <= 0:
        raise Quarantined("bad_geometry", "a PixelSpacing that is not above 0")
    lengths = np.linalg.norm(vectors, axis=1)
    if np.abs(lengths - 1).max() > 0.01 or abs(vectors[0] @ vectors[1]) > 0.01:
        raise Quarantined("bad_geometry", "row and column directions are not at right angles")
    vectors /= lengths[:, np.newaxis]
    apart = None if thickness in (None, "") else abs(float(thickness)) or None
    return Frame(ds, (int(ds.Rows), int(ds.Columns)), vectors, place, pixel, apart, number, groups)
