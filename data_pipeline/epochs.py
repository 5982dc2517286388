"""The endless sequence of samples a lane draws from one source: epochs, each shuffled window by window."""

from __future__ import annotations

import numpy as np

from data_pipeline.rng import permuted


class Cell:
    """The samples of one source in one stratum, dealt to `groups` lanes.

    With at least eight samples a lane, a lane owns a contiguous range of them (`dealt`; ranges are equal to
    one sample). Otherwise all lanes walk the same epochs and lane g takes every G-th position, so that no
    lane is empty and every sample is still drawn equally often.

    A range is cut into pieces of `piece` samples, about what one shard holds. An epoch permutes the pieces
    and shuffles the samples of each `window` consecutive ones; the odd samples at both ends of the range,
    less than a piece each, join a window drawn anew each epoch. Any place of any epoch is found in constant
    time, and nothing is kept but `rows` (int32, in the order of `deal.py`).
    """

    def __init__(self, rows: np.ndarray, piece: int, groups: int, window: int, seed: int, name: str) -> None:
        self.rows, self.piece, self.groups, self.window = rows, piece, groups, window
        self.dealt = len(rows) >= 8 * groups
        self._seed, self._name = seed, name

    def lane_range(self, lane: int) -> tuple[int, int]:
        """First and last-but-one position of this lane's samples in `rows`."""
        n = len(self.rows)
        return (lane * n // self.groups, (lane + 1) * n // self.groups) if self.dealt else (0, n)

    def sample(self, lane: int, n: int) -> tuple[int, int]:
        """Manifest row and epoch of the lane's n-th sample from this cell."""
        epoch, place = self._reached(lane, n)
        return self._row(lane, epoch, place), epoch

    def instead(self, lane: int, n: int, attempt: int) -> tuple[int, int]:
        """Row and epoch of another sample in place of the lane's n-th, for attempts from 1 on.

        The first four are the ones that follow in the same epoch, which a cache holds or is about to; then
        anywhere in the epoch, since a whole shard may be gone. It is never the lane's n-th itself, unless the
        cell has no other.
        """
        epoch, place = self._reached(lane, n)
        low, high = self.lane_range(lane)
        size = high - low
        if size == 1:
            return self._row(lane, epoch, place), epoch
        step = attempt if attempt <= 4 else 4 + (attempt - 4) * max(1, size // 8)
        return self._row(lane, epoch, (place + 1 + (step - 1) % (size - 1)) % size), epoch

    def _reached(self, lane: int, n: int) -> tuple[int, int]:
        low, high = self.lane_range(lane)
        return divmod(n if self.dealt else n * self.groups + lane, high - low)

    def _row(self, lane: int, epoch: int, place: int) -> int:
        low, high = self.lane_range(lane)
        return int(self.rows[self._position(lane if self.dealt else 0, epoch, place, low, high)])

    def _position(self, walk: int, epoch: int, place: int, low: int, high: int) -> int:
        """Position in `rows` of a place of an epoch of the range low … high − 1."""
        seed, name = self._seed, f"{self._name}:{walk}"
        first, last = -(-low // self.piece), high // self.piece
        pieces = max(0, last - first)
        windows = -(-pieces // self.window)
        if windows < 2:
            return low + permuted(seed, epoch, f"range:{name}", high - low, place)
        full = self.window * self.piece
        odd = high - low - pieces * self.piece
        longer = permuted(seed, epoch, f"odd:{name}", windows, 0)
        start = longer * full
        if place < start:
            window = place // full
        else:
            window = max(longer, (place - odd) // full)
            start += 0 if window == longer else odd + (window - longer) * full
        if window < longer:
            start = window * full
        whole = min(full, (pieces - window * self.window) * self.piece)
        size = whole + odd if window == longer else whole
        at = permuted(seed, epoch, f"window:{name}:{window}", size, place - start)
        if at < whole:
            piece, offset = divmod(at, self.piece)
            piece = permuted(seed, epoch, f"pieces:{name}", pieces, window * self.window + piece)
            return (first + piece) * self.piece + offset
        at -= whole
        head = first * self.piece - low
        return low + at if at < head else last * self.piece + at - head


def samples_per_shard(shards: np.ndarray) -> int:
    """Median length of the runs of equal shard numbers: how many of these samples a shard holds."""
    ends = np.flatnonzero(shards[1:] != shards[:-1]) + 1
    lengths = np.diff(np.concatenate([[0], ends, [len(shards)]]))
    return int(np.sort(lengths)[len(lengths) // 2])
