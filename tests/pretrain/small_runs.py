"""The small pretraining run that several test files share: its recipe, processes, and what it leaves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from data_pipeline.manifest import Manifest
from engine.recipe import load_recipe
from pretrain.mae import MaskedAutoencoder
from pretrain.quality import Quality
from pretrain.recipe import PretrainRecipe
from pretrain.stored import kept

REPOSITORY = Path(__file__).parents[2]
SMALL = """
tokens: {slots: 64, classes: [1, 2]}
mixture: {groups: 3, scale: [0.7, 1.4]}
encoder: {size: null, width: 48, depth: 2, heads: 2, drop_path: 0.2, registers: 1}
objective: {decoder_width: 48, decoder_depth: 1, decoder_heads: 2}
evaluation: {batches: 2}
"""
PROBED = (
    SMALL
    + """probes: {data: DATA, shots: 3, cases: 2, window: 64}
data: {root: DATA}
engine: {updates: 8, lr: 0.001, warmup: 3, precision: fp32, threads: 1, workers: 0, log_every: 1,
  checkpoint_every: 4, evaluate_every: 4, evaluate_share: 1.0, keep_last: 20}
"""
)


def recipe_with(recipe_file: Path, *words: str) -> PretrainRecipe:
    return load_recipe(recipe_file, words, PretrainRecipe)


def network_of(recipe: PretrainRecipe) -> MaskedAutoencoder:
    torch.manual_seed(1)
    return MaskedAutoencoder(recipe.encoder, recipe.objective, 1).eval()


def quality_of(recipe: PretrainRecipe) -> Quality:
    return Quality(recipe, Manifest.open(recipe.data.root))


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(REPOSITORY)}


def start(recipe_file: Path, run: Path, processes: int = 1, *fields: str) -> subprocess.Popen[str]:
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m", "--"]
    words = ["pretrain", str(recipe_file), "--run", str(run), *fields]
    return subprocess.Popen(
        [sys.executable, "-m", *(torchrun if processes > 1 else []), *words],
        cwd=REPOSITORY, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def forked(*launches: tuple[int, int | None, list[list[str]]]) -> None:
    """Launch after launch from one process, see `forked_runs.py`: ranks, the update before which they are
    killed, and the command lines of the runs.
    """
    here = Path(__file__).parent
    path = f"{here.parent / 'engine'}{os.pathsep}{REPOSITORY}"
    done = subprocess.run(
        [sys.executable, str(here / "forked_runs.py"), json.dumps(launches)],
        cwd=REPOSITORY, env={**environment(), "PYTHONPATH": path}, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]


def ended(process: subprocess.Popen[str], code: int = 0) -> str:
    said, _ = process.communicate(timeout=300)
    assert process.returncode == code, said[-3000:]
    return said


def medfm(*words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "launch.cli", *words],
        cwd=REPOSITORY, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # which a background job ignores
    )  # fmt: skip


def rows_of(run: Path) -> list[dict[str, Any]]:
    """Scores by checkpoint; a line that is being written, or was when its writer died, is none yet."""
    path = run / "probe.jsonl"
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]] if path.exists() else []


def in_loop(run: Path) -> dict[int, dict[str, float]]:
    """Figures that a run logged itself, by update."""
    found = {}
    for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()):
        scores = {name[9:]: value for name, value in line.items() if name.startswith("evaluate/")}
        if scores:
            found[line["update"]] = scores
    return found


def weights(run: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(kept(run)[-1].glob("*.safetensors"))}
