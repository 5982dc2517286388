"""Counter-based randomness: every choice is a pure function of (seed, index, purpose), never of a rank or of
history.

Philox4x64 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) is keyed by seed and
purpose and its counter is set to the index, so that any draw is reached in constant time. Only the raw 64-bit
output is used for the order, because NumPy promises that stream for good and may change what `Generator`
derives from it.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache

import numpy as np

_TO_UNIT = 2.0**-53


@lru_cache(maxsize=4096)
def _key(seed: int, purpose: str) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed}:{purpose}".encode(), digest_size=16).digest(), "little")


def _philox(seed: int, index: int, purpose: str) -> np.random.Philox:
    if not 0 <= index < 2**64:
        raise ValueError(f"index {index} is not a 64-bit counter")
    return np.random.Philox(key=_key(seed, purpose), counter=index << 192)


def rng(seed: int, index: int, purpose: str) -> np.random.Generator:
    """A generator for one purpose of one item: equal arguments, equal streams, in every process."""
    return np.random.Generator(_philox(seed, index, purpose))


def words(seed: int, index: int, purpose: str, n: int) -> np.ndarray:
    """`n` uniform 64-bit numbers (uint64) for one purpose of one item."""
    return _philox(seed, index, purpose).random_raw(n)


def uniforms(seed: int, index: int, purpose: str, n: int) -> list[float]:
    """`n` floats in [0, 1) for one purpose of one item; about 10 µs, most of it setting up the counter."""
    return [(word >> 11) * _TO_UNIT for word in words(seed, index, purpose, n).tolist()]


def permutation(seed: int, index: int, purpose: str, n: int) -> np.ndarray:
    """A uniform permutation of 0 … n − 1 as int64: the sorting order of `n` raw 64-bit numbers."""
    return np.argsort(words(seed, index, purpose, n), kind="stable")
