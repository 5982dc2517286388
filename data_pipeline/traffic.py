"""What it cost to bring shards to the readers: bytes, requests, retries, blocks, time waited."""

from __future__ import annotations

import threading
from dataclasses import astuple, dataclass, fields


@dataclass(frozen=True)
class Traffic:
    """Counts of one process, or a sum over several.

    bytes: fetched from the store. requests: asked of it, retries among them. retries: requests that had to
    be repeated. fetched: blocks downloaded. refetched: those that this process had downloaded shortly before.
    evicted: blocks deleted to make room. evicted_unused: those that nobody had read yet. damaged: blocks in
    which a check failed, on arrival or later. uncached: reads past the cache for want of room. wait_s:
    seconds in which reading stood still for a download.
    """

    bytes: int = 0
    requests: int = 0
    retries: int = 0
    fetched: int = 0
    refetched: int = 0
    evicted: int = 0
    evicted_unused: int = 0
    damaged: int = 0
    uncached: int = 0
    wait_s: float = 0.0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(*(a + b for a, b in zip(astuple(self), astuple(other))))

    def __sub__(self, other: Traffic) -> Traffic:
        return Traffic(*(a - b for a, b in zip(astuple(self), astuple(other))))

    def __str__(self) -> str:
        """One line with what is not zero."""
        parts = [f"{self.bytes / 1e6:.1f} MB"]
        parts += [
            f"{n} {f.name.replace('_', ' ')}" for f in fields(self)[1:-1] if (n := getattr(self, f.name))
        ]
        return ", ".join([*parts, f"{self.wait_s:.1f} s waited"])


NOTHING = Traffic()


class Meter:
    """Adds up `Traffic`; for any number of threads."""

    def __init__(self) -> None:
        self.total = self._taken = NOTHING
        self._lock = threading.Lock()

    def add(self, **counts: float) -> None:
        """Add to the named counts."""
        with self._lock:
            self.total += Traffic(**counts)  # type: ignore[arg-type]

    def take(self) -> Traffic:
        """What was added since the last call."""
        now = self.total
        if now is self._taken:  # as always with shards on a disk
            return NOTHING
        new, self._taken = now - self._taken, now
        return new

    def __reduce__(self) -> tuple[type[Meter], tuple[()]]:
        return Meter, ()  # a copy in another process counts for itself
