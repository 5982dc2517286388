"""Ranks draw windows of different geometries and in different numbers; no collective may depend on that."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from engine.distributed import World
from engine.errors import UserError
from engine.optimizer import wrap
from engine.recipe import EngineConfig
from finetune.clicks import ClickTraining

HERE = Path(__file__).parent


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_ranks_with_other_windows_train_alike_up_to_zero_2(tmp_path: Path) -> None:
    path = f"{HERE.parent / 'engine'}{os.pathsep}{HERE.parents[1]}"
    done = subprocess.run(
        [sys.executable, str(HERE / "ranks_worker.py"), str(tmp_path), "2"],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        capture_output=True, text=True, timeout=550, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = []
    for stage in range(3):
        lines = (tmp_path / f"zero-{stage}" / "metrics.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        losses = [row["loss"] for row in rows if "loss" in row]
        norms = [row["evaluate/norm"] for row in rows if "evaluate/norm" in row]
        assert (len(losses), len(norms)) == (6, 3)
        assert losses[-1] < losses[0]
        found.append(losses + norms)
    for stage in (1, 2):
        assert found[stage] == pytest.approx(found[0], rel=1e-4)


def test_zero_3_over_ranks_is_refused_in_one_line() -> None:
    """Each part's call would be a collective, and ranks call them in different numbers."""
    task = SimpleNamespace(model=SimpleNamespace(calls_vary=ClickTraining.calls_vary))
    config = EngineConfig(zero_stage=3, device="cpu")
    with pytest.raises(UserError, match=r"zero_stage 3.*use stage 0, 1 or 2"):
        wrap(task, config, World(0, 2, 0, torch.device("cpu")))  # type: ignore[arg-type]
