"""Verify: every damage is found and named, and an intact dataset is called intact."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from data_pipeline.build import build
from data_pipeline.errors import UserError
from data_pipeline.manifest import Manifest
from data_pipeline.sources import SourceConfig
from data_pipeline.storage import DamagedSample, ShardReader, read_index
from data_pipeline.verify import verify


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("verify")
    for n in range(4):
        array = np.random.default_rng(n).normal(0, 100, (40, 40, 40)).astype(np.int16)
        image = nib.Nifti1Image(array, np.eye(4))
        image.set_sform(np.eye(4), 1)
        (root / "in").mkdir(exist_ok=True)
        nib.save(image, root / "in" / f"{n}.nii.gz")
    described = SourceConfig(path=root / "in", name="mr", modality="MR", layout="folder")
    return build([described], root / "out", split={"train": 1.0}, progress=False).out


@pytest.fixture
def dataset(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "copy"))


def flip(path: Path, where: int) -> None:
    data = bytearray(path.read_bytes())
    data[where] ^= 0x10
    path.write_bytes(data)


def test_intact(dataset: Path) -> None:
    seen: list[tuple[int, int]] = []
    assert verify(dataset, lambda done, total: seen.append((done, total))) == []
    assert seen == [(1, 1)]


def test_any_flipped_byte_is_found_and_placed(dataset: Path) -> None:
    shard = next(dataset.glob("*.tar"))
    clean = shard.read_bytes()
    manifest = Manifest.open(dataset)
    generator = np.random.default_rng(0)
    members = {
        (manifest.column("key")[i], m): (
            int(manifest.column(f"{m}_offset")[i]),
            int(manifest.column(f"{m}_size")[i]),
        )
        for i in range(4)
        for m in ("image", "idx", "json")
    }
    named = 0
    headers = [offset - 512 for offset, _ in members.values()]
    for where in [*generator.integers(0, len(clean), 60).tolist(), *headers]:
        flip(shard, where)
        damages = verify(dataset)
        assert len(damages) == 1
        hit = [place for place, (offset, size) in members.items() if offset - 512 <= where < offset + size]
        if hit:
            named += 1
            assert (damages[0].key, damages[0].member) == hit[0]
        else:
            assert "outside every member" in damages[0].reason
        shard.write_bytes(clean)
    assert named > 40


def test_a_damaged_chunk_is_the_one_a_read_refuses(dataset: Path) -> None:
    shard = next(dataset.glob("*.tar"))
    manifest = Manifest.open(dataset)
    offset, size = int(manifest.column("idx_offset")[2]), int(manifest.column("idx_size")[2])
    index = read_index(shard.read_bytes()[offset : offset + size], manifest.column("key")[2])["image"]
    number = 5
    flip(shard, int(manifest.column("image_offset")[2]) + int(index.chunks[number]["offset"]) + 50)
    [damage] = verify(dataset)
    assert (damage.key, damage.member, damage.chunk) == (manifest.column("key")[2], "image", number)
    assert f"chunk {number}" in str(damage)
    with pytest.raises(DamagedSample) as caught:
        ShardReader(dataset, manifest).read_box(2, "image", 0, (0, 0, 0), (40, 40, 40))
    assert (caught.value.key, caught.value.chunk) == (damage.key, number)


def test_truncated_missing_and_foreign(dataset: Path) -> None:
    shard = next(dataset.glob("*.tar"))
    clean = shard.read_bytes()
    shard.write_bytes(clean[: len(clean) // 2])
    reasons = [d.reason for d in verify(dataset)]
    assert any("bytes, " in r for r in reasons)
    assert len(reasons) > 1  # and which samples are lost
    shard.unlink()
    assert [d.reason for d in verify(dataset)] == ["the shard is missing"]
    shard.write_bytes(clean)
    flip(dataset / "manifest.parquet", 100)
    assert [d.member for d in verify(dataset)] == ["manifest.parquet"]
    flip(shard, 4000)
    assert [d.member for d in verify(dataset)] == ["manifest.parquet", ""]
    (dataset / "manifest.parquet").unlink()
    assert verify(dataset)[0].reason == "is missing"


def test_a_flipped_byte_of_a_description(dataset: Path) -> None:
    """Found wherever it is, and never a traceback."""
    for name in ("dataset.json", "report.html", "manifest.parquet"):
        clean = (dataset / name).read_bytes()
        for where in range(0, len(clean), max(1, len(clean) // 120)):
            flip(dataset / name, where)
            try:
                assert name in {damage.member for damage in verify(dataset)}
            except UserError as error:
                assert "dataset.json" in str(error) or "dataset format" in str(error)  # noqa: PT017
            (dataset / name).write_bytes(clean)


def test_inspect_of_a_damaged_sample_is_one_line(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from launch.cli import main

    manifest = Manifest.open(dataset)
    flip(dataset / manifest.column("shard")[0], int(manifest.column("idx_offset")[0]) + 30)
    with pytest.raises(SystemExit, match="3"):
        main(["shards", "inspect", str(dataset), "--key", str(manifest.column("key")[0])])
    said = capsys.readouterr().err
    assert said.startswith(f"medfm: error: sample {manifest.column('key')[0]} in ")
    assert said.count("\n") == 1


def test_an_unknown_option_is_not_ignored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from launch.cli import main

    with pytest.raises(SystemExit, match="2"):
        main(["shards", "build", str(tmp_path), "--out", str(tmp_path / "o"), "--on-leak", "strictest"])
    assert "'--on-leak' is not known" in capsys.readouterr().err


def test_a_shard_of_another_dataset(dataset: Path) -> None:
    """Whoever reads every tar of the folder would take it."""
    shutil.copy(next(dataset.glob("*.tar")), dataset / "train-mr-volume-000009.tar")
    assert [str(damage) for damage in verify(dataset)] == [
        "train-mr-volume-000009.tar: is no shard of this dataset"
    ]


def test_no_dataset(tmp_path: Path, dataset: Path) -> None:
    with pytest.raises(UserError, match=r"dataset\.json is missing"):
        verify(tmp_path)
    info = json.loads((dataset / "dataset.json").read_text())
    (dataset / "dataset.json").write_text(json.dumps(info | {"format_version": 7}))
    with pytest.raises(UserError, match="format 7"):
        verify(dataset)
