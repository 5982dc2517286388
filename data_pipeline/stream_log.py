"""What a training log shows of its data: epochs of each source, damage, and what reading shards cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from data_pipeline.damage import DamageShare
from data_pipeline.order import Order
from data_pipeline.shard_cache import CacheConfig
from data_pipeline.stream import Stream


class StreamLog:
    """Follows the stream of one rank; `open_stream` may be called again, counts start anew then.

    max_damage: share of the crops of all ranks that may come from damaged samples, of the last hundred
    thousand or so and of at least a thousand. A rank by itself draws from a part of the shards, so that one
    bad shard is a large share of it. updates: of the whole run.
    """

    def __init__(
        self, order: Order, root: str, cache: CacheConfig, *, max_damage: float, updates: int
    ) -> None:
        #: The shards lie in a store or go through a cache, so that traffic says something.
        self.fetches = "://" in root or bool(cache.folder)
        self.order, self.updates = order, updates
        self._share = DamageShare(max_damage, root)
        self._judged = 0, 0  # crops of all ranks, and those replaced
        self._stream: Stream[Any] | None = None
        self._named: set[str] = set()

    def follow(self, stream: Stream[Any]) -> Stream[Any]:
        """Take the counts from this stream from now on; returns it."""
        self._stream, self._judged = stream, (0, 0)
        return stream

    def describe(self) -> str:
        """What a batch holds, the weights, and how often each source comes round in the run."""
        crops = self.updates * self.order.batch_size / self.order.mixture.crops_per_volume
        rounds = (
            f"{name} {crops * share / samples:.3g}"
            for name, share, samples in zip(
                self.order.sources, self.order.weights, self.order.counts.sum(axis=1)
            )
            if share > 0
        )
        return (
            f"{self.order.describe()}\nin {self.updates} updates, epochs of each source: {', '.join(rounds)}"
        )

    def counts(self) -> dict[str, float]:
        """Counts of this process, to be summed over ranks: crops replaced for damage, crops of each source,
        and, with a store or a cache, its traffic in MB, requests, blocks and seconds."""
        if self._stream is None:
            return {}
        drawn = {f"crops/{name}": float(self._stream.drawn.get(name, 0)) for name in self.order.sources}
        counts = {"damaged_crops": float(self._stream.damaged), **drawn}
        if self.fetches:
            traffic = asdict(self._stream.traffic)
            counts["fetch/MB"] = traffic.pop("bytes") / 1e6
            counts |= {f"fetch/{name}": float(value) for name, value in traffic.items()}
        return counts

    def check(self, sums: Mapping[str, float]) -> None:
        """Judge `counts` summed over ranks: UserError, on all of them, where too many crops were damaged."""
        crops = int(sum(sums[f"crops/{name}"] for name in self.order.sources))
        damaged = int(sums["damaged_crops"])
        before, self._judged = self._judged, (crops, damaged)
        self._share.add(crops - before[0], damaged - before[1], "; each is named in the log of its rank")

    def notices(self) -> list[str]:
        """A line for each sample that proved damaged since the last call."""
        if self._stream is None:
            return []
        new = [key for key in self._stream.damage if key not in self._named]
        self._named.update(new)
        return [f"sample {key} is damaged; another is drawn wherever it comes up" for key in new]
