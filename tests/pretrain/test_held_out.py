"""Held-out figures of a network: what they are, and that they change nothing of its training."""

from __future__ import annotations

import subprocess
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_runs import (
    REPOSITORY,
    forked,
    in_loop,
    network_of,
    quality_of,
    recipe_with,
    rows_of,
    weights,
)

from data_pipeline.stream import open_stream
from pretrain.batch import MODALITIES, Collate
from pretrain.evaluate import CONSTANT, _means, constant
from pretrain.follow import Follower
from pretrain.held_out_table import describe, lines_of
from pretrain.recipe import EvaluationConfig
from pretrain.task import open_task
from pretrain.tokens import tokenise

CPU = torch.device("cpu")


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


def test_signs_of_collapse_are_said_with_the_figures(recipe_file: Path) -> None:
    quality = quality_of(recipe_with(recipe_file))
    network = network_of(quality.recipe)
    scores = quality.score_alone(network)
    assert "ALARM" not in quality.report(scores, [])
    fallen = scores | {"collapse/rank_share": scores["collapse/rank_share"] / 4}
    report = quality.report(fallen, [scores])
    assert sum(line.startswith("ALARM: features span") for line in report.splitlines()) == 1


def test_a_run_holds_an_evaluation_against_those_before(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = open_task(recipe_with(recipe_file), tmp_path)
    first = {"probe/linear_dice": 0.5, "probe/knn_dice": 0.5, "probe/raw_linear_dice": 0.5,
             "collapse/rank": 24.0, "collapse/rank_share": 0.5}  # fmt: skip
    found = [first, first | {"collapse/rank": 5.0, "collapse/rank_share": 0.1}]
    monkeypatch.setattr(task.quality, "score", lambda *_: found.pop(0))
    task.evaluate(4, 0, 1, None)
    assert "ALARM" not in task.findings()
    task.evaluate(8, 0, 1, None)
    assert "ALARM: features span 10.0% of their width, 50.0% at the last score" in task.findings()


@pytest.mark.slow
def test_evaluation_changes_no_bit_of_training_on_two_processes(recipe_file: Path, tmp_path: Path) -> None:
    """With held-out figures and probes on and off; the figures of two ranks are those of one process.

    But for the last digits of float32: where DeepSpeed lays weights end to end, a product of one row adds up
    in another order than with the same weights at an aligned address, so now and then a neighbour changes.
    """
    on_words, off_words = ([str(recipe_file), "--run", str(tmp_path / name)] for name in ("on", "off"))
    off_words += ["--data.held-out=none", "--probes.data=''", "--engine.evaluate-every=0"]
    forked((2, None, [on_words, off_words]))
    on, off = weights(tmp_path / "on"), weights(tmp_path / "off")
    assert len(on) == 3
    assert on == off
    assert not in_loop(tmp_path / "off")
    Follower(tmp_path / "on", say=lambda _: None).follow()
    alone = {row["update"]: row["scores"] for row in rows_of(tmp_path / "on")}
    for update, scores in in_loop(tmp_path / "on").items():
        assert scores.keys() == alone[update].keys()
        for name, score in scores.items():
            margin = 0.01 if name.startswith("probe/") else 1e-6
            assert score == pytest.approx(alone[update][name], rel=1e-5, abs=margin), name
