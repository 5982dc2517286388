"""Real worker processes on gloo: ZeRO stages, precisions, kills, signals, changes of layout.

The launches are made once and each test looks at one thing in what they left behind.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from toy_runs import (
    ENV,
    UPDATES,
    launch,
    losses,
    plain_loop,
    rank_files,
    rows,
    same_bits,
    weights,
    words,
)
from toy_worker import ToyRecipe, ToyTask

from engine.errors import UserError
from engine.recipe import EngineConfig
from engine.train import train
from engine.verdict import read_verdict
from launch.local import run_local

pytestmark = pytest.mark.slow
MATRIX = [(stage, precision) for stage in range(4) for precision in ("fp32", "bf16")]
NAN = ("--nan_at", "[3]")
AFTER_3 = [0, 1, 2, *range(4, UPDATES + 1)]  # the positions of its updates
EVERY_3 = ("--engine.evaluate_every", "3", "--engine.evaluate_share")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    two = [
        *(words(root / f"two-{s}-{p}", s, p, *NAN, *EVERY_3, "1") for s, p in MATRIX),
        *(words(root / f"quiet-{s}", s, "fp32", *NAN) for s in (1, 3)),
        *(words(root / f"thrifty-{s}", s, "fp32", *NAN, *EVERY_3, "1e-4") for s in (1, 3)),
        words(root / "spoilt", 1, "fp32", "--most_groups", "10"),
        words(root / "frozen", 3, "fp32", "--frozen_part", "--die_with", "SIGTERM", "--die_at", "4"),
        words(root / "frozen", 1, "fp32", "--frozen_part"),
    ]
    one = [
        *(words(root / f"one-{s}-fp32", s, "fp32", *NAN) for s in range(4)),
        words(root / "calm", 1, "bf16"),
        words(root / "one-1-bf16", 1, "bf16", *NAN, "--engine.activation_checkpointing"),
    ]
    launch((2, two), (1, one))
    return root


@pytest.mark.parametrize(("stage", "precision"), MATRIX)
def test_two_ranks_train_at_every_stage_and_skip_nan(runs: Path, stage: int, precision: str) -> None:
    run = runs / f"two-{stage}-{precision}"
    verdict = read_verdict(run)
    assert verdict is not None
    assert (verdict.state, verdict.update, verdict.attempt) == ("finished", UPDATES, 1)
    truth, _ = plain_loop(AFTER_3)
    tolerance = 1e-5 if precision == "fp32" else 1e-2
    assert list(losses(run).values()) == pytest.approx(truth, rel=tolerance)
    state = json.loads((run / "checkpoints" / f"update-{UPDATES:08d}" / "state.json").read_text())
    assert (state["update"], state["position"], state["skipped"]) == (UPDATES, UPDATES + 1, 1)


def test_weights_are_those_of_a_plain_loop(runs: Path) -> None:
    _, truth = plain_loop(AFTER_3)
    for name in [*(f"two-{s}-fp32" for s in range(4)), *(f"one-{s}-fp32" for s in range(4))]:
        torch.testing.assert_close(weights(runs / name), truth, rtol=2e-5, atol=2e-6)


def test_losses_do_not_depend_on_world_or_stage_in_bf16(runs: Path) -> None:
    reference = losses(runs / "one-1-bf16")
    for stage in range(4):
        assert losses(runs / f"two-{stage}-bf16") == pytest.approx(reference, rel=1e-2)


@pytest.mark.parametrize("stage", [1, 3])
def test_evaluations_change_nothing_however_many_there_are(runs: Path, stage: int) -> None:
    """Every third update, at the end only, and the ones between the first and the last put off."""
    evaluated = {f"two-{stage}-fp32": [3, 6, 8], f"quiet-{stage}": [8], f"thrifty-{stage}": [3, 8]}
    for name, updates in evaluated.items():
        assert same_bits(rank_files(runs / name), rank_files(runs / f"quiet-{stage}"))
        rows = [json.loads(line) for line in (runs / name / "metrics.jsonl").read_text().splitlines()]
        assert [row["update"] for row in rows if "evaluate/loss" in row] == updates
    for rank in range(2):
        said = (runs / f"thrifty-{stage}" / "logs" / f"rank-{rank:03d}.jsonl").read_text()
        assert said.count("update 6: evaluation put off") == said.count("evaluation put off") == 1


def test_frozen_parameters_and_buffers_survive_a_change_of_layout(runs: Path) -> None:
    start = ToyTask(ToyRecipe(), Path()).model.state_dict()
    end = weights(runs / "frozen")
    assert end.keys() == start.keys()
    assert torch.equal(end["stems.mr.weight"], start["stems.mr.weight"])
    assert not torch.equal(end["stems.ct.weight"], start["stems.ct.weight"])


def test_metrics_of_ranks_that_saw_different_kinds_are_whole(runs: Path) -> None:
    rows = [json.loads(line) for line in (runs / "two-1-fp32" / "metrics.jsonl").read_text().splitlines()]
    for row in (r for r in rows if "loss/ct" in r and r["update"] != 4):
        ct = 2 if row["data/position"] % 2 else 4  # groups 0 and 2, or group 1 alone, are MR by turns
        whole = (row["loss/ct"] * ct + row["loss/mr"] * (6 - ct)) / 6
        assert row["loss"] == pytest.approx(whole, rel=1e-4) or row["loss"] == pytest.approx(
            (row["loss/ct"] * (6 - ct) + row["loss/mr"] * ct) / 6, rel=1e-4
        )


def test_a_changed_recipe_is_refused_and_a_segment_accepts_it(runs: Path) -> None:
    run = runs / "one-1-fp32"
    config = EngineConfig(updates=UPDATES, lr=0.02, warmup=2, clip=0.3, precision="fp32", device="cpu")
    recipe = ToyRecipe(engine=config, nan_at=(3,))
    with pytest.raises(UserError, match=r"engine\.lr: 0\.01 -> 0\.02.*--continue-as") as caught:
        train(ToyTask(recipe, run), config, run)
    assert "\n" not in str(caught.value)
    assert train(ToyTask(recipe, run), config, run, continue_as="hotter").state == "finished"


def test_other_data_or_another_order_are_refused(runs: Path) -> None:
    run = runs / "one-3-fp32"
    config = EngineConfig(updates=UPDATES, lr=0.01, warmup=2, clip=0.3, precision="fp32", device="cpu")
    task = ToyTask(ToyRecipe(engine=config, nan_at=(3,)), run)
    task.data_identity = lambda: {"manifest": "toy", "order": "2"}  # type: ignore[method-assign]
    with pytest.raises(UserError, match=r"\(order: 1 -> 2\).*--continue-as") as caught:
        train(task, config, run)
    assert "\n" not in str(caught.value)


def test_what_the_data_do_is_said_and_counted_over_all_ranks(runs: Path) -> None:
    run = runs / "two-1-fp32"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["data/groups"] for row in rows if "loss" in row] == [
        3 * row["data/position"] for row in rows if "loss" in row
    ]
    for rank in range(2):
        events = [
            json.loads(line) for line in (run / "logs" / f"rank-{rank:03d}.jsonl").read_text().splitlines()
        ]
        said = [e["text"] for e in events if e["event"] == "message"]
        assert said[:2] == ["toy data", "without end"]
        assert any(e["event"] == "data" and "groups so far" in e["text"] for e in events)


def test_data_that_are_not_fit_end_the_run_on_every_rank(runs: Path) -> None:
    """Counts of all ranks decide: the others would wait for a rank that ends by itself."""
    run = runs / "spoilt"
    verdict = read_verdict(run)
    assert verdict is not None
    assert (verdict.state, verdict.kind, verdict.message) == ("failed", "user", "12 groups are too many")
    assert list(losses(run)) == [1, 2, 3, 4]
    for rank in range(2):
        lines = (run / "logs" / f"rank-{rank:03d}.jsonl").read_text().splitlines()
        assert sum("groups so far" in line for line in lines) == 4


def test_another_architecture_is_one_line(runs: Path) -> None:
    run = runs / "one-2-fp32"
    config = EngineConfig(updates=UPDATES, lr=0.01, warmup=2, clip=0.3, precision="fp32", device="cpu")
    recipe = ToyRecipe(engine=config, nan_at=(3,), hidden=8)
    with pytest.raises(UserError, match=r"another architecture.*\(7, 12\) there, \(8, 12\) here") as caught:
        train(ToyTask(recipe, run), config, run, continue_as="wider")
    assert "\n" not in str(caught.value)


def test_sigkill_and_restart_give_the_same_bits(runs: Path, tmp_path: Path) -> None:
    """The launcher starts the killed run again; weights and moments equal those of a run that was not
    killed. The same on two processes: test_chaos.py."""
    fields = words(tmp_path, 1, "bf16", "--die_at", "5")[2:]
    assert run_local("toy_worker", None, fields, 1, run=tmp_path, env=ENV, restarts=1) == 0
    verdict = read_verdict(tmp_path)
    assert verdict is not None
    assert verdict.attempt == 2
    assert same_bits(rank_files(tmp_path), rank_files(runs / "calm"))
    assert list(losses(tmp_path)) == list(range(1, UPDATES + 1))


def test_an_evaluation_that_fails_costs_no_update(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> dict[str, float]:
        raise RuntimeError("no picture today")

    config = EngineConfig(updates=2, precision="fp32", device="cpu", checkpoint_every=0)
    task = ToyTask(ToyRecipe(engine=config), tmp_path)
    monkeypatch.setattr(task, "evaluate", broken)
    with pytest.raises(RuntimeError, match="no picture"):
        train(task, config, tmp_path)
    assert (tmp_path / "checkpoints" / "update-00000002" / "complete.json").is_file()


def test_a_run_ends_with_an_evaluation_although_a_signal_came_before_it(tmp_path: Path) -> None:
    config = EngineConfig(updates=2, precision="fp32", device="cpu", checkpoint_every=0)
    recipe = ToyRecipe(engine=config, die_at=1, die_with="SIGTERM")
    states = [train(ToyTask(recipe, tmp_path), config, tmp_path).state for _ in range(3)]
    assert states == ["preempted", "finished", "finished"]
    figures = [row for row in rows(tmp_path / "metrics.jsonl") if "evaluate/loss" in row]
    assert [row["update"] for row in figures] == [2]


def test_a_wrong_recipe_is_one_line_and_exit_code_2(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    code = run_local("toy_worker", None, ["--engine.updats", "3"], 2, run=tmp_path, env=ENV)
    assert code == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if line.strip()]
    assert len(lines) == 1, lines
    assert lines[0].startswith("medfm: error: ")
    assert "did you mean `engine.updates`?" in lines[0]
