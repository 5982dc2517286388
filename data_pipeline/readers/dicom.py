"""DICOM series to one volume, with pydicom. Source: DICOM PS3.3 (image plane, enhanced multi-frame, PET
modules).

Slices are sorted by their position along the normal of the image plane, so k grows along that normal (row
direction × column direction), as in SimpleITK. Nothing is interpolated: a series whose slices do not lie on
one right-angled, evenly spaced grid is refused with a code.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data_pipeline.errors import Quarantined
from data_pipeline.privacy import technical_fields
from data_pipeline.readers import dicom_pixels
from data_pipeline.readers.dicom_kinds import MODALITIES, listed, refusal
from data_pipeline.readers.dicom_series import files_of_series, read_header
from data_pipeline.readers.raw import Raw

if TYPE_CHECKING:
    from pydicom import Dataset

EVEN = 0.05  # largest deviation of a slice distance, as a share of the median
OFF_GRID = 0.1  # largest distance of a slice from its place on the even grid, in slice distances
DRIFT = 0.5  # largest sideways shift of a slice against the first, in in-plane pixels


def decode(path: Path, *, series: str | Sequence[Path] | None = None, accept_secondary: bool = False) -> Raw:
    """One DICOM file (a slice, a radiograph or a multi-frame object), or the one image series in a folder.

    ``series`` chooses among several by SeriesInstanceUID, or gives the files so that no folder is searched.
    """
    if series is not None and not isinstance(series, str):
        files: Sequence[Path] = series
    elif path.is_file():
        files = [path]
    else:
        files = files_of_series(path, series)
    try:
        return _decode([read_header(file, with_pixels=True) for file in files], accept_secondary)
    except Quarantined:
        raise
    except Exception as error:  # pydicom converts a value when it is first used: a damaged one fails anywhere
        raise Quarantined("unreadable", f"a header value: {type(error).__name__}") from error


def _decode(found: list[Dataset], accept_secondary: bool) -> Raw:
    for ds in found:
        code = refusal(ds, accept_secondary)
        if code is not None:
            raise Quarantined(code)
    # A file stored twice is one slice, not two.
    datasets = list({str(ds.get("SOPInstanceUID", "")) or id(ds): ds for ds in found}.values())
    first = datasets[0]
    if "PixelData" not in first and "FloatPixelData" not in first:
        raise Quarantined("no_pixel_data")
    modality = MODALITIES[str(first.Modality)]
    if len(datasets) == 1 and "PerFrameFunctionalGroupsSequence" in first:
        return _stack(_enhanced_slices(first), modality)
    if modality == "XR":
        return _projection(datasets)
    return _stack([_classic_slice(ds) for ds in datasets], modality)


@dataclass
class _Slice:
    dataset: Dataset
    frame: int | None  # of a multi-frame object
    shape: tuple[int, int]
    orientation: np.ndarray  # (2, 3): unit vectors along a row (x) and along a column (y)
    position: np.ndarray  # LPS mm of the first pixel's centre
    pixel: tuple[float, float]  # mm between rows (y), between columns (x)
    thickness: float | None
    order: tuple[Any, ...]  # of slices at one position
    functional: tuple[Dataset, ...] = ()


def _classic_slice(ds: Dataset) -> _Slice:
    order = (
        _number(ds.get("TemporalPositionIdentifier")),
        _number(ds.get("EchoNumbers")),
        _number(ds.get("AcquisitionNumber")),
        _number(ds.get("InstanceNumber")),
    )
    thickness = ds.get("SpacingBetweenSlices") or ds.get("SliceThickness")
    return _slice(
        ds,
        None,
        ds.get("ImageOrientationPatient"),
        ds.get("ImagePositionPatient"),
        ds.get("PixelSpacing"),
        thickness,
        order,
    )


def _enhanced_slices(ds: Dataset) -> list[_Slice]:
    shared = ds.get("SharedFunctionalGroupsSequence") or [None]
    slices = []
    for n, group in enumerate(ds.PerFrameFunctionalGroupsSequence):
        groups = tuple(g for g in (group, shared[0]) if g is not None)
        orientation = _functional(groups, "PlaneOrientationSequence", "ImageOrientationPatient")
        position = _functional(groups, "PlanePositionSequence", "ImagePositionPatient")
        spacing = _functional(groups, "PixelMeasuresSequence", "PixelSpacing")
        thickness = _functional(groups, "PixelMeasuresSequence", "SpacingBetweenSlices")
        thickness = thickness or _functional(groups, "PixelMeasuresSequence", "SliceThickness")
        made = _slice(ds, n, orientation, position, spacing, thickness, (n,))
        made.functional = groups
        slices.append(made)
    return slices


def _functional(groups: Iterable[Dataset], sequence: str, name: str) -> Any:
    for group in groups:
        items = group.get(sequence)
        if items and items[0].get(name) is not None:
            return items[0].get(name)
    return None


def _slice(
    ds: Dataset,
    frame: int | None,
    orientation: Any,
    position: Any,
    spacing: Any,
    thickness: Any,
    order: tuple,
) -> _Slice:
    if spacing is None or len(spacing) != 2:
        raise Quarantined("no_spacing", "no PixelSpacing")
    if orientation is None or position is None or len(orientation) != 6 or len(position) != 3:
        raise Quarantined("no_geometry", "no image orientation or position")
    vectors = np.array([float(v) for v in orientation]).reshape(2, 3)
    lengths = np.linalg.norm(vectors, axis=1)
    if (
        not np.isfinite(vectors).all()
        or np.abs(lengths - 1).max() > 0.01
        or abs(vectors[0] @ vectors[1]) > 0.01
    ):
        raise Quarantined("bad_geometry", "row and column directions are not at right angles")
    vectors /= lengths[:, np.newaxis]
    rows, columns = int(ds.Rows), int(ds.Columns)
    return _Slice(
        ds,
        frame,
        (rows, columns),
        vectors,
        np.array([float(v) for v in position]),
        (float(spacing[0]), float(spacing[1])),
        None if thickness in (None, "") else abs(float(thickness)),
        order,
    )


def _stack(slices: list[_Slice], modality: str) -> Raw:
    """Sort, check that the slices are one grid (or whole repeats of one), decode and stack."""
    first = slices[0]
    if any(s.shape != first.shape or not np.allclose(s.pixel, first.pixel, rtol=1e-3) for s in slices):
        raise Quarantined("mixed_shape", f"{len({s.shape for s in slices})} sizes in {len(slices)} slices")
    if max(np.abs(s.orientation - first.orientation).max() for s in slices) > 2e-3:
        raise Quarantined("mixed_orientation", f"{len(slices)} slices")
    normal = np.cross(*first.orientation)
    groups = _by_position(slices, normal)
    repeats = {len(g) for g in groups}
    if len(repeats) > 1:
        raise Quarantined("duplicate_slices", f"{len(slices)} slices at {len(groups)} positions")
    step = _step([g[0] for g in groups], normal)

    affine = np.eye(4)
    affine[:3, 0] = first.orientation[0] * first.pixel[1]
    affine[:3, 1] = first.orientation[1] * first.pixel[0]
    affine[:3, 2] = step
    affine[:3, 3] = groups[0][0].position
    ordered = [group[t] for t in range(repeats.pop()) for group in groups]
    pixels = dicom_pixels.decode([(s.dataset, s.frame, s.functional) for s in ordered], modality)
    frames = pixels.array.reshape(-1, len(groups), *first.shape)
    padding = None if pixels.padding is None else pixels.padding.reshape(frames.shape)
    return Raw(
        frames=frames,
        affine=affine,
        slope=pixels.slope,
        intercept=pixels.intercept,
        modality=modality,
        units=pixels.units,
        padding=padding,
        provenance=technical_fields(first.dataset, pixels.notes),
    )


def _by_position(slices: list[_Slice], normal: np.ndarray) -> list[list[_Slice]]:
    """Slices grouped by position along the normal, ascending; within a position by time, echo, number."""
    along = np.array([s.position @ normal for s in slices])
    groups: list[list[_Slice]] = []
    last = -np.inf
    for n in np.argsort(along, kind="stable"):
        if along[n] - last > 1e-2:
            groups.append([])
            last = along[n]
        groups[-1].append(slices[n])
    return [sorted(group, key=lambda s: s.order) for group in groups]


def _step(slices: list[_Slice], normal: np.ndarray) -> np.ndarray:
    """LPS mm from one slice to the next; refuses gaps, uneven distances and slices shifted sideways."""
    if len(slices) == 1:
        return normal * (slices[0].thickness or max(slices[0].pixel))
    positions = np.array([s.position for s in slices])
    along = (positions - positions[0]) @ normal
    sideways = positions - positions[0] - np.outer(along, normal)
    drift = np.abs(sideways @ slices[0].orientation.T) / np.array(slices[0].pixel[::-1])
    if drift.max() > DRIFT:
        angle = np.degrees(np.arctan2(np.linalg.norm(sideways[-1]), abs(along[-1])))
        raise Quarantined(
            "gantry_tilt", f"slices shift by up to {drift.max():.1f} pixels ({angle:.1f} degrees)"
        )
    gaps = np.diff(along)
    median = float(np.median(gaps))
    if len(gaps) == 1 and slices[0].thickness and median > 3 * slices[0].thickness:
        raise Quarantined(
            "missing_slices", f"2 slices {median:.2f} mm apart, {slices[0].thickness:.2f} mm thick"
        )
    if (off := np.abs(gaps - median) > max(EVEN * median, 1e-2)).any():
        ratios = gaps[off] / median
        whole = (ratios > 1.5).all() and np.abs(ratios - np.round(ratios)).max() < 0.1
        detail = (
            f"{int(off.sum())} of {len(gaps)} distances are not {median:.2f} mm, up to {gaps.max():.2f} mm"
        )
        raise Quarantined("missing_slices" if whole else "uneven_spacing", detail)
    step = float(along[-1] / (len(slices) - 1))
    if (worst := np.abs(along - step * np.arange(len(slices))).max()) > OFF_GRID * step:
        raise Quarantined("uneven_spacing", f"a slice lies {worst:.2f} mm off an even grid of {step:.2f} mm")
    return normal * step


def _projection(datasets: list[Dataset]) -> Raw:
    """A radiograph: depth 1, spacing at the detector or calibrated, no place in the patient."""
    if len(datasets) > 1:
        raise Quarantined(
            "several_series", f"{len(datasets)} radiographs in one series; read the files one by one"
        )
    ds = datasets[0]
    if int(ds.get("NumberOfFrames", 1) or 1) > 1:
        raise Quarantined("unsupported_layout", "a radiograph of several frames")
    pixels = dicom_pixels.decode([(ds, None, ())], "XR")
    spacing = ds.get("PixelSpacing")
    if spacing is None and ds.get("ImagerPixelSpacing") is not None:
        magnification = float(ds.get("EstimatedRadiographicMagnificationFactor") or 1.0)
        spacing = [float(v) / magnification for v in ds.ImagerPixelSpacing]
    affine = np.eye(4)
    if spacing is not None:
        y, x = (float(v) for v in spacing)
        affine = np.diag([x, y, x, 1.0])
    return Raw(
        frames=pixels.array[np.newaxis],
        affine=affine,
        slope=pixels.slope,
        intercept=pixels.intercept,
        spacing_known=spacing is not None,
        has_position=False,
        modality="XR",
        units="arbitrary",
        padding=None if pixels.padding is None else pixels.padding[np.newaxis],
        provenance=technical_fields(ds, pixels.notes),
    )


def _number(value: Any) -> float:
    try:
        return float(listed(value)[0]) if isinstance(value, (list, tuple)) else float(value)
    except (TypeError, ValueError, IndexError):
        return 0.0
