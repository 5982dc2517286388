"""What probes learn from, the features and labels of a few images; and Dice on what is known of others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

THRESHOLDS = tuple(n / 50 for n in range(1, 41))  # of scores: regression on a rare class seldom reaches 1/2


class Shot(NamedTuple):
    """A labelled image as n tokens of D features and P voxels, with C classes."""

    features: Tensor  # (n, D)
    truth: Tensor  # (C, n, P) bool
    known: Tensor  # (n, P) bool: voxels of the image whose classes are known
    learnable: Tensor  # (n,) bool: tokens of the image without a voxel of unknown class
    annotated: tuple[bool, ...]  # (C,): whether the class was looked for; else all its voxels are unknown


def alike(shots: Sequence[Shot]) -> dict[tuple[int, ...], list[int]]:
    """Classes by the shots that are annotated for them, {shots: classes}; they are learnt together."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for label, annotated in enumerate(zip(*(shot.annotated for shot in shots))):
        groups.setdefault(tuple(n for n, yes in enumerate(annotated) if yes), []).append(label)
    return groups


def tally(scores: Tensor, truth: Tensor, known: Tensor) -> Tensor:
    """Known voxels (C, 2, T + 1) int64 by class, truth, and the number of THRESHOLDS their score is above.

    scores, truth: (C, n, P); known: (n, P).
    """
    cells = len(THRESHOLDS) + 1
    above = torch.bucketize(scores.contiguous(), scores.new_tensor(THRESHOLDS))
    first = torch.arange(len(scores), device=scores.device)[:, None, None] * 2 + truth
    cell = (first * cells + above)[known.expand_as(truth)]
    return torch.bincount(cell, minlength=len(scores) * 2 * cells).view(-1, 2, cells)


def dice_by_threshold(counts: Tensor) -> Tensor:
    """Dice (..., T) float64 at each of THRESHOLDS, from tallies (..., 2, T + 1); 0 for 0 voxels."""
    above = counts.flip(-1).cumsum(-1).flip(-1)[..., 1:].double()
    true = counts[..., 1, :].sum(-1, keepdim=True)
    return 2 * above[..., 1, :] / (above.sum(-2) + true).clamp(min=1)


def overlap(found: Tensor, truth: Tensor, known: Tensor) -> tuple[int, int, int]:
    """Known voxels that are found and true, found, and true; all inputs of one shape, bool."""
    found, truth = found & known, truth & known
    return int((found & truth).sum()), int(found.sum()), int(truth.sum())


def dice(both: float, found: float, true: float) -> float | None:
    """Dice coefficient of `overlap`'s counts; None where neither holds a voxel."""
    return 2 * both / (found + true) if found + true else None
