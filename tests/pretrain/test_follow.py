"""`medfm probe`: the figures of a run off-line, and beside the run while it trains."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import (
    REPOSITORY,
    ended,
    environment,
    in_loop,
    medfm,
    recipe_with,
    rows_of,
    start,
    weights,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from engine.errors import UserError
from launch.cli import main
from pretrain.follow import Follower, Record, with_labelled
from pretrain.mae import MaskedAutoencoder
from pretrain.stored import Gone, fingerprint, kept, read_network, recipe_of

CPU = torch.device("cpu")


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of that run."""
    return shutil.copytree(trained, tmp_path / "run")


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
        assert killed.poll() is None or rows_of(run), "the follower ended without a score"
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
    assert [row["update"] for row in rows_of(run)] == [4, 8]
    assert rows_of(run)[: len(first)] == first
    scores = {row["update"]: row["scores"] for row in rows_of(run)}
    assert {update: scores[update] for update in (4, 8)} == in_loop(trained)

    (run / "verdict.json").write_text(verdict)
    last = Follower(run)
    assert last.follow().update == 8
    assert last.scored == 0
