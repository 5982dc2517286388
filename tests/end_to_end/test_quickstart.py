"""The main job through the commands a person types: the quickstart, and a two-channel nnU-Net folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from launch.phantoms import write_nnunet
from launch.quickstart import RECIPES


def medfm(*words: str, timeout: float = 900) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "launch.cli", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_quickstart_short(tmp_path: Path) -> None:
    out = tmp_path / "q"
    text = medfm("quickstart", "--short", "--out", str(out), timeout=1400)
    assert "Dice" in text
    summary = json.loads((out / "summary.json").read_text())
    stages = ["phantoms", "build", "pretrain", "finetune", "segment", "evaluate", "export"]
    assert list(summary["stages"]) == stages
    assert abs(sum(summary["stages"].values()) - summary["seconds"]) < 0.2 * summary["seconds"]
    assert set(summary["loss"]) == {"CT", "MR", "XR"}
    for loss in summary["loss"].values():
        assert 0 < loss["last"] < loss["first"] < 10
    for modality, held in summary["held_out"].items():
        assert set(held) == {"loss", "mean", "interpolation"}, modality
        assert 0 < held["interpolation"] < held["mean"]
    assert set(summary["dice"]) == {"pretrained", "scratch"}
    for dice in summary["dice"].values():
        assert list(dice) == ["1", "3", "5"]
        assert all(0 <= value <= 1 for value in dice.values())
    assert summary["export_max_difference"] == 0.0
    page = (out / "report.html").read_text()
    assert page.count("data:image/png;base64,") >= 4  # reconstructions of three modalities, segmentations
    assert "<polyline" in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    for one in summary["segment"]:
        assert (out / "segment" / f"{one['case']}.nii.gz").is_file()


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_two_channel_nnunet_folder(tmp_path: Path) -> None:
    root = write_nnunet(tmp_path, 4)
    data = tmp_path / "data"
    medfm("shards", "build", str(root), "--out", str(data), "--split", "0.5,0.25,0.25")
    pretrain, finetune = (str(RECIPES / f"quickstart-{name}.yaml") for name in ("pretrain", "finetune"))
    fields = [f"--data.root={data}", "--engine.updates=3"]
    run = ["--processes", "1", "--run", str(tmp_path / "p")]
    medfm("pretrain", pretrain, *run, *fields, "--encoder.size=nano", "--evaluation.batches=1")
    run = ["--processes", "1", "--run", str(tmp_path / "f")]
    medfm("finetune", finetune, *run, *fields, "--head.channels=2", f"--encoder.path={tmp_path / 'p'}")
    images = [root / "imagesTr" / f"phantom_000_{channel:04d}.nii.gz" for channel in (0, 1)]
    label = sitk.ReadImage(str(root / "labelsTr" / "phantom_000.nii.gz"))
    k, j, i = np.argwhere(sitk.GetArrayFromImage(label) == 1).mean(0).round().astype(int).tolist()
    mask_file = tmp_path / "mask.nii.gz"
    prompt = ["--modality", "MR", "--out", str(mask_file), "--point", f"{i},{j},{k}"]
    medfm("segment", str(tmp_path / "f"), *map(str, images), *prompt)
    mask = sitk.ReadImage(str(mask_file))
    assert mask.GetSize() == label.GetSize()
    assert np.allclose(mask.GetOrigin(), label.GetOrigin(), atol=1e-4)
    assert np.allclose(mask.GetDirection(), label.GetDirection(), atol=1e-6)
    assert np.allclose(mask.GetSpacing(), label.GetSpacing(), atol=1e-6)
    assert set(np.unique(sitk.GetArrayFromImage(mask))) <= {0, 1}
    medfm("export", str(tmp_path / "f"), "--out", str(tmp_path / "e"))
    assert json.loads((tmp_path / "e" / "export.json").read_text())["max_difference"] == 0.0
