"""The held-out figures of `HeldOut.score` as a table for people."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from pretrain.batch import MODALITIES


class Line(NamedTuple):
    """One modality of the table; a share is the network's error divided by that of the interpolation."""

    modality: str
    loss: float
    mean: float
    interpolation: float | None
    share: float | None
    content_share: float | None  # without patches of air
    at: dict[str, float]  # by mask ratio: the share; the loss where there is no interpolation
    crops: int

    @property
    def learnt(self) -> bool:
        """Whether the network is below every predictor that has no parameters."""
        return self.loss < min(v for v in (self.mean, self.interpolation) if v is not None)


def lines_of(scores: Mapping[str, float]) -> list[Line]:
    """A line for each modality that was scored."""
    lines = []
    for name in MODALITIES:
        if f"val/{name}" not in scores:
            continue
        ratios = sorted(m[1] for key in scores if (m := re.fullmatch(rf"val/{name}@([\d.]+)", key)))
        lines.append(
            Line(
                name,
                scores[f"val/{name}"],
                scores[f"val/{name}_mean"],
                scores.get(f"val/{name}_interpolation"),
                scores.get(f"val/{name}_share"),
                scores.get(f"val/{name}_content_share"),
                {r: scores.get(f"val/{name}@{r}_share", scores[f"val/{name}@{r}"]) for r in ratios},
                int(scores[f"val/{name}_crops"]),
            )
        )
    return lines


def describe(scores: Mapping[str, float]) -> str:
    """The table as text, a line a modality; empty where nothing was scored."""
    lines = lines_of(scores)
    if not lines:
        return ""
    ratios = sorted({ratio for line in lines for ratio in line.at})
    head = [f"held out {'loss':>9} {'share':>7} {'content':>8}", *(f"{f'@{r}':>7}" for r in ratios), " crops"]
    rows = [" ".join(head)]
    for line in lines:
        cells = [f"{line.modality:<8} {line.loss:9.4f} {_cell(line.share, 7)} {_cell(line.content_share, 8)}"]
        cells += [_cell(line.at.get(ratio), 7) for ratio in ratios]
        verdict = "below mean and interpolation" if line.learnt else "not yet below mean and interpolation"
        rows.append(" ".join([*cells, f"{line.crops:6d}", verdict]))
    if all(line.share is not None for line in lines):
        rows.append("share: of the interpolation's loss; content: without patches of air; @: by mask ratio")
    return "\n".join(rows)


def _cell(value: float | None, width: int) -> str:
    return f"{'–':>{width}}" if value is None else f"{value:{width}.3f}"
