"""`medfm quickstart`: the whole job, small, on this machine, with the very commands a person would type.

Phantoms (or a person's own folder) -> shards -> masked autoencoding -> promptable fine-tuning with and
without the pretrained encoder -> a held-out image segmented from clicks -> simulated clicks on the test
split -> export, loaded again and compared. Ends with a table, `summary.json` and `report.html`.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from engine.errors import UserError
from launch.commands import gpus
from launch.stages import CommandFailed, Stages

CLICKS = (1, 3, 5)
MARK = ".medfm-quickstart"
RECIPES = Path(str(files("launch"))) / "recipes"
_MADE = ("phantoms", "dataset", "dataset-private", "dataset.partial", "pretrain", "finetune-pretrained",
         "finetune-scratch", "segment", "clicks-pretrained.json", "clicks-scratch.json", "export", "logs",
         "summary.json", "report.html")  # fmt: skip


@dataclass(frozen=True)
class Size:
    """How much of everything."""

    subjects: int
    pretrain_updates: int
    finetune_updates: int
    test_images: int
    pretrain_fields: tuple[str, ...] = ()


FULL = Size(subjects=18, pretrain_updates=200, finetune_updates=80, test_images=4)
SHORT = Size(
    subjects=4, pretrain_updates=40, finetune_updates=4, test_images=1,
    # Small and fast, so that the loss of each modality falls by far more than crops differ.
    pretrain_fields=(
        "--encoder.width=96", "--encoder.depth=2", "--encoder.heads=2", "--objective.decoder-width=96",
        "--objective.decoder-depth=1", "--objective.decoder-heads=2", "--evaluation.batches=2",
        "--engine.lr=0.006", "--engine.warmup=4", "--engine.schedule=constant",
    ),
)  # fmt: skip


def quickstart(out: str, *, data: str | None = None, short: bool = False, processes: int | None = None,
               fields: tuple[str, ...] = ()) -> int:  # fmt: skip
    """Run everything under `out`; returns the exit code. `fields` are source fields for the build of
    `data`. `processes` pretrain: 2 where it is None, or 1 where there is one GPU, which they could not share.
    """
    if processes is None:
        processes = min(2, gpus() or 2)
    if processes < 1:
        raise UserError(f"--processes {processes}: at least 1")
    if fields and data is None:
        raise UserError(f"{fields[0]!r} describes your own scans; give them with --data DIR")
    folder = Path(out)
    began = time.monotonic()
    try:
        with own_folder(folder), Stages(folder) as stages:
            summary = _job(
                folder, stages, SHORT if short else FULL, Path(data) if data else None, processes, fields
            )
            summary = {"seconds": round(time.monotonic() - began, 1), **summary}
            from launch.quickstart_report import print_table, write_report

            (folder / "summary.json").write_text(json.dumps(summary, indent=1), encoding="utf-8")
            write_report(folder, summary)
            print_table(summary, folder, stages.console)
            return 0
    except CommandFailed as failed:
        if failed.code == 2:
            raise UserError(str(failed).splitlines()[-1].removeprefix("medfm: error: ")) from None
        print(f"medfm: {failed}", file=sys.stderr)
        return failed.code


@contextmanager
def own_folder(folder: Path) -> Iterator[None]:
    """Make the folder, or clear what an earlier quickstart left in it, and keep other quickstarts out.

    Raises:
        UserError: it holds anything else, another quickstart runs in it, or something in it cannot be
            deleted.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file; give a folder with --out")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / MARK).is_file():
        raise UserError(
            f"{folder}: is not empty and not of an earlier quickstart; give another folder with --out"
        )
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / MARK, "w") as mark:
        try:
            fcntl.flock(mark, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{folder}: another quickstart is running there; wait for it, or give another --out"
            ) from None
        for name in _MADE:
            left = folder / name
            try:
                if left.is_dir() and not left.is_symlink():
                    shutil.rmtree(left)
                else:
                    left.unlink(missing_ok=True)
            except OSError as error:
                raise UserError(
                    f"{left}: left by an earlier quickstart and cannot be deleted ({error.strerror}); "
                    "delete it, or give another --out"
                ) from None
        yield


def _fixed_key(private: Path) -> None:
    """Phantoms name nobody: with one key for all, every quickstart draws the same samples in one order."""
    private.mkdir(mode=0o700, exist_ok=True)
    (private / "hash.key").write_bytes(hashlib.sha256(b"medfm quickstart phantoms").digest())


def _job(
    out: Path, stages: Stages, size: Size, data: Path | None, processes: int, fields: tuple[str, ...]
) -> dict[str, Any]:
    workers = str(min(2, len(os.sched_getaffinity(0))))
    if data is None:
        from launch.phantoms import write

        with stages.stage("phantoms", f"drawing CT, MR and X-ray of {size.subjects} phantom subjects"):
            bar = stages.bar("subjects", size.subjects)
            source = write(out / "phantoms", size.subjects, workers=int(workers), done=bar.at).sources
        _fixed_key(out / "dataset-private")
    else:
        source = data / "sources.yaml" if (data / "sources.yaml").is_file() else data
    dataset = out / "dataset"
    with stages.stage("build", "raw scans to a shard dataset"):
        options = ("--out", str(dataset), "--workers", workers, "--split", "0.7,0.15,0.15", *fields)
        stages.run({"shards build": ["shards", "build", str(source), *options]})
        stages.run({"shards verify": ["shards", "verify", str(dataset)]})
    one_thread = {"OMP_NUM_THREADS": "1"}
    pretrained = out / "pretrain"
    with stages.stage("pretrain", f"masked autoencoding with DeepSpeed on {processes} processes"):
        options = (
            f"--data.root={dataset}", f"--engine.updates={size.pretrain_updates}", *size.pretrain_fields
        )  # fmt: skip
        recipe = str(RECIPES / "quickstart-pretrain.yaml")
        words = ["pretrain", recipe, "--processes", str(processes), "--run", str(pretrained), *options]
        stages.run({"pretrain": words}, one_thread)
    from launch.quickstart_report import held_out, losses

    summary: dict[str, Any] = {"loss": losses(pretrained), "held_out": held_out(pretrained)}
    labelled = labelled_images(dataset)
    if labelled is None:
        reason = "no labels in the dataset: fine-tuning, segmentation and evaluation left out"
        stages.console.print(reason, style="yellow")
        summary |= {"dice": None, "left_out": reason}
    else:
        summary |= _segmentation(out, stages, size, dataset, pretrained, labelled, one_thread)
    with stages.stage("export", "exporting the weights, loading them again, comparing"):
        weights = pretrained if labelled is None else out / "finetune-pretrained"
        words = ["export", str(weights), "--format", "safetensors", "--out", str(out / "export")]
        stages.run({"export": words})
    exported = json.loads((out / "export" / "export.json").read_text(encoding="utf-8"))
    return {
        "stages": {name: round(seconds, 1) for name, seconds in stages.seconds.items()},
        **summary,
        "export_max_difference": exported["max_difference"],
        "commands": stages.commands,
    }


@dataclass(frozen=True)
class Labelled:
    """Which labelled images the quickstart works with: one number of channels, and a split to test on."""

    channels: int
    sources: tuple[str, ...]
    test_split: str


def labelled_images(dataset: Path) -> Labelled | None:
    """None where the training split has no label or no other split has one."""
    from data_pipeline.manifest import Manifest

    manifest = Manifest.open(dataset)
    rows = manifest.select(split="train", labelled=True)
    if len(rows) == 0:
        return None
    counted = Counter(int(channels) for channels in manifest.column("shape")[rows, 0])
    channels = counted.most_common(1)[0][0]
    by_source: dict[str, set[int]] = {}
    for row in manifest.select(labelled=True).tolist():
        by_source.setdefault(str(manifest.column("source")[row]), set()).add(
            int(manifest.column("shape")[row, 0])
        )
    sources = tuple(sorted(name for name, found in by_source.items() if found == {channels}))
    for split in ("test", "val"):
        held = manifest.select(split=split, labelled=True)
        if any(str(manifest.column("source")[row]) in sources for row in held.tolist()):
            return Labelled(channels, sources, split)
    return None


def _segmentation(
    out: Path, stages: Stages, size: Size, dataset: Path, pretrained: Path, labelled: Labelled,
    environment: dict[str, str],
) -> dict[str, Any]:  # fmt: skip
    """Fine-tune twice, segment held-out images, score both models."""
    common = [
        str(RECIPES / "quickstart-finetune.yaml"), "--processes", "1", f"--data.root={dataset}",
        f"--data.sources=[{', '.join(labelled.sources)}]", f"--head.channels={labelled.channels}",
        f"--encoder.path={pretrained}", f"--engine.updates={size.finetune_updates}",
    ]  # fmt: skip
    runs = {"pretrained": out / "finetune-pretrained", "scratch": out / "finetune-scratch"}
    with stages.stage("finetune", "promptable head: on the pretrained encoder, and the same from scratch"):
        words = {name: ["finetune", *common, "--run", str(run)] for name, run in runs.items()}
        words["scratch"].append("--from-scratch")
        stages.run(words, environment)
    with stages.stage("segment", "held-out images from clicks"):
        from launch.quickstart_segment import choose_cases, save_picture

        cases = choose_cases(dataset, out / "dataset-private", labelled)
        words = {}
        for case in cases:
            prompts = [f"--point-lps={','.join(f'{v:.3f}' for v in point)}" for point in case.clicks]
            modality = [] if case.modality is None else ["--modality", case.modality]
            place = ["--out", str(out / "segment" / f"{case.name}.nii.gz")]
            images = map(str, case.images)
            words[case.name] = ["segment", str(runs["pretrained"]), *images, *place, *prompts, *modality]
        stages.run(words, environment)
        for case in cases:
            save_picture(case, out / "segment" / f"{case.name}.nii.gz", out / "segment" / f"{case.name}.png")
    with stages.stage("evaluate", "simulated clicks on held-out subjects, both models"):
        scores = {name: out / f"clicks-{name}.json" for name in runs}
        options = ["--protocol", "clicks", "--split", labelled.test_split, "--limit", str(size.test_images)]
        stages.run(
            {
                name: ["evaluate", str(runs[name]), str(dataset), *options, "--json", str(scores[name])]
                for name in runs
            },
            environment,
        )
    found = {name: json.loads(path.read_text(encoding="utf-8")) for name, path in scores.items()}
    return {
        "dice": {name: {str(n): one["mean"]["dsc"][n - 1] for n in CLICKS} for name, one in found.items()},
        "dice_no_prompt": {name: one["mean"].get("dsc_no_prompt") for name, one in found.items()},
        "dice_wrong_prompt": {name: one["mean"].get("dsc_wrong_prompt") for name, one in found.items()},
        "dice_by_object": {name: by_object(one["objects"]) for name, one in found.items()},
        "segment": [{"case": case.name, "object": case.label, "dice": case.dice} for case in cases],
    }


def by_object(objects: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Mean Dice of each label name after each number of clicks."""
    names = sorted({one["object"] for one in objects})
    found: dict[str, dict[str, float]] = {}
    for name in names:
        mine = [one["dsc"] for one in objects if one["object"] == name and None not in one["dsc"]]
        if mine:
            found[name] = {str(n): sum(dsc[n - 1] for dsc in mine) / len(mine) for n in CLICKS}
    return found
