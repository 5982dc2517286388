"""Voxels to tokens to features, and weights on disk. Imports no other room.

`from model import load_encoder` is all that use of the weights needs; names are looked up on first use, so
that importing a part (such as the plan, which needs no torch) costs only that part.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from model.config import EncoderConfig
    from model.encoder import Encoder
    from model.errors import UserError
    from model.plan import AdaptationPlan, normalise_for
    from model.weights import LoadReport, load_encoder, save_encoder

_HOME = {
    "AdaptationPlan": "plan",
    "Encoder": "encoder",
    "EncoderConfig": "config",
    "LoadReport": "weights",
    "UserError": "errors",
    "load_encoder": "weights",
    "normalise_for": "plan",
    "save_encoder": "weights",
}

__all__ = [
    "AdaptationPlan",
    "Encoder",
    "EncoderConfig",
    "LoadReport",
    "UserError",
    "load_encoder",
    "normalise_for",
    "save_encoder",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'model' has no attribute {name!r}")
    return getattr(import_module(f"model.{_HOME[name]}"), name)
