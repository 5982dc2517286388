"""Real scans, built into shards and streamed back: CT, MR and X-ray, three geometries."""

from __future__ import annotations

import itertools
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch

from data_pipeline.build import build
from data_pipeline.geometry import TokenConfig
from data_pipeline.manifest import Manifest
from data_pipeline.order import Order
from data_pipeline.schedule import MixtureConfig
from data_pipeline.sources import SourceConfig
from data_pipeline.stream import Crop, open_stream

pytestmark = pytest.mark.real_data


@pytest.fixture(scope="module")
def shards(real_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("real") / "shards"
    sources = [
        SourceConfig(
            path=real_data / "mr_hippocampus" / "imagesTr",
            name="hippocampus",
            modality="MR",
            layout="folder",
            include=("hippocampus_00*.nii.gz",),
        ),
        SourceConfig(
            path=real_data / "ct_mr_body",
            name="body",
            modality={"example_ct*": "CT"},
            layout="folder",
            include=("example_ct_sm.nii.gz",),
        ),
        SourceConfig(
            path=real_data / "xray_lungs",
            name="lungs",
            modality="XR",
            layout="folder",
            include=("train/images/IM-000*.png",),
            field_mm=250,
            burned_in="accept",
        ),
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEDFM_CACHE", str(out.parent / "cache"))
        build(sources, out, split={"train": 1.0}, shard_samples=4, progress=False)
        yield out  # type: ignore[misc]


def collate(update: int, group: int | None, crops: list[Crop]) -> list[tuple[int, str, torch.Tensor]]:
    return [(crop.draw.index, crop.modality, torch.from_numpy(crop.voxels)) for crop in crops]


def test_real_crops_stream_alike_at_any_worker_count(shards: Path) -> None:
    manifest = Manifest.open(shards)
    order = Order(
        manifest,
        manifest.select(split="train"),
        TokenConfig(slots=512, classes=(1, 2, 4)),
        MixtureConfig(groups=2),
        0,
    )
    taken = []
    for workers in (0, 2):
        with open_stream(
            shards, manifest, order, rank=0, world=1, start_update=0, workers=workers, collate=collate
        ) as stream:
            taken.append(list(itertools.islice(stream, 6)))
            assert stream.damaged == 0
    flat = [list(itertools.chain.from_iterable(batches)) for batches in taken]
    assert [crop[0] for crop in flat[0]] == list(range(3 * order.batch_size))
    assert {crop[1] for crop in flat[0]} == {"CT", "MR", "XR"}
    for first, second in zip(*flat, strict=True):
        assert first[:2] == second[:2]
        assert torch.equal(first[2], second[2])


def test_a_native_crop_holds_the_voxels_of_the_file(shards: Path, real_data: Path) -> None:
    manifest = Manifest.open(shards)
    rows = manifest.select(modality="MR")
    order = Order(manifest, rows, TokenConfig(), MixtureConfig(groups=1), 0, window=(24, 24, 24))
    files = sorted((real_data / "mr_hippocampus" / "imagesTr").glob("hippocampus_00*.nii.gz"))
    # RAS files: LPS order is the file's own x and y reversed, and z, y, x its transpose.
    volumes = [np.asarray(nibabel.load(path).dataobj)[::-1, ::-1].T for path in files]
    with open_stream(
        shards, manifest, order, rank=0, world=1, start_update=0, workers=0, collate=lambda u, g, crops: crops
    ) as stream:
        for crop in itertools.chain.from_iterable(itertools.islice(stream, 20)):
            slope, intercept = crop.norm[:2]
            real = crop.voxels * slope + intercept
            box = tuple(slice(o, o + e) for o, e in zip(crop.draw.origin, crop.draw.extent))
            shape = tuple(manifest.column("shape")[crop.draw.row, 1:].tolist())
            assert any(
                volume.shape == shape
                and np.allclose(volume[box], real, rtol=1e-4, atol=1e-4 * np.ptp(volume))
                for volume in volumes
            )
