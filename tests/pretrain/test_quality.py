"""What is measured of a network: held-out figures, the same in a run, off-line and beside the run."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from data_pipeline.manifest import Manifest
from data_pipeline.stream import open_stream
from engine.errors import UserError
from engine.recipe import load_recipe
from launch.cli import main
from pretrain.batch import MODALITIES, Collate
from pretrain.evaluate import CONSTANT, _means, constant
from pretrain.follow import Follower, Record, with_labelled
from pretrain.held_out_table import describe, lines_of
from pretrain.mae import MaskedAutoencoder
from pretrain.quality import Quality
from pretrain.recipe import EvaluationConfig, PretrainRecipe
from pretrain.stored import Gone, fingerprint, kept, read_network, recipe_of
from pretrain.task import open_task
from pretrain.tokens import tokenise

REPOSITORY = Path(__file__).parents[2]
CPU = torch.device("cpu")
RECIPE = """
tokens: {slots: 64, classes: [1, 2]}
mixture: {groups: 3, scale: [0.7, 1.4]}
encoder: {size: null, width: 48, depth: 2, heads: 2, drop_path: 0.2, registers: 1}
objective: {decoder_width: 48, decoder_depth: 1, decoder_heads: 2}
evaluation: {batches: 2}
probes: {data: DATA, shots: 3, cases: 2, window: 64}
data: {root: DATA}
engine: {updates: 8, lr: 0.001, warmup: 3, precision: fp32, threads: 1, workers: 0, log_every: 1,
  checkpoint_every: 2, evaluate_every: 4, evaluate_share: 1.0, keep_last: 20}
"""


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Labelled CT volumes, half of each one air, and thick MR slabs."""
    import nibabel as nib

    from data_pipeline.build import build
    from data_pipeline.sources import SourceConfig

    root = tmp_path_factory.mktemp("scans")
    generator = np.random.default_rng(5)
    for i in range(10):
        for name, shape, spacing in (("ct", (26 + i, 30, 34), (1.2, 1.2, 1.5)),
                                     ("mr", (6, 50, 56 + i), (0.8, 0.8, 5.0))):  # fmt: skip
            axes = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
            label = (sum(a**2 for a in axes) < 0.3).astype(np.uint8)
            image = np.where(label, 160, -30) + generator.integers(-30, 30, shape)
            image[..., : shape[2] // 2] = -1000
            folder = root / name / f"{'train' if i < 6 else 'val'}_p{i}"
            folder.mkdir(parents=True)
            for kind, values in (("image", image.astype(np.int16)), ("label", label)):
                picture = nib.Nifti1Image(values.transpose(2, 1, 0), np.diag([*spacing, 1]))
                nib.save(picture, folder / f"{kind}.nii.gz")
    common: dict[str, Any] = {
        "layout": "folder", "include": ("*/image.nii.gz",), "label_glob": "*/label.nii.gz",
        "label_origin": "human", "subject_pattern": "_(p[0-9])/", "labels": {1: "liver"},
        "splits": {"train_*/*": "train", "val_*/*": "val"},
    }  # fmt: skip
    sources = [
        SourceConfig(path=root / "ct", name="ct", modality="CT", units="HU", **common),
        SourceConfig(path=root / "mr", name="mr", modality="MR", **common),
    ]
    out = tmp_path_factory.mktemp("dataset") / "shards"
    build(sources, out, progress=False)
    return out


@pytest.fixture(scope="module")
def recipe_file(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    path.write_text(RECIPE.replace("DATA", str(dataset)))
    return path


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
    path = run / "probe.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


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


@pytest.fixture(scope="module")
def trained(recipe_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of one process that evaluated itself at updates 4 and 8; do not write into it."""
    run = tmp_path_factory.mktemp("trained") / "run"
    assert "held out: " in ended(start(recipe_file, run))
    return run


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of that run with two of its checkpoints."""
    copy = tmp_path / "run"
    shutil.copytree(trained, copy, ignore=shutil.ignore_patterns("update-00000002", "update-00000006"))
    return copy


def test_constant_patches_are_those_whose_valid_voxels_are_alike(hand: Any) -> None:
    """Against the crop itself: CT patches whose values span no more than `CONSTANT` times 500 HU."""
    generator = np.random.default_rng(0)
    crop = hand.crop("volume", (16, 24, 40), invalid=0.0)
    for z, y, x in np.ndindex(2, 3, 5):  # each patch spans 0 to 87 HU around a level of its own
        span = 3 * (x + 5 * (y + 3 * z))
        patch = generator.integers(0, span + 1, (8, 8, 8)) + 200 * y
        patch.flat[:2] = (200 * y, 200 * y + span)
        crop.voxels[8 * z : 8 * z + 8, 8 * y : 8 * y + 8, 8 * x : 8 * x + 8] = patch
    crop.voxels[0, 0, ::8] = -32768  # no value there, so no difference
    model, batch = hand.build([hand.spec("volume", 1, 1, 32)], [crop], augment=False)
    tokens = tokenise(next(iter(batch.values())), model.encoder.patch("volume"))
    flat = constant(tokens)[0]
    seen = []
    for place in tokens.predicted[0].nonzero().flatten().tolist():
        z, y, x = np.unravel_index(int(tokens.target_ids[0, place]), (2, 3, 5))
        patch = crop.voxels[8 * z : 8 * z + 8, 8 * y : 8 * y + 8, 8 * x : 8 * x + 8]
        there = patch[patch != -32768]
        seen.append(int(there.max()) - int(there.min()) <= CONSTANT * 500)
        assert bool(flat[place]) == seen[-1]
    assert 5 < sum(seen) < len(seen) - 5


def test_figures_are_those_of_a_slow_reference(recipe_file: Path) -> None:
    """Every figure of the network at every ratio, crop by crop and voxel by voxel in float64."""
    recipe = recipe_with(recipe_file, "--evaluation.mask-ratios", "[0.5, 0.9]", "--probes.data=''")
    network, quality = network_of(recipe), quality_of(recipe)
    held_out = quality.held_out
    assert held_out is not None
    scores = quality.score_alone(network)
    for ratio, at in ((0.75, ""), (0.5, "@0.50"), (0.9, "@0.90")):
        objective = recipe.objective.model_copy(update={"mask_ratio": ratio})
        order = held_out.order
        collate = Collate(order.composition, objective, 2, recipe.evaluation.seed, augment=False)
        stream = open_stream(
            held_out.manifest.root, held_out.manifest, order, rank=0, world=1, start_update=0, workers=0,
            collate=collate, cache=recipe.data.cache,
        )  # fmt: skip
        every: dict[str, list[float]] = {}
        content: dict[str, list[float]] = {}
        with stream, torch.no_grad():
            for batch in islice(stream, recipe.evaluation.batches * order.groups):
                for block, result in zip(batch.values(), network(batch, reconstruct=True)):
                    for slot in np.flatnonzero(block.weight.numpy()):
                        scored = result.tokens.scored[slot].numpy()
                        target = result.tokens.target[slot].double().numpy()
                        squared = (result.prediction[slot].double().numpy() - target) ** 2
                        name = MODALITIES[int(block.modality[slot])]
                        if not scored.any():
                            continue
                        every.setdefault(name, []).append(squared[scored].mean())
                        varied = [
                            squared[p][scored[p]]
                            for p in np.flatnonzero(scored.any(axis=1))
                            if np.ptp(result.tokens.target[slot, p].numpy()[scored[p]]) > CONSTANT
                        ]
                        if varied:
                            content.setdefault(name, []).append(np.concatenate(varied).mean())
        assert every.keys() == {"CT", "MR"}
        for name in every:
            assert scores[f"val/{name}{at}"] == pytest.approx(np.mean(every[name]), rel=1e-5)
            assert scores[f"val/{name}{at}_content"] == pytest.approx(np.mean(content[name]), rel=1e-5)
            assert not at or f"val/{name}{at}_mean" not in scores
            if not at:
                assert scores[f"val/{name}_crops"] == len(every[name])
                assert scores[f"val/{name}_content_crops"] == len(content[name])
                for part in ("", "_content"):
                    under = scores[f"val/{name}{part}_interpolation"]
                    assert scores[f"val/{name}{part}_share"] == scores[f"val/{name}{part}"] / under
    assert scores["val/CT_content"] != scores["val/CT"]
    assert scores["val/CT_content_mean"] > scores["val/CT_content_interpolation"]


def test_a_crop_of_air_alone_counts_in_the_loss_and_not_in_that_of_content() -> None:
    # modality, has content, then (all, content) of network, mean and interpolation
    rows = torch.tensor([[1.0, 1.0, 2.0, 4.0, 3.0, 5.0, 4.0, 8.0], [1.0, 0.0, 1.0, 0.0, 1.0, 0.0, 2.0, 0.0]])
    found = _means(rows)
    assert (found[""], found["_share"], found["_crops"]) == (1.5, 0.5, 2.0)
    assert (found["_content"], found["_content_mean"], found["_content_share"]) == (4.0, 5.0, 0.5)
    assert found["_content_crops"] == 1.0
    assert "_content" not in _means(rows[1:])


def test_baselines_are_solved_once_and_scores_repeat(
    recipe_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_with(recipe_file, "--probes.data=''")
    quality = quality_of(recipe)
    first = quality.score_alone(network_of(recipe))
    monkeypatch.setattr("pretrain.evaluate.interpolation", None)
    assert quality.score_alone(network_of(recipe)) == first
    trained = network_of(recipe)
    torch.nn.init.zeros_(trained.heads["volume"].weight)
    other = quality.score_alone(trained)
    assert other["val/CT"] != first["val/CT"]
    assert other["val/CT_interpolation"] == first["val/CT_interpolation"]


def test_shares_of_two_ranks_make_the_whole(recipe_file: Path) -> None:
    """Without a process group each rank returns the means of its own crops, which add up to those of one."""
    recipe = recipe_with(recipe_file, "--probes.data=''")
    network = network_of(recipe)
    whole = quality_of(recipe).score(network, 0, 1, CPU)
    parts = [quality_of(recipe).score(network, rank, 2, CPU) for rank in range(2)]
    for name in ("CT", "MR"):
        for figure, crops in (("", "_crops"), ("@0.90", "_crops"), ("_content", "_content_crops")):
            counts = [part.get(f"val/{name}{crops}", 0.0) for part in parts]
            mean = sum(n * part.get(f"val/{name}{figure}", 0.0) for n, part in zip(counts, parts)) / sum(
                counts
            )
            assert sum(counts) == whole[f"val/{name}{crops}"]
            assert mean == pytest.approx(whole[f"val/{name}{figure}"], rel=1e-6)


def test_ranged_and_normalised_recipes(recipe_file: Path) -> None:
    """A ranged ratio is scored at its middle; with norm_pix there is a mean but no interpolation."""
    ratios = ["--evaluation.mask-ratios", "[0.7]", "--probes.data=''"]
    ranged = recipe_with(recipe_file, "--objective.mask-ratio", "[0.6, 0.8]", *ratios)
    fixed = recipe_with(recipe_file, "--objective.mask-ratio", "0.7", *ratios)
    found = quality_of(ranged).score_alone(network_of(ranged))
    assert found == quality_of(fixed).score_alone(network_of(fixed))
    assert found["val/CT@0.70"] == found["val/CT"]
    normalised = recipe_with(recipe_file, "--objective.norm-pix", *ratios)
    scores = quality_of(normalised).score_alone(network_of(normalised))
    assert "val/CT_mean" in scores
    assert not any("interpolation" in name or "share" in name for name in scores)
    table = describe(scores).splitlines()
    assert len(table) == 3
    assert "–" in table[1]


def test_the_table_has_a_line_for_each_modality() -> None:
    scores = {
        "val/CT": 0.1, "val/CT_mean": 0.5, "val/CT_interpolation": 0.2, "val/CT_share": 0.5,
        "val/CT_crops": 4.0, "val/CT_content_share": 0.625, "val/CT@0.50": 0.05, "val/CT@0.50_share": 0.45,
        "val/CT@0.90": 0.3, "val/CT@0.90_share": 0.75,
    }  # fmt: skip
    (line,) = lines_of(scores)
    assert line.at == {"0.50": 0.45, "0.90": 0.75}
    assert line.learnt
    head, row, _ = describe(scores).splitlines()
    assert head.split() == ["held", "out", "loss", "share", "content", "@0.50", "@0.90", "crops"]
    assert row.split()[:7] == ["CT", "0.1000", "0.500", "0.625", "0.450", "0.750", "4"]
    assert describe({}) == ""


@pytest.mark.parametrize("ratios", [(0.5, 1.0), (0.0,), (0.501, 0.502)])
def test_mask_ratios_that_cannot_be(ratios: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="mask_ratios"):
        EvaluationConfig(mask_ratios=ratios)


def test_reading_a_recipe_needs_no_torch() -> None:
    code = "import sys, pretrain.recipe; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "False"


def test_a_run_and_the_command_find_the_same(trained: Path, tmp_path: Path) -> None:
    """`medfm probe CHECKPOINT DATA` gives the very figures of the run's own evaluation, without deepspeed."""
    code = (
        "import sys\nfrom launch.cli import main\ntry: main(sys.argv[1:])\n"
        "except SystemExit as end: print(end.code, 'deepspeed' in sys.modules)"
    )
    logged = in_loop(trained)
    assert logged.keys() == {4, 8}
    assert {"val/CT_share", "val/MR@0.90_content", "probe/linear_dice", "collapse/rank"} < logged[8].keys()
    folder = trained / "checkpoints" / "update-00000004"
    words = [str(folder), recipe_of(trained).data.root, "--json", str(tmp_path / "f.json")]
    done = subprocess.run(
        [sys.executable, "-c", code, "probe", *words],
        cwd=REPOSITORY, env=environment(), capture_output=True, text=True, check=True, timeout=200,
    )  # fmt: skip
    assert done.stdout.splitlines()[-1] == "0 False", done.stderr
    found = json.loads((tmp_path / "f.json").read_text())
    assert found["checkpoint"] == str(folder)
    assert found["scores"] == logged[4]


def test_following_a_finished_run_scores_each_checkpoint_once(
    run: Path, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    assert Follower(run).follow().state == "finished"
    rows = rows_of(run)
    assert [row["update"] for row in rows] == [4, 8]
    assert [row["scores"] for row in rows] == [in_loop(trained)[u] for u in (4, 8)]
    events = list((run / "tensorboard" / "probe").iterdir())
    assert len(events) == 1
    for folder in (events[0].parent, run / "tensorboard"):  # by the same names, grouped by kind of figure
        tags = EventAccumulator(str(folder)).Reload().Tags()
        assert {"pictures/CT-0", "pictures/MR-0"} == set(tags["images"])
        assert {"val/CT@0.90_share", "probe/knn_dice", "collapse/rank"} < set(tags["scalars"])
    assert {p: p.read_bytes() for p in before} == before
    again = Follower(run)
    again.follow()
    assert again.scored == 0
    assert rows_of(run) == rows
    with open(run / "probe.jsonl", "r+", encoding="utf-8") as file:  # as a kill leaves it
        file.truncate(len(file.readline()) + 50)
    third = Follower(run, say=lambda _: None)
    third.follow()
    assert third.scored == 1
    assert [row["scores"] for row in rows_of(run)] == [row["scores"] for row in rows]
    assert capsys.readouterr().out.count("held out  ") == 2


def test_a_followed_checkpoint_may_vanish_or_be_damaged(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One is deleted while it is read, one was damaged; both are said once, and the others are scored."""
    said: list[str] = []
    first, second = kept(run)
    shutil.copytree(second, second.with_name("update-00000099"))
    (second.with_name("update-00000099") / "encoder.safetensors").write_bytes(b"no")
    (second.with_name("update-00000099") / "complete.json").write_text(
        (second / "complete.json").read_text() + " "
    )

    def read(folder: Path, *rest: Any) -> MaskedAutoencoder:
        if folder == first:
            shutil.rmtree(folder)
        return read_network(folder, *rest)

    monkeypatch.setattr("pretrain.follow.read_network", read)
    Follower(run, say=said.append).follow()
    assert [row["update"] for row in rows_of(run)] == [8]
    assert sum("update-00000004 was deleted while it was read" in line for line in said) == 1
    assert sum("left out" in line and "encoder.safetensors has 2 bytes" in line for line in said) == 1
    with pytest.raises(Gone):
        fingerprint(first)


def test_one_follower_a_run_and_only_of_pretraining(run: Path, tmp_path: Path) -> None:
    with Record(run), pytest.raises(UserError, match="another"):
        Follower(run).follow()
    recipe = recipe_of(run)
    other = recipe.model_copy(update={"encoder": recipe.encoder.model_copy(update={"width": 24})})
    with pytest.raises(UserError, match=r"update-00000008: not the network of its recipe.yaml \(.*size"):
        read_network(kept(run)[-1], other, CPU)


def test_wrong_words_are_one_line(
    run: Path, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "attempt").write_text("1\n")
    (tmp_path / "other" / "recipe.yaml").write_text("head: {kind: promptable}\n")
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    lonely = shutil.copytree(kept(run)[-1], tmp_path / "alone" / "x" / "update-00000008")
    for words, said in (
        ([], "--follow RUN"),
        (["nowhere"], "nowhere: no such folder"),
        ([str(tmp_path)], "neither encoder.safetensors nor"),
        ([str(tmp_path / "empty")], "no good checkpoint"),
        ([str(lonely)], "recipe.yaml"),
        ([str(run), str(tmp_path)], "not a shard dataset"),
        ([str(run), str(dataset), "--split", "dev"], "no samples in split 'dev'; it has train, val"),
        ([str(run), "--json", "/nowhere/f.json"], "--json /nowhere/f.json"),
        ([str(run), "--device", "gpu"], "device gpu"),
        (["--follow", str(tmp_path)], "not the folder of a run"),
        (["--follow", str(tmp_path / "other")], "a finetune run"),
        (["--follow", str(run), "--poll", "0"], "--poll 0"),
        (["--follow", str(run), "--json", "f.json"], "RUN/probe.jsonl"),
    ):
        with pytest.raises(SystemExit) as end:
            main(["probe", *words])
        error = capsys.readouterr().err
        assert end.value.code == 2, words
        assert len(error.strip().splitlines()) == 1, error
        assert said in error


def test_another_labelled_dataset_need_not_have_the_sources_of_the_recipe(
    recipe_file: Path, dataset: Path
) -> None:
    said: list[str] = []
    here = recipe_with(recipe_file, "--probes.sources", "[ct]", "--probes.classes", "[liver]")
    assert with_labelled(here, str(dataset), said.append) == here
    assert not said
    for words in (["--probes.sources", "[brats]"], ["--probes.classes", "[tumour]"]):
        other = with_labelled(recipe_with(recipe_file, *words), str(dataset), said.append).probes
        assert (other.data, other.sources, other.classes) == (str(dataset), (), ())
        assert words[1].strip("[]") in said.pop()


def test_signs_of_collapse_are_said_with_the_figures(recipe_file: Path) -> None:
    quality = quality_of(recipe_with(recipe_file))
    network = network_of(quality.recipe)
    scores = quality.score_alone(network)
    assert "ALARM" not in quality.report(scores, [])
    fallen = scores | {"collapse/rank_share": scores["collapse/rank_share"] / 4}
    report = quality.report(fallen, [scores])
    assert sum(line.startswith("ALARM: features span") for line in report.splitlines()) == 1


def test_a_run_holds_an_evaluation_against_those_before(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    task = open_task(recipe_with(recipe_file), tmp_path)
    first = {"probe/linear_dice": 0.5, "probe/knn_dice": 0.5, "probe/raw_linear_dice": 0.5,
             "collapse/rank": 24.0, "collapse/rank_share": 0.5}  # fmt: skip
    found = [first, first | {"collapse/rank": 5.0, "collapse/rank_share": 0.1}]
    monkeypatch.setattr(task.quality, "score", lambda *_: found.pop(0))
    task.evaluate(4, 0, 1, None)
    assert "ALARM" not in capsys.readouterr().out
    task.evaluate(8, 0, 1, None)
    assert "ALARM: features span 10.0% of their width, 50.0% at the last score" in capsys.readouterr().out


def test_an_encoder_alone_gives_the_probes_and_says_so(
    run: Path, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("encoder.safetensors", "plan.json"):
        (tmp_path / "export").mkdir(exist_ok=True)
        shutil.copy(kept(run)[-1] / name, tmp_path / "export" / name)
    with pytest.raises(SystemExit) as end:
        main(["probe", str(tmp_path / "export"), str(dataset), "--json", str(tmp_path / "f.json")])
    assert end.value.code == 0
    assert "held out: left out" in capsys.readouterr().out
    scores = json.loads((tmp_path / "f.json").read_text())["scores"]
    assert "probe/linear_dice" in scores
    assert not any(name.startswith("val/") for name in scores)


@pytest.mark.slow
def test_evaluation_changes_no_bit_of_training_on_two_processes(
    recipe_file: Path, trained: Path, tmp_path: Path
) -> None:
    """With held-out figures and probes on and off; the figures of two ranks are those of one process."""
    ended(start(recipe_file, tmp_path / "on", 2))
    off_fields = ("--data.held-out=none", "--probes.data=''", "--engine.evaluate-every=0")
    ended(start(recipe_file, tmp_path / "off", 2, *off_fields))
    on, off = weights(tmp_path / "on"), weights(tmp_path / "off")
    assert len(on) == 3
    assert on == off
    assert not in_loop(tmp_path / "off")
    Follower(tmp_path / "on", say=lambda _: None).follow()
    alone = {row["update"]: row["scores"] for row in rows_of(tmp_path / "on")}
    for update, scores in in_loop(tmp_path / "on").items():
        assert scores == alone[update]


@pytest.mark.slow
def test_following_a_run_that_trains_through_a_kill_and_an_interrupt(
    recipe_file: Path, trained: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    training = start(recipe_file, run)
    deadline = time.monotonic() + 200
    while not (run / "attempt").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    killed = medfm("probe", "--follow", str(run), "--poll", "0.2")
    while not rows_of(run):
        assert killed.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    killed.kill()
    killed.communicate(timeout=30)
    first = rows_of(run)
    ended(training)
    assert weights(run) == weights(trained)

    verdict = (run / "verdict.json").read_text()
    (run / "verdict.json").write_text(verdict.replace("finished", "preempted"))
    waiting = medfm("probe", "--follow", str(run), "--poll", "0.2")
    assert waiting.stdout is not None
    while "may be started again; waiting" not in (line := waiting.stdout.readline()):
        assert line, "the follower ended"
    waiting.send_signal(signal.SIGINT)
    assert "start the same command again" in ended(waiting, 130)
    assert [row["update"] for row in rows_of(run)] == [2, 4, 6, 8]
    assert rows_of(run)[: len(first)] == first
    scores = {row["update"]: row["scores"] for row in rows_of(run)}
    assert {update: scores[update] for update in (4, 8)} == in_loop(trained)

    (run / "verdict.json").write_text(verdict)
    last = Follower(run)
    assert last.follow().update == 8
    assert last.scored == 0
