"""What is drawn and how often: the mixture of a recipe, the rows of a group, the shares of the sources.

The composition of a group is constant: whole rows of each kind, a geometry and row class (a stratum).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from data_pipeline.errors import UserError


class MixtureConfig(BaseModel):
    """What is drawn, how often, and how large the unit is that a rank can take."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    by: str = Field(
        "modality", description="manifest column whose values are the sources that weights are for"
    )
    weights: dict[str, float] | None = Field(
        None,
        description="share of crops of each source; none: proportional to the square root of its samples",
    )
    scale: tuple[float, float] = Field(
        (0.5, 4.0), description="range of an output voxel in native voxels, drawn log-uniform"
    )
    foreground: float = Field(
        0.0, ge=0.0, le=1.0, description="share of crops over a labelled voxel; without labels, over no air"
    )
    groups: int = Field(8, ge=1, description="groups of a batch, which is the largest useful number of ranks")
    rows_per_group: int | None = Field(
        None, ge=1, description="rows of a group; none: as many as there are kinds of rows"
    )
    window_shards: int = Field(16, ge=1, description="shards a lane shuffles at a time, over all its sources")
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
        quota = weight * (room / math.fsum(weight[free])) if free.any() else weight
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


def merge_rare(
    geometries: Sequence[str], per_row: Sequence[int], shares: Sequence[float], rows: int | None
) -> list[int]:
    """Number of the stratum that each one joins, itself for most.

    One that would have under half a row of a group joins the next lower row class of its geometry: its
    samples have room there, and would otherwise be drawn far more often than others. rows: of a group; None
    for as many as there are strata.
    """
    joins = list(range(len(per_row)))
    share = [float(s) for s in shares]
    rows = rows or len(per_row)
    while True:
        left = [c for c, into in enumerate(joins) if c == into]
        below = {
            c: [b for b in left if geometries[b] == geometries[c] and per_row[b] < per_row[c]] for c in left
        }
        total = math.fsum(share[c] / per_row[c] for c in left)  # `sum` rounds by Python version
        rare = [c for c in left if below[c] and share[c] / per_row[c] * rows < 0.5 * total]
        if not rare:
            return joins
        gone = min(rare, key=lambda c: (share[c] / per_row[c], c))
        into = max(below[gone], key=lambda b: per_row[b])
        share[into] += share[gone]
        joins = [into if j == gone else j for j in joins]


def compose(shares: Sequence[float], per_row: Sequence[int], rows: int) -> list[int]:
    """Rows of each stratum in a group, from the share of crops wanted of it and the crops its rows hold."""
    if rows < len(shares):
        raise UserError(
            f"mixture.rows_per_group is {rows}, but the data hold {len(shares)} kinds of rows "
            f"(geometry and row class) and each needs one; set {len(shares)} or more"
        )
    return largest_remainder([share / k for share, k in zip(shares, per_row)], rows)


def share_windows(shares: Sequence[float] | np.ndarray, pieces: Sequence[int], budget: int) -> list[int]:
    """Shards in the window of each cell of a lane: at least one each, `budget` in all, more for larger shares
    and no more than the cell has `pieces`.
    """
    share, most = np.asarray(shares, dtype=np.float64), np.asarray(pieces)
    window = np.ones(len(share), dtype=np.int64)
    for _ in range(min(budget, int(most.sum())) - len(window)):
        need = np.where(window < most, share / window, -1.0)
        if need.max() < 0:
            break
        window[int(need.argmax())] += 1
    return window.tolist()


def stratum_shares(wanted: np.ndarray, counts: np.ndarray, crops: np.ndarray) -> np.ndarray:
    """Share of each source in each stratum, (sources, strata), columns summing to 1.

    Starts from each source's own distribution over strata (`counts`, samples) times its weight (`wanted`,
    summing to 1), then fits both margins alternately (Deming and Stephan 1940): the composition of a group
    (`crops` of each stratum), which is exact, and the weights, which are met wherever the composition leaves
    room. No share falls below a quarter of where it started, so that no sample is starved for the sake of the
    margins.
    """
    natural = wanted[:, None] * counts / _total(counts, 1)[:, None]
    natural /= _total(natural, 0)
    columns = crops / crops.sum()
    joint = natural * columns
    for _ in range(200):
        joint *= (wanted / _total(joint, 1))[:, None]
        joint *= columns / _total(joint, 0)
    share = np.maximum(joint / columns, natural / 4)
    return share / _total(share, 0)


def _total(array: np.ndarray, axis: int) -> np.ndarray:
    """Sum in the order of the entries: `np.sum` may group them differently on another processor."""
    return np.cumsum(array, axis=axis).take(-1, axis=axis)
