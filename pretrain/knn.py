"""A segmentation probe without any training: each token takes the labels of the tokens most like it.

The k shot tokens nearest by cosine vote with the labels of their own voxels, weighted by exp(similarity /
0.07): the weighted kNN of Wu et al. 2018 and DINO (Caron et al. 2021), with label patches in the place of
class names as in Hummingbird (Balažević et al. 2023). So its Dice is one of voxels, on the same images as the
linear probe's: kNN says whether like anatomy lies close by, the linear probe whether it can be read off at
all. Similarities are taken around the mean of the shots: the features of a masked autoencoder share a large
constant part, which puts every cosine near 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from pretrain.shots import Shot, alike

TEMPERATURE = 0.07


def segment(shots: Sequence[Shot], queries: Tensor, k: int) -> dict[int, Tensor]:
    """(n, P) bool for each class, by its number: more than half of the votes are for it.

    queries: features (n, D). At least one of the shots is annotated for each class. A neighbour whose voxel
    is of unknown class has no vote there.
    """
    found: dict[int, Tensor] = {}
    mean = torch.cat([shot.features[shot.known.any(1)] for shot in shots]).float().mean(0)
    for used, classes in alike(shots).items():
        mine = [shots[n] for n in used]
        bank = torch.cat([shot.features[shot.known.any(1)] for shot in mine])
        known = torch.cat([shot.known[shot.known.any(1)] for shot in mine])
        near, weight = neighbours(queries.float() - mean, bank.float() - mean, k)
        for label in classes:
            truth = torch.cat([shot.truth[label][shot.known.any(1)] for shot in mine])
            found[label] = _share(truth, known, near, weight) > 0.5
    return found


def neighbours(queries: Tensor, bank: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Places (n, k) in the bank of the nearest by cosine, nearest first, and their weights, of sum 1.

    k is at most the size of the bank.
    """
    similarity = functional.normalize(queries, dim=1) @ functional.normalize(bank, dim=1).T
    value, place = similarity.topk(min(k, len(bank)), dim=1)
    return place, (value / TEMPERATURE).softmax(1)


def _share(truth: Tensor, known: Tensor, near: Tensor, weight: Tensor) -> Tensor:
    """Share of the votes (n, P) for a class; 0 where nobody votes. truth, known: (bank, P) bool."""
    votes = weight.new_zeros(len(near), truth.shape[1])
    all_ = torch.zeros_like(votes)
    for place, one in zip(near.unbind(1), weight.unbind(1)):  # one neighbour at a time bounds memory
        votes += one[:, None] * (truth & known)[place]
        all_ += one[:, None] * known[place]
    return votes / all_.clamp(min=1e-12)
