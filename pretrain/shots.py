"""What probes learn from, the features and labels of a few images; and Dice on what is known of others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


class Shot(NamedTuple):
    """A labelled image as n tokens of D features and P voxels, with C classes."""

    features: Tensor  # (n, D)
    truth: Tensor  # (C, n, P) bool
    known: Tensor  # (n, P) bool: voxels of the image whose classes are known
    learnable: Tensor  # (n,) bool: tokens of the image without a voxel of unknown class
    annotated: tuple[bool, ...]  # (C,): whether the class was looked for; else all its voxels are unknown


def alike(shots: Sequence[Shot]) -> dict[tuple[int, ...], list[int]]:
    """Classes by the shots that are annotated for them, {shots: classes}; they share a fit's matrices."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for label, annotated in enumerate(zip(*(shot.annotated for shot in shots))):
        groups.setdefault(tuple(n for n, yes in enumerate(annotated) if yes), []).append(label)
    return groups


def overlap(found: Tensor, truth: Tensor, known: Tensor) -> tuple[int, int, int]:
    """Known voxels that are found and true, found, and true; all inputs of one shape, bool."""
    found, truth = found & known, truth & known
    return int((found & truth).sum()), int(found.sum()), int(truth.sum())


def dice(both: float, found: float, true: float) -> float | None:
    """Dice coefficient of `overlap`'s counts; None where neither holds a voxel."""
    return 2 * both / (found + true) if found + true else None
