"""What an encoder costs: parameters and floating-point operations, computed from its configuration."""

from __future__ import annotations

import math

from model.config import EncoderConfig, Kind

Layout = tuple[tuple[int, int], ...]


def parameter_count(config: EncoderConfig) -> int:
    """Number of trainable parameters, all stems included."""
    width, depth, heads = config.shape
    hidden = config.mlp_hidden
    norms = 2 * 2 * width + (4 * (width // heads) if config.qk_norm else 0)
    attention = 4 * width * width + 4 * width
    wide = 2 * hidden if config.swiglu else hidden
    mlp = width * wide + wide + hidden * width + width
    scales = 2 * width if config.layer_scale else 0
    stems = sum((config.channels * math.prod(patch) + 1) * width for patch in config.patch.values())
    table = math.prod(config.learned_positions) * width if config.learned_positions else 0
    prefix = (config.registers + config.class_token) * width
    return depth * (norms + attention + mlp + scales) + stems + table + prefix + 2 * width


def forward_flops(config: EncoderConfig, layout: Layout) -> int:
    """Operations (a multiply-add is two) of the trunk's matrix products on packed tokens ((n, length), ...).

    A training step costs three times that, with activation checkpointing four. Stems are in `stem_flops`.
    """
    width, depth, _ = config.shape
    prefix = config.registers + config.class_token
    hidden = config.mlp_hidden * (3 if config.swiglu else 2)
    total = 0
    for n, length in layout:
        inner = length + prefix if n else 0
        linear = 2 * inner * (4 * width * width + width * hidden)
        attention = 4 * inner * inner * width
        total += n * depth * (linear + attention)
    return total


def stem_flops(config: EncoderConfig, kind: Kind, tokens: int) -> int:
    """Operations of one stem on so many tokens."""
    return 2 * tokens * config.channels * math.prod(config.patch[kind]) * config.shape.width
