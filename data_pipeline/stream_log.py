"""What a training log shows of its data: epochs of each source, damage, and what reading shards cost."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from data_pipeline.order import Order
from data_pipeline.shard_cache import CacheConfig
from data_pipeline.stream import Stream


class StreamLog:
    """Follows the stream of one rank; `open_stream` may be called again, counts start anew then.

    fetches: the shards lie in a store or go through a cache, so that traffic says something.
    """

    def __init__(self, order: Order, root: str, cache: CacheConfig) -> None:
        self.order, self.fetches = order, "://" in root or bool(cache.folder)
        self._stream: Stream[Any] | None = None
        self._named: set[str] = set()

    def follow(self, stream: Stream[Any]) -> Stream[Any]:
        """Take the counts from this stream from now on; returns it."""
        self._stream = stream
        return stream

    def describe(self, updates: int) -> str:
        """What a batch holds, the weights, and how often each source comes round in a run of `updates`."""
        crops = updates * self.order.batch_size / self.order.mixture.crops_per_volume
        rounds = (
            f"{name} {crops * share / samples:.3g}"
            for name, share, samples in zip(
                self.order.sources, self.order.weights, self.order.counts.sum(axis=1)
            )
            if share > 0
        )
        return f"{self.order.describe()}\nin {updates} updates, epochs of each source: {', '.join(rounds)}"

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

    def notices(self) -> list[str]:
        """A line for each sample that proved damaged since the last call."""
        if self._stream is None:
            return []
        new = [key for key in self._stream.damage if key not in self._named]
        self._named.update(new)
        return [f"sample {key} is damaged; another is drawn wherever it comes up" for key in new]
