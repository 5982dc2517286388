"""A simulated run as a page for people: every figure with its unit and its meaning."""

from __future__ import annotations

from data_pipeline.node_reads import Fetched
from data_pipeline.order import Order
from data_pipeline.simulate import GOAL, Simulation


def page(order: Order, s: Simulation) -> str:
    """`Order.describe`, then what the run would read and how well it mixes."""
    return "\n".join([order.describe(), "", *_played(s), *_traffic(s), *_crops(s), *_mixing(s)])


def amount(count: float) -> str:
    """Bytes in the unit that fits them."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.{0 if count >= 100 * size else 1}f} {unit}"
    return f"{count:.0f} B"


def _many(count: int, what: str) -> str:
    return f"{count:,} {what}" if count == 1 else f"{count:,} {what}s"


def _line(what: str, figure: str) -> str:
    return f"  {what:<52} {figure}"


def _played(s: Simulation) -> list[str]:
    p = s.played
    whole = p.updates >= p.longest_epoch
    part = "every sample is drawn" if whole else f"the longest epoch takes {p.longest_epoch:,}"
    rounds = ", ".join(f"{name} {count:.2f}" for name, count in s.epochs.items())
    lines = [
        f"simulated: {_many(p.updates, 'update')} ({part}) on {_many(s.nodes, 'node')} of "
        f"{_many(s.ranks_per_node, 'rank')}",
        _line("data", f"{_many(s.samples, 'sample')}, {_many(s.shards, 'shard')}, {amount(s.bytes)}"),
        _line("lanes", f"{s.groups:,}, up to {s.lanes:,} a node"),
        _line("played for traffic", f"{_many(len(p.nodes), 'node')}, up to {_many(p.lanes, 'lane')} of each"),
        _line("times the samples of a source come round", rounds),
    ]
    if s.nodes > s.groups:
        lines.append(f"  {_many(s.nodes - s.groups, 'node')} without a lane: set mixture.groups to {s.nodes}")
    if p.lanes < s.lanes:
        lines.append("  part of a node, with its part of the cache: whole shards look worse than they are")
    if not whole:
        lines.append(
            "  less than an epoch: what is fetched for later counts in full, so traffic looks higher"
        )
    return lines


def _traffic(s: Simulation) -> list[str]:
    def times(f: Fetched) -> str:
        least, most = f"{f.least:.2f}", f"{f.most:.2f}"
        return f"{most} x" if least == most else f"{least} x to {most} x, by node"

    if s.working_set is None:
        need = f"no cache brings every node to {GOAL} x"
    elif s.working_set:
        need = f"{amount(s.working_set)} (smallest cache for {GOAL} x)"
    else:
        need = f"the blocks in use (no cache needed for {GOAL} x)"
    chunks = s.crop.read_bytes / s.share_per_crop
    return [
        f"traffic of a node: bytes fetched / its share of {amount(s.share_bytes)} a round (data / nodes)",
        _line(f"blocks, cache of {amount(s.cache)} a node", times(s.blocks)),
        _line(f"blocks, cache of {amount(s.cache / 2)}", times(s.half_cache)),
        _line(f"blocks, cache of {amount(s.cache * 2)}", times(s.double_cache)),
        _line(f"whole shards, cache of {amount(s.cache)}", times(s.whole_shards)),
        _line("chunk by chunk, no cache", f"{chunks:.2f} x"),
        _line("requests: blocks", f"{s.blocks.per_crop:.2f} a crop, of {amount(s.blocks.piece_bytes)}"),
        _line("requests: chunk by chunk", f"{s.crop.requests:.2f} a crop"),
        _line("working set of a node", need),
    ]


def _crops(s: Simulation) -> list[str]:
    c = s.crop

    def over(count: float) -> str:
        return f"{count / c.used_bytes:.2f} x"

    return [
        "amplification: means over crops",
        _line("voxels used", f"{c.used / 1e6:.3f} million"),
        _line("voxels decompressed / used", f"{c.decompressed / c.used:.2f} x (whole chunks)"),
        _line("compressed bytes used", amount(c.used_bytes)),
        _line("bytes of touched chunks / used", over(c.touched_bytes)),
        _line("bytes read chunk by chunk / used", f"{over(c.read_bytes)} (with indices and gaps)"),
        _line("bytes fetched in blocks / used", f"{over(s.blocks.bytes_per_crop)} (whole samples)"),
    ]


def _mixing(s: Simulation) -> list[str]:
    b, lane = s.batch, s.lane
    return [
        "shuffle quality",
        _line("crops of a volume that is in the batch already", f"{b.repeats:.2%}"),
        _line("pairs of a source in a batch from one shard", f"{b.same_shard:.3%}"),
        _line("  the same after a perfect shuffle", f"{b.same_shard_shuffled:.3%}"),
        _line("rank correlation of drawing and storage order", f"{lane.correlation:.3f} (perfect 0, none 1)"),
        _line("draws between neighbours in storage", f"{lane.distance:.0%} of a perfect shuffle's"),
    ]
