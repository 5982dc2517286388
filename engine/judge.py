"""Whether an update may be applied: a function of numbers that all ranks have alike."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median

from engine.recipe import EngineConfig

FEWEST = 16  # losses before which none counts as a spike
TO_DEVIATION = 1.4826  # median absolute deviation -> standard deviation, for normal values
LEAST_DEVIATION = 0.05  # of the median: a loss that hardly moves makes no spike of a small step


def objection(loss: float, norm: float, losses: Sequence[float], config: EngineConfig) -> str:
    """Why an update must be skipped, or an empty string.

    A spike is a loss more than `config.spike` robust standard deviations above the median of `losses`. Median
    and median absolute deviation are not moved by the spikes that came before (Leys et al., Detecting
    outliers: do not use standard deviation around the mean, J. Exp. Soc. Psychol. 2013).

    Args:
        loss: of the update, summed over ranks.
        norm: of the gradient, over all ranks, before clipping.
        losses: of the last updates that were applied.
        config: `spike` of it is used.
    """
    if not math.isfinite(loss):
        return "the loss is not finite"
    if not math.isfinite(norm):
        return "the gradient is not finite"
    if config.spike and len(losses) >= FEWEST and loss > (limit := spike_limit(losses, config.spike)):
        return f"the loss is above {limit:.4g}, far from the last ones"
    return ""


def spike_limit(losses: Sequence[float], spike: float) -> float:
    """The loss above which an update counts as a spike."""
    middle = median(losses)
    deviation = TO_DEVIATION * median(abs(loss - middle) for loss in losses)
    return middle + spike * max(deviation, LEAST_DEVIATION * abs(middle))
