"""Bad updates on two ranks: what is skipped, where a run goes back to, and that no interruption changes a
bit of it. Also runs that are extended, which go back for another reason."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from toy_runs import launch, losses, plain_loop, rank_files, rows, same_bits, state_of, weights, words
from toy_worker import ToyRecipe, ToyTask

from engine import loop
from engine.recipe import EngineConfig
from engine.train import train
from engine.verdict import read_verdict
from engine.zero_state import Partition

pytestmark = pytest.mark.slow

UPDATES = 14
BAD = ("--nan_at", "[7, 9]", "--kink_at", "[8]")  # loss, gradient, loss: back from update 7 to 5
APPLIED = [*range(5), *range(10, 19)]  # the positions of the updates that are left of it
TWICE = [*range(3), *range(14, 25)]
SPIKE, SPIKED_UPDATES = 18, 22


def toy(run: Path, stage: int, precision: str = "fp32", *more: str, updates: int = UPDATES) -> list[str]:
    fields = {"updates": updates, "checkpoint_every": 5, "max_bad_updates": 3, "trackers": "[]"}
    engine = [word for name, value in fields.items() for word in (f"--engine.{name}", str(value))]
    return words(run, stage, precision, *engine, "--patient", *more)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("rollback")
    spiked = {"updates": SPIKED_UPDATES}
    wsd = ("--engine.schedule", "wsd", "--engine.decay", "4", "--engine.min_lr", "1e-4")
    stop, kill = ("--die_with", "SIGTERM", "--die_at"), ("--die_with", "SIGKILL", "--die_at")
    again = [
        toy(root / "stopped-amid-1", 1, "fp32", *BAD),
        toy(root / "stopped-then-3", 3, "fp32", *BAD),
        toy(root / "ended-1", 1, "fp32", *BAD),
        toy(root / "ended-3", 3, "fp32", *BAD),
        toy(root / "spike-stopped", 1, "bf16", "--spike_at", f"[{SPIKE}]", **spiked),
    ]
    # Data that are not fit end a run without a save, here before and after the first save that follows.
    ends = [("--most_groups", str(3 * position + 1)) for position in (12, 16)]
    first = [
        *(toy(root / f"back-{s}", s, "fp32", *BAD) for s in range(4)),
        *(toy(root / f"back-bf16-{s}", s, "bf16", *BAD) for s in (0, 3)),
        [*again[0], *stop, "8"],
        [*again[1], *stop, "9"],
        [*again[2], *ends[0]],
        [*again[3], *ends[1]],
        toy(root / "twice", 1, "fp32", "--nan_at", "[7,8,9,11,12,13]", "--engine.checkpoint_every", "3"),
        toy(root / "hopeless", 2, "fp32", "--nan_at", f"{[*range(7, 40)]}", "--engine.max_rollbacks", "1"),
        toy(root / "early", 0, "fp32", "--nan_at", "[2,3,4]"),
        *(
            toy(root / f"{bad}-{s}-{p}", s, p, f"--{bad}_at", f"[{SPIKE}]", **spiked)
            for s, p in ((0, "fp32"), (1, "bf16"), (3, "bf16"))
            for bad in ("spike", "nan")
        ),
        toy(root / "allowed", 1, "fp32", "--spike_at", f"[{SPIKE}]", "--engine.spike", "0", **spiked),
        [*again[4], *stop, str(SPIKE - 1)],
        toy(root / "longer", 1, "bf16", *wsd, updates=20),
        toy(root / "extended", 1, "bf16", *wsd, updates=12),
        toy(root / "extended", 1, "bf16", *wsd, "--continue-as", "more", updates=20),
        [*toy(root / "killed", 2, "fp32", *BAD), *kill, "13"],
    ]  # fmt: skip
    launch((2, first), (2, [toy(root / "killed", 2, "fp32", *BAD), *again]))
    return root


def finished(run: Path, update: int = UPDATES) -> dict[str, Any]:
    """The last state of a run that has finished."""
    verdict = read_verdict(run)
    assert verdict is not None
    assert (verdict.state, verdict.update) == ("finished", update), verdict.message
    return state_of(run, update)


@pytest.mark.parametrize("stage", range(4))
def test_a_run_of_bad_updates_goes_back_and_past_them(runs: Path, stage: int) -> None:
    """Weights, moments, step count and schedule are those of a run that never saw what was left out."""
    run = runs / f"back-{stage}"
    state = finished(run)
    assert (state["position"], state["skipped"], state["rollbacks"]) == (19, 3, 1)
    truth, final = plain_loop(APPLIED)
    assert list(losses(run).values()) == pytest.approx(truth, rel=1e-5)
    torch.testing.assert_close(weights(run, UPDATES), final, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("stage", [0, 3])
def test_in_bf16_too(runs: Path, stage: int) -> None:
    assert finished(runs / f"back-bf16-{stage}")["rollbacks"] == 1
    assert list(losses(runs / f"back-bf16-{stage}").values()) == pytest.approx(
        plain_loop(APPLIED)[0], rel=1e-2
    )


def test_what_was_bad_is_named(runs: Path) -> None:
    bad = rows(runs / "back-1" / "bad_updates.jsonl")
    assert [(row["update"], row["position"]) for row in bad] == [(7, 7), (7, 8), (7, 9)]
    assert [row["reason"] for row in bad] == [f"the {x} is not finite" for x in ("loss", "gradient", "loss")]
    assert [row["loss"] == "nan" for row in bad] == [True, False, True]
    assert bad[1]["norm"] == "nan"
    assert bad[2]["keys"] == [f"9/{group}/{i}" for group in range(3) for i in range(2)]
    for rank in range(2):
        events = rows(runs / "back-1" / "logs" / f"rank-{rank:03d}.jsonl")
        backs = [event for event in events if event["event"] == "rollback"]
        assert [(b["update"], b["to"], b["position"]) for b in backs] == [(7, 5, 10)]
        said = " ".join(event["text"] for event in events if event["event"] == "message")
        assert "samples 9/0/0, 9/0/1, 9/1/0 and 3 more" in said


@pytest.mark.parametrize(
    ("run", "reference"),
    [("stopped-amid-1", "back-1"), ("stopped-then-3", "back-3"), ("ended-1", "back-1"), ("ended-3", "back-3"),
     ("killed", "back-2")],
)  # fmt: skip
def test_no_interruption_changes_a_bit(runs: Path, run: str, reference: str) -> None:
    """Stopped amid the bad updates (its save is not gone back to) and right after going back; ended and
    killed after going back, before and after the next save."""
    verdict = read_verdict(runs / run)
    assert verdict is not None
    assert verdict.attempt == 2
    assert finished(runs / run) == finished(runs / reference)
    assert same_bits(rank_files(runs / run, UPDATES), rank_files(runs / reference, UPDATES))


def test_checkpoints_that_a_run_went_back_behind_are_kept_by_another_name(runs: Path) -> None:
    names = {folder.name for folder in (runs / "stopped-amid-1" / "checkpoints").iterdir()}
    assert names == {"update-00000005", "update-00000010", "update-00000014", "bad-update-00000007"}


def test_going_back_again_soon_takes_an_older_checkpoint(runs: Path) -> None:
    state = finished(runs / "twice")
    assert (state["skipped"], state["rollbacks"], state["back_in_a_row"]) == (6, 2, 0)
    torch.testing.assert_close(weights(runs / "twice", UPDATES), plain_loop(TWICE)[1], rtol=2e-5, atol=2e-6)
    events = rows(runs / "twice" / "logs" / "rank-000.jsonl")
    assert [(e["update"], e["to"]) for e in events if e["event"] == "rollback"] == [(7, 6), (7, 3)]


def test_a_run_that_gets_no_further_fails_with_a_report(runs: Path) -> None:
    verdict = read_verdict(runs / "hopeless")
    assert verdict is not None
    assert (verdict.state, verdict.update) == ("failed", 5)
    assert "3 updates in a row were bad, the last at position 12" in verdict.message
    assert "engine.max_rollbacks (1) is used up" in verdict.message
    report = json.loads((runs / "hopeless" / "report.json").read_text())
    assert report["message"] == verdict.message
    assert [row["position"] for row in report["bad"]] == [7, 8, 9, 10, 11, 12]
    assert report["bad"][-1]["keys"][0] == "12/0/0"


def test_a_run_without_a_checkpoint_cannot_go_back(runs: Path) -> None:
    verdict = read_verdict(runs / "early")
    assert verdict is not None
    assert (verdict.state, verdict.update) == ("failed", 2)
    assert "there is no checkpoint to go back to" in verdict.message
    assert (runs / "early" / "report.json").is_file()


@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (1, "bf16"), (3, "bf16")])
def test_a_spike_is_skipped_as_if_it_were_not_finite(runs: Path, stage: int, precision: str) -> None:
    spike, nan = (runs / f"{bad}-{stage}-{precision}" for bad in ("spike", "nan"))
    assert finished(spike, SPIKED_UPDATES)["skipped"] == finished(nan, SPIKED_UPDATES)["skipped"] == 1
    assert same_bits(rank_files(spike, SPIKED_UPDATES), rank_files(nan, SPIKED_UPDATES))
    (row,) = rows(spike / "bad_updates.jsonl")
    assert row["position"] == SPIKE
    assert row["loss"] > 1e3
    assert "the loss is above" in row["reason"]


def test_spikes_may_be_allowed(runs: Path) -> None:
    assert finished(runs / "allowed", SPIKED_UPDATES)["skipped"] == 0


def test_a_resumed_run_knows_the_losses_that_a_spike_is_held_against(runs: Path) -> None:
    resumed, whole = runs / "spike-stopped", runs / "spike-1-bf16"
    assert finished(resumed, SPIKED_UPDATES) == finished(whole, SPIKED_UPDATES)
    assert same_bits(rank_files(resumed, SPIKED_UPDATES), rank_files(whole, SPIKED_UPDATES))


def test_an_extended_run_is_the_longer_run(runs: Path) -> None:
    """It goes on from where the decay of the shorter one began, and not one bit is different."""
    extended, longer = finished(runs / "extended", 20), finished(runs / "longer", 20)
    assert same_bits(rank_files(runs / "extended", 20), rank_files(runs / "longer", 20))
    assert list(losses(runs / "extended").items()) == list(losses(runs / "longer").items())
    assert [(s["name"], s["position"]) for s in extended["segments"]] == [("first", 0), ("more", 8)]
    assert extended["losses"] == longer["losses"]
    names = {folder.name for folder in (runs / "extended" / "checkpoints").iterdir()}
    assert {"first-update-00000010", "first-update-00000012", "update-00000016"} <= names
    assert "first-update-00000008" not in names


# One rank in this process: a stop request at a certain instant.


def small(run: Path, every: int = 5) -> tuple[ToyTask, EngineConfig]:
    config = EngineConfig(
        updates=12, lr=0.01, warmup=2, precision="fp32", device="cpu", checkpoint_every=every,
        max_bad_updates=3, evaluate_every=4, evaluate_share=1.0,
    )  # fmt: skip
    recipe = ToyRecipe(engine=config, nan_at=(7, 8, 9), patient=True)
    return ToyTask(recipe, run), config


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("undisturbed")
    assert train(*small(run), run).state == "finished"
    return run


def signalling(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, with a stop request to this process when it is first called."""
    calls: list[None] = []

    def called(*arguments: Any, **named: Any) -> Any:
        calls.append(None)
        if len(calls) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return function(*arguments, **named)

    return called


@pytest.mark.parametrize(
    ("when", "update"),
    [("batches", 1), ("evaluate", 4), ("export", 6), ("where_to", 5), ("load", 5)],
)
def test_a_stop_request_at_any_instant_ends_in_a_saved_state(
    tmp_path: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch, when: str, update: int
) -> None:
    """Before the first update, in an evaluation, while a checkpoint is written, while the run goes back."""
    task, config = small(tmp_path)
    with monkeypatch.context() as patch:
        if when == "where_to":
            patch.setattr(loop, "where_to", signalling(loop.where_to))
        elif when == "load":
            patch.setattr(Partition, "load", signalling(Partition.load))
        else:
            patch.setattr(task, when, signalling(getattr(task, when)))
        verdict = train(task, config, tmp_path)
    assert verdict.state == "preempted"
    assert verdict.update >= update
    assert (tmp_path / "checkpoints" / f"update-{verdict.update:08d}" / "complete.json").is_file()
    assert train(*small(tmp_path), tmp_path).state == "finished"
    assert state_of(tmp_path, 12) == state_of(undisturbed, 12)
    assert same_bits(rank_files(tmp_path, 12), rank_files(undisturbed, 12))


def test_a_stop_request_before_a_launch_has_begun_costs_nothing(
    tmp_path: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that stands at a checkpoint makes no update first."""
    task, config = small(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(task, "evaluate", signalling(task.evaluate))
        stopped = train(task, config, tmp_path)
        patch.setattr(loop, "Saver", signalling(loop.Saver))
        task, config = small(tmp_path)
        assert train(task, config, tmp_path) == type(stopped)(
            "preempted", stopped.update, 2, "stopped by SIGTERM and saved; start again to go on"
        )


@pytest.mark.parametrize(("damaged", "back_to"), [((6,), 3), ((6, 3), None)])
def test_a_damaged_checkpoint_is_not_gone_back_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damaged: tuple[int, ...], back_to: int | None
) -> None:
    where_to = loop.where_to

    def spoil(*arguments: Any) -> Any:
        for update in damaged:
            (tmp_path / "checkpoints" / f"update-{update:08d}" / "state.json").write_text("{}")
        return where_to(*arguments)

    monkeypatch.setattr(loop, "where_to", spoil)
    verdict = train(*small(tmp_path, every=3), tmp_path)
    events = rows(tmp_path / "logs" / "rank-000.jsonl")
    backs = [event["to"] for event in events if event["event"] == "rollback"]
    assert backs == ([back_to] if back_to else [])
    assert verdict.state == ("finished" if back_to else "failed")
    assert back_to or "there is no checkpoint to go back to" in verdict.message
