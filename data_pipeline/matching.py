"""Which position each crop of a source takes: unit jobs with windows on positions that only some may use.

A position holds one job; a job may take any position inside its window whose stratum its source has. Earliest
deadlines are served first; what is left over is placed along augmenting paths (Berge 1957), which finds a
perfect matching wherever there is one. Ties go to the lowest number, so that the result is the same
everywhere.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass

import numpy as np

_NEVER = 1 << 40


@dataclass(frozen=True)
class Jobs:
    """Jobs of all sources, those of a source consecutive and in time order: job `start[s] + k` is its k-th.

    first, last: window of each job, inclusive positions, ascending within a source.
    """

    start: np.ndarray
    first: np.ndarray
    last: np.ndarray


def match(jobs: Jobs, cells: np.ndarray, strata: np.ndarray) -> np.ndarray | None:
    """The source at each position (int32), or None if not every job fits into its window.

    cells: jobs wanted of each (source, stratum); 0 where a source has nothing. The totals reached differ from
    these by a few where the windows ask for it. strata: stratum of each position. As many jobs as positions.
    """
    holder, waiting = _deal(jobs, cells, strata)
    source = np.repeat(np.arange(len(cells)), np.diff(jobs.start))
    paths = _Paths(jobs, source, cells, strata, holder)
    if not all(paths.place(job) for job in waiting):
        return None
    return source[np.array(paths.holder)].astype(np.int32)


def _deal(jobs: Jobs, cells: np.ndarray, strata: np.ndarray) -> tuple[list[int], list[int]]:
    """Job at each position, −1 for none, and the jobs left over.

    A job on its last position goes first; else the least sum of two deadlines, that of the source and that of
    its cell, which keeps cells to their shares.
    """
    length = len(strata)
    start, end = jobs.start[:-1], jobs.start[1:]
    first, last = np.append(jobs.first, _NEVER), np.append(jobs.last, _NEVER)
    job = np.where(end > start, start, len(jobs.first))
    opens, closes = first[job], last[job]
    members = [np.flatnonzero(column) for column in cells.T]
    step = [length / column[at] for column, at in zip(cells.T, members)]
    due = [distance.copy() for distance in step]
    holder, waiting = [-1] * length, []

    def next_job(s: int) -> None:
        job[s] = job[s] + 1 if job[s] + 1 < end[s] else len(jobs.first)
        opens[s], closes[s] = first[job[s]], last[job[s]]

    soonest = int(closes.min())
    for position, stratum in enumerate(strata.tolist()):
        while position > soonest:
            for s in np.flatnonzero(closes < position).tolist():
                waiting.append(int(job[s]))
                next_job(s)
            soonest = int(closes.min())
        at = members[stratum]
        closing = closes[at]
        key = np.where(closing == position, -1.0, closing + due[stratum])
        key[opens[at] > position] = np.inf
        best = int(key.argmin())
        if key[best] < np.inf:
            s = int(at[best])
            holder[position] = int(job[s])
            due[stratum][best] += step[stratum][best]
            next_job(s)
    waiting += [j for s in range(len(cells)) for j in range(int(job[s]), int(end[s]))]
    return holder, waiting


class _Paths:
    """Breadth-first augmenting paths; a search visits a position once and stops at the first free one."""

    def __init__(
        self, jobs: Jobs, source: np.ndarray, cells: np.ndarray, strata: np.ndarray, holder: list[int]
    ) -> None:
        self.holder = holder
        self._position = [-1] * len(source)
        for position, job in enumerate(holder):
            if job >= 0:
                self._position[job] = position
        self._source, self._first, self._last = source.tolist(), jobs.first.tolist(), jobs.last.tolist()
        self._strata = [np.flatnonzero(row).tolist() for row in cells]
        self._places = [np.flatnonzero(strata == c).tolist() for c in range(cells.shape[1])]

    def place(self, job: int) -> bool:
        """Give `job` a position, moving others inside their windows; False if there is no way."""
        reached_from: dict[int, int] = {}
        skip: list[dict[int, int]] = [{} for _ in self._places]  # index in a stratum → next one not visited
        queue = [job]
        for mover in queue:
            first, last = self._first[mover], self._last[mover]
            for c in self._strata[self._source[mover]]:
                places = self._places[c]
                i = _next(skip[c], bisect_left(places, first))
                while i < len(places) and places[i] <= last:
                    position = places[i]
                    reached_from[position] = mover
                    skip[c][i] = i + 1
                    if self.holder[position] < 0:
                        self._shift(position, reached_from)
                        return True
                    queue.append(self.holder[position])
                    i = _next(skip[c], i + 1)
        return False

    def _shift(self, position: int, reached_from: dict[int, int]) -> None:
        while position >= 0:
            mover = reached_from[position]
            before = self._position[mover]
            self.holder[position], self._position[mover] = mover, position
            position = before


def _next(skip: dict[int, int], i: int) -> int:
    """The first index from `i` on that was not visited; shortens the chains it follows."""
    end = i
    while end in skip:
        end = skip[end]
    while i in skip:
        skip[i], i = end, skip[i]
    return end
