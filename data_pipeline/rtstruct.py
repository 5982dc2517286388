"""RTSTRUCT contours to voxels: closed planar contours, filled at voxel centres, on any grid in patient space.

Source: DICOM PS3.3 C.8.8.6 (ROI contour module). A voxel belongs to a structure if its centre lies inside an
odd number of the structure's contours on its slice, so that a contour within another is a hole. Centres on an
edge belong to the side of growing row and column, so that two structures that share an edge share no voxel.
Nothing is filled between slices.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from data_pipeline.errors import Quarantined
from data_pipeline.label_layers import Layers, Slices, merge
from data_pipeline.labels import MAX_LOST, Label, classes_of
from data_pipeline.readers.dicom_references import items
from data_pipeline.readers.dicom_series import read_header
from data_pipeline.volume import Volume

CLOSED = ("CLOSED_PLANAR", "CLOSEDPLANAR_XOR")
SAME_PLANE = 0.05  # slice distances: contours nearer than this lie in one plane
LEAN = 0.5  # slice distances that the points of one contour may differ in
FARTHEST = 1e5  # voxels from the image
DECIMALS = 4  # of a voxel: rounding of the header must not decide on which side of a centre an edge lies


@dataclass
class Drawing:
    """Closed contours of one ROI, each (points, 3) in LPS mm, and what was left out of it."""

    contours: list[np.ndarray] = field(default_factory=list)
    automatic: bool = False
    skipped: int = 0


def place(
    path: Path, volume: Volume, regions: Mapping[str, tuple[int, ...]], ids: Mapping[str, int]
) -> Label:
    """The structures of an RTSTRUCT on the grid of ``volume``; ``regions`` maps names to ROI numbers.

    Names whose ROIs hold no closed contour were not annotated (planning systems list empty ROIs), nor are
    those whose contours hold no voxel's centre. Raises `Quarantined` ``label_empty`` where none is left,
    ``label_contours`` for contours across the slices, ``label_outside`` where more than 5 % lies outside the
    image, ``label_unreadable``.
    """
    wanted = {number for numbers in regions.values() for number in numbers}
    drawings = read_contours(path, wanted)
    axis = volume.axes.index(0)
    layers = Layers(volume.shape, axis)
    notes: Counter[str] = Counter()
    lost: dict[int, float] = {}
    annotated = []
    outside = kept = 0
    for name, numbers in regions.items():
        own = [drawings[n] for n in numbers if n in drawings]
        notes["contours_skipped"] += sum(d.skipped for d in own)
        if not any(d.contours for d in own):
            notes["structures_without_contour"] += 1
            continue
        slices: Slices = {}
        beyond = 0
        for drawing in own:
            made, left = rasterise(drawing.contours, volume, axis, notes)
            merge(slices, made)
            beyond += left
        inside = sum(int(mask.sum()) for mask in slices.values())
        if inside + beyond == 0:  # drawn, but smaller than a voxel: present, so not "looked for and absent"
            notes["structures_without_voxel"] += 1
            continue
        annotated.append(name)
        layers.add(ids[name], slices)
        outside, kept = outside + beyond, kept + inside
        if beyond:
            lost[ids[name]] = beyond / (beyond + inside)
    if not annotated:
        raise Quarantined("label_empty", f"{len(regions)} structures without a closed contour around a voxel")
    if kept == 0 and outside > 0:
        raise Quarantined("label_outside", "no overlap")
    if outside and outside / (outside + kept) > MAX_LOST:
        raise Quarantined("label_outside", f"{outside / (outside + kept):.1%} of the labelled voxels")
    stacked = layers.stacked()
    return Label(
        stacked,
        classes_of(stacked),
        "contours",
        lost,
        {},
        tuple(annotated),
        {name: str(count) for name, count in notes.items() if count},
        "model" if any(d.automatic for d in drawings.values()) else "unknown",
    )


def read_contours(path: Path, numbers: Iterable[int]) -> dict[int, Drawing]:
    """The closed contours of the ROIs of these numbers. Raises `Quarantined` where the file is damaged."""
    wanted = set(numbers)
    ds = read_header(path)
    found: dict[int, Drawing] = {}
    try:
        for roi in items(ds, "StructureSetROISequence"):
            if int(roi.ROINumber) in wanted:
                if int(roi.ROINumber) in found:
                    raise Quarantined("label_unreadable", "two structures of one number")
                algorithm = str(roi.get("ROIGenerationAlgorithm", "") or "").strip().upper()
                found[int(roi.ROINumber)] = Drawing(automatic=algorithm == "AUTOMATIC")
        for roi in items(ds, "ROIContourSequence"):
            drawing = found.get(int(roi.ReferencedROINumber))
            if drawing is None:
                continue
            for contour in items(roi, "ContourSequence"):
                kind = str(contour.get("ContourGeometricType", "") or "").strip().upper()
                values = contour.get("ContourData")
                points = np.array([float(v) for v in values or ()], np.float64)
                if len(points) % 3 or not np.isfinite(points).all():
                    raise Quarantined("label_unreadable", "contour points that are no triples of numbers")
                if kind in CLOSED and len(points) >= 9:
                    drawing.contours.append(points.reshape(-1, 3))
                else:
                    drawing.skipped += 1
    except Quarantined:
        raise
    except Exception as error:  # a damaged element fails in any of pydicom's conversions
        raise Quarantined("label_unreadable", type(error).__name__, path) from error
    return found


def rasterise(
    contours: Sequence[np.ndarray], volume: Volume, axis: int, notes: Counter[str]
) -> tuple[Slices, int]:
    """One ROI's closed contours (points, 3) in LPS mm as slices of the volume's grid, and the number of
    voxels that lie outside it. ``axis`` is the array axis along which the image's slices are stacked.

    A plane of contours goes to the slice nearest to it; of several nearest to one slice, the nearest alone.
    ``notes`` counts ``contours_between_slices`` (those others), ``contours_repeated`` (one outline twice on a
    slice, from any point and either way round, which would undo itself) and ``slices_without_contour``
    (between two with one).
    """
    across = [n for n in range(3) if n != axis]
    shape = (volume.shape[across[0]], volume.shape[across[1]])
    placed = [np.round(volume.index_of_lps_mm(points)[:, ::-1], DECIMALS) for points in contours]
    if any(np.abs(points).max() > FARTHEST for points in placed):
        raise Quarantined("label_contours", "contours far outside the image")
    if leaning := sum(bool(np.ptp(points[:, axis]) > LEAN) for points in placed):
        raise Quarantined("label_contours", f"{leaning} of {len(placed)} contours lie across the slices")
    planes: list[tuple[float, list[np.ndarray]]] = []
    for points in sorted(placed, key=lambda p: float(p[:, axis].mean())):
        along = float(points[:, axis].mean())
        if not planes or along - planes[-1][0] > SAME_PLANE:
            planes.append((along, []))
        planes[-1][1].append(points[:, across])
    nearest: dict[int, tuple[float, list[np.ndarray]]] = {}
    for along, polygons in planes:
        k = int(np.floor(along + 0.5))
        if k in nearest and abs(nearest[k][0] - k) <= abs(along - k):
            notes["contours_between_slices"] += len(polygons)
            continue
        if k in nearest:
            notes["contours_between_slices"] += len(nearest[k][1])
        nearest[k] = along, polygons

    slices: Slices = {}
    outside = 0
    for k, (_, polygons) in nearest.items():
        distinct = {_outline(polygon): polygon for polygon in polygons}
        notes["contours_repeated"] += len(polygons) - len(distinct)
        mask, total = fill(list(distinct.values()), shape)
        if 0 <= k < volume.shape[axis]:
            slices[k] = mask
            outside += total - int(mask.sum())
        else:
            outside += total
    if slices:
        notes["slices_without_contour"] += max(slices) - min(slices) + 1 - len(slices)
    return slices, outside


def _outline(polygon: np.ndarray) -> bytes:
    """The same for one outline whatever point it begins at, whichever way it runs, closed or not."""
    points = [tuple(point) for point in polygon + 0.0]  # no -0.0
    points = [point for n, point in enumerate(points) if point != points[n - 1]] or points[:1]
    turns = []
    for way in (points, points[::-1]):
        first = way.index(min(way))
        turns.append(way[first:] + way[:first])
    return np.array(min(turns)).tobytes()


def fill(polygons: Sequence[np.ndarray], shape: tuple[int, int]) -> tuple[np.ndarray, int]:
    """Pixels whose centres lie inside an odd number of ``polygons``, each (points, 2) as (row, column) with
    centres at whole numbers; an edge closes each from its last point to its first.

    Returns the mask (rows, columns) and the number of such pixels on the unbounded grid. Scan lines: edges
    cross each row at columns between which the inside lies.
    """
    rows, columns = _crossings(polygons)
    order = np.lexsort((columns, rows))
    ordered = columns[order]  # every row is crossed an even number of times
    total = int((ordered[1::2] - ordered[::2]).sum())
    here = (rows >= 0) & (rows < shape[0])
    at = rows[here] * (shape[1] + 1) + np.clip(columns[here], 0, shape[1])
    turns = np.bincount(at, minlength=shape[0] * (shape[1] + 1)).reshape(shape[0], shape[1] + 1)
    return (np.cumsum(turns, axis=1)[:, : shape[1]] & 1).astype(bool), total


def _crossings(polygons: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Row of each crossing of an edge, and the first column whose centre is not left of it."""
    starts = np.concatenate(polygons)
    ends = np.concatenate([np.roll(polygon, -1, axis=0) for polygon in polygons])
    swap = starts[:, 0] > ends[:, 0]  # an edge is cut at the same place from either end
    low, high = np.where(swap[:, None], ends, starts), np.where(swap[:, None], starts, ends)
    first = np.ceil(low[:, 0]).astype(np.int64)
    count = np.ceil(high[:, 0]).astype(np.int64) - first
    edge = np.repeat(np.arange(len(first)), count)
    rows = first[edge] + np.arange(len(edge)) - np.repeat(np.cumsum(count) - count, count)
    share = (rows - low[edge, 0]) / (high[edge, 0] - low[edge, 0])
    columns = low[edge, 1] + share * (high[edge, 1] - low[edge, 1])
    return rows, np.ceil(np.round(columns, DECIMALS + 2)).astype(np.int64)
