"""Losses of one round: soft Dice plus binary cross-entropy on known voxels, in float32."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def mask_loss(logits: Tensor, truth: Tensor, known: Tensor) -> Tensor:
    """Soft Dice loss plus mean BCE of each mask: (B, M) from logits (B, M, Z, Y, X); truth and known are
    (B, Z, Y, X).

    Voxels that are not known enter neither term.
    """
    known = known[:, None].float()
    truth = truth[:, None].float().expand_as(logits)
    logits = logits.float()
    probability = logits.sigmoid() * known
    overlap = (probability * truth).flatten(2).sum(2)
    sizes = probability.flatten(2).sum(2) + (truth * known).flatten(2).sum(2)
    dice = 1 - (2 * overlap + 1) / (sizes + 1)
    entropy = F.binary_cross_entropy_with_logits(logits, truth, reduction="none") * known
    return dice + entropy.flatten(2).sum(2) / known.flatten(2).sum(2).clamp(min=1)


def true_iou(logits: Tensor, truth: Tensor, known: Tensor) -> Tensor:
    """Intersection over union (B, M) of the masks logits > 0 with the truth over known voxels; 1 where both
    are empty."""
    masks = (logits > 0) & known[:, None]
    truth = truth[:, None] & known[:, None]
    union = (masks | truth).flatten(2).sum(2).float()
    return ((masks & truth).flatten(2).sum(2).float() / union.clamp(min=1)).where(union > 0, 1.0)
