"""Two ranks that hold windows of other geometries and in other numbers; a test starts this file.

PYTHONPATH=tests/engine:. python tests/finetune/ranks_worker.py FOLDER HANG_MINUTES
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
from forked_ranks import fork_ranks

from engine.distributed import import_deepspeed
from engine.recipe import EngineConfig
from engine.train import train
from finetune.batch import Batch, Windows
from finetune.clicks import ClickTraining
from finetune.promptable import HeadConfig, PromptableModel
from finetune.recipe import FinetuneRecipe, PromptTraining
from model.config import EncoderConfig
from model.encoder import Encoder


def windows(geometry: str, size: tuple[int, int, int], index: int) -> Windows:
    """One window of noise with a bright box in it, which is the object."""
    truth = torch.zeros(1, *size, dtype=torch.bool)
    truth[:, :, 2:9, 3:11] = True
    image = torch.randn(1, 1, *size, generator=torch.Generator().manual_seed(index)) + 2.0 * truth
    everywhere = torch.ones_like(truth)
    return Windows(
        image, truth, everywhere, everywhere, torch.ones(1, 3), torch.ones(1), torch.tensor([index]),
        geometry, (0, 1, 2),
    )  # fmt: skip


class Task:
    """Rank 0 has one volume; rank 1 has a radiograph and two volumes."""

    samples_per_update = 4

    def __init__(self) -> None:
        torch.manual_seed(0)
        config = HeadConfig(widths=(4, 4, 8, 8), heads=2, layers=1, encoder=True)
        encoder = Encoder(EncoderConfig(size=None, width=24, depth=2, heads=2))
        self.model = ClickTraining(PromptableModel(config, encoder), PromptTraining(rounds=(2, 2)), 4, seed=0)

    def batches(self, start: int, rank: int, world: int) -> Iterator[Batch]:
        volumes = [windows("volume", (16, 16, 16), i) for i in range(3)]
        mine = [volumes[:1], [windows("planar", (1, 32, 32), 3), *volumes[1:]]][rank]
        return (Batch(update, mine) for update, _ in enumerate(repeat(None), start))

    def micro_steps(self, world: int) -> int:
        return 1

    def recipe(self) -> FinetuneRecipe:
        return FinetuneRecipe()

    def data_identity(self) -> dict[str, str]:
        return {}

    def evaluate(self, *_: Any) -> dict[str, float]:
        return {"norm": float(sum(p.square().sum() for p in self.model.parameters()))}

    def pictures(self, *_: Any) -> None:
        pass

    def export(self, *_: Any) -> None:
        pass

    def optimizer_groups(self) -> list[dict[str, Any]]:
        return [{"params": list(self.model.parameters())}]


def train_at_every_stage(folder: Path, hang_minutes: float) -> int:
    for stage in range(3):
        settings = EngineConfig(
            updates=6, lr=3e-3, warmup=0, precision="fp32", zero_stage=stage, threads=1, log_every=1,
            device="cpu", evaluate_every=2, evaluate_share=1.0, hang_minutes=hang_minutes,
        )  # fmt: skip
        train(Task(), settings, folder / f"zero-{stage}")
    return 0


if __name__ == "__main__":
    import_deepspeed()
    sys.exit(fork_ranks(2, lambda: train_at_every_stage(Path(sys.argv[1]), float(sys.argv[2]))))
