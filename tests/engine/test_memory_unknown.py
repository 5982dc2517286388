"""A task whose memory cannot be told."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from engine.distributed import World
from engine.memory import predict
from engine.recipe import EngineConfig


def test_a_hook_that_fails_does_not_end_the_run_and_is_said() -> None:
    def fails(checkpointing: bool) -> int:
        raise RuntimeError("no such\noperator")

    task: Any = SimpleNamespace(
        model=torch.nn.Linear(3, 3), micro_steps=lambda world: 1, activation_bytes=fails
    )
    found = predict(task, EngineConfig(), World(0, 1, 0, torch.device("cpu")))
    assert "activations" not in found.parts
    assert "could not be found (RuntimeError: no such operator)" in found.text()
