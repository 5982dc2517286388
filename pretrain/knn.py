"""A segmentation probe without any training: each token takes the labels of the tokens most like it.

The k shot tokens nearest by cosine vote with the labels of their own voxels, weighted by exp(similarity /
0.07): the weighted kNN of Wu et al. 2018 and DINO (Caron et al. 2021), with label patches in the place of
class names as in Hummingbird (Balažević et al. 2023). A voxel is of a class where its share of the votes is
above the threshold that gives the best Dice when each shot is segmented by the others. So its figure is Dice
at voxel resolution, of the same images as the linear probe's: kNN says whether like anatomy lies close by,
the linear probe whether it can be read off at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from pretrain.shots import THRESHOLDS, Shot, alike, dice_by_threshold, tally

TEMPERATURE = 0.07


class Bank(NamedTuple):
    """Tokens of shots that are annotated for the same C classes."""

    features: Tensor  # (m, D)
    truth: Tensor  # (C, m, P) bool
    known: Tensor  # (m, P) bool

    def votes(self, queries: Tensor, k: int) -> Tensor:
        """Share of the votes (C, n, P) float32 for each class, for queries (n, D).

        A neighbour whose voxel is of unknown class has no vote there; 0 where nobody has.
        """
        near, weight = neighbours(queries, self.features, k)
        votes = weight.new_zeros(len(self.truth), len(queries), self.truth.shape[2])
        cast = torch.zeros_like(votes[0])
        for place, one in zip(near.unbind(1), weight.unbind(1)):  # one neighbour at a time bounds memory
            votes += one[:, None] * (self.truth[:, place] & self.known[place])
            cast += one[:, None] * self.known[place]
        return votes / cast.clamp(min=1e-12)


class Knn:
    """The shots' tokens, and for each class the threshold on its share of the votes."""

    def __init__(self, shots: Sequence[Shot], k: int) -> None:
        self.k = k
        self.banks: list[tuple[list[int], Bank, list[float]]] = []  # classes, their tokens, their thresholds
        for used, classes in alike(shots).items():
            mine = [shots[n]._replace(truth=shots[n].truth[classes]) for n in used]
            counts = sum(
                tally(_bank([other for other in mine if other is not shot]).votes(shot.features, k),
                      shot.truth, shot.known)
                for shot in mine
            )  # fmt: skip
            best = dice_by_threshold(torch.as_tensor(counts)).argmax(1).tolist()
            self.banks.append((classes, _bank(mine), [THRESHOLDS[place] for place in best]))

    def segment(self, features: Tensor) -> dict[int, Tensor]:
        """(n, P) bool for each class by its number, from the features (n, D) of n tokens."""
        return {
            label: votes > threshold
            for classes, bank, thresholds in self.banks
            for label, votes, threshold in zip(classes, bank.votes(features, self.k), thresholds)
        }


def neighbours(queries: Tensor, bank: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Places (n, k) in the bank of the nearest by cosine, nearest first, and their weights, of sum 1.

    k is at most the size of the bank.
    """
    similarity = functional.normalize(queries, dim=1) @ functional.normalize(bank, dim=1).T
    value, place = similarity.topk(min(k, len(bank)), dim=1)
    return place, (value / TEMPERATURE).softmax(1)


def _bank(shots: Sequence[Shot]) -> Bank:
    """Those of the shots' tokens that hold a known voxel."""
    there = [shot.known.any(1) for shot in shots]
    return Bank(
        torch.cat([shot.features[mask] for shot, mask in zip(shots, there)]),
        torch.cat([shot.truth[:, mask] for shot, mask in zip(shots, there)], dim=1),
        torch.cat([shot.known[mask] for shot, mask in zip(shots, there)]),
    )
