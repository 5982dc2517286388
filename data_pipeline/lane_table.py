"""Which source each crop of a lane comes from: one table for all positions of a lane, repeated for ever.

A lane is a line of positions, group after group. The row kinds (strata) of a group's positions are fixed; the
sources are matched to them so that on every prefix of the lane the crops of a source stay within a bound of
its share of the length: less than one at the end of every group, and less than one at every crop wherever the
kinds of rows allow it. Lanes, and the repeats of a lane, differ by swaps inside these bounds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np

from data_pipeline.matching import Jobs, match
from data_pipeline.rng import words
from data_pipeline.schedule import largest_remainder

#: A table repeats after a number of crops that divides by 3,000 or at least 1,000, unless that is longer than
#: `LONGEST`: weights of three decimals, and thirds and eighths, are then exact.
EXACT, LONGEST, USUAL = (3000, 1000), 32_000, 12_000
#: Positions whose swaps are drawn at once.
_BLOCK = 1024
_DISTANCES = (1, 2, 3, 5, 8, 13, 21, 34, 55, 89)


class LaneTable:
    """Sources of all positions of all lanes.

    shares: share of each source in each stratum, (sources, strata), columns summing to 1. crops: crops of
    each stratum in a group. geometries: geometry of each stratum. seed: of the swaps.

    Attributes: `places` (stratum and slot of each place of a group), `length` (crops of a period), `cells`
    (crops of each source and stratum in a period), `weights` (share of each source, which `cells` give
    exactly), `bound` (every prefix of a lane holds each source within this many crops of its share) and
    `group_bound` (the same for prefixes of whole groups). A few hundred kilobytes, and 8 KB for each block of
    a lane in use.
    """

    def __init__(
        self, shares: np.ndarray, crops: Sequence[int], geometries: Sequence[str], seed: int, lanes: int
    ) -> None:
        strata = interleave(geometries, crops)
        taken = [0] * len(crops)
        self.places: list[tuple[int, int]] = []
        for c in strata:
            self.places.append((c, taken[c]))
            taken[c] += 1
        self.group_size = len(strata)
        groups = period(shares, crops)
        self.length = groups * self.group_size
        planned = cell_counts(shares, crops, groups)
        self._strata = np.tile(np.array(strata, dtype=np.int32), groups)
        self._source, self._first, self._last = _table(
            planned.tobytes(), (len(shares), len(crops)), tuple(strata), groups
        )
        n, kinds = planned.size, len(crops)
        code = self._source * kinds + self._strata
        self.cells = np.bincount(code, minlength=n).reshape(planned.shape)
        self.weights = self.cells.sum(axis=1) / self.length
        self.bound, self.group_bound = self._bounds()
        blocks = [np.bincount(code[at : at + _BLOCK], minlength=n) for at in range(0, self.length, _BLOCK)]
        self._before = np.cumsum([np.zeros(n, int), *blocks[:-1]], axis=0).astype(np.int32)
        self._seed, self._lanes = seed, lanes
        self._block = lru_cache(maxsize=max(64, 2 * lanes))(self._drawn_block)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_block"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._block = lru_cache(maxsize=max(64, 2 * self._lanes))(self._drawn_block)

    def at(self, lane: int, position: int) -> tuple[int, int]:
        """Source of a position of a lane, and how many crops of that source and stratum the lane had
        before.
        """
        repeat, place = divmod(position, self.length)
        block, offset = divmod(place, _BLOCK)
        source, before = self._block(lane, repeat, block)
        s = int(source[offset])
        stratum = self.places[place % self.group_size][0]
        return s, repeat * int(self.cells[s, stratum]) + int(before[offset])

    def _drawn_block(self, lane: int, repeat: int, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Sources of a block of positions, and the crops of their cells before each in the period (int32)."""
        part = slice(block * _BLOCK, min((block + 1) * _BLOCK, self.length))
        strata = self._strata[part]
        by_stratum = np.argsort(strata, kind="stable")
        kinds, position = strata[by_stratum], by_stratum + part.start
        entries = np.stack([self._source[part], self._first[part], self._last[part]])[:, by_stratum]
        n = len(position)
        distances = [d for d in 2 * _DISTANCES if d < n]
        index = repeat * len(self._before) + block
        coins = words(self._seed, index, f"lane:{lane}", n * len(distances)).reshape(len(distances), n)
        index_of = np.arange(n)
        for d, coin in zip(distances, coins):
            phase = (index_of + int(coin[0] % np.uint64(2 * d))) % (2 * d) < d
            left = np.flatnonzero(phase[:-d] & (coin[:-d] >> np.uint64(63) == 1) & (kinds[:-d] == kinds[d:]))
            right = left + d
            free = (entries[2, left] >= position[right]) & (entries[1, right] <= position[left])
            i, j = left[free], right[free]
            entries[:, np.concatenate([i, j])] = entries[:, np.concatenate([j, i])]
        source = np.empty(n, dtype=np.int32)
        source[by_stratum] = entries[0]
        return source, self._counted(source, strata, block)

    def _counted(self, source: np.ndarray, strata: np.ndarray, block: int) -> np.ndarray:
        code = source * len(self.cells[0]) + strata
        by_cell = np.argsort(code, kind="stable")
        sorted_code = code[by_cell]
        begins = np.flatnonzero(np.concatenate([[True], sorted_code[1:] != sorted_code[:-1]]))
        run = np.arange(len(code)) - np.repeat(begins, np.diff(np.append(begins, len(code))))
        before = np.empty(len(code), dtype=np.int32)
        before[by_cell] = self._before[block][sorted_code] + run
        return before

    def _bounds(self) -> tuple[float, float]:
        """Largest distance from a share that the windows of the entries permit: anywhere, between groups."""
        ends = np.arange(self.group_size, self.length + 1, self.group_size)
        anywhere = between = 0.0
        for s, weight in enumerate(self.weights.tolist()):
            at = self._source == s
            first, last = np.sort(self._first[at]), np.sort(self._last[at])
            if not len(first):
                continue
            k = np.arange(len(first))
            early, late = k + 1 - weight * (first + 1), weight * last - k
            anywhere = max(anywhere, float(early.max()), float(late.max()))
            most, least = np.searchsorted(first, ends), np.searchsorted(last, ends)
            between = max(between, float((most - weight * ends).max()), float((weight * ends - least).max()))
        return anywhere, between


def interleave(geometries: Sequence[str], crops: Sequence[int]) -> list[int]:
    """Stratum of each place of a group: geometries spread evenly over it, row classes over their geometry.

    Each prefix holds each geometry, and each class among the places of its geometry, within one of its share.
    """
    members: dict[str, list[int]] = {}
    for c, geometry in enumerate(geometries):
        members.setdefault(geometry, []).append(c)
    inside = [[at[i] for i in _spread([crops[c] for c in at])] for at in members.values()]
    taken = [iter(classes) for classes in inside]
    return [next(taken[g]) for g in _spread([len(classes) for classes in inside])]


def _spread(counts: Sequence[int]) -> list[int]:
    """Each index `counts[index]` times, every prefix within one of its share: the k-th of m in a row of n
    belongs at or after floor(k·n/m) and before ceil((k + 1)·n/m), and what has to come soonest goes first
    (Baruah et al., "Proportionate progress", Algorithmica 1996).
    """
    n, row = sum(counts), []
    taken = [0] * len(counts)
    for place in range(n):
        waiting = [
            (-(-(taken[i] + 1) * n // m), i)
            for i, m in enumerate(counts)
            if taken[i] < m and taken[i] * n // m <= place
        ]
        row.append(min(waiting)[1])
        taken[row[-1]] += 1
    return row


def period(shares: np.ndarray, crops: Sequence[int]) -> int:
    """Groups after which the table repeats."""
    group_size = sum(crops)
    rarest = max(-(-2 * int(n) // c) for n, c in zip((shares > 0).sum(axis=0), crops))
    least = max(rarest, -(-20 * len(shares) // group_size))
    for divisor in EXACT:
        groups = divisor // math.gcd(divisor, group_size)
        groups *= -(-least // groups)
        if groups * group_size <= LONGEST:
            return groups
    return max(least, -(-USUAL // group_size))


def cell_counts(shares: np.ndarray, crops: Sequence[int], groups: int) -> np.ndarray:
    """Crops of each source and stratum in `groups` groups: whole numbers near `shares`, at least one wherever
    a share is above 0, with exact sums over sources and, as far as that leaves room, over strata.
    """
    exact = shares * np.array(crops) * groups
    cells = np.zeros(shares.shape, dtype=np.int64)
    for c, n in enumerate(crops):
        there = np.flatnonzero(shares[:, c] > 0)
        cells[there, c] = largest_remainder(shares[there, c], groups * n)
    rows = np.cumsum(exact, axis=1)[:, -1]
    used = np.flatnonzero(rows > 0)
    surplus = cells.sum(axis=1)
    surplus[used] -= largest_remainder(rows[used], groups * sum(crops))
    for source in np.flatnonzero(surplus > 0).tolist():
        while surplus[source] > 0 and (path := _exchange(cells, source, surplus)):
            for a, b in pairwise(path):
                free = np.flatnonzero((cells[a] > 1) & (cells[b] > 0))
                gain = (cells[a] - exact[a] - cells[b] + exact[b])[free]
                c = free[int(gain.argmax())]
                cells[a, c] -= 1
                cells[b, c] += 1
            surplus[source] -= 1
            surplus[path[-1]] += 1
    return cells


def _exchange(cells: np.ndarray, source: int, surplus: np.ndarray) -> list[int]:
    """The shortest chain of sources, neighbours sharing a stratum, to one that has too few; empty if none."""
    came_from = {source: -1}
    queue = [source]
    for a in queue:
        for b in np.flatnonzero((cells[:, cells[a] > 1] > 0).any(axis=1)).tolist():
            if b in came_from:
                continue
            came_from[b] = a
            queue.append(b)
            if surplus[b] < 0:
                path = [b]
                while path[-1] != source:
                    path.append(came_from[path[-1]])
                return path[::-1]
    return []


@lru_cache(maxsize=16)
def _table(
    planned: bytes, shape: tuple[int, int], strata: tuple[int, ...], groups: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Source of every position of a period, and the first and last position its entry may be swapped to.

    First every source is held to its share of all positions. Where the strata do not allow that, or only at
    the cost of other shares inside the strata, it is held to what the strata passed so far give it: fractions
    of crops would fit then, so a matching exists (Kőnig), and both shares agree after each group.
    """
    cells = np.frombuffer(planned, dtype=np.int64).reshape(shape)
    positions = np.tile(np.array(strata, dtype=np.int32), groups)
    even = _jobs([_even_windows(m, len(positions)) for m in cells.sum(axis=1).tolist()])
    source, jobs = match(even, cells, positions), even
    if source is None or not _near(_reached(source, positions, shape), cells):
        jobs = _jobs([_stratum_windows(row, strata, groups) for row in cells])
        source = match(jobs, cells, positions)
        if source is None:
            raise RuntimeError("no table of sources fits; this is a defect of the order")
        _feed(source, cells, positions)
        even = _jobs(
            [_even_windows(m, len(positions)) for m in np.bincount(source, minlength=shape[0]).tolist()]
        )
        if (np.diff(even.start) != np.diff(jobs.start)).any():
            jobs = _jobs(
                [_stratum_windows(row, strata, groups) for row in _reached(source, positions, shape)]
            )
    by_source = np.argsort(source, kind="stable")
    windows = np.empty((2, len(source)), dtype=np.int32)
    windows[0, by_source] = np.minimum(np.maximum(jobs.first, even.first), by_source)
    windows[1, by_source] = np.maximum(np.minimum(jobs.last, even.last), by_source)
    return source, windows[0], windows[1]


def _reached(source: np.ndarray, positions: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    return np.bincount(source * shape[1] + positions, minlength=shape[0] * shape[1]).reshape(shape)


def _near(reached: np.ndarray, cells: np.ndarray) -> bool:
    return bool(
        ((reached >= 0.6 * cells - 1) & (reached <= 1.5 * cells + 1)).all() and (reached[cells > 0] > 0).all()
    )


def _feed(source: np.ndarray, cells: np.ndarray, positions: np.ndarray) -> None:
    """Give every planned cell a crop; changes `source`.

    By the nearest exchange with a source that has more; where no such source can take the place that is given
    up, the one with most crops in that stratum does.
    """
    for s, c in np.argwhere((_reached(source, positions, cells.shape) == 0) & (cells > 0)).tolist():
        have = _reached(source, positions, cells.shape)
        there = np.flatnonzero(positions == c)
        there = there[have[source[there], c] > 1]
        own = np.flatnonzero(source == s)
        own = own[have[s, positions[own]] > 1]
        if not len(own):
            source[there[0]] = s
            continue
        fits = cells[source[there]][:, positions[own]] > 0
        apart = np.abs(there[:, None] - own[None]) + np.where(fits, 0, len(source))
        i, j = np.unravel_index(int(apart.argmin()), apart.shape)
        to = positions[own[j]]
        source[own[j]] = source[there[i]] if fits[i, j] else have[:, to].argmax()
        source[there[i]] = s


def _jobs(windows: list[tuple[np.ndarray, np.ndarray]]) -> Jobs:
    start = np.cumsum([0, *(len(first) for first, _ in windows)])
    return Jobs(start, np.concatenate([w[0] for w in windows]), np.concatenate([w[1] for w in windows]))


def _even_windows(m: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Windows of `m` jobs spread evenly over `length` positions, see `_spread`."""
    k = np.arange(m)
    return k * length // max(m, 1), -(-(k + 1) * length // max(m, 1)) - 1


def _stratum_windows(row: np.ndarray, strata: Sequence[int], groups: int) -> tuple[np.ndarray, np.ndarray]:
    """Windows of a source's jobs around the line that climbs, at each position, by the source's share of its
    stratum.
    """
    per_group = np.bincount(strata, minlength=len(row)) * groups
    climb = np.concatenate([[0.0], np.cumsum((row / per_group)[np.array(strata)])])
    m = int(row.sum())
    line = np.append((np.arange(groups)[:, None] * (m / groups) + climb[:-1]).ravel(), m)
    k = np.arange(m)
    # A job touches the positions where the line passes between k and k + 1; sums are exact to about 1e-9.
    return np.searchsorted(line[1:], k + 1e-7, side="right"), np.searchsorted(line, k + 1 - 1e-7) - 1
