"""Two predictors without parameters, scored on the same masks and voxels as the network.

A masked autoencoder that does not beat them has learnt nothing of anatomy, however its loss falls: the mean
of the visible voxels is what a constant can do, the interpolation of the visible patch means is what
smoothness can do.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pretrain.mae import crop_error
from pretrain.tokens import Tokens

POWER = 4.0  # of the inverse distance; see `interpolation`


def visible_mean(tokens: Tokens) -> Tensor:
    """Prediction (n, 1, 1): the mean of the crop's visible valid voxels."""
    seen = tokens.visible_inside & tokens.attend[..., None]
    total = torch.where(seen, tokens.visible, 0.0).sum(dim=(1, 2), keepdim=True)
    return total / seen.sum(dim=(1, 2), keepdim=True).clamp(min=1)


def interpolation(tokens: Tokens) -> Tensor:
    """Prediction (n, p, 1): inverse-distance weighting (Shepard 1968) of the visible patches' means.

    Distances run between token centres in mm, to the power `POWER`; a patch counts by its valid voxels.
    """
    seen = tokens.visible_inside & tokens.attend[..., None]
    voxels = seen.sum(dim=-1)
    means = torch.where(seen, tokens.visible, 0.0).sum(dim=-1) / voxels.clamp(min=1)
    distance = torch.cdist(
        tokens.target_centres, tokens.visible_centres, compute_mode="donot_use_mm_for_euclid_dist"
    )
    # Relative to the nearest patch, so that the power neither overflows nor underflows at any spacing.
    usable = torch.where(voxels[:, None, :] > 0, distance, torch.inf)
    nearest = usable.amin(dim=-1, keepdim=True).clamp(min=1e-6)
    nearest = torch.where(torch.isinf(nearest), 1.0, nearest)
    weight = (usable.clamp(min=1e-6) / nearest).pow(-POWER) * voxels[:, None, :]
    total = weight.sum(dim=-1, keepdim=True)
    mixed = (weight * means[:, None, :]).sum(
        dim=-1, keepdim=True
    )  # no matrix product: autocast would round it
    return mixed / torch.where(total > 0, total, 1.0)


def baseline_errors(tokens: Tokens) -> tuple[Tensor, Tensor]:
    """Mean squared errors (n,) of `visible_mean` and of `interpolation` over each crop's scored voxels."""
    return (
        crop_error(visible_mean(tokens), tokens.target, tokens.scored),
        crop_error(interpolation(tokens), tokens.target, tokens.scored),
    )
