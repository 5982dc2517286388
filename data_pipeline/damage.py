"""How much of what a stream reads is damaged: counted by sample, logged once for each, and limited."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Collection, Iterable

from data_pipeline.errors import UserError
from data_pipeline.shard_reader import DamagedSample

log = logging.getLogger(__name__)

#: Crops that the share of damage is judged over, so that data going bad late in a long run end it too.
RECENT = 100_000
#: Fewer crops count as this many: one damaged sample met at the start does not end a run.
FLOOR = 1_000
NAMED = 3  # damaged samples that the error names


class DamageShare:
    """Share of the crops that were replaced, of the last hundred thousand or so and of at least a thousand,
    and its limit. root: the dataset, for the error."""

    def __init__(self, limit: float, root: object) -> None:
        self.limit, self.root = limit, root
        self._crops = self._replaced = 0

    def add(self, crops: int, replaced: int, where: str = "") -> None:
        """Count crops, `replaced` of them. UserError once the share is above the limit; where: what to look
        at, for its text."""
        if self._crops >= RECENT:  # the counts stay those of the last one to two halves
            self._crops //= 2
            self._replaced //= 2
        self._crops += crops
        self._replaced += replaced
        if self._replaced > self.limit * max(self._crops, FLOOR):
            raise UserError(
                f"{self._replaced} of the last {self._crops} crops hit damaged samples (allowed: "
                f"{self.limit:.2%} of {FLOOR} or more){where}; run `medfm shards verify {self.root}`"
            )


class DamageCount:
    """Damage of one stream, in the process that consumes it, whatever number of workers read.

    `by_key`: crops replaced, by key of the damaged sample that the order chose. `total`: their sum. `crops`:
    crops seen. limit, root: as for `DamageShare`.
    """

    def __init__(self, limit: float, root: object) -> None:
        self.by_key: dict[str, int] = {}
        self.total = self.crops = 0
        self._share = DamageShare(limit, root)
        self._last: deque[str] = deque(maxlen=NAMED)
        self._logged: set[str] = set()

    def add(self, crops: int, replaced: Collection[str], faults: Iterable[DamagedSample]) -> None:
        """Count a batch: its crops, the keys whose crops were replaced, and the faults met, some perhaps
        known.

        Raises UserError once the share of damage is above the limit.
        """
        for fault in faults:
            if fault.key not in self._logged:
                self._logged.add(fault.key)
                log.warning("%s; other samples are drawn in its place", fault)
        self.crops += crops
        for key in replaced:
            self.by_key[key] = self.by_key.get(key, 0) + 1
            self.total += 1
            if key in self._last:
                self._last.remove(key)
            self._last.append(key)
        self._share.add(crops, len(replaced), f", the last of them {', '.join(self._last)}")
