"""Counter-based randomness: every choice is a pure function of (seed, index, purpose), never of a rank or of
history.

Philox4x64 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) is keyed by seed and
purpose and its counter is set to the index, so that any draw is reached in constant time. Only the raw 64-bit
output is used for the order, because NumPy promises that stream for good and may change what `Generator`
derives from it.
"""

from __future__ import annotations

import hashlib
import math
from functools import lru_cache

import numpy as np
from numpy.random import Generator, Philox  # NumPy would load it at the first draw, in every worker

_TO_UNIT = 2.0**-53
_WORD = (1 << 64) - 1
#: Permutations up to this length are drawn as a whole, hence exactly uniform; longer ones place by place.
_WHOLE = 64
_ROUNDS = 6


@lru_cache(maxsize=4096)
def _key(seed: int, purpose: str) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed}:{purpose}".encode(), digest_size=16).digest(), "little")


def _philox(seed: int, index: int, purpose: str) -> Philox:
    if not 0 <= index < 2**64:
        raise ValueError(f"index {index} is not a 64-bit counter")
    return Philox(key=_key(seed, purpose), counter=index << 192)


def rng(seed: int, index: int, purpose: str) -> Generator:
    """A generator for one purpose of one item: equal arguments, equal streams, in every process."""
    return Generator(_philox(seed, index, purpose))


def words(seed: int, index: int, purpose: str, n: int) -> np.ndarray:
    """`n` uniform 64-bit numbers (uint64) for one purpose of one item."""
    return _philox(seed, index, purpose).random_raw(n)


def uniforms(seed: int, index: int, purpose: str, n: int) -> list[float]:
    """`n` floats in [0, 1) for one purpose of one item; about 10 µs, most of it setting up the counter."""
    return [(word >> 11) * _TO_UNIT for word in words(seed, index, purpose, n).tolist()]


def permutation(seed: int, index: int, purpose: str, n: int) -> np.ndarray:
    """A uniform permutation of 0 … n − 1 as int64: the sorting order of `n` raw 64-bit numbers."""
    return np.argsort(words(seed, index, purpose, n), kind="stable")


def permuted(seed: int, index: int, purpose: str, n: int, i: int) -> int:
    """Place `i` of a random permutation of 0 … n − 1, in constant time and memory whatever n is.

    Up to 64 places the whole permutation is drawn. Above, a number below n is split into two digits of nearly
    √n values, each of which is shifted in turn by a keyed hash of the other (a Feistel network on a · b ≥ n;
    FE1 of Black and Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002); the few results beyond n
    are sent round again, which keeps it a bijection on 0 … n − 1.
    """
    if not 0 <= i < n:
        raise IndexError(f"place {i} of a permutation of {n}")
    if n <= _WHOLE:
        return _whole(seed, index, purpose, n)[i]
    keys = _round_keys(seed, index, purpose)
    a = math.isqrt(n - 1) + 1
    b = -(-n // a)
    while True:
        x, y = divmod(i, b)
        for key in keys:
            # The finaliser of SplitMix64 (Steele et al., OOPSLA 2014), then a multiply-shift into 0 … a − 1.
            z = (y + key) & _WORD
            z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & _WORD
            z = (z ^ z >> 27) * 0x94D049BB133111EB & _WORD
            x, y, a, b = y, (x + ((z ^ z >> 31) * a >> 64)) % a, b, a
        i = x * b + y
        if i < n:
            return i


@lru_cache(maxsize=4096)
def _whole(seed: int, index: int, purpose: str, n: int) -> tuple[int, ...]:
    return tuple(permutation(seed, index, purpose, n).tolist())


@lru_cache(maxsize=4096)
def _round_keys(seed: int, index: int, purpose: str) -> tuple[int, ...]:
    return tuple(words(seed, index, purpose, _ROUNDS).tolist())
