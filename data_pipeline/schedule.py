"""Which kinds of rows a group holds, and from which source each crop of a lane comes.

The composition of a group is constant: whole rows of each (geometry, row class). Inside such a stratum, a
periodic table says which source the n-th crop of a lane comes from; on every prefix, a source's count is less
than one crop away from its share times the length.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from data_pipeline.errors import UserError
from data_pipeline.rng import words

#: Crops after which a source table repeats; weights of three decimals, thirds and eighths are exact.
PERIOD = 3000


class MixtureConfig(BaseModel):
    """What is drawn, how often, and how large the unit is that a rank can take."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    by: str = Field("modality", description="what a weight is for: each modality or each source")
    weights: dict[str, float] | None = Field(
        None,
        description="share of crops of each source; none: proportional to the square root of its samples",
    )
    scale: tuple[float, float] = Field(
        (0.5, 4.0), description="range of an output voxel in native voxels, drawn log-uniform"
    )
    foreground: float = Field(0.0, ge=0.0, le=1.0, description="share of crops placed over a labelled voxel")
    groups: int = Field(8, ge=1, description="groups of a batch, which is the largest useful number of ranks")
    rows_per_group: int | None = Field(None, ge=1, description="rows of a group; none: one of each kind")
    window_shards: int = Field(16, ge=1, description="shards whose samples are shuffled together")
    crops_per_volume: int = Field(
        1, ge=1, description="crops taken from a volume in a row, to read it less often"
    )

    @field_validator("weights")
    @classmethod
    def _check_weights(cls, weights: dict[str, float] | None) -> dict[str, float] | None:
        if weights is not None and not (
            all(math.isfinite(w) and w >= 0 for w in weights.values()) and sum(weights.values()) > 0
        ):
            raise ValueError("weights are numbers of at least 0, and one of them is above 0")
        return weights

    @model_validator(mode="after")
    def _check_scale(self) -> MixtureConfig:
        low, high = self.scale
        if not (0 < low <= high and math.isfinite(high)):
            raise ValueError("scale is a range of two positive numbers, the lower one first")
        return self


def largest_remainder(shares: Sequence[float] | np.ndarray, total: int, least: int = 1) -> list[int]:
    """Whole numbers summing to `total`, as `shares` are, none below `least`; ties go to the lowest index."""
    weight = np.asarray(shares, dtype=np.float64)
    if total < least * len(weight):
        raise ValueError(f"{total} cannot be dealt to {len(weight)} with at least {least} each")
    counts = np.full(len(weight), least, dtype=np.int64)
    free = np.ones(len(weight), dtype=bool)
    while True:
        room = total - int(counts[~free].sum())
        quota = weight * (room / weight[free].sum()) if free.any() else weight
        short = free & (quota < least)
        if not short.any():
            break
        free &= ~short
    if free.any():
        # A quota such as 0.3 × 3000 may lie a rounding error below the whole number it stands for.
        counts[free] = np.floor(quota[free] + 1e-9).astype(np.int64)
        rest = np.where(free, quota - counts, -np.inf)
        for i in np.argsort(-np.round(rest, 9), kind="stable")[: total - int(counts.sum())]:
            counts[i] += 1
    else:
        counts[0] += total - int(counts.sum())
    return counts.tolist()


def compose(shares: Sequence[float], per_row: Sequence[int], rows: int | None) -> list[int]:
    """Rows of each stratum in a group, from the share of crops wanted of it and the crops its rows hold."""
    if rows is None:
        return [1] * len(shares)
    if rows < len(shares):
        raise UserError(
            f"mixture.rows_per_group is {rows}, but the data hold {len(shares)} kinds of rows "
            f"(geometry and row class) and each needs one; set {len(shares)} or more"
        )
    return largest_remainder([share / k for share, k in zip(shares, per_row)], rows)


def stratum_shares(wanted: np.ndarray, counts: np.ndarray, crops: np.ndarray) -> np.ndarray:
    """Share of each source in each stratum, (sources, strata), columns summing to 1.

    Starts from each source's own distribution over strata (`counts`, samples) times its weight (`wanted`,
    summing to 1), then fits both margins alternately (Deming and Stephan 1940): the composition of a group
    (`crops` of each stratum), which is exact, and the weights, which are met wherever the composition leaves
    room. No share falls below a quarter of where it started, so that no sample is starved for the sake of the
    margins.
    """
    natural = wanted[:, None] * counts / counts.sum(axis=1, keepdims=True)
    natural /= natural.sum(axis=0, keepdims=True)
    columns = crops / crops.sum()
    joint = natural * columns
    for _ in range(200):
        joint *= (wanted / joint.sum(axis=1))[:, None]
        joint *= columns / joint.sum(axis=0)
    share = np.maximum(joint / columns, natural / 4)
    return share / share.sum(axis=0, keepdims=True)


def source_table(shares: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sources of one period, with the window of positions each entry may move in: source, first, last
    (int32).

    The k-th crop of a source with m in a period of D has to lie at or after floor(k·D/m) and before ceil((k +
    1)·D/m): then the prefix error is below one crop (Baruah et al., "Proportionate progress", Algorithmica
    1996). Taking the entry whose window closes first always succeeds, since there is one place a position and
    the shares sum to one.
    """
    present = np.flatnonzero(shares > 0)
    length = max(PERIOD, 8 * len(present))
    counts = largest_remainder(shares[present], length)
    opening: list[tuple[int, int, int]] = []
    for source, m in zip(present.tolist(), counts):
        opening += [(k * length // m, -(-(k + 1) * length // m) - 1, source) for k in range(m)]
    opening.sort()
    table = np.empty((3, length), dtype=np.int32)
    ready: list[tuple[int, int, int]] = []
    at = 0
    for position in range(length):
        while at < length and opening[at][0] <= position:
            first, last, source = opening[at]
            heapq.heappush(ready, (last, source, first))
            at += 1
        last, source, first = heapq.heappop(ready)
        table[:, position] = source, first, last
    return table[0], table[1], table[2]


def lane_table(
    source: np.ndarray, first: np.ndarray, last: np.ndarray, seed: int, lane: int, purpose: str
) -> np.ndarray:
    """One lane's own table: entries swapped at random inside their windows, so that lanes differ and the
    bound holds.

    Without it every lane would draw the same source at the same update, and batches would be lumpy.
    """
    if (source == source[0]).all():
        return source
    entries = np.stack([source, first, last])
    length = len(source)
    position = np.arange(length)
    distances = [d for d in (1, 2, 3, 5, 8, 13, 21, 34, 55, 89) if d < length]
    for sweep in range(4 * len(distances)):
        d = distances[sweep % len(distances)]
        coins = words(seed, lane, f"table:{purpose}:{sweep}", length)
        offset = int(coins[0] % np.uint64(2 * d))
        left = np.flatnonzero(
            (position >= offset) & ((position - offset) % (2 * d) < d) & (position + d < length)
        )
        right = left + d
        free = (entries[2, left] >= right) & (entries[1, right] <= left) & (coins[left] >> np.uint64(63) == 1)
        i, j = left[free], right[free]
        entries[:, i], entries[:, j] = entries[:, j], entries[:, i]
    return entries[0]
