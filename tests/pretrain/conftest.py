"""Crops made by hand, so that most tests need no dataset, and a small labelled dataset for the others."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # for what lies beside this file

from small_runs import PROBED, ended, start

from data_pipeline.geometry import PATCH
from data_pipeline.order import RowSpec
from model.config import EncoderConfig
from pretrain.batch import Batch, Collate
from pretrain.mae import MaskedAutoencoder
from pretrain.objective import AugmentConfig, ObjectiveConfig

INVALID = -32768
NORM = {
    "CT": (1.0, -1024.0, -1024.0, 3071.0, -200.0, 500.0, 0.0),
    "MR": (0.5, 0.0, 0.0, 900.0, 300.0, 120.0, 0.0),
    "PT": (0.01, 0.0, 0.0, 100.0, 1.0, 1.0, 1.0),
    "XR": (1.0, 0.0, 10.0, 1800.0, 800.0, 300.0, 0.0),
}


def small_objective(**changes: Any) -> ObjectiveConfig:
    settings: dict[str, Any] = {
        "decoder_width": 48, "decoder_depth": 1, "decoder_heads": 2, "augment": AugmentConfig(),
    }  # fmt: skip
    return ObjectiveConfig(**(settings | changes))


def hand_crop(
    geometry: str,
    shape: tuple[int, int, int],
    *,
    index: int = 0,
    spec: int = 0,
    slot: int = 0,
    modality: str = "CT",
    axes: tuple[int, int, int] = (0, 1, 2),
    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0),
    residual: tuple[float, float, float] = (1.0, 1.0, 1.0),
    invalid: float = 0.0,
    seed: int = 0,
) -> Any:
    """A crop of random voxels (`shape` in stem order), with a share of invalid ones; `residual` of them make
    an output voxel.
    """
    generator = np.random.default_rng(seed)
    voxels = generator.integers(0, 2000, shape).astype(np.int16)
    voxels[generator.random(shape) < invalid] = INVALID
    grid = tuple(math.ceil(n / (p * r) - 1e-6) for n, p, r in zip(shape, PATCH[geometry], residual))
    draw = SimpleNamespace(
        index=index, spec=spec, slot=slot, grid=grid, residual=residual, axes=axes,
        start_mm=(3.0, 40.0, 5.0), spacing=spacing,
    )  # fmt: skip
    return SimpleNamespace(
        draw=draw, key=f"k{index}", modality=modality, voxels=voxels, norm=np.array(NORM[modality]),
        seg=None, substituted=False,
    )  # fmt: skip


def row_spec(geometry: str, k: int, rows: int, slots: int) -> RowSpec:
    capacity = slots // k
    return RowSpec(geometry, k, rows, capacity, capacity * int(np.prod(PATCH[geometry])))


def build(
    specs: list[RowSpec],
    crops: list[Any],
    *,
    crops_per_update: int | None = None,
    augment: bool = True,
    encoder: dict[str, Any] | None = None,
    seed: int = 0,
    **objective: Any,
) -> tuple[MaskedAutoencoder, Batch]:
    """A small network, always the same for the same settings, and a batch of hand-made crops."""
    settings = small_objective(**objective)
    torch.manual_seed(7)
    config = EncoderConfig(**({"size": None, "width": 48, "depth": 2, "heads": 2} | (encoder or {})))
    model = MaskedAutoencoder(config, settings, crops_per_update or len(crops))
    collate = Collate(specs, settings, model.encoder.depth, seed, augment=augment)
    return model, collate(0, 0, crops)


@pytest.fixture
def hand() -> Any:
    """`hand.crop`, `hand.spec`, `hand.build`: the functions above."""
    return SimpleNamespace(crop=hand_crop, spec=row_spec, build=build)


@pytest.fixture(scope="session")
def dataset(built_once: Any) -> Path:
    """Labelled CT volumes, half of each one air, and thick MR slabs."""
    folder: Path = built_once("labelled", _labelled)
    return folder / "shards"


def _labelled(folder: Path) -> None:
    import nibabel as nib

    from data_pipeline.build import build
    from data_pipeline.sources import SourceConfig

    root = folder / "scans"
    generator = np.random.default_rng(5)
    for i in range(10):
        for name, shape, spacing in (("ct", (26 + i, 30, 34), (1.2, 1.2, 1.5)),
                                     ("mr", (6, 50, 56 + i), (0.8, 0.8, 5.0))):  # fmt: skip
            axes = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
            label = (sum(a**2 for a in axes) < 0.3).astype(np.uint8)
            image = np.where(label, 160, -30) + generator.integers(-30, 30, shape)
            image[..., : shape[2] // 2] = -1000
            case = root / name / f"{'train' if i < 6 else 'val'}_p{i}"
            case.mkdir(parents=True)
            for kind, values in (("image", image.astype(np.int16)), ("label", label)):
                picture = nib.Nifti1Image(values.transpose(2, 1, 0), np.diag([*spacing, 1]))
                nib.save(picture, case / f"{kind}.nii.gz")
    common: dict[str, Any] = {
        "layout": "folder", "include": ("*/image.nii.gz",), "label_glob": "*/label.nii.gz",
        "label_origin": "human", "subject_pattern": "_(p[0-9])/", "labels": {1: "liver"},
        "splits": {"train_*/*": "train", "val_*/*": "val"},
    }  # fmt: skip
    sources = [
        SourceConfig(path=root / "ct", name="ct", modality="CT", units="HU", **common),
        SourceConfig(path=root / "mr", name="mr", modality="MR", **common),
    ]
    build(sources, folder / "shards", progress=False)


@pytest.fixture(scope="session")
def recipe_file(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    path.write_text(PROBED.replace("DATA", str(dataset)))
    return path


@pytest.fixture(scope="session")
def trained(recipe_file: Path, built_once: Any) -> Path:
    """A finished run of one process that evaluated itself at updates 4 and 8; do not write into it."""

    def train(folder: Path) -> None:
        assert "held out: " in ended(start(recipe_file, folder / "run"))

    folder: Path = built_once("trained", train)
    return folder / "run"
