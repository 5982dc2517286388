"""The learning rate as a function of the update count: no state to save or to load."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from engine.recipe import EngineConfig


def learning_rate(update: int, config: EngineConfig) -> float:
    """Learning rate of update `update` (0-based): linear warm-up, then what `config.schedule` says.

    cosine: half a cosine to `min_lr` (Loshchilov and Hutter, SGDR, ICLR 2017, one cycle without restarts).
    wsd: constant, then a decay over the last `decay` updates (warm-up, stable, decay: Hu et al., MiniCPM,
    COLM 2024), by one minus the square root of the share done (Hägele et al., Scaling laws and
    compute-optimal training beyond fixed training durations, NeurIPS 2024).
    """
    if update < config.warmup:
        return config.lr * (update + 1) / config.warmup
    if config.schedule == "constant":
        return config.lr
    if config.schedule == "wsd":
        start = decay_start(config)
        if update <= start:
            return config.lr
        share = min(1.0, (update - start) / max(1, config.updates - start))
        return config.min_lr + (config.lr - config.min_lr) * (1.0 - math.sqrt(share))
    share = min(1.0, (update - config.warmup) / max(1, config.updates - config.warmup))
    return config.min_lr + 0.5 * (config.lr - config.min_lr) * (1.0 + math.cos(math.pi * share))


def decay_start(config: EngineConfig) -> int:
    """Updates of wsd done when its decay begins: the state from which a run can be extended."""
    length = config.decay or max(1, config.updates // 10)
    return max(config.warmup, config.updates - length)


def agree_until(old: EngineConfig, new: EngineConfig) -> int:
    """Number of updates, from the first on, for which both give the same learning rates.

    A checkpoint of no more updates belongs to either run.
    """
    longest = max(old.updates, new.updates)
    rates = (learning_rate(u, old) == learning_rate(u, new) for u in range(longest))
    return next((update for update, same in enumerate(rates) if not same), longest)


def set_learning_rate(groups: Iterable[dict[str, Any]], lr: float) -> None:
    """Write `lr` times each group's `lr_scale` (default 1) into AdamW's groups."""
    for group in groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
