"""Inspect: a picture upright and in proportion, with its label; a table of what is stored."""

from __future__ import annotations

import io
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from data_pipeline.build import build
from data_pipeline.errors import UserError
from data_pipeline.inspect import inspect
from data_pipeline.manifest import Manifest
from data_pipeline.pictures import grey, overlay, resized
from data_pipeline.sources import SourceConfig
from data_pipeline.storage import INVALID


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("inspect")
    affine = np.diag([1.0, 1.0, 2.0, 1.0])
    for name, n in (("a", 0), ("b", 1)):
        array = np.random.default_rng(n).normal(0, 10, (30, 40, 20)).astype(np.int16) + 20
        array[:, :, -5:] = 500  # bright at the head
        mask = np.zeros(array.shape, np.uint8)
        mask[10:14, 20:25, 8:11] = 1
        for kind, data in (("image", array), ("label", mask)):
            file = nib.Nifti1Image(data, affine)
            file.set_sform(affine, 1)
            (root / "in").mkdir(exist_ok=True)
            if kind == "image" or name == "a":
                nib.save(file, root / "in" / f"{name}_{kind}.nii.gz")
    described = SourceConfig(
        path=root / "in",
        name="mr",
        modality="MR",
        include=("*_image.nii.gz",),
        label_glob="*_label.nii.gz",
        labels={1: "node"},
    )
    return build([described], root / "out", progress=False).out


def test_picture_and_table(dataset: Path) -> None:
    shown = inspect(dataset)  # the labelled one comes first
    text = shown.text()
    assert "20 × 40 × 30" in text
    assert "2 × 1 × 1, header" in text
    assert "classes present" in text
    assert "node" in text
    picture = np.asarray(Image.open(io.BytesIO(shown.png)))
    assert picture.shape[2] == 3
    coloured = (picture.max(-1).astype(int) - picture.min(-1)) > 60
    assert coloured.any()  # the label
    coronal = picture[:, 324:644].mean(-1)
    rows = np.flatnonzero(coronal.max(1) > 0)
    top, bottom = coronal[rows[:20]].mean(), coronal[rows[-20:]].mean()
    assert top > bottom + 50  # head up
    assert inspect(dataset).png == shown.png


def test_by_key(dataset: Path) -> None:
    manifest = Manifest.open(dataset)
    unlabelled = manifest.column("key")[manifest.select(labelled=False)[0]]
    shown = inspect(dataset, unlabelled[:10])
    assert shown.key == unlabelled
    assert "classes present" not in shown.text()
    with pytest.raises(UserError, match="no sample with key"):
        inspect(dataset, "zz")
    with pytest.raises(UserError, match="2 samples whose key starts with"):
        inspect(dataset, "")


def test_grey_and_overlay() -> None:
    stored = np.array([[INVALID, -100, 0, 100, 300]], np.int16)
    shade = grey(stored, (1.0, 0.0, -100.0, 100.0, 0.0, 1.0, 0.0))
    assert shade.tolist() == [[0, 0, 127, 255, 255]]
    label = np.array([[[0, 0, 1, 255, 0]]], np.uint8)
    picture = overlay(shade, label)
    assert (picture[0, 0] == 0).all()
    assert len(set(picture[0, 2].tolist())) > 1
    assert (picture[0, 4] == 255).all()


def test_proportions() -> None:
    assert resized(np.zeros((10, 40), np.uint8), (4.0, 1.0), 100).size == (100, 100)
    assert resized(np.zeros((10, 40), np.uint8), (1.0, 1.0), 100).size == (100, 25)
