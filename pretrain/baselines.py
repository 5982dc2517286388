"""Two predictors without parameters, scored on the same masks and voxels as the network.

A masked autoencoder that does not beat them has learnt nothing of anatomy, however its loss falls: the mean
of the visible voxels is what a constant can do, the interpolation of the visible patch means is what
smoothness can do.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pretrain.tokens import Tokens

BANDWIDTH = 0.8  # of the Gaussian weights, in distances to the nearest visible patch
RIDGE = 0.1  # on the slopes, in squared bandwidths


def visible_mean(tokens: Tokens) -> Tensor:
    """Prediction (n, 1, 1): the mean of the crop's visible valid voxels."""
    seen = tokens.visible_inside & tokens.attend[..., None]
    total = torch.where(seen, tokens.visible, 0.0).sum(dim=(1, 2), keepdim=True)
    return total / seen.sum(dim=(1, 2), keepdim=True).clamp(min=1)


def interpolation(tokens: Tokens) -> Tensor:
    """Prediction (n, p, P): local linear regression (Cleveland 1979) on the visible patches' means.

    Around each masked token a plane is fitted to the means of the visible patches by their centres in mm,
    weighted by a Gaussian of the distance and by the patch's valid voxels, and read off at every voxel,
    within the range of the means. Of the interpolations tried on real CT, MR, PET and X-ray (nearest,
    inverse distance to the powers 2 to 6, Gaussian means, planes read off at the token's centre, several
    widths and ridges) this one had the smallest error in every modality, up to a quarter below inverse
    squared distance.
    """
    shape = tokens.target.shape
    with torch.autocast(tokens.target.device.type, enabled=False):
        crops = [_interpolated(Tokens(*(field[i] for field in tokens))) for i in range(shape[0])]
    return torch.stack(crops) if crops else tokens.target.new_zeros(shape)


def _interpolated(tokens: Tokens) -> Tensor:
    """(p, P) for the fields of one crop."""
    seen = tokens.visible_inside & tokens.attend[:, None]
    voxels = seen.sum(dim=-1)
    means = torch.where(seen, tokens.visible, 0.0).sum(dim=-1) / voxels.clamp(min=1)
    away = tokens.visible_centres[None] - tokens.target_centres[:, None]  # (p, v, 3) mm
    distance = torch.where(voxels > 0, away.norm(dim=-1), torch.inf)
    nearest = distance.amin(dim=-1, keepdim=True)
    width = BANDWIDTH * torch.where(nearest.isinf(), 1.0, nearest.clamp(min=1e-3))
    weight = torch.exp(-(distance / width).square() / 2) * voxels
    weight = weight / weight.sum(dim=-1, keepdim=True).clamp(min=1e-30)
    # Columns of the regression: 1 and the offset in bandwidths.
    columns = torch.cat([torch.ones_like(away[..., :1]), away / width[..., None]], dim=-1)
    weighted = columns * weight[..., None]
    normal = weighted.transpose(1, 2) @ columns + torch.diag(columns.new_tensor([1e-6, RIDGE, RIDGE, RIDGE]))
    plane = torch.linalg.solve(normal, weighted.transpose(1, 2) @ means[:, None])[..., 0]  # (p, 4)
    slopes = plane[:, 1:] / width
    usable = voxels > 0
    low = torch.where(usable, means, torch.inf).amin().nan_to_num(0.0, 0.0, 0.0)
    high = torch.where(usable, means, -torch.inf).amax().nan_to_num(0.0, 0.0, 0.0)
    return (plane[:, :1] + slopes @ tokens.voxel_offsets.T).clamp(low, high)
