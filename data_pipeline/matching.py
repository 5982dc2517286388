"""Which position each crop of a source takes: unit jobs with windows on positions that only some may use.

A position holds one job; a job may take any position inside its window whose stratum its source has. Early
deadlines are served first, and a job that was passed over is placed along an augmenting path (Berge 1957),
which finds a perfect matching wherever there is one; trades then bring the cells (source and stratum) back to
what is wanted of them. Ties go to the lowest number, so that the result is the
same everywhere.
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
    these where the windows ask for it. strata: stratum of each position. As many jobs as positions.
    """
    matching = _Matching(jobs, cells, strata)
    if not matching.deal():
        return None
    matching.settle()
    return matching.source[np.array(matching.holder)].astype(np.int32)


class _Matching:
    """A matching that grows position by position; `holder` is the job at each position, −1 for none."""

    def __init__(self, jobs: Jobs, cells: np.ndarray, strata: np.ndarray) -> None:
        self.jobs, self.cells = jobs, cells
        self.source = np.repeat(np.arange(len(cells)), np.diff(jobs.start))
        self.holder = [-1] * len(strata)
        self._position = [-1] * len(self.source)
        self._source, self._first, self._last = self.source.tolist(), jobs.first.tolist(), jobs.last.tolist()
        self._stratum = strata.tolist()
        self._strata = [np.flatnonzero(row).tolist() for row in cells]
        self._places = [np.flatnonzero(strata == c).tolist() for c in range(cells.shape[1])]
        # Positions between two jobs of a cell, and the position by which its next job is due.
        self._step = len(strata) / np.maximum(cells, 1)
        self._due = self._step.copy()
        self._count, self._wanted = np.zeros_like(cells).tolist(), cells.tolist()

    def deal(self) -> bool:
        """Fill all positions; False if that is impossible.

        A job on its last position goes first; else the one with the least time left, counted in the usual
        distance between two such jobs: twice that of the source and once that of its cell, which keeps cells
        to their shares. A job that was passed over gets a place at once by moving others.
        """
        none = len(self.source)
        first, last = np.append(self.jobs.first, _NEVER), np.append(self.jobs.last, _NEVER)
        start, end = self.jobs.start[:-1], self.jobs.start[1:]
        job = np.where(end > start, start, none)
        opens, closes = first[job], last[job]
        often = 2.0 * np.diff(self.jobs.start) / len(self.holder)
        members = [np.flatnonzero(column) for column in self.cells.T]

        def advance(s: int) -> None:
            job[s] = job[s] + 1 if job[s] + 1 < end[s] else none
            opens[s], closes[s] = first[job[s]], last[job[s]]

        soonest = int(closes.min())
        for position, stratum in enumerate(self._stratum):
            while position > soonest:
                for s in np.flatnonzero(closes < position).tolist():
                    if not self._place(int(job[s])):
                        return False
                    advance(s)
                soonest = int(closes.min())
            at = members[stratum]
            if self.holder[position] >= 0 or not len(at):
                continue
            closing = closes[at]
            left = (closing - position) * often[at]
            left += (self._due[at, stratum] - position) / self._step[at, stratum]
            left[closing == position] = -np.inf
            left[opens[at] > position] = np.inf
            best = int(left.argmin())
            if left[best] < np.inf:
                s = int(at[best])
                self._move(int(job[s]), position)
                advance(s)
        left_over = [j for s in range(len(start)) for j in range(int(job[s]), int(end[s]))]
        return all(self._place(j) for j in left_over)

    def settle(self, rounds: int = 4) -> None:
        """Bring cells nearer to what is wanted of them: jobs trade positions, both inside their windows.

        A job of a cell that has too many makes the trade that lowers Σ (jobs − wanted)² / (wanted + 1) most.
        """
        first, last, source, wanted = self.jobs.first, self.jobs.last, self.source, self.cells
        holder, stratum = np.array(self.holder), np.array(self._stratum)
        weight = 1.0 / (wanted + 1)
        over = np.array(self._count) - wanted
        for _ in range(rounds):
            before = over.copy()
            for position in np.flatnonzero(over[source[holder], stratum] > 0).tolist():
                job = holder[position]
                s, c = source[job], stratum[position]
                if over[s, c] <= 0:
                    continue
                places = slice(first[job], last[job] + 1)
                others = holder[places]
                t, d = source[others], stratum[places]
                fits = (first[others] <= position) & (position <= last[others])
                fits &= (c != d) & (wanted[s, d] > 0) & (wanted[t, c] > 0)
                cost = (1 + 2 * over[s, d]) * weight[s, d] + (1 - 2 * over[s, c]) * weight[s, c]
                cost += (1 + 2 * over[t, c]) * weight[t, c] + (1 - 2 * over[t, d]) * weight[t, d]
                best = int(np.where(fits, cost, 0.0).argmin())
                if fits[best] and cost[best] < -1e-9:
                    other, to = t[best], d[best]
                    over[s, c] -= 1
                    over[s, to] += 1
                    over[other, to] -= 1
                    over[other, c] += 1
                    holder[position], holder[places.start + best] = others[best], job
            if (over == before).all():
                break
        self.holder = holder.tolist()

    def _place(self, job: int) -> bool:
        """Near and at no cost to the cells if possible, else wherever there is room."""
        return self._search(job, 0.25, 300) or self._search(job, 2.0, 2000) or self._search(job)

    def _search(self, job: int, slack: float | None = None, reach: int | None = None) -> bool:
        """Give `job` a position along an augmenting path, found breadth first; False if there is none.

        slack: a cell that is this share of its jobs away from what is wanted of it (and one job) gets no
        further away; None for no such care. reach: jobs to look at before giving up.
        """
        reached_from: dict[int, int] = {}
        skip: list[dict[int, int]] = [{} for _ in self._places]  # index in a stratum → next one not visited
        queue = [job]
        for mover in queue:
            s, first, last, here = (
                self._source[mover],
                self._first[mover],
                self._last[mover],
                self._position[mover],
            )
            strata = self._strata[s]
            if reach is not None and len(queue) > reach:
                return False
            if slack is not None:
                now = self._stratum[here] if here >= 0 else -1
                leaves = here < 0 or self._count[s][now] - 1 >= max(1, (1 - slack) * self._wanted[s][now])
                strata = [c for c in strata if c == now or (leaves and self._has_room(s, c, slack))]
            for c in strata:
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

    def _has_room(self, s: int, c: int, slack: float) -> bool:
        return bool(self._count[s][c] < self._wanted[s][c] + max(1.0, slack * self._wanted[s][c]))

    def _shift(self, position: int, reached_from: dict[int, int]) -> None:
        while position >= 0:
            mover = reached_from[position]
            before = self._position[mover]
            self._move(mover, position)
            position = before

    def _move(self, job: int, position: int) -> None:
        s, before = self._source[job], self._position[job]
        if before >= 0:
            c = self._stratum[before]
            self._count[s][c] -= 1
            self._due[s, c] -= self._step[s, c]
        c = self._stratum[position]
        self._count[s][c] += 1
        self._due[s, c] += self._step[s, c]
        self.holder[position], self._position[job] = job, position


def _next(skip: dict[int, int], i: int) -> int:
    """The first index from `i` on that was not visited; shortens the chains it follows."""
    end = i
    while end in skip:
        end = skip[end]
    while i in skip:
        skip[i], i = end, skip[i]
    return end
