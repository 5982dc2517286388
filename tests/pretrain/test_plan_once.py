"""The adaptation plan of a run is made once, however many checkpoints are exported."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from engine.recipe import load_recipe
from model.plan import read_plan
from pretrain.recipe import PretrainRecipe
from pretrain.selection import select_rows
from pretrain.task import PretrainTask, open_task


def test_every_export_has_the_whole_plan_and_one_alone_makes_it(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = open_task(load_recipe(recipe_file, [], PretrainRecipe), tmp_path)
    made = []
    plan = PretrainTask.plan
    monkeypatch.setattr(PretrainTask, "plan", lambda self: made.append(1) or plan(self))
    state = {name: p.float() for name, p in task.model.state_dict().items()}
    for name in ("first", "second"):
        task.export(state, tmp_path / name)
    assert len(made) == 1
    texts = [(tmp_path / name / "plan.json").read_bytes() for name in ("first", "second")]
    assert texts[0] == texts[1]
    found = read_plan(tmp_path / "second" / "plan.json")
    assert found.versions.keys() >= {"torch", "safetensors"}
    data, recipe = found.training_data, task.recipe().data
    rows = select_rows(task.manifest, recipe, recipe.split)
    table = [task.manifest.row(row) for row in rows]
    assert data["samples"] == len(table)
    assert data["subject_keys"] == sorted({row["subject"] for row in table})
    assert data["content_hashes"] == sorted({row["content_hash"] for row in table})
    assert data["subjects"] == len(data["subject_keys"])
    for what in ("modality", "source"):
        names, counts = np.unique([row[what] for row in table], return_counts=True)
        assert data[f"samples_by_{what}"] == dict(zip(names.tolist(), counts.tolist()))
