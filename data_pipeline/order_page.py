"""An order as a page for people: composition, what rounding did, epochs; `medfm shards order` prints it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from data_pipeline.order import Order


def description(order: Order) -> str:
    """What a group holds, what rounding did to the weights, and how often samples come round."""
    table = order._table
    rows = ", ".join(
        f"{s.rows} × {s.geometry} rows of {s.k} (≤ {s.capacity} tokens, {share:.0%} filled)"
        for s, share in zip(order.composition, filled(order))
    )
    lines = [
        f"batch: {order.groups} groups of {order.group_size} crops = {order.batch_size} crops an update",
        f"group: {rows}",
    ]
    lines += [
        f"  {n} samples of {kind} rows of {k} go into rows of {into}: they would fill less than half a "
        "row of a group"
        for n, kind, k, into in order.merged
    ]
    lines += [
        f"sources by {order.mixture.by}: every prefix of a lane is within {_up(table.bound)} crops of its "
        f"share, within {_up(table.group_bound)} after each group (shares in steps of one in {table.length})",
        "epoch of a source: each of its samples once, kind of row by kind of row",
    ]
    updates = order.epoch_updates()
    slowest = max(updates.values())
    for s, name in enumerate(order.sources):
        if order.wanted[s] == 0:
            lines.append(f"source {name}: weight 0, left out")
            continue
        wanted, given = f"{order.wanted[s]:.2%}", f"{order.weights[s]:.2%}"
        why = "" if wanted == given else "; a group holds whole rows, more rows_per_group come nearer"
        lines.append(
            f"source {name}: {order.counts[s].sum()} samples, {given} of crops (wanted {wanted}{why})"
        )
        for (source, c), count in updates.items():
            if source == s:
                lines.append(_described(order, s, c, count, slowest))
    if order.left_out:
        lines.append(f"{order.left_out} samples of weight 0 are never drawn")
    return "\n".join(lines)


def filled(order: Order, crops: int = 1000) -> list[float]:
    """Share of its token slots that the first crops of each kind of row fill: `slot_waste` is the rest."""
    tokens, slots = [0] * len(order.composition), [0] * len(order.composition)
    for i in range(-(-crops // order.group_size) * order.group_size):
        draw = order.draw(i)
        tokens[draw.spec] += math.prod(draw.grid)
        slots[draw.spec] += order.composition[draw.spec].capacity
    return [t / s for t, s in zip(tokens, slots)]


def _described(order: Order, source: int, stratum: int, updates: float, slowest: float) -> str:
    cell, spec = order._cells[source, stratum], order.composition[stratum]
    own = "each lane has its own" if cell.dealt else "shared by all lanes (under 8 a lane)"
    often = slowest / updates
    repeated = f", drawn {often:.1f} times as often as the rarest" if often > 1.05 else ""
    return (
        f"  {spec.geometry} of {spec.k}: {len(cell.rows)} samples, {own}, an epoch every {updates:.1f} "
        f"updates{repeated}"
    )


def _up(x: float) -> float:
    """Rounded up to two decimals, so that the printed bound holds."""
    return math.ceil(x * 100 - 1e-6) / 100
