"""From stored voxels to the visible and the predicted tokens of each crop; runs on the device, in float32.

Only these tokens are cut out, resampled and normalised. All shapes are static and nothing here waits for the
device. Only valid voxels of predicted tokens are scored: those inside the crop and not marked invalid by the
source.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from model.normalise import background, may_look, normalise
from model.patches import gather_patches, token_centres
from pretrain.batch import RowBlock

Patch = tuple[int, int, int]


class Tokens(NamedTuple):
    """The n crops of a row block as tokens; v and p are the most visible and predicted tokens a crop can
    have.

    P is the voxels of a patch, in C-order over the stem's axes. Unused places hold the crop's first token
    and are False in `attend` or `scored`.
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


class Tokeniser(nn.Module):
    """`tokenise` as a module without weights, so that it is compiled where the blocks are: interpolating is
    some hundred passes over the voxels, which one kernel does at once."""

    def forward(self, block: RowBlock, patch: Patch) -> Tokens:
        return tokenise(block, patch)


def tokenise(block: RowBlock, patch: Patch) -> Tokens:
    """Cut and normalise the tokens of a block that its masks name."""
    ids = torch.cat([block.visible_ids, block.target_ids], dim=1)
    split = [block.visible_ids.shape[1], block.target_ids.shape[1]]
    raw, inside = gather_patches(
        block.voxels, block.extent, block.grid, block.residual, block.flip, patch, sum(split),
        tokens=ids, resample=None if may_look(ids) else True,
    )  # fmt: skip
    values = change_tone(normalise(raw, block.norm, inside), block.norm, block.tone)
    centres = token_centres(block.grid, block.start_mm, block.spacing, patch, block.axes, tokens=ids)
    visible, target = values.split(split, 1)
    visible_inside, target_inside = inside.split(split, 1)
    visible_centres, target_centres = centres.split(split, 1)
    attend, predicted = (
        torch.arange(places, device=ids.device) < count[:, None]
        for places, count in zip(split, (block.visible, block.predicted))
    )
    return Tokens(
        visible=visible,
        visible_inside=visible_inside,
        visible_centres=visible_centres,
        visible_ids=block.visible_ids,
        attend=attend,
        target=target,
        scored=target_inside & predicted[..., None],
        target_centres=target_centres,
        target_ids=block.target_ids,
        predicted=predicted,
        voxel_offsets=voxel_offsets(block, patch),
    )


def index_centres(block: RowBlock, ids: Tensor, patch: Patch) -> Tensor:
    """Centres (n, m, 3) float32 of tokens `ids` in voxels from the crop's corner: positions without mm."""
    return token_centres(
        block.grid, torch.zeros_like(block.start_mm), torch.ones_like(block.spacing), patch, block.axes,
        tokens=ids,
    )  # fmt: skip


def voxel_offsets(block: RowBlock, patch: Patch) -> Tensor:
    """Centres of a token's voxels (n, P, 3) from the token's centre, in mm along the patient's z, y, x."""
    steps = [torch.arange(p, device=block.spacing.device) - (p - 1) / 2 for p in patch]
    stem = torch.stack(torch.meshgrid(*steps, indexing="ij"), dim=-1).reshape(1, -1, 3)
    stem = stem * block.spacing[:, None]
    patient = torch.argsort(block.axes, dim=1)  # stem axis of each patient axis
    return stem.gather(2, patient[:, None].expand_as(stem))


def change_tone(values: Tensor, norm: Tensor, tone: Tensor) -> Tensor:
    """Apply the intensity change (gain, shift, exponent) of each crop to its normalised values (n, m, P).

    The exponent bends the range between the normalised ends of the clip window, then gain and shift apply.
    """
    gain, shift, exponent = (tone[:, k, None, None] for k in range(3))
    if not may_look(tone) or bool((exponent != 1.0).any()):  # costly, so not without need
        low, high = background(norm)[:, None, None], ceiling(norm)[:, None, None]
        share = ((values - low) / (high - low)).clamp(0.0, 1.0)
        values = torch.where(exponent == 1.0, values, low + (high - low) * share.pow(exponent))
    return values * gain + shift


def ceiling(norm: Tensor) -> Tensor:
    """(n,) float32: the normalised `high` of each crop, the counterpart of `background`."""
    return background(torch.cat([norm[:, :2], norm[:, 3:4], norm[:, 3:]], dim=1))
