"""How well samples are mixed: within batches, and in the order in which a lane goes through its samples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data_pipeline.order import Order


@dataclass(frozen=True)
class BatchMixing:
    """Of whole batches.

    updates: played. repeats: share of crops whose sample was in their batch before. same_shard: share of
    pairs of crops of one source in a batch whose samples lie in one shard; same_shard_shuffled: the same if
    every source were shuffled as a whole. sources: share of crops of each.
    """

    updates: int
    repeats: float
    same_shard: float
    same_shard_shuffled: float
    sources: dict[str, float]


def batch_mixing(order: Order, shard: np.ndarray, updates: Sequence[int]) -> BatchMixing:
    """Play these updates whole. `shard`: number of the shard of each manifest row."""
    sources = Counter[str]()
    repeats = pairs = together = 0
    for update in updates:
        rows = Counter[int]()
        by_source: dict[str, Counter[int]] = {}
        first = update * order.batch_size
        for i in range(first, first + order.batch_size):
            row, source = order.row(i), order.source_of(i)
            rows[row] += 1
            by_source.setdefault(source, Counter())[int(shard[row])] += 1
        repeats += order.batch_size - len(rows)
        for source, counts in by_source.items():
            total = sum(counts.values())
            sources[source] += total
            pairs += total * (total - 1)
            together += sum(count * (count - 1) for count in counts.values())
    crops = len(updates) * order.batch_size
    return BatchMixing(
        updates=len(updates),
        repeats=repeats / crops,
        same_shard=together / max(1, pairs),
        same_shard_shuffled=_shuffled(order, shard),
        sources={name: sources[name] / crops for name in order.sources},
    )


def _shuffled(order: Order, shard: np.ndarray) -> float:
    """Chance that two crops of one source share a shard if all its samples were drawn alike."""
    chance = weight = 0.0
    for source, share in enumerate(order.weights):
        rows = [rows for (s, _), rows in order.cells() if s == source]
        if rows:
            counts = np.bincount(shard[np.concatenate(rows)])
            # Weighted as the pairs of a batch are, by the square of a source's share.
            chance += share**2 * float(((counts / counts.sum()) ** 2).sum())
            weight += share**2
    return chance / weight


@dataclass(frozen=True)
class LaneMixing:
    """Of the first epoch of some lanes in their largest cell (source and kind of row).

    samples: of those epochs, all lanes together. correlation: between the place in the shards and the place
    in the epoch (Spearman's rank correlation, mean over lanes, absolute value): 0 for a perfect shuffle, 1
    for reading in order. distance: mean number of draws between two samples that lie side by side, over that
    of a perfect shuffle (a third of the epoch): 1 for a perfect shuffle, near 0 where neighbours come one
    after another.
    """

    samples: int
    correlation: float
    distance: float


def lane_mixing(order: Order, drawn: Sequence[np.ndarray]) -> LaneMixing:
    """drawn: for some lanes, the rows that each draws from the start, as `node_reads.play` gives them."""
    largest = max((rows for _, rows in order.cells()), key=len)
    samples, correlations, distances = 0, [], []
    for lane in drawn:
        rows, first = np.unique(lane[np.isin(lane, largest)], return_index=True)  # first visits: one epoch
        samples += len(rows)
        if len(rows) > 2:
            place = np.argsort(np.argsort(first))
            epoch = max(len(rows), len(largest) / order.groups)
            correlations.append(float(np.corrcoef(place, np.arange(len(rows)))[0, 1]))
            distances.append(float(np.abs(np.diff(place)).mean() / ((epoch + 1) / 3)))
    if not distances:
        return LaneMixing(samples, 0.0, 1.0)
    return LaneMixing(samples, abs(float(np.mean(correlations))), float(np.mean(distances)))
