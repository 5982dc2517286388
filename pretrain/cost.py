"""What a training step costs in floating-point operations, computed from configuration.

Operations of the matrix products, a multiply-add counted as two; forward once and backward twice, which is
what the model needs (recomputed activations and the softmax are not counted). Slots are counted as they are
computed, whether a crop fills them or not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

from data_pipeline.order import RowSpec
from model.config import EncoderConfig, Kind
from model.cost import forward_flops, stem_flops
from pretrain.masking import places
from pretrain.objective import ObjectiveConfig

TRAINING = 3  # forward, and two products of the same size backward


def step_flops(encoder: EncoderConfig, objective: ObjectiveConfig, composition: Sequence[RowSpec]) -> int:
    """Operations of forward and backward of one group."""
    costs = [crop_flops(encoder, objective, cast(Kind, spec.geometry), spec.capacity) for spec in composition]
    return sum(spec.crops * cost for spec, cost in zip(composition, costs))


def crop_flops(encoder: EncoderConfig, objective: ObjectiveConfig, kind: Kind, tokens: int) -> int:
    """Operations of forward and backward of one crop in a slot of so many tokens, at the lowest and highest
    mask ratio."""
    visible, predicted = places(tokens, objective)
    trunk = forward_flops(encoder, ((1, visible),))
    decoder = decoder_flops(encoder, objective, kind, visible, predicted)
    # No gradient flows to the voxels: the stem costs two products, not three.
    return TRAINING * (trunk + decoder) + (TRAINING - 1) * stem_flops(encoder, kind, visible)


def decoder_flops(
    encoder: EncoderConfig, objective: ObjectiveConfig, kind: Kind, visible: int, predicted: int
) -> int:
    """Operations of one forward pass of decoder and prediction head for one crop."""
    width, depth = objective.decoder_width, objective.decoder_depth
    ends = (
        2
        * width
        * (visible * encoder.shape.width + predicted * encoder.channels * math.prod(encoder.patch[kind]))
    )
    if objective.decoder == "self":
        blocks = EncoderConfig(size=None, width=width, depth=depth, heads=objective.decoder_heads)
        return ends + forward_flops(blocks, ((1, visible + predicted),))
    queries = 2 * predicted * (2 + 2 * 4) * width * width  # query, projection, MLP
    keys = 2 * visible * 2 * width * width
    attention = 4 * predicted * visible * width
    return ends + depth * (queries + keys + attention)
