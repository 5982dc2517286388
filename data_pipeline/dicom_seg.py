"""DICOM segmentations onto the grid of their image: bits, fractions and label maps, segment by segment.

Source: DICOM PS3.3 A.51 and C.8.20 (segmentation image), PS3.5 8.1.1 (packing of bits). Frames that coincide
with slices of the image are copied voxel for voxel, each by its own plane position, so that slices without a
frame stay empty; frames on another grid are resampled like any other label.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data_pipeline.errors import Quarantined
from data_pipeline.label_layers import Layers, Slices, merge
from data_pipeline.labels import MAX_LOST, SAME_GRID, Label, classes_of, resample
from data_pipeline.readers.dicom_references import items
from data_pipeline.readers.dicom_series import read_header
from data_pipeline.volume import Channel, Volume

if TYPE_CHECKING:
    from pydicom import Dataset

EVEN = 0.1  # share of a frame distance by which frames may lie off an even grid
MOST_SLICES = 4096  # of a segmentation on a grid of its own


@dataclass(frozen=True)
class Frames:
    """Planes of a segmentation. ``segments`` gives each frame's segment number, or is None for a label map.

    ``row`` and ``column`` are LPS mm from a pixel to the next along a row and along a column, ``positions``
    (frame, 3) the LPS mm of each first pixel's centre, ``shape`` (rows, columns).
    """

    segments: tuple[int, ...] | None
    row: np.ndarray
    column: np.ndarray
    positions: np.ndarray
    distance: float | None
    shape: tuple[int, int]


def place(
    path: Path,
    volume: Volume,
    regions: Mapping[str, tuple[int, ...]],
    ids: Mapping[str, int],
    threshold: float | None = None,
) -> Label:
    """The segments of a SEG on the grid of ``volume``; ``regions`` maps names to segment numbers.

    ``threshold`` (0 to 1) is the fraction from which a voxel of a FRACTIONAL segmentation belongs to its
    segment. A segment without a frame was looked for and is not there. Raises `Quarantined` ``label_grey``
    for fractions without a threshold, ``label_outside`` where more than 5 % lies outside the image,
    ``label_geometry`` for planes that are no stack, ``label_values``, ``label_unreadable``.
    """
    ds = read_header(path, with_pixels=True)
    try:
        frames = _frames(ds)
        masks = _masks(ds, frames, regions, threshold)
        automatic = _automatic(ds, regions)
        label = _on_grid(frames, volume, masks, ids) or _resampled(frames, volume, masks, ids)
    except (Quarantined, MemoryError):
        raise
    except Exception as error:  # a damaged element fails in any of pydicom's conversions
        raise Quarantined("label_unreadable", type(error).__name__, path) from error
    return Label(
        label.layers,
        label.classes,
        label.placed,
        label.lost,
        label.volume_change,
        tuple(regions),
        {},
        "model" if automatic else "unknown",
    )


#: Each name with its frames: number of the frame -> mask (rows, columns).
Masks = Callable[[], Iterator[tuple[str, Slices]]]


def _frames(ds: Dataset) -> Frames:
    per_frame = items(ds, "PerFrameFunctionalGroupsSequence")
    shared = next(iter(items(ds, "SharedFunctionalGroupsSequence")), None)
    if not per_frame or len(per_frame) != int(ds.get("NumberOfFrames", 1) or 1):
        raise Quarantined("label_unreadable", f"{len(per_frame)} frames described")
    orientations, spacings, positions, segments = [], [], [], []
    for group in per_frame:
        orientations.append(_value(group, shared, "PlaneOrientationSequence", "ImageOrientationPatient"))
        spacings.append(_value(group, shared, "PixelMeasuresSequence", "PixelSpacing"))
        positions.append(_value(group, shared, "PlanePositionSequence", "ImagePositionPatient"))
        number = _value(group, shared, "SegmentIdentificationSequence", "ReferencedSegmentNumber")
        segments.append(None if number is None else int(number))
    if any(value is None for value in (*orientations, *spacings, *positions)):
        raise Quarantined("label_geometry", "frames without a place in the patient")
    vectors = np.array(orientations, np.float64).reshape(-1, 2, 3)
    pixel = np.array(spacings, np.float64)
    if np.abs(vectors - vectors[0]).max() > 2e-3 or not np.allclose(pixel, pixel[0], rtol=1e-3):
        raise Quarantined("label_geometry", "frames of several orientations or pixel spacings")
    labelmap = str(ds.get("SegmentationType", "")).upper() == "LABELMAP"
    if not labelmap and None in segments:
        raise Quarantined("label_unreadable", "frames without a segment number")
    distance = _value(per_frame[0], shared, "PixelMeasuresSequence", "SpacingBetweenSlices")
    distance = distance or _value(per_frame[0], shared, "PixelMeasuresSequence", "SliceThickness")
    return Frames(
        None if labelmap else tuple(n for n in segments if n is not None),
        vectors[0, 0] * pixel[0, 1],
        vectors[0, 1] * pixel[0, 0],
        np.array(positions, np.float64),
        abs(float(distance)) if distance else None,
        (int(ds.Rows), int(ds.Columns)),
    )


def _value(group: Dataset, shared: Dataset | None, sequence: str, name: str) -> Any:
    for place in (group, shared):
        for item in items(place, sequence):
            if item.get(name) is not None:
                return item.get(name)
    return None


def _automatic(ds: Dataset, regions: Mapping[str, tuple[int, ...]]) -> bool:
    used = {number for numbers in regions.values() for number in numbers}
    return any(
        str(s.get("SegmentAlgorithmType", "") or "").strip().upper() == "AUTOMATIC"
        for s in items(ds, "SegmentSequence")
        if int(s.SegmentNumber) in used
    )


def _masks(
    ds: Dataset, frames: Frames, regions: Mapping[str, tuple[int, ...]], threshold: float | None
) -> Masks:
    """What gives the masks of each name, frame by frame; they are decoded when asked for."""
    kind = str(ds.get("SegmentationType", "") or "").upper()
    if kind == "FRACTIONAL":
        if threshold is None:
            raise Quarantined("label_grey", "a FRACTIONAL segmentation; state label_threshold")
        if not 0 < threshold <= 1:
            raise Quarantined("label_grey", "label_threshold of fractions lies between 0 and 1")
    elif kind not in ("BINARY", "LABELMAP"):
        raise Quarantined("label_unreadable", "neither BINARY, FRACTIONAL nor LABELMAP")
    described = [int(s.SegmentNumber) for s in items(ds, "SegmentSequence")]
    if len(set(described)) < len(described):
        raise Quarantined("label_unreadable", "two segments of one number")
    pixels = _decoder(ds, frames)
    if frames.segments is None:
        return _labelmap(ds, pixels, len(frames.positions), regions)
    numbers = frames.segments
    if undeclared := set(numbers) - set(described):
        raise Quarantined("label_values", f"frames of {len(undeclared)} segments that are not described")
    lowest = 1.0 if kind == "BINARY" else (threshold or 1.0) * float(ds.get("MaximumFractionalValue") or 255)

    def masks() -> Iterator[tuple[str, Slices]]:
        for name, wanted in regions.items():
            yield name, {n: pixels(n) >= lowest for n, number in enumerate(numbers) if number in wanted}

    return masks


def _labelmap(
    ds: Dataset, pixels: Callable[[int], np.ndarray], count: int, regions: Mapping[str, tuple[int, ...]]
) -> Masks:
    declared = {0, int(ds.get("PixelPaddingValue", 0) or 0)}
    declared |= {int(s.SegmentNumber) for s in items(ds, "SegmentSequence")}
    planes = [pixels(n) for n in range(count)]
    values = np.unique(np.concatenate([np.unique(plane) for plane in planes]))
    if undeclared := {int(v) for v in values} - declared:
        raise Quarantined("label_values", f"{len(undeclared)} values without a segment")

    def masks() -> Iterator[tuple[str, Slices]]:
        for name, wanted in regions.items():
            yield name, {n: np.isin(plane, wanted) for n, plane in enumerate(planes)}

    return masks


def _decoder(ds: Dataset, frames: Frames) -> Callable[[int], np.ndarray]:
    """What gives the stored values (rows, columns) of frame n."""
    if "PixelData" not in ds:
        raise Quarantined("label_unreadable", "no pixel data")
    syntax = ds.file_meta.TransferSyntaxUID
    size = frames.shape[0] * frames.shape[1]
    if int(ds.BitsAllocated) == 1 and not syntax.is_encapsulated:
        packed = np.frombuffer(ds.PixelData, np.uint8)
        if len(packed) * 8 < size * len(frames.positions):
            raise Quarantined("label_unreadable", "fewer bits than voxels")

        def bits(n: int) -> np.ndarray:
            first = n * size
            window = packed[first // 8 : (first + size + 7) // 8]
            flat = np.unpackbits(window, bitorder="little")[first % 8 : first % 8 + size]
            return flat.reshape(frames.shape)

        return bits
    from pydicom.pixels import get_decoder

    decoder = get_decoder(syntax)
    return lambda n: decoder.as_array(ds, index=n, raw=True)[0].reshape(frames.shape)


def _on_grid(frames: Frames, volume: Volume, masks: Masks, ids: Mapping[str, int]) -> Label | None:
    """Frame by frame onto the slices they coincide with; None where one lies off the grid by more than a
    tenth of a voxel."""
    to_index = np.linalg.inv(volume.affine)
    row, column = ((to_index[:3, :3] @ v)[::-1] for v in (frames.row, frames.column))  # (z, y, x)
    first = (frames.positions @ to_index[:3, :3].T + to_index[:3, 3])[:, ::-1]
    across, down = int(np.abs(row).argmax()), int(np.abs(column).argmax())
    if across == down:
        return None
    steps = np.zeros((2, 3))
    steps[0, across], steps[1, down] = np.sign(row[across]), np.sign(column[down])
    start = np.round(first)
    for j in (0, frames.shape[0] - 1):
        for i in (0, frames.shape[1] - 1):
            off = first + i * row + j * column - (start + i * steps[0] + j * steps[1])
            if np.abs(off).max() > SAME_GRID:
                return None
    axis = 3 - across - down
    columns = np.arange(frames.shape[1]) * int(steps[0, across])
    rows = np.arange(frames.shape[0]) * int(steps[1, down])
    size = volume.shape[down], volume.shape[across]
    layers = Layers(volume.shape, axis)
    lost: dict[int, float] = {}
    outside = kept = 0
    for name, found in masks():
        slices: Slices = {}
        beyond = 0
        for n, mask in found.items():
            at = start[n].astype(int)
            plane, left = _pasted(mask, at[down] + rows, at[across] + columns, size)
            if not 0 <= at[axis] < volume.shape[axis]:
                beyond += int(mask.sum())
                continue
            merge(slices, {int(at[axis]): plane if down < across else plane.T})
            beyond += left
        inside = sum(int(mask.sum()) for mask in slices.values())
        layers.add(ids[name], slices)
        outside, kept = outside + beyond, kept + inside
        if beyond:
            lost[ids[name]] = beyond / (beyond + inside)
    if outside and kept == 0:
        raise Quarantined("label_outside", "no overlap")
    if outside and outside / (outside + kept) > MAX_LOST:
        raise Quarantined("label_outside", f"{outside / (outside + kept):.1%} of the labelled voxels")
    stacked = layers.stacked()
    return Label(stacked, classes_of(stacked), "grid", lost, {})


def _pasted(
    mask: np.ndarray, rows: np.ndarray, columns: np.ndarray, size: tuple[int, int]
) -> tuple[np.ndarray, int]:
    """A mask at rows and columns of another plane, and how many of its voxels lie outside."""
    plane = np.zeros(size, bool)
    down, across = (rows >= 0) & (rows < size[0]), (columns >= 0) & (columns < size[1])
    inner = mask[np.ix_(down, across)]
    plane[np.ix_(rows[down], columns[across])] = inner
    return plane, int(mask.sum()) - int(inner.sum())


def _resampled(frames: Frames, volume: Volume, masks: Masks, ids: Mapping[str, int]) -> Label:
    affine, numbers = _stack(frames, volume)
    shape = (int(numbers.max()) + 1, *frames.shape)
    layers = Layers(shape)
    for name, found in masks():
        slices: Slices = {}
        for n, mask in found.items():
            merge(slices, {int(numbers[n]): mask})
        layers.add(ids[name], slices)
    stacked = layers.stacked()
    channel = Channel("label", "MR", "arbitrary")
    return resample(Volume.on_grid(stacked, (channel,) * len(stacked), affine).to_lps(), volume)


def _stack(frames: Frames, volume: Volume) -> tuple[np.ndarray, np.ndarray]:
    """The affine of the evenly spaced stack that all frames lie on, and each frame's slice in it."""
    normal = np.cross(frames.row, frames.column)
    normal /= np.linalg.norm(normal)
    along = frames.positions @ normal
    order = np.argsort(along, kind="stable")
    gaps = np.diff(along[order])
    gaps = gaps[gaps > 1e-2]
    affine = np.eye(4)
    affine[:3, 0], affine[:3, 1], affine[:3, 3] = frames.row, frames.column, frames.positions[order[0]]
    if len(gaps) == 0:
        affine[:3, 2] = normal * (frames.distance or volume.spacing[volume.axes.index(0)])
        return affine, np.zeros(len(along), int)
    numbers = (along - along.min()) / gaps.min()
    if np.abs(numbers - np.round(numbers)).max() > EVEN or numbers.max() >= MOST_SLICES:
        raise Quarantined("label_geometry", "frames at uneven distances")
    numbers = np.round(numbers).astype(int)
    last = int(numbers.argmax())
    affine[:3, 2] = (frames.positions[last] - frames.positions[order[0]]) / numbers.max()
    return affine, numbers
