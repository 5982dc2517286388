"""Scans on disk to shards to a trained head to a mask: the whole of fine-tuning, small."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
import torch.distributed as dist

from data_pipeline.build import build
from data_pipeline.manifest import Manifest
from data_pipeline.sources import SourceConfig
from engine.distributed import World
from engine.errors import UserError
from engine.memory import Limit, advice, predict
from engine.recipe import load_recipe
from finetune.cost import Shape
from finetune.evaluate import evaluate_clicks, seen_before
from finetune.network import scales_for
from finetune.recipe import FinetuneRecipe
from finetune.session import PromptableSession
from finetune.task import FinetuneTask, held_out_rows, training_rows
from finetune.weights import load_model
from model.encoder import Encoder, EncoderConfig
from model.weights import save_encoder


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Twelve two-channel cases in nnU-Net layout: a bright and a dark ball in noise."""
    root = tmp_path_factory.mktemp("raw") / "Dataset001_Balls"
    for name in ("imagesTr", "labelsTr"):
        (root / name).mkdir(parents=True)
    grid = np.stack(np.meshgrid(*[np.arange(16.0)] * 3, indexing="ij"), -1)
    for case in range(12):
        rng = np.random.default_rng(case)
        label = np.zeros((16, 16, 16), np.uint8)
        for value, centre in ((1, (5, 5, 5)), (2, (10, 10, 10))):
            label[((grid - np.array(centre) - rng.uniform(-1, 1, 3)) ** 2).sum(-1) < 12] = value
        for channel in range(2):
            image = rng.normal(100, 10, label.shape) + 60.0 * (label == 1) - 60.0 * (label == 2)
            sitk.WriteImage(sitk.GetImageFromArray(image.astype(np.float32)),
                            str(root / "imagesTr" / f"ball_{case:03d}_{channel:04d}.nii.gz"))  # fmt: skip
        sitk.WriteImage(sitk.GetImageFromArray(label), str(root / "labelsTr" / f"ball_{case:03d}.nii.gz"))
    (root / "dataset.json").write_text(
        json.dumps({
            "channel_names": {"0": "T1", "1": "T2"}, "labels": {"background": 0, "bright": 1, "dark": 2},
            "numTraining": 12, "file_ending": ".nii.gz",
        })
    )  # fmt: skip
    out = tmp_path_factory.mktemp("shards") / "balls"
    source = SourceConfig(path=root, modality="MR", label_origin="human")
    build([source], out, split={"train": 0.7, "val": 0.1, "test": 0.2}, progress=False)
    return out


def recipe_for(shards, **engine):
    words = ["--data.root", str(shards), "--head.channels", "2", "--head.window", "16", "16", "16",
             "--head.widths", "8", "8", "12", "16", "--head.heads", "2", "--mixture.groups", "2"]  # fmt: skip
    for name, value in engine.items():
        words += [f"--engine.{name}", str(value)]
    return load_recipe(None, words, FinetuneRecipe)


def test_a_two_channel_folder_trains_exports_and_segments(shards, tmp_path):
    recipe = recipe_for(shards, workers=0, lr=0.01)
    task = FinetuneTask(recipe)
    optimizer = torch.optim.AdamW(task.optimizer_groups(), lr=0.01)
    batches = task.batches(0, 0, 1)
    losses = []
    for _ in range(60):
        total = 0.0
        for _ in range(task.micro_steps(1)):
            loss, _ = task.model(next(batches))
            loss.backward()
            total += float(loss.detach())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    assert np.mean(losses[-5:]) < 0.7 * losses[0]
    task.export(task.model.state_dict(), tmp_path)
    net, plan = load_model(tmp_path)
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, task.net.state_dict()[name])
    assert plan.training_data["samples"] == len(task.rows)

    report = evaluate_clicks(tmp_path, shards, split="test")
    assert report["n_objects"] == 2 * report["n_images"] > 0
    assert report["seen_in_training"] == 0
    means = report["mean"]
    assert means["dsc"][-1] > 0.5
    assert means["dsc"][0] > means["dsc_wrong_prompt"]
    json.dumps(report)
    with pytest.raises(UserError, match="--allow-seen"):
        evaluate_clicks(tmp_path, shards, split="train")
    assert evaluate_clicks(tmp_path, shards, split="train", limit=1, allow_seen=True)["seen_in_training"] == 1

    session = PromptableSession(tmp_path)
    array = np.random.default_rng(0).normal(100, 10, (2, 14, 18, 15))
    session.set_image(array, spacing=(1, 1, 1), modality="MR")
    session.add_point((5, 5, 5))
    assert session.predict().shape == (14, 18, 15)


def test_batches_are_the_same_from_any_start_and_any_split_of_the_work(shards):
    task = FinetuneTask(recipe_for(shards, workers=0))

    def take(start, rank, world, count):
        found = []
        for batch, _ in zip(task.batches(start, rank, world), range(count)):
            found += [
                (batch.update, int(w.index[0]), float(w.image.sum()), int(w.truth.sum()))
                for w in batch.windows
            ]
        return found

    whole = take(0, 0, 1, 8)
    assert take(2, 0, 1, 4) == whole[4:]
    halves = [take(0, rank, 2, 4) for rank in range(2)]
    assert sorted(halves[0] + halves[1]) == sorted(whole)


def test_sample_keys_are_those_that_the_stream_delivers(shards, monkeypatch):
    monkeypatch.setattr(
        "finetune.task.Collate", lambda *_: lambda update, group, crops: [c.key for c in crops]
    )
    task = FinetuneTask(recipe_for(shards, workers=0))
    for world in (1, 2):
        seen = []
        for rank in range(world):
            for keys, _ in zip(task.batches(3, rank, world), range(task.micro_steps(world))):
                seen += keys
        assert task.sample_keys(3) == seen
    assert task.sample_keys(4) != task.sample_keys(3)
    assert task.tokens_per_update == task.samples_per_update * 8  # a window of 16 voxels, patches of 8


def test_cases_are_a_fixed_draw_and_too_many_are_refused(shards):
    manifest = Manifest.open(shards)
    recipe = recipe_for(shards)

    def rows(**data):
        return training_rows(
            manifest, recipe.model_copy(update={"data": recipe.data.model_copy(update=data)})
        )

    assert rows(cases=3).tolist() == rows(cases=3).tolist()
    assert set(rows(cases=3)) < set(rows(cases=5)) < set(rows())
    assert rows(cases=3, case_seed=1).tolist() != rows(cases=3).tolist()
    with pytest.raises(UserError, match="cases"):
        rows(cases=99)
    with pytest.raises(UserError, match="no labelled sample"):
        rows(modalities=("CT",))


def test_the_evaluation_during_a_run_takes_only_images_the_model_can_read(shards):
    manifest, recipe = Manifest.open(shards), recipe_for(shards)
    held_out = held_out_rows(manifest, recipe)
    assert len(held_out) > 0
    assert set(held_out) <= set(manifest.select(split="val", labelled=True))
    one_channel = recipe.model_copy(update={"head": recipe.head.model_copy(update={"channels": 1})})
    assert len(held_out_rows(manifest, one_channel)) == 0
    other = recipe.model_copy(update={"data": recipe.data.model_copy(update={"modalities": ("CT",)})})
    assert len(held_out_rows(manifest, other)) == 0


def test_figures_during_a_run_are_the_same_from_any_number_of_ranks(shards, tmp_path):
    # Not forked from here, where earlier tests may have left a process group.
    done = subprocess.run(
        [sys.executable, __file__, str(shards), str(tmp_path)],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    wanted = json.loads((tmp_path / "wanted.json").read_text())
    assert min(wanted) > 0
    for world in WORLDS:
        for rank in range(world):
            found = json.loads((tmp_path / f"{world}-{rank}.json").read_text())
            assert found == pytest.approx({f"held_out/dice_click_{i + 1}": d for i, d in enumerate(wanted)})


WORLDS = (1, 2, 4)  # of four ranks one has no case


def figures_of_ranks(shards, out):
    """Write the figures of each rank of each world, and those of one evaluation of all cases."""
    recipe = recipe_for(shards, workers=0)
    recipe = recipe.model_copy(
        update={
            "data": recipe.data.model_copy(update={"held_out": "train"}),
            "evaluation": recipe.evaluation.model_copy(update={"cases": 3, "clicks": 2}),
        }
    )
    task = FinetuneTask(recipe)
    rows = held_out_rows(task.manifest, recipe)
    report = evaluate_clicks(task.net, task.manifest, rows, clicks=2, controls=False)
    (out / "wanted.json").write_text(json.dumps(report["mean"]["dsc"]))
    for world in WORLDS:
        ranks = []
        for rank in range(world):
            if not (child := os.fork()):
                try:
                    meet = f"file://{out}/{world}"
                    dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=world)
                    found = task.evaluate(0, rank, world, None)
                    (out / f"{world}-{rank}.json").write_text(json.dumps(found))
                    dist.destroy_process_group()
                finally:
                    os._exit(0)
            ranks.append(child)
        for child in ranks:
            os.waitpid(child, 0)


def test_an_encoder_of_unknown_training_is_not_called_unseen(shards, tmp_path):
    save_encoder(tmp_path / "encoder", Encoder(EncoderConfig(size="nano")))
    recipe = recipe_for(shards, workers=0)
    seen = {}
    for scratch in (False, True):
        choice = recipe.encoder.model_copy(
            update={"path": str(tmp_path / "encoder"), "from_scratch": scratch}
        )
        task = FinetuneTask(recipe.model_copy(update={"encoder": choice}))
        task.export(task.model.state_dict(), tmp_path / f"{scratch}")
        _, plan = load_model(tmp_path / f"{scratch}")
        seen[scratch] = seen_before(task.manifest, task.rows, plan.training_data)["seen_in_pretraining"]
    assert seen == {False: None, True: 0}


def test_the_shipped_recipe_is_valid():
    recipe = load_recipe(
        Path(__file__).parents[2] / "recipes" / "finetune-hippocampus.yaml", [], FinetuneRecipe
    )
    assert recipe.data.cases == 20


def test_memory_is_predicted_with_activations_and_the_advice_names_recipe_fields(shards):
    words = ["--data.root", str(shards), "--head.channels", "2", "--head.window", "16", "16", "30",
             "--head.widths", "8", "8", "12", "16", "--head.heads", "2", "--head.layers", "1",
             "--prompts.rounds", "1", "1", "--engine.device", "cpu"]  # fmt: skip
    task = FinetuneTask(load_recipe(None, words, FinetuneRecipe))
    assert task.largest_windows() == [Shape(1, "volume", (16, 16, 32), scales_for((1.0, 1.0, 1.0)))]
    here = predict(task, task.recipe().engine, World(0, 1, 0, torch.device("cpu")))
    # Ten of the maps of 8 channels, in bf16 at full size, stand when the loss is computed, and more beside.
    assert here.parts["activations"] > 10 * 2 * 8 * 16 * 16 * 32
    assert "does not say" not in here.text()
    short = here.parts["activations"] // 2
    said = advice(here, Limit("x", here.total - short, here.total - short))
    assert "a micro-step of 50 % of its size would fit: lower head.window, mixture.rows_per_group" in said


if __name__ == "__main__":
    figures_of_ranks(Path(sys.argv[1]), Path(sys.argv[2]))
