"""What a run would read: the order played without data, for so many nodes and so large a cache.

A node's *share* is what it would fetch if every sample it draws were fetched once: over a time in which every
sample is drawn once, the selected bytes of the dataset over the number of nodes; a source (or a kind of row)
that comes round three times in that time counts three times. What a node fetches is given as a multiple of
its share.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from data_pipeline.crop_cost import CropCost, crop_cost
from data_pipeline.errors import UserError
from data_pipeline.manifest import Manifest
from data_pipeline.mixing import BatchMixing, LaneMixing, batch_mixing, lane_mixing
from data_pipeline.node_reads import Fetched, Layout, NodeDraws, fetched, node_lanes, play, working_set
from data_pipeline.order import Order

#: Draws looked up, at most: some ten seconds of work.
BUDGET = 400_000
#: Crops whose boxes are looked at.
CROPS = 600
#: A cache serves a node well when the node fetches at most this much of its share.
GOAL = 1.2


@dataclass(frozen=True)
class Cache:
    """Size of a node's cache: in shards of mean size for each lane of a node, or in bytes of the node."""

    shards: float = 16
    bytes: float | None = None

    @classmethod
    def parse(cls, text: str) -> Cache:
        """ "16" is shards for each lane, "200GB" bytes of a node. Raises UserError for anything else."""
        number, gb = text.strip().upper().removesuffix("GB"), text.strip().upper().endswith("GB")
        try:
            size = float(number)
        except ValueError:
            size = math.nan
        if not 0 <= size < math.inf:
            raise UserError(f"--cache {text!r}: give shards for each lane, like 16, or a size, like 200GB")
        return cls(bytes=size * 1e9) if gb else cls(shards=size)

    def bytes_per_lane(self, lanes: int, shard_bytes: float) -> float:
        """Bytes for each lane of a node that has so many."""
        return self.shards * shard_bytes if self.bytes is None else self.bytes / lanes


@dataclass(frozen=True)
class Played:
    """The part of the run that was played for traffic: these nodes (numbers), of each the first `lanes`
    lanes, from the start for so many updates. longest_epoch: updates in which each sample is drawn at least
    once.
    """

    nodes: tuple[int, ...]
    lanes: int
    updates: int
    longest_epoch: int


@dataclass(frozen=True)
class Simulation:
    """Figures of a simulated run.

    lanes: of a node, at most. samples, shards, bytes: of the selection. share_bytes: `bytes` over `nodes`.
    share_per_crop: bytes of a node's share that a crop stands for. cache: bytes of a node. blocks,
    half_cache, double_cache: what is fetched in blocks, with the cache and with others; whole_shards: in
    shards. working_set: bytes of the smallest cache of a node, to 10 %, with which all nodes played fetch at
    most `GOAL` times their share; 0 where the block in use is enough, None where no cache is. epochs: how
    often the samples of each source came round in the updates played.
    """

    nodes: int
    ranks_per_node: int
    groups: int
    lanes: int
    samples: int
    shards: int
    bytes: int
    share_bytes: float
    share_per_crop: float
    cache: float
    played: Played
    blocks: Fetched
    half_cache: Fetched
    double_cache: Fetched
    whole_shards: Fetched
    working_set: float | None
    crop: CropCost
    epochs: dict[str, float]
    batch: BatchMixing
    lane: LaneMixing


def simulate(
    manifest: Manifest,
    order: Order,
    *,
    nodes: int = 1,
    ranks_per_node: int = 1,
    cache: Cache = Cache(),
    updates: int | None = None,
    budget: int = BUDGET,
    layout: Layout | None = None,
) -> Simulation:
    """Play a run from its start on equal nodes; no voxel is read.

    updates: to play; None plays the longest epoch. budget: draws at most, else fewer nodes, then fewer lanes
    of a node (with their part of the cache), then fewer updates are played; `Simulation.played` says what
    was. layout: `Layout.of(manifest)`, where it is at hand.
    """
    if nodes < 1 or ranks_per_node < 1 or (updates is not None and updates < 1):
        raise UserError(
            f"{nodes} nodes of {ranks_per_node} ranks and {updates} updates cannot be simulated; "
            "give 1 or more of each"
        )
    layout = layout or Layout.of(manifest)
    selected = order.rows
    total, shards = int(layout.bytes[selected].sum()), np.unique(layout.shards.of[selected])
    by_node = [node_lanes(node, nodes, ranks_per_node, order.groups) for node in range(nodes)]
    widest = max(map(len, by_node))
    lane_cache = cache.bytes_per_lane(widest, float(layout.shards.size[shards].mean()))

    played = _plan(order, by_node, updates, budget)
    lane_share = _mean_bytes(order, layout) * (order.groups / nodes / order.mixture.crops_per_volume)
    draws = []
    for node in played.nodes:
        own, lanes = by_node[node], by_node[node][: played.lanes]
        rows = play(order, lanes, range(played.updates))
        share = float(lane_share[rows].sum(dtype=np.float64)) / len(own)
        draws.append(NodeDraws(rows, share, lane_cache * len(lanes), len(lanes) / len(own)))
    few = sorted({k * (order.groups - 1) // 7 for k in range(8)})
    alone = range(min(played.updates, max(1, budget // 4 // len(few) // order.group_size)))
    batches = np.linspace(0, played.updates - 1, max(1, budget // 4 // order.batch_size)).astype(int)
    crops = np.linspace(0, played.updates * order.batch_size - 1, CROPS).astype(int)
    return Simulation(
        nodes=nodes,
        ranks_per_node=ranks_per_node,
        groups=order.groups,
        lanes=widest,
        samples=len(selected),
        shards=len(shards),
        bytes=total,
        share_bytes=total / nodes,
        share_per_crop=sum(d.share for d in draws) / sum(len(d.rows) for d in draws),
        cache=lane_cache * widest,
        played=played,
        blocks=fetched(draws, layout.blocks),
        half_cache=fetched(draws, layout.blocks, 0.5),
        double_cache=fetched(draws, layout.blocks, 2.0),
        whole_shards=fetched(draws, layout.shards),
        working_set=working_set(draws, layout.blocks, GOAL),
        crop=crop_cost(manifest, [order.draw(i) for i in np.unique(crops).tolist()]),
        epochs=_epochs(order, played.updates),
        batch=batch_mixing(order, layout.shards.of, np.unique(batches).tolist()),
        lane=lane_mixing(order, [play(order, [lane], alone) for lane in few]),
    )


def _plan(order: Order, by_node: list[list[int]], updates: int | None, budget: int) -> Played:
    """What of the run is played for traffic."""
    longest = math.ceil(max(order.epoch_updates().values()))
    length = max(1, min(updates or longest, budget // order.group_size))
    lanes = max(1, budget // (length * order.group_size))
    widest = max(map(len, by_node))
    busy = [node for node, own in enumerate(by_node) if own]
    count = min(len(busy), max(1, lanes // widest))
    nodes = [busy[k * (len(busy) - 1) // max(1, count - 1)] for k in range(count)]
    return Played(tuple(nodes), min(lanes, widest), length, longest)


def _epochs(order: Order, updates: int) -> dict[str, float]:
    """How often the samples of each source come round in so many updates, on average over its samples."""
    samples, drawn = dict.fromkeys(order.sources, 0), dict.fromkeys(order.sources, 0.0)
    lengths = order.epoch_updates()
    for (source, j), rows in order.cells():
        samples[order.sources[source]] += len(rows)
        drawn[order.sources[source]] += len(rows) * updates / lengths[source, j]
    return {name: drawn[name] / samples[name] for name in order.sources if samples[name]}


def _mean_bytes(order: Order, layout: Layout) -> np.ndarray:
    """For each manifest row that is drawn, the mean sample of its cell in bytes (float32)."""
    mean = np.zeros(len(layout.bytes), np.float32)
    for _, rows in order.cells():
        mean[rows] = layout.bytes[rows].mean()
    return mean
