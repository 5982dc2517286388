"""What a training step costs in floating-point operations and in memory, computed from configuration.

Operations of the matrix products, a multiply-add counted as two; forward once and backward twice, which is
what the model needs (recomputed activations and the softmax are not counted). Memory of activations: what is
kept for the backward pass when the loss is computed, and what stands beside it then. Slots are counted as
they are computed, whether a crop fills them or not.
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


def activation_bytes(
    encoder: EncoderConfig,
    objective: ObjectiveConfig,
    composition: Sequence[RowSpec],
    *,
    element: int,
    checkpointing: bool,
) -> int:
    """Most bytes that activations of one group take at a time, by tensors (not the blocks of an allocator).

    element: bytes of a value between blocks, 2 in bf16 and 4 in fp32. checkpointing: blocks keep their input
    only, and one at a time is computed again.
    """
    layers = objective.decoder_width, 4 * objective.decoder_width
    seen = asked = scored = voxels = 0  # tokens of trunk, of decoder, scored ones; values of all patches
    for spec in composition:
        visible, predicted = places(spec.capacity, objective)
        patch = encoder.channels * math.prod(encoder.patch[cast(Kind, spec.geometry)])
        seen += spec.crops * (visible + encoder.registers + encoder.class_token)
        asked += spec.crops * (predicted if objective.decoder == "cross" else visible + predicted)
        scored += spec.crops * predicted * patch
        voxels += spec.crops * (visible + predicted) * patch
    width = encoder.shape.width
    block = element * seen * _kept_by_block(encoder)
    decoder_block = element * asked * (8 * layers[0] + 2 * layers[1])
    if objective.decoder == "cross":  # keys, values and the norm of the visible tokens
        decoder_block += element * seen * 5 * layers[0]
    if checkpointing:
        kept = element * (encoder.shape.depth * seen * width + objective.decoder_depth * asked * layers[0])
        again = max(block, decoder_block)
    else:
        kept, again = encoder.shape.depth * block + objective.decoder_depth * decoder_block, 0
    # Normalised values and their masks; prediction, error, its square and what is summed of it, all float32.
    loss = (4 + 2) * voxels + 5 * 4 * scored
    loss += 4 * scored * (objective.norm_pix + 3 * (objective.gradient_weight > 0))
    ends = element * (2 * seen * width + 3 * asked * layers[0]) + element * (voxels - scored)
    return kept + ends + max(loss, again)


def _kept_by_block(encoder: EncoderConfig) -> int:
    """Values that a block keeps for its backward pass, a token."""
    width, hidden = encoder.shape.width, encoder.mlp_hidden
    # Inputs of both norms, of qkv, of fc1 and of proj; queries, keys and values.
    kept = 8 * width + (4 if encoder.swiglu else 2) * hidden
    kept += 3 * width * encoder.qk_norm
    return kept + 2 * width * (bool(encoder.layer_scale) + (encoder.drop_path > 0))
