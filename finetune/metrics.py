"""Segmentation metrics on the label's own grid, in mm, with the rules for empty masks written down.

Both masks empty: None (left out and counted by the caller). One empty: DSC 0, NSD 0, HD95 the image
diagonal. Surfaces are the voxels of a mask with a face neighbour outside it or outside the image; axes of
length 1 do not count as faces.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from scipy import ndimage


def dsc(predicted: np.ndarray, truth: np.ndarray) -> float | None:
    """Dice similarity coefficient of two bool arrays; None where both are empty."""
    total = int(np.count_nonzero(predicted)) + int(np.count_nonzero(truth))
    return None if total == 0 else 2.0 * int(np.count_nonzero(predicted & truth)) / total


def surface(mask: np.ndarray) -> np.ndarray:
    """The voxels of `mask` (bool, any dimension) that touch its outside across a face."""
    return mask & ~ndimage.binary_erosion(mask, ndimage.generate_binary_structure(mask.ndim, 1))


def surface_distances(
    predicted: np.ndarray, truth: np.ndarray, spacing: Sequence[float]
) -> tuple[np.ndarray, np.ndarray]:
    """Distances in mm from each surface voxel of one non-empty mask to the other's surface:
    (predicted→truth, truth→predicted)."""
    keep = [i for i, n in enumerate(truth.shape) if n > 1]
    spacing = [float(spacing[i]) for i in keep] or [1.0]
    predicted, truth = np.atleast_1d(predicted.squeeze()), np.atleast_1d(truth.squeeze())
    both = ndimage.find_objects((predicted | truth).astype(np.uint8))[0]
    # One voxel of margin keeps faces at the edge of the crop apart from faces at the edge of the image:
    # both are surface.
    predicted, truth = predicted[both], truth[both]
    a, b = surface(predicted), surface(truth)
    to_truth = ndimage.distance_transform_edt(~b, sampling=spacing)
    to_predicted = ndimage.distance_transform_edt(~a, sampling=spacing)
    return to_truth[a], to_predicted[b]


def nsd(
    predicted: np.ndarray, truth: np.ndarray, spacing: Sequence[float], tolerance_mm: float
) -> float | None:
    """Normalised surface distance: share of both surfaces within `tolerance_mm` of the other (Nikolov et
    al. 2021)."""
    if not predicted.any() or not truth.any():
        return None if not predicted.any() and not truth.any() else 0.0
    there, back = surface_distances(predicted, truth, spacing)
    near = int((there <= tolerance_mm).sum()) + int((back <= tolerance_mm).sum())
    return near / (len(there) + len(back))


def hd95(predicted: np.ndarray, truth: np.ndarray, spacing: Sequence[float]) -> float | None:
    """The larger of the two 95th percentiles of surface distance, in mm; the image diagonal where one mask
    is empty."""
    if not predicted.any() or not truth.any():
        if not predicted.any() and not truth.any():
            return None
        return float(np.linalg.norm(np.array(truth.shape) * np.array(spacing)))
    there, back = surface_distances(predicted, truth, spacing)
    return float(max(np.percentile(there, 95), np.percentile(back, 95)))


def auc(by_click: Sequence[float]) -> float:
    """Trapezoid over equally spaced clicks: at most len - 1, so 4 for the challenge's five clicks."""
    values = np.asarray(by_click, dtype=np.float64)
    return float(((values[1:] + values[:-1]) / 2).sum())


def nested_mean(values: Iterable[tuple[str, str, float]]) -> float | None:
    """Mean over the objects of an image, then the images of a subject, then subjects: (subject, image,
    value) rows."""
    images: dict[tuple[str, str], list[float]] = {}
    for subject, image, value in values:
        images.setdefault((subject, image), []).append(value)
    subjects: dict[str, list[float]] = {}
    for (subject, _), objects in images.items():
        subjects.setdefault(subject, []).append(float(np.mean(objects)))
    return float(np.mean([np.mean(v) for v in subjects.values()])) if subjects else None
