"""Runs of the toy task: how they are started, and what they leave behind.

Importing DeepSpeed takes seconds, so one process imports it for many runs (`forked_ranks.py`).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from toy_worker import GROUPS, ToyRecipe, ToyTask

from engine.recipe import EngineConfig
from engine.schedule import learning_rate, set_learning_rate

HERE = Path(__file__).parent
UPDATES = 8
ENV = {"PYTHONPATH": f"{HERE}{os.pathsep}{HERE.parents[1]}", "OMP_NUM_THREADS": "1"}
COMMON = ["--engine.updates", str(UPDATES), "--engine.lr", "0.01", "--engine.warmup", "2",
          "--engine.clip", "0.3", "--engine.log_every", "1", "--engine.checkpoint_every", "2",
          "--engine.device", "cpu", "--engine.hang_minutes", "3", "--engine.trackers", "[]"]  # fmt: skip


def words(run: Path, stage: int, precision: str = "fp32", *more: str) -> list[str]:
    return [
        "--run",
        str(run),
        "--engine.zero_stage",
        str(stage),
        "--engine.precision",
        precision,
        *COMMON,
        *more,
    ]


def launch(*launches: tuple[int, Sequence[list[str]]]) -> None:
    """Launch after launch, each a number of ranks and its runs; a run's verdict says how it ended."""
    subprocess.run(
        [sys.executable, str(HERE / "forked_ranks.py"), json.dumps(launches)],
        env={**os.environ, **ENV}, timeout=300, cwd=HERE, stdout=subprocess.DEVNULL,
    )  # fmt: skip


def losses(run: Path) -> dict[int, float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {row["update"]: row["loss"] for row in rows if "loss" in row}


def weights(run: Path, update: int = UPDATES) -> dict[str, Tensor]:
    return load_file(run / "checkpoints" / f"update-{update:08d}" / "encoder.safetensors")


def rank_files(run: Path, update: int = UPDATES) -> dict[str, Tensor]:
    """Masters and moments of every rank of a checkpoint."""
    files = sorted((run / "checkpoints" / f"update-{update:08d}").glob("rank-*.safetensors"))
    return {f"{file.stem}/{key}": tensor for file in files for key, tensor in load_file(file).items()}


def same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def plain_loop(positions: Iterable[int]) -> tuple[list[float], dict[str, Tensor]]:
    """The same training written out in plain PyTorch: one process, no DeepSpeed, an update for each of
    `positions`."""
    drawn = list(positions)
    recipe = ToyRecipe()
    config = EngineConfig(updates=len(drawn), lr=0.01, warmup=2, clip=0.3, precision="fp32")
    task = ToyTask(recipe, Path())
    adam = torch.optim.AdamW(
        task.optimizer_groups(), lr=1.0, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay
    )
    seen = []
    for update, position in enumerate(drawn):
        set_learning_rate(adam.param_groups, learning_rate(update, config))
        adam.zero_grad()
        loss = torch.stack([task.model(task.batch(position, g))[0] for g in range(GROUPS)]).sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(task.model.parameters(), config.clip)
        adam.step()
        seen.append(loss.item())
    return seen, {n: t.clone() for n, t in task.model.state_dict().items()}


def state_of(run: Path, update: int = UPDATES) -> dict[str, Any]:
    """Content of a checkpoint's `state.json`."""
    return json.loads((run / "checkpoints" / f"update-{update:08d}" / "state.json").read_text())


def rows(file: Path) -> list[dict[str, Any]]:
    """The lines of a JSON-lines file."""
    return [json.loads(line) for line in file.read_text().splitlines()]
