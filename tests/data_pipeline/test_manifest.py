"""The manifest: rows come back as written, columns are mapped, and a wrong dataset gives one clear line."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline.errors import UserError
from data_pipeline.manifest import FORMAT_VERSION, MEMBERS, SCHEMA, Manifest, write_manifest


def a_row(i: int) -> dict[str, Any]:
    row: dict[str, Any] = {
        "key": f"{i:016x}",
        "shard": f"train-ct-volume-{i // 4:06d}.tar",
        "split": "train" if i % 3 else "val",
        "source": "a" if i % 2 else "b",
        "subject": f"s{i}",
        "modality": "CT" if i % 2 else "MR",
        "modalities": ["CT" if i % 2 else "MR"],
        "channels": ["x"],
        "geometry": "volume",
        "axes": [0, 1, 2],
        "shape": [1, 10 + i, 20, 30],
        "spacing": [1.5, 1.0, 0.5 + i],
        "spacing_source": "header",
        "dtype": "int16",
        "max_error": 0.0,
        "levels": [[1, 1, 1], [2, 2, 2]],
        "norm": [[1.0, 0.0, -1024.0, 3071.0, -200.0, 500.0, 0.0]],
        "content_hash": f"{i:032x}",
        "label_origin": "human",
        "annotated": ["liver"],
        "classes": ["liver"] if i % 2 else [],
        "foreground": [{"class": 1, "layer": 0, "voxels": [1, 2, 3 + i]}],
        "valid_fraction": 0.5,
    }
    for n, member in enumerate(MEMBERS):
        row[f"{member}_offset"], row[f"{member}_size"] = i * 10240 + n * 1024, 100 + n
    if i % 5 == 0:
        row["seg_offset"] = row["seg_size"] = -1
    return row


@pytest.fixture
def dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MEDFM_CACHE", str(tmp_path / "cache"))
    root = tmp_path / "shards"
    root.mkdir()
    rows = [a_row(i) for i in range(10)]
    digest = write_manifest(reversed(rows), root / "manifest.parquet")
    shards = []
    for name in sorted({row["shard"] for row in rows}):
        (root / name).write_bytes(b"\0" * 10240)
        shards.append({"name": name, "size": 10240})
    info = {
        "format_version": FORMAT_VERSION,
        "labels": {"1": "liver"},
        "shards": shards,
        "manifest_sha256": digest,
    }
    (root / "dataset.json").write_text(json.dumps(info))
    return root


def test_rows_come_back_sorted_and_whole(dataset: Path) -> None:
    manifest = Manifest.open(dataset)
    assert len(manifest) == 10
    for i in range(10):
        got, want = manifest.row(i), a_row(i)
        assert set(got) == set(SCHEMA.names)
        for name, value in want.items():
            assert got[name] == (pytest.approx(value) if name in ("spacing", "valid_fraction") else value), (
                name
            )
    assert manifest.column("shape").shape == (10, 4)
    assert manifest.column("shape").dtype == np.int32
    assert manifest.column("spacing").shape == manifest.column("axes").shape == (10, 3)
    assert manifest.column("image_offset").dtype == np.int64
    assert list(manifest.column("split")) == [a_row(i)["split"] for i in range(10)]
    assert manifest.column("foreground")[3] == a_row(3)["foreground"]
    with pytest.raises(ValueError, match="read-only"):
        manifest.column("shape")[0] = 0  # mapped, not copied


def test_select_combines_conditions(dataset: Path) -> None:
    manifest = Manifest.open(dataset)
    rows = [a_row(i) for i in range(10)]
    for split in (None, "train", "val", "test"):
        for source in (None, "a"):
            for labelled in (None, True, False):
                got = manifest.select(split=split, source=source, modality=None, labelled=labelled)
                want = [
                    i
                    for i, row in enumerate(rows)
                    if (split is None or row["split"] == split)
                    and (source is None or row["source"] == source)
                    and (labelled is None or (row["seg_size"] > 0) == labelled)
                ]
                assert list(got) == want
    assert list(manifest.select(modality="CT")) == [1, 3, 5, 7, 9]


def test_it_travels_between_processes(dataset: Path) -> None:
    manifest = Manifest.open(dataset)
    manifest.column("shape")
    data = pickle.dumps(manifest)
    assert len(data) < 2000  # the path, not the rows
    assert pickle.loads(data).row(4) == manifest.row(4)


def test_one_arrow_file_a_dataset(dataset: Path, tmp_path: Path) -> None:
    for _ in range(3):
        Manifest.open(dataset)
    assert len(list((tmp_path / "cache").iterdir())) == 1


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda root: (root / "train-ct-volume-000001.tar").unlink(), "shard missing.*000001.tar"),
        (
            lambda root: (root / "train-ct-volume-000001.tar").write_bytes(b""),
            "wrong size.*0 bytes, 10240 written",
        ),
        (lambda root: (root / "manifest.parquet").write_bytes(b"no"), "not the one that dataset.json names"),
        (lambda root: (root / "manifest.parquet").unlink(), "not a shard dataset"),
        (lambda root: (root / "dataset.json").unlink(), "not a shard dataset"),
        (lambda root: (root / "dataset.json").write_text("{"), "not valid JSON"),
        (lambda root: (root / "dataset.json").write_text('{"format_version": 9}'), "format 9"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(dataset: Path, spoil: Any, message: str) -> None:
    spoil(dataset)
    with pytest.raises(UserError, match=message) as caught:
        Manifest.open(dataset)
    assert "\n" not in str(caught.value)


def test_a_remote_manifest_opens(dataset: Path) -> None:
    import fsspec

    files = fsspec.filesystem("memory")
    for path in dataset.iterdir():
        files.pipe(f"/medfm-manifest/{path.name}", path.read_bytes())
    assert len(Manifest.open("memory://medfm-manifest")) == 10
    with pytest.raises(UserError, match="not a shard dataset"):
        Manifest.open("memory://medfm-nothing")
