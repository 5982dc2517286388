"""The learning rate as a function of the update count: no state to save or to load."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from engine.recipe import EngineConfig


def learning_rate(update: int, config: EngineConfig) -> float:
    """Learning rate of update `update` (0-based): linear warm-up, then a half cosine to `min_lr` or a
    constant.

    Source: Loshchilov and Hutter, SGDR, ICLR 2017, one cycle without restarts.
    """
    if update < config.warmup:
        return config.lr * (update + 1) / config.warmup
    if config.schedule == "constant":
        return config.lr
    share = min(1.0, (update - config.warmup) / max(1, config.updates - config.warmup))
    return config.min_lr + 0.5 * (config.lr - config.min_lr) * (1.0 + math.cos(math.pi * share))


def set_learning_rate(groups: Iterable[dict[str, Any]], lr: float) -> None:
    """Write `lr` times each group's `lr_scale` (default 1) into AdamW's groups."""
    for group in groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
