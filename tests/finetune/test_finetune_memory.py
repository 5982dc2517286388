"""Predicted memory of a fine-tuning update beside what its tensors take."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine.distributed import import_deepspeed, join
from engine.memory import predict
from engine.optimizer import wrap
from engine.recipe import EngineConfig
from finetune.batch import Batch, Windows
from finetune.clicks import ClickTraining
from finetune.cost import Shape, largest_shape, micro_step_bytes
from finetune.network import scales_for
from finetune.promptable import HeadConfig, PromptableModel
from finetune.recipe import PromptTraining
from model.config import EncoderConfig
from model.encoder import Encoder

CPU = torch.device("cpu")
ISOTROPIC = (1.0, 1.0, 1.0)
VOLUME = Shape(1, "volume", (16, 32, 24), scales_for(ISOTROPIC))
FLAT = Shape(1, "planar", (1, 64, 64), scales_for(ISOTROPIC, (True, False, False)))


def windows(shape: Shape, spacing: tuple[float, float, float] = ISOTROPIC) -> Windows:
    """Noise, with a box in it that is asked for."""
    truth = torch.zeros(shape.windows, *shape.size, dtype=torch.bool)
    truth[:, :, 5:20, 6:16] = True
    return Windows(
        torch.randn(shape.windows, 1, *shape.size), truth, torch.ones_like(truth), torch.ones_like(truth),
        torch.tensor([spacing] * shape.windows), torch.ones(shape.windows), torch.arange(shape.windows),
        shape.geometry, (0, 1, 2),
    )  # fmt: skip


def training(encoder: str) -> ClickTraining:
    """With an encoder none, small (most is taken by the head), large, or large and frozen."""
    sizes = {"small": (48, 1), "large": (192, 2), "frozen": (192, 2)}
    head = HeadConfig(widths=(8, 16, 16, 32), heads=2, layers=1, encoder=encoder != "none")
    net = None
    if encoder in sizes:
        width, depth = sizes[encoder]
        net = Encoder(EncoderConfig(size=None, width=width, depth=depth, heads=3, registers=1))
    model = PromptableModel(head, net, frozen=encoder == "frozen")
    rounds = 2 if net is None else 1
    return ClickTraining(model, PromptTraining(rounds=(rounds, rounds)), 1, seed=0)


class Task:
    """Fine-tuning on one batch of windows."""

    def __init__(
        self, model: ClickTraining, shapes: list[Shape], config: EngineConfig, micro_steps: int
    ) -> None:
        self.model, self.shapes, self.config, self.steps = model, shapes, config, micro_steps

    def micro_steps(self, world: int) -> int:
        return self.steps

    def activation_bytes(self, checkpointing: bool) -> int:
        if checkpointing != self.config.activation_checkpointing:
            return 0  # asked for what could be set instead
        return micro_step_bytes(
            self.model, self.shapes, device=CPU, precision=self.config.precision, checkpointing=checkpointing
        )

    def optimizer_groups(self) -> list[dict[str, Any]]:
        return [{"params": [p for p in self.model.parameters() if p.requires_grad]}]


@pytest.mark.parametrize(
    ("encoder", "precision", "checkpointing", "micro_steps", "shapes"),
    [
        ("none", "fp32", False, 1, [VOLUME._replace(windows=2)]),
        ("none", "bf16", False, 2, [FLAT]),
        ("small", "bf16", False, 1, [VOLUME]),
        ("large", "fp32", True, 1, [VOLUME]),
        ("frozen", "bf16", False, 1, [VOLUME]),
    ],
)  # fmt: skip
def test_predicted_parts_make_the_peak_of_an_update(
    encoder: str, precision: Any, checkpointing: bool, micro_steps: int, shapes: list[Shape],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """One that the engine makes on the CPU; within 8 %."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "engine"))
    live_bytes = importlib.import_module("live_bytes")
    import_deepspeed()
    config = EngineConfig(
        precision=precision, activation_checkpointing=checkpointing, device="cpu", threads=1
    )  # fmt: skip
    world = join(config)
    live = live_bytes.LiveBytes()
    with live:
        task: Any = Task(training(encoder), shapes, config, micro_steps)
    parts = predict(task, config, world).parts
    with live:
        task.model.set_checkpointing(checkpointing)
        engine, partition = wrap(task, config, world)
        engine.train()
        batch = Batch(0, [windows(shape) for shape in shapes])
        for step in range(micro_steps):
            engine.set_gradient_accumulation_boundary(step == micro_steps - 1)
            loss, _ = engine(batch)
            engine.backward(loss, scale_wrt_gas=False)
            del loss
        partition.apply(0.5)
    assert 0.92 < sum(parts.values()) / live.peak < 1.08
    assert task.model.net.encoder is None or task.model.net.encoder.checkpointing == checkpointing


def test_the_window_that_takes_most_is_found_among_the_grids_of_the_data() -> None:
    def largest(shapes: list[tuple[int, ...]], spacings: list[tuple[float, ...]]) -> Shape:
        return largest_shape(
            2, "volume", np.array(shapes), np.array(spacings), (20, 30, 24), (8, 8, 8), (8, 16, 32, 64)
        )

    cube = (64, 64, 64)
    found = largest([cube], [(0.7, 0.7, 0.7)])
    assert (found.windows, found.size, found.scales) == (2, (24, 32, 24), scales_for(ISOTROPIC))
    # Thick slices are strided less, so that the deeper maps are larger.
    found = largest([cube, cube], [(0.7, 0.7, 0.7), (2.8, 0.7, 0.7)])
    assert found.scales == scales_for((2.8, 0.7, 0.7))
    # An axis of length 1 stays 1.
    assert largest([(1, 64, 64)], [ISOTROPIC]).size == (1, 32, 24)
    assert largest([(1, 64, 64), cube], [ISOTROPIC] * 2).size == (24, 32, 24)
