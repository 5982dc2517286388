"""A linear segmentation probe in closed form: ridge regression from a token's features to its voxels.

Every voxel of a patch has its own linear map from the features of its token, so that the figure is Dice at
voxel resolution and not that of coarse tokens; all of them share one matrix to invert (Hoerl and Kennard
1970). A class is a regression of its own on 0 and 1, since classes may overlap and need not be annotated in
the same images. Its ridge and its threshold are those with the best Dice on shots left out of the fit:
regression on a rare class seldom reaches 1/2, which would call features useless that are not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pretrain.shots import THRESHOLDS, Shot, alike, dice_by_threshold, tally

RIDGES = (1e-3, 1e-2, 1e-1, 1.0)  # on the diagonal, relative to its mean
FOLDS = 4  # parts of the shots, by position, that are left out in turn
TOGETHER = 4  # classes fitted at a time, so that memory is bounded by shots x D x 4 P


class Linear(NamedTuple):
    """The fitted map of one class: a voxel is of the class where its score is above `threshold`."""

    weight: Tensor  # (D, P)
    bias: Tensor  # (P,)
    ridge: float
    threshold: float

    def score(self, features: Tensor) -> Tensor:
        """(n, P) float64 from the features (n, D) of n tokens."""
        return features.double() @ self.weight + self.bias

    def segment(self, features: Tensor) -> Tensor:
        """(n, P) bool: voxels of the class."""
        return self.score(features) > self.threshold


class _Sums(NamedTuple):
    """Sums over tokens, from which any ridge regression follows."""

    tokens: Tensor  # ()
    x: Tensor  # (D,)
    y: Tensor  # (Q,)
    xx: Tensor  # (D, D)
    xy: Tensor  # (D, Q)

    def solve(self, ridge: float) -> tuple[Tensor, Tensor]:
        """Weight (D, Q) and bias (Q,) of least squares with a penalty of ridge x mean diagonal on weights."""
        x, y = self.x / self.tokens, self.y / self.tokens
        xx = self.xx - self.tokens * x[:, None] * x
        diagonal = xx.diagonal()
        xx = xx + torch.diag(torch.full_like(diagonal, ridge) * diagonal.mean().clamp(min=1e-12))
        xy = self.xy - self.tokens * x[:, None] * y
        weight = torch.cholesky_solve(xy, torch.linalg.cholesky(xx))
        return weight, y - x @ weight


def fit(shots: Sequence[Shot]) -> dict[int, Linear]:
    """The map of every class, by its number; at least two of the shots are annotated for each."""
    mean, deviation = _moments(torch.cat([shot.features[shot.learnable] for shot in shots]).double())
    scaled = [shot._replace(features=(shot.features.double() - mean) / deviation) for shot in shots]
    found: dict[int, Linear] = {}
    for used, group in alike(shots).items():
        for start in range(0, len(group), TOGETHER):
            classes = group[start : start + TOGETHER]
            for label, linear in zip(classes, _fit([scaled[n] for n in used], classes)):
                weight = linear.weight / deviation[:, None]
                found[label] = linear._replace(weight=weight, bias=linear.bias - mean @ weight)
    return found


def _fit(shots: Sequence[Shot], classes: Sequence[int]) -> list[Linear]:
    """Maps of classes that all of the shots are annotated for."""
    sums = [_sums(shot, classes) for shot in shots]
    folds = min(FOLDS, len(shots))
    counts = torch.zeros(len(RIDGES), len(classes), 2, len(THRESHOLDS) + 1, dtype=torch.int64)
    for fold in range(folds):
        kept = _total([s for n, s in enumerate(sums) if n % folds != fold])
        for number, ridge in enumerate(RIDGES):
            weight, bias = kept.solve(ridge)
            for shot in shots[fold::folds]:
                scores = (shot.features @ weight + bias).unflatten(1, (len(classes), -1)).transpose(0, 1)
                counts[number] += tally(scores, shot.truth[list(classes)], shot.known).cpu()
    best = _best(counts)
    total = _total(sums)
    solved = {number: total.solve(RIDGES[number]) for number in sorted({number for number, _ in best})}
    maps = []
    for place, (number, threshold) in enumerate(best):
        weight, bias = (part.chunk(len(classes), dim=-1)[place] for part in solved[number])
        maps.append(Linear(weight, bias, RIDGES[number], THRESHOLDS[threshold]))
    return maps


def _moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (D,) of features (n, D); 1 for one that does not vary."""
    mean = features.mean(0)
    deviation = (features - mean).square().mean(0).sqrt()
    return mean, torch.where(deviation > 0, deviation, 1.0)


def _sums(shot: Shot, classes: Sequence[int]) -> _Sums:
    x = shot.features[shot.learnable]
    y = shot.truth[list(classes)][:, shot.learnable].transpose(0, 1).flatten(1).to(x.dtype)
    return _Sums(x.new_tensor(float(len(x))), x.sum(0), y.sum(0), x.T @ x, x.T @ y)


def _total(parts: Sequence[_Sums]) -> _Sums:
    return _Sums(*(torch.stack(same).sum(0) for same in zip(*parts)))


def _best(counts: Tensor) -> list[tuple[int, int]]:
    """Places of the ridge and the threshold with the highest Dice, for each class, from tallies (ridge,
    class, 2, T + 1).
    """
    dice = dice_by_threshold(counts).transpose(0, 1)
    return [divmod(place, len(THRESHOLDS)) for place in dice.flatten(1).argmax(1).tolist()]
