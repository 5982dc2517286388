"""What a run would read: the order played without data; shards fetched by each node, how samples mix."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np

from data_pipeline.errors import UserError
from data_pipeline.order import Columns, Order, lanes_of


@dataclass(frozen=True)
class Simulation:
    """Figures of `updates` updates on `nodes` nodes.

    shards: that hold a sample of the selection. fetched: distinct shards each node read. working: mean number
    of distinct shards a node reads in ten consecutive updates, which is what its cache has to hold.
    in_batch_repeats: share of crops whose sample comes again in the same batch. same_shard: share of pairs of
    crops of one source in a batch that come from one shard; same_shard_shuffled: the same for a perfect
    shuffle of each source. unseen: share of the samples never drawn. sources: share of crops of each.
    """

    nodes: int
    updates: int
    crops: int
    shards: int
    fetched: tuple[int, ...]
    working: float
    in_batch_repeats: float
    same_shard: float
    same_shard_shuffled: float
    unseen: float
    sources: dict[str, float]


def simulate(
    manifest: Columns, order: Order, *, nodes: int = 1, updates: int = 100, start: int = 0
) -> Simulation:
    """Play `updates` updates from `start` on `nodes` equal nodes; no voxel is read."""
    if nodes < 1 or updates < 1:
        raise UserError(f"{nodes} nodes and {updates} updates cannot be simulated; give 1 or more of each")
    node_of = {g: node for node in range(nodes) for g in lanes_of(node, nodes, order.groups) if g is not None}
    shard_of = manifest.column("shard")
    fetched: list[set[str]] = [set() for _ in range(nodes)]
    recent: list[list[set[str]]] = [[] for _ in range(nodes)]
    working: list[int] = []
    drawn: set[int] = set()
    sources = Counter[str]()
    repeats = pairs = together = 0
    for update in range(start, start + updates):
        rows = Counter[int]()
        by_source: dict[str, Counter[str]] = {}
        now: list[set[str]] = [set() for _ in range(nodes)]
        for group in range(order.groups):
            for draw in order.group_draws(update, group):
                shard, source = str(shard_of[draw.row]), order.source_of(draw.index)
                rows[draw.row] += 1
                sources[source] += 1
                by_source.setdefault(source, Counter())[shard] += 1
                now[node_of[group]].add(shard)
        drawn |= rows.keys()
        repeats += sum(count for count in rows.values() if count > 1)
        for counts in by_source.values():
            total = sum(counts.values())
            pairs += total * (total - 1)
            together += sum(count * (count - 1) for count in counts.values())
        for node in range(nodes):
            fetched[node] |= now[node]
            recent[node] = [*recent[node][-9:], now[node]]
            working.append(len(set().union(*recent[node])))
    crops = updates * order.batch_size
    return Simulation(
        nodes=nodes,
        updates=updates,
        crops=crops,
        shards=len({str(shard_of[row]) for row in order.rows}),
        fetched=tuple(len(shards) for shards in fetched),
        working=float(np.mean(working)),
        in_batch_repeats=repeats / crops,
        same_shard=together / max(1, pairs),
        same_shard_shuffled=_shuffled(manifest, order),
        unseen=1 - len(drawn) / len(order.rows),
        sources={name: sources[name] / crops for name in order.sources},
    )


def _shuffled(manifest: Columns, order: Order) -> float:
    """Chance that two crops of one source share a shard if all its samples were drawn alike."""
    shard_of, source_of = manifest.column("shard"), manifest.column(order.mixture.by)
    chance = weight = 0.0
    held: dict[str, Counter[str]] = {source: Counter() for source in order.sources}
    for row in order.rows.tolist():
        held[str(source_of[row])][str(shard_of[row])] += 1
    for source, share in zip(order.sources, order.weights):
        counts = np.array(list(held[source].values()))
        if len(counts):
            # Weighted as the pairs of a batch are, by the square of a source's share.
            chance += share**2 * float(((counts / counts.sum()) ** 2).sum())
            weight += share**2
    return chance / weight


def describe(manifest: Columns, order: Order, *, nodes: int = 1, updates: int = 100) -> str:
    """`Order.describe` and, below it, what `updates` simulated updates on `nodes` nodes would read."""
    s = simulate(manifest, order, nodes=nodes, updates=updates)
    fetched = f"{min(s.fetched)} to {max(s.fetched)}" if len(set(s.fetched)) > 1 else str(s.fetched[0])
    return "\n".join(
        [
            order.describe(),
            f"simulated: {s.updates} updates, {s.crops} crops on {s.nodes} node{'s' if s.nodes > 1 else ''}; "
            f"{s.unseen:.1%} of the samples not yet drawn",
            f"  shards: a node fetches {fetched} of {s.shards} and reads {s.working:.1f} in ten updates",
            f"  mixing: {s.in_batch_repeats:.1%} of crops share a volume with one of their batch;"
            f" {s.same_shard:.2%} of a source's pairs share a shard (shuffled: {s.same_shard_shuffled:.2%})",
        ]
    )
