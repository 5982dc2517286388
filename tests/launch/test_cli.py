"""The command as a person meets it: quick help, negative coordinates, and one line for whatever is wrong."""

from __future__ import annotations

import json
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from engine.errors import UserError
from launch.cli import NOT_YET, _joined, main, parser
from launch.commands import numbers, stage_of
from launch.phantoms import write, write_png
from launch.quickstart import MARK, own_folder


class Done(NamedTuple):
    """How a command ended, with what it and its child processes printed."""

    returncode: int
    stdout: str
    stderr: str


Medfm = Callable[..., Done]


@pytest.fixture
def medfm(capfd: pytest.CaptureFixture[str]) -> Medfm:
    """Runs `medfm WORDS` in this process, which has the libraries already; its exception fails the test."""

    def run(*words: str) -> Done:
        capfd.readouterr()
        held = signal.pthread_sigmask(signal.SIG_BLOCK, ())
        with pytest.raises(SystemExit) as ended:
            main(words)
        assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == held  # or what is forked later hears none
        assert isinstance(ended.value.code, int)
        return Done(ended.value.code, *capfd.readouterr())

    return run


def assert_one_line(done: Done, *parts: str) -> None:
    """Exit code 2, one line on stderr that holds every part, no traceback anywhere."""
    assert done.returncode == 2, done.stdout + done.stderr
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("medfm: error: "), lines[0]
    assert lines[0].count("medfm: ") == 1, lines[0]
    assert "Traceback" not in done.stdout + done.stderr
    for part in parts:
        assert part in lines[0], lines[0]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small dataset of phantoms, built by the command."""
    folder = tmp_path_factory.mktemp("cli")
    phantoms = write(folder / "scans", 3)
    with pytest.raises(SystemExit) as ended:
        main(["shards", "build", str(phantoms.sources), "--out", str(folder / "data")])
    assert ended.value.code == 0
    return folder / "data"


def test_an_error_of_the_installed_command_is_one_line() -> None:
    command = [sys.executable, "-m", "launch.cli", "predict", "x", "y"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert_one_line(Done(done.returncode, done.stdout, done.stderr), "not in this version yet")


def test_help_takes_no_heavy_import() -> None:
    """Importing the command and printing help loads none of the libraries that take seconds."""
    code = (
        "import sys\nfrom launch.cli import parser\nparser().format_help()\n"
        "heavy = {'torch', 'deepspeed', 'monai', 'SimpleITK', 'numpy', 'pydantic', 'tyro', 'rich'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "[]"
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0


def test_help_does_not_offer_what_is_not_there() -> None:
    text = parser().format_help()
    offered = text.split("not yet in this version")[0]
    assert all(f"\n    {name}" not in offered for name in NOT_YET)
    assert "quickstart" in offered


@pytest.mark.parametrize(
    "line",
    [
        "predict x y", "plan r.yaml", "launch slurm r.yaml", "launch kubernetes r.yaml",
        "launch hostfile r.yaml",
        "export x --format onnx --out y", "evaluate x y --protocol dense",
    ],
)  # fmt: skip
def test_what_is_not_there_yet_says_so(medfm: Medfm, line: str) -> None:
    assert_one_line(medfm(*line.split()), "not in this version yet")


@pytest.mark.parametrize(
    "words",
    [(), ("trian",), ("doctor", "--fast"), ("segment", "a", "b"), ("export", "a", "--format", "zip")],
)
def test_a_wrong_command_line_is_one_line(medfm: Medfm, words: tuple[str, ...]) -> None:
    assert_one_line(medfm(*words), "medfm: error: ")


def test_negative_coordinates_parse() -> None:
    words = _joined(
        [
            "segment",
            "m",
            "i",
            "--out",
            "o",
            "--point-ras",
            "-12.5,3,4",
            "--point",
            "1,2,3",
            "--negative-lps",
            "-.5,1,-2",
        ]
    )
    args = parser().parse_args(words)
    assert args.point_ras == ["-12.5,3,4"]
    assert args.point == ["1,2,3"]
    assert args.negative_lps == ["-.5,1,-2"]
    assert numbers(args.point_ras[0], 3, "--point-ras") == (-12.5, 3.0, 4.0)


@pytest.mark.parametrize("text", ["1,2", "a,b,c", "1 2 3", ""])
def test_a_point_that_is_none_names_the_option(text: str) -> None:
    with pytest.raises(UserError, match="--point"):
        numbers(text, 3, "--point")


def test_the_stage_follows_from_the_recipe(tmp_path: Path) -> None:
    recipes = Path(__file__).parents[2] / "launch" / "recipes"
    assert stage_of(str(recipes / "quickstart-pretrain.yaml")) == "pretrain"
    assert stage_of(str(recipes / "quickstart-finetune.yaml")) == "finetune"
    (tmp_path / "r.yaml").write_text("engine: {updates: 3}\n")
    with pytest.raises(UserError, match="--stage"):
        stage_of(str(tmp_path / "r.yaml"))


def test_unreadable_scan(medfm: Medfm, tmp_path: Path) -> None:
    (tmp_path / "scans").mkdir()
    (tmp_path / "scans" / "broken.nii.gz").write_bytes(b"this is not gzip")
    done = medfm(
        "shards", "build", str(tmp_path / "scans"), "--modality", "MR", "--out", str(tmp_path / "out")
    )
    assert_one_line(done, "no input could be used")
    assert not (tmp_path / "out").exists()


def test_missing_source_and_undeclared_radiographs(medfm: Medfm, tmp_path: Path) -> None:
    assert_one_line(
        medfm("shards", "build", str(tmp_path / "nothing"), "--out", str(tmp_path / "o")), "nothing"
    )
    write_png(tmp_path / "x" / "a.png", np.arange(4096, dtype=np.uint16).reshape(64, 64))
    words = (
        "shards",
        "build",
        str(tmp_path / "x"),
        "--modality",
        "XR",
        "--spacing",
        "0.5",
        "--out",
        str(tmp_path / "o"),
    )
    assert_one_line(medfm(*words), "burned_in")


def test_wrong_recipe_key(medfm: Medfm, tmp_path: Path, dataset: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"data: {{root: {dataset}}}\nengine: {{udpates: 3}}\n")
    done = medfm("pretrain", str(recipe), "--processes", "1", "--run", str(tmp_path / "run"))
    assert_one_line(done, "engine.udpates", "did you mean", "engine.updates")


def test_missing_shard(medfm: Medfm, tmp_path: Path, dataset: Path) -> None:
    copy = tmp_path / "data"
    shutil.copytree(dataset, copy)
    shard = sorted(copy.glob("train-*.tar"))[0]
    shard.unlink()
    recipe = Path(__file__).parents[2] / "launch" / "recipes" / "quickstart-pretrain.yaml"
    done = medfm(
        "pretrain", str(recipe), "--processes", "1", "--run", str(tmp_path / "run"), f"--data.root={copy}"
    )
    assert_one_line(done, shard.name)
    found = medfm("shards", "verify", str(copy))
    assert found.returncode in (2, 3)
    assert shard.name in found.stderr
    assert "Traceback" not in found.stderr


def test_verify_inspect_and_order(medfm: Medfm, dataset: Path, tmp_path: Path) -> None:
    assert medfm("shards", "verify", str(dataset)).returncode == 0
    shown = medfm("shards", "inspect", str(dataset), "--picture", str(tmp_path / "p.png"))
    assert shown.returncode == 0, shown.stderr
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    drawn = medfm("shards", "order", str(dataset), "--updates", "1")
    assert drawn.returncode == 0, drawn.stderr
    assert "update 0 rank 0 group 0" in drawn.stdout
    played = medfm("shards", "order", str(dataset), "--simulate", "3", "--nodes", "2")
    assert played.returncode == 0, played.stderr
    assert "simulated: 3 updates" in played.stdout
    assert "on 2 nodes" in played.stdout
    assert "update 0 rank 0" not in played.stdout
    assert_one_line(medfm("shards", "order", str(dataset), "--simulate", "--nodes", "0"), "0 nodes")
    figures, recipe = tmp_path / "figures.json", tmp_path / "order.yaml"
    recipe.write_text("mixture: {groups: 2}\n")
    words = ["--simulate", "--nodes", "2", "--ranks-per-node", "2", "--cache", "3GB", "--json", str(figures)]
    page = medfm("shards", "order", str(dataset), str(recipe), *words)
    assert page.returncode == 0, page.stderr
    assert "every sample is drawn" in page.stdout
    found = json.loads(figures.read_text())
    assert (found["nodes"], found["groups"], found["cache"]) == (2, 2, 3e9)
    assert_one_line(medfm("shards", "order", str(dataset), "--simulate", "--cache", "big"), "'big'")


def test_checkpoint_of_another_architecture_and_exact_export(medfm: Medfm, tmp_path: Path) -> None:
    from model.encoder import Encoder, EncoderConfig
    from model.weights import save_encoder

    save_encoder(tmp_path / "good", Encoder(EncoderConfig(size="nano")))
    done = medfm("export", str(tmp_path / "good"), "--out", str(tmp_path / "exported"))
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "exported" / "export.json").read_text())
    assert report["max_difference"] == 0.0
    save_encoder(tmp_path / "other", Encoder(EncoderConfig(size="nano", width=48, heads=2)))
    weights = (tmp_path / "other" / "encoder.safetensors").read_bytes()
    (tmp_path / "good" / "encoder.safetensors").write_bytes(weights)
    assert_one_line(medfm("export", str(tmp_path / "good"), "--out", str(tmp_path / "bad")), "architecture")
    assert_one_line(medfm("export", str(tmp_path / "none"), "--out", str(tmp_path / "bad")), "none")
    assert_one_line(
        medfm("segment", str(tmp_path / "none"), "image.nii.gz", "--out", "s.nii.gz", "--point", "1,2,3"),
        "none",
    )


def test_export_notices_a_difference(tmp_path: Path) -> None:
    import torch

    from launch.export import encoder_difference
    from model.encoder import Encoder, EncoderConfig
    from model.weights import save_encoder

    encoder = Encoder(EncoderConfig(size="nano"))
    save_encoder(tmp_path / "a", encoder)
    with torch.no_grad():
        next(encoder.parameters()).add_(0.01)
    save_encoder(tmp_path / "b", encoder)
    assert encoder_difference(tmp_path / "a", tmp_path / "a") == 0.0
    assert encoder_difference(tmp_path / "a", tmp_path / "b") > 0.0


def test_quickstart_touches_no_folder_of_others(medfm: Medfm, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    assert_one_line(medfm("quickstart", "--out", str(tmp_path)), "not empty")
    assert (tmp_path / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize(("gpus", "words", "expected"), [(0, (), 2), (1, (), 1), (8, (), 2), (8, ("3",), 3)])
def test_quickstart_pretrains_with_one_process_where_there_is_one_gpu(
    medfm: Medfm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpus: int, words: tuple[str], expected: int
) -> None:
    """Two processes cannot share a GPU."""
    asked: list[int] = []

    def job(out: Path, stages: Any, size: Any, data: Any, processes: int, fields: Any) -> dict[str, Any]:
        asked.append(processes)
        raise UserError("enough")

    monkeypatch.setattr("launch.quickstart.gpus", lambda: gpus)
    monkeypatch.setattr("launch.quickstart._job", job)
    assert_one_line(
        medfm("quickstart", "--out", str(tmp_path / "q"), *(f"--processes={w}" for w in words)), "enough"
    )
    assert asked == [expected]


def test_quickstart_clears_its_own_folder_and_only_that(tmp_path: Path) -> None:
    with own_folder(tmp_path / "q"):
        pass
    for name in ("dataset", "pretrain"):
        (tmp_path / "q" / name / "old").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "kept.txt").touch()
    (tmp_path / "q" / "export").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "q" / "clicks-scratch.json").touch()
    (tmp_path / "q" / "notes.txt").touch()
    with own_folder(tmp_path / "q"):
        assert sorted(p.name for p in (tmp_path / "q").iterdir()) == [MARK, "notes.txt"]
        with pytest.raises(UserError, match="another quickstart"), own_folder(tmp_path / "q"):
            pass
    assert (tmp_path / "elsewhere" / "kept.txt").is_file()


def test_quickstart_does_not_start_in_what_it_cannot_delete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with own_folder(tmp_path):
        (tmp_path / "dataset").mkdir()

    def refuse(path: Path, **_: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(shutil, "rmtree", refuse)
    with (
        pytest.raises(UserError, match=r"dataset: left by an earlier.*Permission denied"),
        own_folder(tmp_path),
    ):
        pass


def test_a_run_folder_or_device_that_cannot_be_is_one_line(medfm: Medfm, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    recipe = Path(__file__).parents[2] / "launch" / "recipes" / "quickstart-pretrain.yaml"
    done = medfm("pretrain", str(recipe), "--processes", "1", "--run", str(tmp_path / "file" / "run"))
    assert_one_line(done, "file")
    words = ("segment", str(tmp_path), "i.nii.gz", "--out", "s.nii.gz", "--point", "1,2,3")
    assert_one_line(medfm(*words, "--device", "gpu"), "device gpu")
    words = ("evaluate", str(tmp_path), str(tmp_path))
    assert_one_line(medfm(*words, "--clicks", "0"), "clicks 0")
    assert_one_line(medfm(*words, "--limit", "-1"), "limit -1")


def test_fields_lists_every_field_of_the_recipe(medfm: Medfm) -> None:
    """`medfm pretrain --fields` names each leaf of the schema with its meaning."""
    out = medfm("pretrain", "--fields")
    assert out.returncode == 0
    for field in ("--engine.zero-stage", "--objective.mask-ratio", "--tokens.slots", "--encoder.size"):
        assert field in out.stdout
