"""A small task with two data-dependent branches, and the worker that the tests start under torchrun.

Samples come from a counter-based stream, in groups; a rank takes whole groups. Group g holds only samples of
one kind (so ranks see different branches), and a rank without a group gets an empty batch: both feed zero
rows to what they do not use.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    gc.disable()  # while it imports: half a second

import numpy as np
import torch
from pydantic import Field
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from engine.errors import UserError
from engine.recipe import EngineConfig, Frozen, free, load_recipe
from engine.train import train
from engine.worker import end_process, run_worker

GROUPS, PER_GROUP, WIDTH = 3, 2, 12


class ToyRecipe(Frozen):
    engine: EngineConfig = EngineConfig()
    hidden: int = Field(7, ge=1)  # odd sizes, so that no partition is even
    nan_at: tuple[int, ...] = ()  # positions whose loss is NaN on the rank that holds group 0
    spike_at: tuple[int, ...] = ()  # positions whose loss is far too large there
    kink_at: tuple[int, ...] = ()  # positions whose gradient is not finite there, though the loss is
    frozen_part: bool = False  # one stem is not trained
    die_at: int = free(-1, "position before which the last rank signals itself, once in a run folder")
    die_with: str = free("SIGKILL", "that signal")
    most_groups: int = free(-1, "groups of all ranks after which the data end the run; -1 for none")
    sleep: float = free(0.0, "seconds a batch takes")
    patient: bool = free(False, "data that wait for what is being written, so that no save is put off")


class ToyModel(nn.Module):
    def __init__(self, recipe: ToyRecipe) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.stems = nn.ModuleDict({k: nn.Linear(WIDTH, recipe.hidden) for k in ("ct", "mr")})
        self.trunk = nn.Linear(recipe.hidden, recipe.hidden)
        self.norm = nn.LayerNorm(recipe.hidden)
        self.head = nn.Linear(recipe.hidden, WIDTH)
        self.register_buffer("scale", torch.ones(1))
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.2, generator=generator)
        self.stems["mr"].requires_grad_(not recipe.frozen_part)
        self.checkpointing = False

    def set_checkpointing(self, on: bool) -> None:
        self.checkpointing = on

    def forward(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
        total, metrics = batch["poison"], {}
        for kind in ("ct", "mr"):
            x = batch[kind]
            inner = self.stems[kind](x)
            inner = (
                checkpoint(self.trunk, inner, use_reentrant=False)
                if self.checkpointing
                else self.trunk(inner)
            )
            y = self.head(torch.tanh(self.norm(inner.float()))).float()
            error = (y - torch.roll(x, 1, -1)).square().mean(-1)
            total = total + error.sum()
            if len(x):
                metrics[f"loss/{kind}"] = (error.sum(), torch.tensor(float(len(x))))
        if "kink" in batch:  # 0 with a gradient of infinity times 0
            total = total + (self.head.bias.square().sum() * 0.0).sqrt()
        return total / (GROUPS * PER_GROUP), metrics


class ToyData:
    """A `DataLog` that counts groups."""

    def __init__(self, recipe: ToyRecipe) -> None:
        self.groups, self.most = 0, recipe.most_groups

    def describe(self) -> str:
        return "toy data\nwithout end"

    def counts(self) -> dict[str, float]:
        return {"groups": float(self.groups)}

    def check(self, sums: Mapping[str, float]) -> None:
        if 0 <= self.most < sums["groups"]:
            raise UserError(f"{sums['groups']:.0f} groups are too many")

    def notices(self) -> list[str]:
        return [f"{self.groups} groups so far"]


class ToyTask:
    samples_per_update = GROUPS * PER_GROUP

    def __init__(self, recipe: ToyRecipe, run: Path) -> None:
        self.the_recipe, self.run = recipe, run
        self.model: nn.Module = ToyModel(recipe)
        self.data = ToyData(recipe)

    def micro_steps(self, world: int) -> int:
        return -(-GROUPS // world)

    def batches(self, start_update: int, rank: int, world: int) -> Iterator[dict[str, Tensor]]:
        update = start_update
        while True:
            if update == self.the_recipe.die_at and rank == world - 1 and not (self.run / "died").exists():
                (self.run / "died").touch()
                os.kill(os.getpid(), getattr(signal, self.the_recipe.die_with))
            time.sleep(self.the_recipe.sleep)
            for thread in threading.enumerate() if self.the_recipe.patient else ():
                if thread.name == "saver":
                    thread.join()
            for step in range(self.micro_steps(world)):
                group = rank * self.micro_steps(world) + step
                self.data.groups += group < GROUPS
                yield self.batch(update, group if group < GROUPS else None)
            update += 1

    def batch(self, update: int, group: int | None) -> dict[str, Tensor]:
        out = {"ct": torch.zeros(0, WIDTH), "mr": torch.zeros(0, WIDTH), "poison": torch.zeros(())}
        if group is not None:
            draws = np.random.Generator(np.random.Philox(key=[update, group])).standard_normal(
                (PER_GROUP, WIDTH)
            )
            out["ct" if (group + update) % 2 else "mr"] = torch.from_numpy(draws).float()
        if group == 0 and update in self.the_recipe.nan_at:
            out["poison"] = torch.tensor(float("nan"))
        if group == 0 and update in self.the_recipe.spike_at:
            out["poison"] = torch.tensor(1e4)
        if group == 0 and update in self.the_recipe.kink_at:
            out["kink"] = torch.zeros(())
        return out

    def recipe(self) -> ToyRecipe:
        return self.the_recipe

    def data_identity(self) -> dict[str, str]:
        return {"manifest": "toy", "order": "1"}

    def sample_keys(self, position: int) -> list[str]:
        return [f"{position}/{group}/{i}" for group in range(GROUPS) for i in range(PER_GROUP)]

    def optimizer_groups(self) -> list[dict[str, Any]]:
        trained = [p for p in self.model.parameters() if p.requires_grad]
        return [
            {"params": [p for p in trained if p.ndim > 1]},
            {"params": [p for p in trained if p.ndim == 1], "weight_decay": 0.0, "lr_scale": 0.5},
        ]

    def evaluate(self, update: int, rank: int, world: int, writer: Any) -> dict[str, float]:
        torch.rand(5), np.random.rand(3)  # noqa: NPY002 - must not change training
        return {"loss": float(sum(self.model(self.batch(10_000 + g, g))[0] for g in range(GROUPS)))}

    def pictures(self, update: int, rank: int, world: int, writer: Any) -> None:
        writer.add_image("noise", torch.rand(1, 4, 4), update)

    def export(self, state: Mapping[str, Tensor], folder: Path) -> None:
        save_file(dict(state), folder / "encoder.safetensors")
        (folder / "plan.json").write_text("{}")


def one(words: list[str]) -> int:
    """One run, given as a worker's command line: `--run DIR [--continue-as NAME] [--field value ...]`."""
    run = Path(words[words.index("--run") + 1])
    segment = words[words.index("--continue-as") + 1] if "--continue-as" in words else None
    rest = [w for i, w in enumerate(words) if not {words[i - 1] if i else "", w} & {"--run", "--continue-as"}]

    def body() -> Any:
        recipe = load_recipe(None, rest, ToyRecipe)
        return train(ToyTask(recipe, run), recipe.engine, run, continue_as=segment)

    return run_worker(body, run)


if __name__ == "__main__":
    gc.enable()
    end_process(one(sys.argv[1:]))
