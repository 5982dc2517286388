"""Which tokens of a crop are seen, which are predicted, and in what order: pure functions of (seed, index).

A crop has `n` valid tokens in a random order (single tokens, or blocks of them). The first
`visible_count(n)` are encoded, the next `predicted_count(...)` are predicted and scored. Both counts grow
with `n` by at most one token at a time and are monotone in the ratio, so that `places` bounds them for a row
slot, which is what keeps every tensor shape static.
"""

from __future__ import annotations

import math

import numpy as np

from data_pipeline.rng import rng
from pretrain.objective import ObjectiveConfig

Triple = tuple[int, int, int]

_ROUNDING = 1e-9  # products such as 0.1 * 30 must not spill over to the next whole number


def masked_count(valid: int, ratio: float) -> int:
    """Masked tokens among `valid` ones: `valid * ratio` rounded half up, but one token stays visible."""
    return min(math.floor(valid * ratio + (0.5 + _ROUNDING)), max(valid - 1, 0))


def visible_count(valid: int, ratio: float) -> int:
    """Visible tokens among `valid` ones: what `masked_count` leaves, at least one where any is valid."""
    return valid - masked_count(valid, ratio)


def predicted_count(valid: int, ratio: float, share: float) -> int:
    """Masked tokens that are predicted and scored: `share` of them, rounded up."""
    return math.ceil(masked_count(valid, ratio) * share - _ROUNDING)


def places(capacity: int, objective: ObjectiveConfig) -> tuple[int, int]:
    """Most visible and most predicted tokens of a crop of up to `capacity` tokens."""
    low, high = objective.ratios
    return visible_count(capacity, low), predicted_count(capacity, high, objective.predict_share)


def draw_ratio(seed: int, index: int, objective: ObjectiveConfig) -> float:
    """Mask ratio of a crop: the recipe's, or uniform between its two."""
    low, high = objective.ratios
    return low if low == high else float(rng(seed, index, "mask-ratio").uniform(low, high))


def draw_mask(
    seed: int, index: int, grid: Triple, valid: np.ndarray, objective: ObjectiveConfig
) -> tuple[np.ndarray, np.ndarray]:
    """Visible and predicted tokens of a crop, two int64 arrays of token numbers (C-order over `grid`).

    valid: (tokens,) bool. The order is drawn for the grid alone, so a crop's mask does not depend on the row
    class it is served in, nor the order on which tokens are valid.
    """
    generator = rng(seed, index, "mask")
    if objective.masking == "block":
        order = block_order(generator, grid, objective.mask_block)
    else:
        order = generator.permutation(math.prod(grid)).astype(np.int64)
    order = order[valid[order]]
    ratio = draw_ratio(seed, index, objective)
    seen = visible_count(len(order), ratio)
    return order[:seen], order[seen : seen + predicted_count(len(order), ratio, objective.predict_share)]


def block_order(generator: np.random.Generator, grid: Triple, block: Triple) -> np.ndarray:
    """Permutation of the tokens of `grid`, int64, in which those of one block (z, y, x tokens) stay together.

    The blocks tile the grid from a random corner; blocks come in random order and tokens in random order
    within a block, so masked and visible regions are made of whole blocks (one block at the border may be
    split).
    """
    corner = [int(generator.integers(size)) for size in block]
    z, y, x = ((np.arange(length) + offset) // size for length, offset, size in zip(grid, corner, block))
    counts = [int(axis[-1]) + 1 for axis in (z, y, x)]
    number = (z[:, None, None] * counts[1] + y[None, :, None]) * counts[2] + x[None, None, :]
    rank = generator.permutation(math.prod(counts))[number.ravel()]
    return np.lexsort((generator.random(math.prod(grid)), rank)).astype(np.int64)
