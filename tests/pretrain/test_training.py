"""Whole runs on a small dataset built here: any world size, any ZeRO stage, kill and restart."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_runs import REPOSITORY, SMALL, environment, forked

from engine.errors import UserError
from engine.recipe import load_recipe
from engine.worker import split_arguments
from pretrain.__main__ import main
from pretrain.recipe import PretrainRecipe
from pretrain.task import open_task

RECIPE = (
    SMALL
    + """engine: {updates: 12, lr: 0.001, warmup: 3, precision: fp32, threads: 1, workers: 1, log_every: 1,
checkpoint_every: 4,
  keep_last: 20}
"""
)


def blob(generator: np.random.Generator, shape: tuple[int, int, int]) -> np.ndarray:
    """A few bright ellipsoids on a dark ground, with texture; values 0 to 1."""
    axes = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
    image = 0.05 * generator.random(shape)
    for _ in range(4):
        centre, radius = generator.uniform(-0.6, 0.6, 3), generator.uniform(0.3, 0.8, 3)
        inside = sum(((a - c) / r) ** 2 for a, c, r in zip(axes, centre, radius)) < 1
        image[inside] = generator.uniform(0.2, 1.0)
    return image


@pytest.fixture(scope="session")
def shards(built_once: Any) -> Path:
    """A dataset of CT volumes, thick MR slabs and radiographs."""
    folder: Path = built_once("three-kinds", _three_kinds)
    return folder / "shards"


def _three_kinds(folder: Path) -> None:
    import nibabel as nib
    from PIL import Image

    from data_pipeline.build import build
    from data_pipeline.sources import SourceConfig

    root = folder / "scans"
    generator = np.random.default_rng(3)
    for name in ("ct", "mr", "xr"):
        (root / name).mkdir(parents=True)
    for i in range(12):
        ct = (blob(generator, (20 + i, 33, 41)) * 1500 - 1000).round().astype(np.int16)
        nib.save(
            nib.Nifti1Image(ct.transpose(2, 1, 0), np.diag([1.2, 1.2, 2.0, 1])), root / "ct" / f"c{i}.nii.gz"
        )
        mr = (blob(generator, (7, 60 + i, 50)) * 800).round().astype(np.int16)
        nib.save(
            nib.Nifti1Image(mr.transpose(2, 1, 0), np.diag([0.8, 0.8, 5.0, 1])), root / "mr" / f"m{i}.nii.gz"
        )
        xr = (blob(generator, (3, 70, 90))[1] * 255).astype(np.uint8)
        Image.fromarray(xr).save(root / "xr" / f"x{i}.png")
    sources = [
        SourceConfig(path=root / "ct", name="ct", layout="folder", modality="CT"),
        SourceConfig(path=root / "mr", name="mr", layout="folder", modality="MR"),
        SourceConfig(
            path=root / "xr", name="xr", layout="folder", modality="XR", field_mm=300, burned_in="accept"
        ),
    ]
    build(sources, folder / "shards", split={"train": 0.7, "val": 0.3}, progress=False)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


def task_of(recipe: Path, shards: Path, run: Path, *overrides: str) -> Any:
    words = ["--data.root", str(shards), "--engine.workers", "0", *overrides]
    return open_task(load_recipe(recipe, words, PretrainRecipe), run)


def losses(run: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["update"]: line["loss"] for line in lines if "loss" in line}


def weights(run: Path) -> dict[str, bytes]:
    newest = sorted((run / "checkpoints").glob("update-*"))[-1]
    return {file.name: file.read_bytes() for file in sorted(newest.glob("*.safetensors"))}


def test_the_loss_of_an_update_is_the_same_for_every_number_of_ranks(
    recipe: Path, shards: Path, tmp_path: Path
) -> None:
    task = task_of(recipe, shards, tmp_path)
    task.model.train()
    totals = []
    for world in (1, 2, 3, 4):
        total = 0.0
        for rank in range(world):
            stream = task.batches(1, rank, world)
            for batch in islice(stream, task.micro_steps(world)):
                with torch.no_grad():
                    total += float(task.model(batch)[0])
            stream.close()
        totals.append(total)
    assert totals[0] > 0.1
    assert totals[1:] == pytest.approx([totals[0]] * 3, rel=1e-5)


@pytest.mark.parametrize("world", [1, 2])
def test_sample_keys_are_those_that_the_stream_delivers(
    world: int, recipe: Path, shards: Path, tmp_path: Path
) -> None:
    task = task_of(recipe, shards, tmp_path)
    task.collate = lambda update, group, crops: [crop.key for crop in crops]
    seen: list[list[str]] = [[], []]
    for rank in range(world):
        stream = task.batches(5, rank, world)
        for step, keys in enumerate(islice(stream, 2 * task.micro_steps(world))):
            seen[step // task.micro_steps(world)] += keys
        stream.close()
    assert [task.sample_keys(5), task.sample_keys(6)] == seen
    assert len(seen[0]) == task.samples_per_update
    assert seen[0] != seen[1]


def test_tokens_of_an_update_are_the_slots_of_its_batches(recipe: Path, shards: Path, tmp_path: Path) -> None:
    task = task_of(recipe, shards, tmp_path)
    stream = task.batches(0, 0, 1)
    batches = list(islice(stream, task.micro_steps(1)))
    stream.close()
    assert task.tokens_per_update == sum(int(block.slots.sum()) for b in batches for block in b.values())


def test_evaluation_repeats_ignores_training_state_and_names_every_modality(
    recipe: Path, shards: Path, tmp_path: Path
) -> None:
    task = task_of(recipe, shards, tmp_path, "--encoder.drop_path", "0.5")
    task.model.train()
    before = {name: p.clone() for name, p in task.model.state_dict().items()}
    first = task.evaluate(0, 0, 1, None)
    assert task.model.training
    task.model.eval()
    torch.manual_seed(99)
    assert task.evaluate(5, 0, 1, None) == first
    assert all(torch.equal(before[name], p) for name, p in task.model.state_dict().items())
    for modality in ("CT", "MR", "XR"):
        for ending in ("", "_mean", "_interpolation"):
            assert np.isfinite(first[f"val/{modality}{ending}"])
        assert first[f"val/{modality}_crops"] >= 2
    assert first["val/CT_interpolation"] < first["val/CT_mean"]


def test_shares_of_the_evaluation_make_the_whole(recipe: Path, shards: Path, tmp_path: Path) -> None:
    task = task_of(recipe, shards, tmp_path)
    whole = task.quality.held_out.score(task.model, 0, 1, torch.device("cpu"))
    parts = [task.quality.held_out.score(task.model, rank, 2, torch.device("cpu")) for rank in range(2)]
    for name in ("CT", "MR", "XR"):
        counts = [p.get(f"val/{name}_crops", 0.0) for p in parts]
        assert sum(counts) == whole[f"val/{name}_crops"]
        mean = sum(c * p.get(f"val/{name}", 0.0) for c, p in zip(counts, parts)) / sum(counts)
        assert mean == pytest.approx(whole[f"val/{name}"], rel=1e-5)


def test_pictures_show_each_modality_in_its_own_units(recipe: Path, shards: Path, tmp_path: Path) -> None:
    import torch

    from engine.distributed import World
    from engine.logs import Logs
    from engine.recipe import EngineConfig

    task = task_of(recipe, shards, tmp_path)
    with Logs(tmp_path, World(0, 1, 0, torch.device("cpu")), EngineConfig(trackers=())) as logs:
        task.evaluate(3, 0, 1, logs.writer)
        task.pictures(3, 0, 1, logs.writer)
    names = sorted(path.name for path in (tmp_path / "pictures").glob("*.png"))
    assert names == [f"update-00000003-{m}-0.png" for m in ("CT", "MR", "XR")]
    for picture in task.quality.held_out.pictures:
        known = np.isfinite(picture.image)
        seen = np.isfinite(picture.visible)
        assert np.array_equal(picture.image[seen], picture.reconstruction[seen])
        assert 0.1 < seen.sum() / known.sum() < 0.5
        if picture.modality == "CT":
            assert -1100 <= picture.image[known].min() < -900


def test_only_matrices_decay(recipe: Path, shards: Path, tmp_path: Path) -> None:
    switches = ["--encoder.registers", "2", "--encoder.class_token", "true", "--encoder.layer_scale", "0.1"]
    table = ["--encoder.learned_positions", "[4, 4, 4]"]
    task = task_of(recipe, shards, tmp_path, *switches, *table)
    decaying, others = task.optimizer_groups()
    names = {id(parameter): name for name, parameter in task.model.named_parameters()}
    assert decaying["weight_decay"] > 0 == others["weight_decay"]
    assert {names[id(p)].rpartition(".")[2] for p in decaying["params"]} == {"weight"}
    kept = {names[id(p)] for p in others["params"]}
    assert {"encoder.prefix.tokens", "encoder.positions.table", "decoder.mask_token"} <= kept
    assert len(decaying["params"]) + len(others["params"]) == len(names)


def test_export_is_an_encoder_with_its_plan(recipe: Path, shards: Path, tmp_path: Path) -> None:
    from model.weights import load_encoder

    task = task_of(recipe, shards, tmp_path)
    task.export({name: p.float() for name, p in task.model.state_dict().items()}, tmp_path / "export")
    encoder = load_encoder(tmp_path / "export")
    mine = task.network.encoder.state_dict()
    assert all(torch.equal(mine[name], p) for name, p in encoder.state_dict().items())
    assert encoder.plan is not None
    data = encoder.plan.training_data
    assert data["samples_by_modality"].keys() == {"CT", "MR", "XR"}
    assert data["manifest"] == task.manifest.hash
    assert set(encoder.plan.stems) == {"volume", "slab", "planar"}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--data.root", "/nowhere"], "/nowhere"),
        ([], "data.root"),
        (["--data.root", "SHARDS", "--data.split", "val"], "data.held_out"),
        (["--data.root", "SHARDS", "--data.sources", "[pet]"], "no source 'pet'"),
        (["--data.root", "SHARDS", "--objective.mask_ration", "0.5"], "mask_ratio"),
        (["--data.root", "SHARDS", "--objective.decoder_width", "50"], "decoder_width"),
    ],
)
def test_wrong_input_is_one_line_and_code_2(
    words: list[str],
    said: str,
    recipe: Path,
    shards: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    real = [str(shards) if word == "SHARDS" else word for word in words]
    code = main([str(recipe), "--run", str(tmp_path / "run"), *real])
    error = capsys.readouterr().err
    assert code == 2
    assert said in error
    assert len(error.strip().splitlines()) == 1


def test_arguments() -> None:
    words = ["r.yaml", "--engine.lr", "1e-3", "--run", "out", "--continue-as=second", "--engine.compile"]
    expected = (Path("r.yaml"), Path("out"), "second", ["--engine.lr", "1e-3", "--engine.compile"])
    assert split_arguments(words, "pretrain") == expected
    for wrong in ([], ["--run", "x"], ["r.yaml"], ["r.yaml", "--run"], ["r.yaml", "--run", "--engine.lr"]):
        with pytest.raises(UserError):
            split_arguments(wrong, "pretrain")


@pytest.fixture(scope="module")
def runs(shards: Path, built_once: Any) -> Path:
    """Uninterrupted runs on one process and on two, in folders `1` and `2`, and in `killed` one on two that
    was killed before its seventh update and started again.
    """

    def train(folder: Path) -> None:
        (folder / "recipe.yaml").write_text(RECIPE)
        words = ["--data.root", str(shards), "--evaluation.pictures", "0", "--engine.trackers", "[]"]
        one, two, killed = (
            [[str(folder / "recipe.yaml"), "--run", str(folder / name), *words]]
            for name in ("1", "2", "killed")
        )
        forked((1, None, one), (2, None, two), (2, 6, killed), (2, None, killed))

    folder: Path = built_once("whole", train)
    return folder


@pytest.mark.slow
def test_two_processes_train_like_one(runs: Path) -> None:
    one, two = losses(runs / "1"), losses(runs / "2")
    assert one.keys() == two.keys() == set(range(1, 13))
    assert [two[u] for u in sorted(two)] == pytest.approx([one[u] for u in sorted(one)], rel=1e-5)


@pytest.mark.slow
def test_a_killed_run_started_again_gives_the_same_bits(runs: Path) -> None:
    log = runs / "killed" / "logs" / "rank-000.jsonl"
    events = [json.loads(line) for line in log.read_text().splitlines()]
    assert [one["update"] for one in events if one["event"] == "start"] == [0, 4]
    before, after = weights(runs / "2"), weights(runs / "killed")
    assert before.keys() == after.keys()
    assert len(before) == 2 + 1  # each rank's slices, and the encoder for use
    assert all(before[name] == after[name] for name in before)


STEMS = '''
import sys
from pathlib import Path
sys.path[:0] = [{repository!r}, {tests!r}, {engine!r}]
import torch
from itertools import repeat
import conftest
from forked_ranks import fork_ranks
from engine.distributed import import_deepspeed
from engine.recipe import EngineConfig
from engine.train import train
from pretrain.recipe import PretrainRecipe

class Task:
    """Rank 0 sees volumes only and rank 1 radiographs only."""
    samples_per_update = 2
    def __init__(self):
        self.volume = conftest.hand_crop("volume", (16, 16, 24), index=0)
        self.planar = conftest.hand_crop("planar", (1, 64, 64), index=1, modality="XR")
        self.model, _ = conftest.build([conftest.row_spec("volume", 1, 1, 16)], [self.volume])
    def batches(self, start, rank, world):
        kind, crop = [("volume", self.volume), ("planar", self.planar)][rank]
        return repeat(conftest.build([conftest.row_spec(kind, 1, 1, 16)], [crop])[1])
    def micro_steps(self, world): return 1
    def recipe(self): return PretrainRecipe()
    def data_identity(self): return {{}}
    def evaluate(self, *args): return {{}}
    def pictures(self, *args): pass
    def export(self, state, folder): pass
    def optimizer_groups(self): return [{{"params": list(self.model.parameters())}}]

def body():
    for stage in range(4):
        config = EngineConfig(
            updates=8, lr=3e-3, warmup=0, precision="fp32", zero_stage=stage, threads=1, log_every=1
        )
        train(Task(), config, Path(sys.argv[1]) / f"zero-{{stage}}")
    return 0

import_deepspeed()
sys.exit(fork_ranks(2, body))
'''


@pytest.mark.slow
def test_ranks_that_see_different_stems_train_alike_at_every_zero_stage(tmp_path: Path) -> None:
    script = tmp_path / "different_stems.py"
    here = Path(__file__).parent
    script.write_text(
        STEMS.format(repository=str(REPOSITORY), tests=str(here), engine=str(here.parent / "engine"))
    )
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)],
        env=environment(), capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = [[x for _, x in sorted(losses(tmp_path / f"zero-{stage}").items())] for stage in range(4)]
    assert found[0][-1] < found[0][0]
    for stage in (1, 2, 3):
        assert found[stage] == pytest.approx(found[0], rel=1e-4)
