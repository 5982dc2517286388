"""From stored voxels to the visible and the predicted tokens of each crop; runs on the device, in float32.

All shapes are static and nothing here waits for the device. A token is valid when it holds at least one
voxel that is inside the crop and not marked invalid by the source. Only valid tokens are attended to and
only valid voxels of predicted tokens are scored.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from model.normalise import background, normalise
from model.patches import gather_patches, token_centres
from pretrain.batch import RowBlock
from pretrain.masking import predicted_count, valid_first, visible_count
from pretrain.objective import ObjectiveConfig

Patch = tuple[int, int, int]


class Tokens(NamedTuple):
    """The n crops of a row block as tokens; v and p are the most visible and predicted tokens a crop can
    have.

    P is the voxels of a patch, in C-order over the stem's axes. Unused places hold some token's data and
    are False in `attend` or `scored`.
    """

    visible: Tensor  # (n, v, P) float32: normalised values
    visible_inside: Tensor  # (n, v, P) bool: voxel of the crop and not invalid
    visible_centres: Tensor  # (n, v, 3) float32: mm along the patient's z, y, x
    visible_ids: Tensor  # (n, v) int64: token numbers, C-order over the grid
    attend: Tensor  # (n, v) bool: a visible token stands here
    target: Tensor  # (n, p, P) float32: normalised values of the predicted tokens
    scored: Tensor  # (n, p, P) bool: valid voxel of a predicted token
    target_centres: Tensor  # (n, p, 3) float32
    target_ids: Tensor  # (n, p) int64
    predicted: Tensor  # (n, p) bool: a predicted token stands here
    voxel_offsets: Tensor  # (n, P, 3) float32: voxel centres from their token's centre, mm, patient z, y, x
    valid: Tensor  # (n,) int64: valid tokens of the crop


def tokenise(block: RowBlock, patch: Patch, objective: ObjectiveConfig) -> Tokens:
    """Cut, normalise and mask the crops of a block."""
    n, capacity = block.token_order.shape
    on_cpu = block.voxels.device.type == "cpu"  # where a look at the values waits for nothing
    raw, inside = gather_patches(
        block.voxels, block.extent, block.grid, block.residual, block.flip, patch, capacity,
        resample=None if on_cpu else True,
    )  # fmt: skip
    values = change_tone(normalise(raw, block.norm, inside), block.norm, block.tone)
    centres = token_centres(
        block.grid, block.start_mm, block.spacing, patch, block.axes, block.flip, capacity
    )
    usable = inside.any(dim=-1)
    order = valid_first(block.token_order, usable)
    valid = usable.sum(dim=1)
    ratio, share = objective.mask_ratio, objective.predict_share
    visible, predicted = visible_count(valid, ratio), predicted_count(valid, ratio, share)
    most_visible, most_predicted = visible_count(capacity, ratio), predicted_count(capacity, ratio, share)

    visible_ids = order[:, :most_visible]
    place = torch.arange(most_predicted, device=order.device).expand(n, -1)
    target_ids = order.gather(1, (place + visible[:, None]).clamp(max=capacity - 1))
    is_predicted = place < predicted[:, None]
    return Tokens(
        visible=take(values, visible_ids),
        visible_inside=take(inside, visible_ids),
        visible_centres=take(centres, visible_ids),
        visible_ids=visible_ids,
        attend=torch.arange(most_visible, device=order.device) < visible[:, None],
        target=take(values, target_ids),
        scored=take(inside, target_ids) & is_predicted[..., None],
        target_centres=take(centres, target_ids),
        target_ids=target_ids,
        predicted=is_predicted,
        voxel_offsets=voxel_offsets(block, patch),
        valid=valid,
    )


def voxel_offsets(block: RowBlock, patch: Patch) -> Tensor:
    """Centres of a token's voxels (n, P, 3) from the token's centre, in mm along the patient's z, y, x."""
    steps = [torch.arange(p, device=block.spacing.device) - (p - 1) / 2 for p in patch]
    stem = torch.stack(torch.meshgrid(*steps, indexing="ij"), dim=-1).reshape(1, -1, 3)
    stem = stem * block.spacing[:, None]
    patient = torch.argsort(block.axes, dim=1)  # stem axis of each patient axis
    return stem.gather(2, patient[:, None].expand_as(stem))


def take(tokens: Tensor, ids: Tensor) -> Tensor:
    """Rows `ids` (n, m) of `tokens` (n, capacity, d): (n, m, d)."""
    return tokens.gather(1, ids[..., None].expand(-1, -1, tokens.shape[-1]))


def change_tone(values: Tensor, norm: Tensor, tone: Tensor) -> Tensor:
    """Apply the intensity change (gain, shift, exponent) of each crop to its normalised values (n,
    capacity, P).

    The exponent bends the range between the normalised ends of the clip window, then gain and shift apply.
    """
    low, high = background(norm)[:, None, None], ceiling(norm)[:, None, None]
    gain, shift, exponent = (tone[:, k, None, None] for k in range(3))
    share = ((values - low) / (high - low)).clamp(0.0, 1.0)
    bent = torch.where(exponent == 1.0, values, low + (high - low) * share.pow(exponent))
    return bent * gain + shift


def ceiling(norm: Tensor) -> Tensor:
    """(n,) float32: the normalised `high` of each crop, the counterpart of `background`."""
    return background(torch.cat([norm[:, :2], norm[:, 3:4], norm[:, 3:]], dim=1))
