"""Burned-in annotation on radiographs: names, dates and side markers found by their strokes.

A classical detector, built of the steps that text detection in scenes is built of (strokes of one width:
Epshtein, Ofek and Wexler, CVPR 2010; components chained to lines: Neumann and Matas, ACCV 2010), for what
burned-in text is: thin strokes of nearly one value, sharply brighter or darker than what surrounds them, as
tall as their neighbours on the line. It reads nothing and knows no alphabet. It misses text and takes some
anatomy for text; `benchmarks/privacy.py` measures both, and the figures stand in docs/privacy.md.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
from scipy import ndimage
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from data_pipeline.volume import Volume

STROKE = 5  # pixels: strokes narrower than this are found, at each octave
GLYPH = (4, 44)  # pixels: longer side of a component that may be a glyph, at each octave
COARSEST = 200  # pixels: no octave is smaller than this on its shorter side, but the first
WEAK, LINE, LONE = (
    0.07,
    0.13,
    0.18,
)  # contrast of a stroke: to be looked at, of a line's mean, of a single mark
SHARP = 0.7  # largest step over 3 pixels along the edge of a glyph ÷ its contrast
UNEVEN = 0.4  # largest standard deviation inside a glyph ÷ its contrast
CLEAR = 0.13  # contrast of marks that are chained once more without the weaker ones, which may be anatomy
CROOKED = 0.10  # largest standard deviation of the glyphs' feet, heads or middles ÷ their height
LEVEL = 0.7  # least median height of a line's glyphs ÷ the line's height
SALIENT = 3.2  # least contrast of a line ÷ mean contrast of all strokes around it
GAP = 2.5  # of the height: widest gap between two found parts of a line that is masked too
MARGIN = 0.5  # of a line's height, grown on every side; at least 2 pixels
LARGEST_MARKS = 2000  # components of one octave and polarity; the strongest are kept


def text_mask(volume: Volume) -> np.ndarray:
    """Where a radiograph may hold burned-in text: bool, (z, y, x) of `volume`, True to hide.

    Every plane across the axis of length 1 (else the first axis) and every channel is searched. Both
    polarities and strokes up to about 3 % of the picture's width are; text along either axis is, oblique
    text only if its glyphs stand out one by one. Found lines are masked as filled boxes with a margin. The
    mask of a picture does not change with the scale and offset of its values, nor with inversion.
    """
    axis = volume.shape.index(1) if 1 in volume.shape else 0
    mask = np.zeros(volume.shape, bool)
    for channel in range(len(volume.channels)):
        for plane, target in zip(np.moveaxis(volume.real(channel), axis, 0), np.moveaxis(mask, axis, 0)):
            target |= _plane_mask(plane)
    return mask


@dataclass(frozen=True)
class _Marks:
    """Stroke-like components of a picture: boxes in pixels (stops exclusive) and features, arrays of one
    length."""

    top: np.ndarray
    left: np.ndarray
    bottom: np.ndarray
    right: np.ndarray
    contrast: np.ndarray
    sharp: np.ndarray
    uneven: np.ndarray
    fill: np.ndarray

    def take(self, which: np.ndarray) -> _Marks:
        return _Marks(*(getattr(self, f.name)[which] for f in fields(self)))

    def turned(self) -> _Marks:
        """The same with y and x exchanged."""
        return _Marks(
            self.left, self.top, self.right, self.bottom, self.contrast, self.sharp, self.uneven, self.fill
        )


def _plane_mask(plane: np.ndarray) -> np.ndarray:
    """(rows, columns) bool for real values, NaN where invalid."""
    mask = np.zeros(plane.shape, bool)
    there = np.isfinite(plane)
    if not there.any():
        return mask
    low, high = np.percentile(plane[there], (0.5, 99.5))
    low, high = (low, high) if high > low else (plane[there].min(), plane[there].max())
    if high == low:
        return mask
    picture = np.where(there, (plane - low) / (high - low), 0.0).clip(-0.25, 1.25).astype(np.float32)
    scale = 1
    while True:
        for image in (picture, -picture):
            hat = image - ndimage.grey_opening(image, (STROKE, STROKE))
            marks = _glyphs(_marks(image, hat))
            for least in (0.0, CLEAR):
                some = marks.take(marks.contrast >= least)
                for top, left, bottom, right in _lines(some, hat) + _turned(_lines(some.turned(), hat.T)):
                    mask[top * scale : bottom * scale, left * scale : right * scale] = True
        if min(picture.shape) // 2 < COARSEST:
            return mask
        picture, scale = _halved(picture), 2 * scale


def _turned(boxes: list[tuple[int, int, int, int]]) -> list[tuple[int, int, int, int]]:
    return [(left, top, right, bottom) for top, left, bottom, right in boxes]


def _halved(picture: np.ndarray) -> np.ndarray:
    """Means of 2 x 2 pixels; an odd last row or column is repeated."""
    padded = np.pad(picture, [(0, n % 2) for n in picture.shape], mode="edge")
    return padded.reshape(padded.shape[0] // 2, 2, padded.shape[1] // 2, 2).mean((1, 3))


def _marks(image: np.ndarray, hat: np.ndarray) -> _Marks:
    """Components that are brighter than their surroundings, by `hat`, and vanish under an opening."""
    # Half of the local peak is the edge of a glyph, however it was smoothed and whatever its contrast.
    found = (hat > WEAK) & (hat > 0.5 * ndimage.maximum_filter(hat, 7))
    numbers, count = ndimage.label(found, np.ones((3, 3)))
    boxes = ndimage.find_objects(numbers)
    edges = np.array([(b[0].start, b[1].start, b[0].stop, b[1].stop) for b in boxes], int).reshape(-1, 4)
    top, left, bottom, right = edges.T
    pixels = np.flatnonzero(found)
    owner = numbers.ravel()[pixels] - 1
    area = np.maximum(np.bincount(owner, minlength=count), 1)

    def mean(values: np.ndarray) -> np.ndarray:
        return np.bincount(owner, values, count) / area

    contrast = mean(hat.ravel()[pixels])
    values = image.ravel()[pixels].astype(np.float64)
    spread = np.sqrt(np.maximum(mean(values**2) - mean(values) ** 2, 0))
    step = ndimage.maximum_filter(image, 3) - ndimage.minimum_filter(image, 3)
    on_edge = (found & ~ndimage.binary_erosion(found, border_value=1)).ravel()[pixels]
    length = np.maximum(np.bincount(owner, on_edge, count), 1)
    sharp = np.bincount(owner, step.ravel()[pixels] * on_edge, count) / length
    return _Marks(
        top, left, bottom, right, contrast, sharp / contrast, spread / contrast,
        area / ((bottom - top) * (right - left)),
    )  # fmt: skip


def _glyphs(marks: _Marks) -> _Marks:
    """Those of the marks that may be glyphs, or runs of touching ones."""
    height, width = marks.bottom - marks.top, marks.right - marks.left
    longer, shorter = np.maximum(height, width), np.minimum(height, width)
    keep = (
        (longer >= GLYPH[0])
        & (shorter <= GLYPH[1])
        & (longer <= 8 * GLYPH[1])
        & (marks.sharp >= SHARP)
        & (marks.uneven <= UNEVEN)
        & (marks.fill >= 0.15)
    )
    kept = np.flatnonzero(keep)
    return marks.take(kept[np.argsort(-marks.contrast[kept], kind="stable")[:LARGEST_MARKS]])


def _lines(marks: _Marks, hat: np.ndarray) -> list[tuple[int, int, int, int]]:
    """Boxes (top, left, bottom, right), with margin, of lines of text along x and of single marks."""
    if not len(marks.top):
        return []
    height, width = marks.bottom - marks.top, marks.right - marks.left
    shorter, taller = np.minimum(height[:, None], height), np.maximum(height[:, None], height)
    overlap = np.minimum(marks.bottom[:, None], marks.bottom) - np.maximum(marks.top[:, None], marks.top)
    gap = np.maximum(marks.left[:, None], marks.left) - np.minimum(marks.right[:, None], marks.right)
    weaker, stronger = (pick(marks.contrast[:, None], marks.contrast) for pick in (np.minimum, np.maximum))
    joined = (
        (overlap >= 0.6 * shorter) & (taller <= 1.8 * shorter) & (gap <= taller) & (stronger <= 2 * weaker)
    )
    _, line = connected_components(coo_matrix(joined), directed=False)
    groups = np.split(np.argsort(line, kind="stable"), np.cumsum(np.bincount(line))[:-1])
    glyph = (height <= GLYPH[1]) & (width <= 6 * height) & (height <= 4 * width)
    sums = np.pad(hat, ((1, 0), (1, 0))).cumsum(0, dtype=np.float64).cumsum(1)
    lines, lone = [], []
    for of in groups:
        box = _around(marks, of)
        if len(of) >= 3 and _is_line(marks, of, box, sums):
            lines.append(box)
        else:
            strong = of[glyph[of] & (marks.contrast[of] >= LONE)]
            lone += [_around(marks, strong[n : n + 1]) for n in range(len(strong))]
    # The last letter of a line is missed more often than one between others.
    return (
        [_grown(box, 1.0) for box in lines]
        + [_grown(box, MARGIN) for box in lone]
        + [_grown(box, 1.0) for box in _between(lines + lone)]
    )


def _between(boxes: list[tuple[int, int, int, int]]) -> list[tuple[int, int, int, int]]:
    """Boxes that bridge two found ones of one line: the letters between them were missed."""
    bridges = []
    ordered = sorted(boxes, key=lambda box: box[1])
    for n, (top, left, bottom, right) in enumerate(ordered):
        for other in ordered[n + 1 :]:
            shorter, taller = sorted((bottom - top, other[2] - other[0]))
            overlap = min(bottom, other[2]) - max(top, other[0])
            if overlap >= 0.7 * shorter and taller <= 1.5 * shorter and 0 < other[1] - right <= GAP * taller:
                bridges.append((min(top, other[0]), left, max(bottom, other[2]), other[3]))
    return bridges


def _grown(box: tuple[int, int, int, int], along: float) -> tuple[int, int, int, int]:
    """A box grown by `along` of its height along the line and `MARGIN` across."""
    top, left, bottom, right = box
    x, y = (max(2, round(share * (bottom - top))) for share in (along, MARGIN))
    return max(top - y, 0), max(left - x, 0), bottom + y, right + x


def _around(marks: _Marks, of: np.ndarray) -> tuple[int, int, int, int]:
    return (
        int(marks.top[of].min()), int(marks.left[of].min()),
        int(marks.bottom[of].max()), int(marks.right[of].max()),
    )  # fmt: skip


def _is_line(marks: _Marks, of: np.ndarray, box: tuple[int, int, int, int], sums: np.ndarray) -> bool:
    """Whether a chain of marks stands on a line and stands out from what is around it."""
    top, left, bottom, right = box
    contrast = float(marks.contrast[of].mean())
    high = float(np.median(marks.bottom[of] - marks.top[of]))
    # Letters share a foot or a head; descenders and dots are why the better of the two is taken.
    uneven = (
        min(float(ends[of].std()) for ends in (marks.top, marks.bottom, (marks.top + marks.bottom) / 2))
        / high
    )
    if (
        contrast < LINE
        or uneven > CROOKED
        or high < LEVEL * (bottom - top)
        or right - left < 1.5 * (bottom - top)
    ):
        return False
    reach = max(bottom - top, 8)
    outer, outer_area = _sum(sums, top - 2 - reach, left - 2 - reach, bottom + 2 + reach, right + 2 + reach)
    inner, inner_area = _sum(sums, top - 2, left - 2, bottom + 2, right + 2)
    return contrast >= SALIENT * (outer - inner) / max(outer_area - inner_area, 1)


def _sum(sums: np.ndarray, top: int, left: int, bottom: int, right: int) -> tuple[float, int]:
    """Sum and number of pixels of a box, cut at the picture's edges, of a summed-area table."""
    top, bottom = (min(max(n, 0), sums.shape[0] - 1) for n in (top, bottom))
    left, right = (min(max(n, 0), sums.shape[1] - 1) for n in (left, right))
    total = sums[bottom, right] - sums[top, right] - sums[bottom, left] + sums[top, left]
    return float(total), (bottom - top) * (right - left)
