"""Voxels hidden from training: read as invalid, shown when asked for, checked like any other bytes."""

from __future__ import annotations

import io
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from data_pipeline import shard_reader
from data_pipeline.geometry import TokenConfig
from data_pipeline.inspect import inspect
from data_pipeline.manifest import FORMAT_VERSION, MEMBERS, Manifest, write_manifest
from data_pipeline.order import Order
from data_pipeline.schedule import MixtureConfig
from data_pipeline.storage import INVALID, DamagedSample, ShardReader, encode, write_index
from data_pipeline.stream import Crop, open_stream

SHAPE = (2, 40, 48, 44)
CHUNK = (1, 16, 16, 16)
SHARD = "train-mr-volume-000000.tar"


def voxels_of(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(100, 4000, SHAPE).astype(np.int16)


def hide_of(number: int) -> np.ndarray:
    """A box in the front of the sample, its edges on no chunk's edge."""
    hide = np.zeros((1, *SHAPE[1:]), np.uint8)
    hide[0, 3 : 20 + number, :21, 5:37] = 1
    return hide


def members_of(number: int) -> dict[str, np.ndarray]:
    """Sample 0 is float32 and hides; 1 is int16 and hides; 2 and 3 hide nothing."""
    image = voxels_of(number)
    members = {
        "image": image.astype(np.float32) if number == 0 else image,
        "seg": (image[:1] % 3).astype(np.uint8),
    }
    return {**members, "hide": hide_of(number)} if number < 2 else members


def write_dataset(root: Path, damage: str | None = None) -> None:
    """Four samples in one file, members end to end; `damage` flips a byte in that member of sample 1."""
    rows: list[dict[str, Any]] = []
    data = b"\0" * 512
    for number in range(4):
        key = f"{number:08x}"
        frames = {name: encode(array, CHUNK) for name, array in members_of(number).items()}
        members = {**frames, "json": b"{}", "idx": write_index(key, frames, {"json": b"{}"})}
        row: dict[str, Any] = {
            "key": key, "shard": SHARD, "split": "train", "source": "a", "subject": key, "modality": "MR",
            "modalities": ["MR", "MR"], "channels": ["T1w", "T2w"], "sequence": "", "geometry": "volume",
            "axes": [0, 1, 2], "shape": list(SHAPE), "spacing": [1.0, 1.0, 1.0], "spacing_source": "header",
            "dtype": str(members_of(number)["image"].dtype), "max_error": 0.0, "levels": [[1, 1, 1]],
            "norm": [[1.0, 0.0, 0.0, 4000.0, 2000.0, 1000.0, 0.0]] * 2, "content_hash": key * 4,
            "label_origin": "human", "annotated": ["organ"], "classes": ["organ"],
            "foreground": [{"class": 1, "layer": 0, "voxels": [100]}], "valid_fraction": 1.0,
        }  # fmt: skip
        for name in MEMBERS:
            # A sample without a member has -1 or, from a table that never had it, null.
            offset = len(data) if name in members else (None if number == 3 else -1)
            row[f"{name}_offset"] = offset
            row[f"{name}_size"] = len(members[name]) if name in members else offset
            part = members.get(name, b"")
            if number == 1 and name == damage:
                part = part[: len(part) // 2] + bytes([part[len(part) // 2] ^ 1]) + part[len(part) // 2 + 1 :]
            data += part + b"\0" * (-len(part) % 512)
        rows.append(row)
    (root / SHARD).write_bytes(data)
    digest = write_manifest(rows, root / "manifest.parquet")
    info = {
        "format_version": FORMAT_VERSION,
        "labels": {"1": "organ"},
        "shards": [{"name": SHARD, "size": len(data), "samples": 4, "xxh3_128": "0" * 32}],
        "manifest_sha256": digest,
    }
    (root / "dataset.json").write_text(json.dumps(info))


@pytest.fixture
def dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MEDFM_CACHE", str(tmp_path / "cache"))
    write_dataset(tmp_path)
    return tmp_path


def open_reader(root: Path) -> ShardReader:
    return ShardReader(root, Manifest.open(root))


def test_one_value_means_invalid() -> None:
    assert shard_reader.INVALID == INVALID


@pytest.mark.parametrize("channel", [None, 0, 1])
@pytest.mark.parametrize("row", [0, 1, 2, 3])
def test_any_box_of_an_image_has_no_hidden_voxel(dataset: Path, row: int, channel: int | None) -> None:
    reader = open_reader(dataset)
    image = members_of(row)["image"]
    hide = np.broadcast_to(members_of(row).get("hide", np.zeros(1, np.uint8)) != 0, image.shape)
    masked = np.where(hide, np.nan if image.dtype == np.float32 else INVALID, image).astype(image.dtype)
    generator = np.random.default_rng(row)
    for _ in range(20):
        origin = [int(generator.integers(0, n)) for n in SHAPE[1:]]
        extent = [int(generator.integers(1, n - o + 1)) for n, o in zip(SHAPE[1:], origin)]
        box = (
            slice(None) if channel is None else channel,
            *(slice(o, o + e) for o, e in zip(origin, extent)),
        )
        got = reader.read_box(row, "image", channel, origin, extent)
        assert got.dtype == image.dtype
        assert got.flags.c_contiguous
        np.testing.assert_array_equal(got, masked[box])
        np.testing.assert_array_equal(
            reader.read_box(row, "image", channel, origin, extent, hidden=True), image[box]
        )
    np.testing.assert_array_equal(
        reader.read_box(row, "seg", None, (0, 0, 0), SHAPE[1:]), members_of(row)["seg"]
    )
    assert reader.hides(row) == (row < 2)


def test_samples_that_hide_nothing_cost_no_extra_read(dataset: Path) -> None:
    reader = open_reader(dataset)
    reads: list[int] = []
    read = reader.files.read
    reader.files.read = lambda name, offset, size: reads.append(size) or read(name, offset, size)  # type: ignore
    for row, hidden, count in ((2, False, 2), (3, False, 2), (1, True, 2), (0, False, 3)):
        reads.clear()
        reader.read_box(row, "image", 0, (0, 0, 0), (16, 16, 16), hidden=hidden)
        assert (
            len(reads) == count
        )  # the index, the image's chunks, and the hidden voxels' where there are any


def test_damage_to_the_hidden_voxels_is_never_read_past(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEDFM_CACHE", str(tmp_path / "cache"))
    write_dataset(tmp_path, damage="hide")
    reader = open_reader(tmp_path)
    with pytest.raises(DamagedSample, match="hide"):
        reader.read_box(1, "image", None, (0, 0, 0), SHAPE[1:])
    reader.read_box(1, "image", None, (0, 0, 0), SHAPE[1:], hidden=True)


def test_hidden_voxels_of_another_shape_are_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEDFM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(f"{__name__}.hide_of", lambda number: np.zeros((1, 40, 48, 43), np.uint8))
    write_dataset(tmp_path)
    with pytest.raises(DamagedSample, match="shape"):
        open_reader(tmp_path).read_box(0, "image", 0, (0, 0, 0), (4, 4, 4))


def collate(update: int, group: int | None, crops: list[Crop]) -> list[Crop]:
    return crops


@pytest.mark.parametrize("workers", [0, 1])
def test_training_never_sees_a_hidden_voxel(dataset: Path, workers: int) -> None:
    manifest = Manifest.open(dataset)
    order = Order(
        manifest, manifest.select(), TokenConfig(slots=64, classes=(1, 2)), MixtureConfig(groups=2), 1
    )
    streamed = open_stream(
        dataset, manifest, order, rank=0, world=1, start_update=0, workers=workers, collate=collate
    )
    touched = 0
    with streamed as stream:
        for crop in itertools.chain.from_iterable(itertools.islice(stream, 30)):
            draw, number = crop.draw, int(crop.key, 16)
            box = tuple(slice(o, o + e) for o, e in zip(draw.origin, draw.extent))
            image = members_of(number)["image"][(draw.channel, *box)]
            hide = members_of(number).get("hide", np.zeros((1, *SHAPE[1:]), np.uint8))[(0, *box)] != 0
            invalid = np.isnan(crop.voxels) if crop.voxels.dtype == np.float32 else crop.voxels == INVALID
            np.testing.assert_array_equal(invalid, hide)
            np.testing.assert_array_equal(crop.voxels[~hide], image[~hide])
            touched += int(hide.any())
        assert stream.damaged == 0
    assert touched > 3


def test_the_model_takes_hidden_voxels_for_absent_ones(dataset: Path) -> None:
    from model.patches import INVALID as ABSENT

    crop = open_reader(dataset).read_box(1, "image", 0, (0, 0, 0), (16, 16, 16))
    there = torch.from_numpy(crop) != ABSENT
    assert int((~there).sum()) == int(hide_of(1)[0, :16, :16, :16].sum())


def test_inspect_shows_what_is_hidden_and_says_so(dataset: Path) -> None:
    shown = inspect(dataset, "00000001")
    assert f"{hide_of(1).mean():.1%} of the voxels, shown here" in shown.text()
    assert "hide" in dict(shown.table)["bytes"]
    assert "hidden" not in inspect(dataset, "00000003").text()
    axial = np.asarray(Image.open(io.BytesIO(shown.png)).convert("L"), np.float64)[20:300, 60:260]
    assert abs(axial[:100].mean() - axial[-100:].mean()) < 15  # the hidden front is as bright as the back
