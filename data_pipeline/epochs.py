"""The endless sequence of samples a lane draws from one source: epochs, each shuffled window by window."""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict

import numpy as np

from data_pipeline.rng import permutation


class Cell:
    """The samples of one source in one stratum, dealt to `groups` lanes.

    Where the cell spans at least as many shards as there are lanes, and eight samples a lane, a lane owns a
    contiguous run of the shards (runs are equal to one sample, so two neighbours may share a shard).
    Otherwise all lanes walk the same epochs and lane g takes every G-th position, so that no lane is empty
    and every sample is still drawn equally often.

    An epoch permutes the shards, then shuffles the samples of each `window` consecutive shards. Memory is one
    int32 a sample for the whole cell, one window a lane, and the shard table of the epochs in use.
    """

    def __init__(
        self, rows: np.ndarray, shard_starts: np.ndarray, groups: int, window: int, seed: int, name: str
    ) -> None:
        self.rows = rows
        self.groups = groups
        self.by_shard = len(shard_starts) >= groups and len(rows) >= 8 * groups
        self._starts = shard_starts
        self._window = window
        self._seed = seed
        self._name = name
        self._epochs: OrderedDict[tuple[int, int], tuple[list[int], np.ndarray, np.ndarray]] = OrderedDict()
        self._windows: OrderedDict[tuple[int, int, int], list[int]] = OrderedDict()

    def lane_range(self, lane: int) -> tuple[int, int]:
        """First and last-but-one position of this lane's samples in `rows`."""
        n = len(self.rows)
        return (lane * n // self.groups, (lane + 1) * n // self.groups) if self.by_shard else (0, n)

    def sample(self, lane: int, n: int) -> tuple[int, int]:
        """Manifest row and epoch of the lane's n-th sample from this cell."""
        low, high = self.lane_range(lane)
        walk = lane if self.by_shard else 0
        epoch, position = divmod(n if self.by_shard else n * self.groups + lane, high - low)
        bounds, starts, lengths = self._epoch(walk, epoch, low, high)
        window = bisect_right(bounds, position) - 1
        return self._window_rows(walk, epoch, window, starts, lengths)[position - bounds[window]], epoch

    def _epoch(self, walk: int, epoch: int, low: int, high: int) -> tuple[list[int], np.ndarray, np.ndarray]:
        """First positions of the windows, and the starts and lengths of the shards in this epoch's order."""
        key = walk, epoch
        if key not in self._epochs:
            inside = self._starts[
                np.searchsorted(self._starts, low, side="right") : np.searchsorted(self._starts, high)
            ]
            starts = np.concatenate([[low], inside])
            lengths = np.diff(np.concatenate([starts, [high]]))
            shuffled = permutation(self._seed, epoch, f"shards:{self._name}:{walk}", len(starts))
            starts, lengths = starts[shuffled], lengths[shuffled]
            ends = np.cumsum(lengths)
            bounds = [0, *ends[self._window - 1 : -1 : self._window].tolist()]
            self._epochs[key] = bounds, starts, lengths
            if len(self._epochs) > 2 * self.groups:
                self._epochs.popitem(last=False)
        return self._epochs[key]

    def _window_rows(
        self, walk: int, epoch: int, window: int, starts: np.ndarray, lengths: np.ndarray
    ) -> list[int]:
        key = walk, epoch, window
        if key not in self._windows:
            part = slice(window * self._window, (window + 1) * self._window)
            runs = [self.rows[s : s + n] for s, n in zip(starts[part].tolist(), lengths[part].tolist())]
            rows = np.concatenate(runs)
            # Windows of an epoch have their own keys: the epoch is the counter, the window part of the
            # purpose.
            shuffled = permutation(self._seed, epoch, f"window:{self._name}:{walk}:{window}", len(rows))
            self._windows[key] = rows[shuffled].tolist()
            if len(self._windows) > 2 * self.groups:
                self._windows.popitem(last=False)
        return self._windows[key]


def shard_starts(shard_codes: np.ndarray) -> np.ndarray:
    """Positions at which a new shard begins in a list of samples in manifest order; the first is 0."""
    return np.flatnonzero(np.concatenate([[True], shard_codes[1:] != shard_codes[:-1]]))
