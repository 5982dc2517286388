"""Which tokens of a crop are seen, which are predicted, and in what order: pure functions.

A crop has `n` valid tokens. Its token order (a permutation, see `random_order` and `block_order`) puts the
tokens in a random sequence; the first `visible_count(n)` valid ones are encoded, the next
`predicted_count(...)` are predicted and scored. All counts grow with `n` by at most one token at a time, so
their values at the capacity of a row slot bound them, which is what keeps every tensor shape static.
"""

from __future__ import annotations

import math
from typing import overload

import numpy as np
import torch
from torch import Tensor

_ROUNDING = 1e-9  # products such as 0.1 * 30 must not spill over to the next whole number


@overload
def masked_count(valid: int, ratio: float) -> int: ...
@overload
def masked_count(valid: Tensor, ratio: float) -> Tensor: ...
def masked_count(valid: int | Tensor, ratio: float) -> int | Tensor:
    """Number of masked tokens among `valid` ones: `valid * ratio` rounded half up, but one token stays
    visible.
    """
    if isinstance(valid, Tensor):
        rounded = torch.floor(valid.double() * ratio + (0.5 + _ROUNDING)).to(valid.dtype)
        return torch.minimum(rounded, (valid - 1).clamp(min=0))
    return min(math.floor(valid * ratio + (0.5 + _ROUNDING)), max(valid - 1, 0))


@overload
def visible_count(valid: int, ratio: float) -> int: ...
@overload
def visible_count(valid: Tensor, ratio: float) -> Tensor: ...
def visible_count(valid: int | Tensor, ratio: float) -> int | Tensor:
    """Number of visible tokens among `valid` ones: what `masked_count` leaves, at least one where any is
    valid.
    """
    return valid - masked_count(valid, ratio)


@overload
def predicted_count(valid: int, ratio: float, share: float) -> int: ...
@overload
def predicted_count(valid: Tensor, ratio: float, share: float) -> Tensor: ...
def predicted_count(valid: int | Tensor, ratio: float, share: float) -> int | Tensor:
    """Number of masked tokens that are predicted and scored: `share` of them, rounded up."""
    if isinstance(valid, Tensor):
        return torch.ceil(masked_count(valid, ratio).double() * share - _ROUNDING).to(valid.dtype)
    return math.ceil(masked_count(valid, ratio) * share - _ROUNDING)


def random_order(generator: np.random.Generator, grid: tuple[int, int, int], capacity: int) -> np.ndarray:
    """Permutation (capacity,) int64: the tokens of `grid` (C-order) uniformly shuffled, then the unused
    slots.

    The shuffle draws for the grid alone, so a crop's mask does not depend on the row class it is served in.
    """
    tokens = math.prod(grid)
    return np.concatenate([generator.permutation(tokens), np.arange(tokens, capacity)]).astype(np.int64)


def block_order(
    generator: np.random.Generator, grid: tuple[int, int, int], capacity: int, block: tuple[int, int, int]
) -> np.ndarray:
    """Permutation like `random_order`, but tokens of one block of `block` tokens (z, y, x) stay together.

    The blocks tile the grid from a random corner; blocks come in random order and tokens in random order
    within a block, so masked and visible regions are made of whole blocks (one block at the border may be
    split).
    """
    tokens = math.prod(grid)
    corner = [int(generator.integers(size)) for size in block]
    coordinates = [(np.arange(length) + offset) // size for length, offset, size in zip(grid, corner, block)]
    counts = [int(axis[-1]) + 1 for axis in coordinates]
    number = (coordinates[0][:, None, None] * counts[1] + coordinates[1][None, :, None]) * counts[
        2
    ] + coordinates[2][None, None, :]
    rank = generator.permutation(math.prod(counts))[number.ravel()]
    order = np.lexsort((generator.random(tokens), rank))
    return np.concatenate([order, np.arange(tokens, capacity)]).astype(np.int64)


def valid_first(order: Tensor, valid: Tensor) -> Tensor:
    """Move the valid tokens to the front of each order and keep the sequence among them.

    `order` (n, capacity) int64 permutations, `valid` (n, capacity) bool by token number; returns (n,
    capacity) int64.
    """
    unusable = ~valid.gather(1, order)
    return order.gather(1, torch.sort(unusable.to(torch.uint8), dim=1, stable=True).indices)
