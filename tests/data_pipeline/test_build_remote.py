"""A dataset in an object store, built from scans in one: a real S3 protocol server on this machine."""

from __future__ import annotations

import json
import shutil
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scan_files import phantom, write_nifti

from data_pipeline.build import build
from data_pipeline.errors import UserError
from data_pipeline.inspect import inspect
from data_pipeline.manifest import Manifest
from data_pipeline.place import Place
from data_pipeline.sources import SourceConfig
from data_pipeline.storage import ShardReader
from data_pipeline.verify import verify

pytest.importorskip("s3fs", reason="s3fs is not installed: pip install medfm[s3]")
server = pytest.importorskip("moto.server", reason="moto is not installed: pip install -e .[dev]")


@pytest.fixture(scope="module")
def s3() -> Iterator[Any]:
    """A bucket `scans` on a server that speaks S3; yields the file system."""
    import fsspec

    running = server.ThreadedMotoServer(port=0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "testing",
            "AWS_DEFAULT_REGION": "us-east-1",
        }.items():
            patch.setenv(name, value)
        # Buckets are kept for the process, in which other tests may have had servers.
        urllib.request.urlopen(f"http://{host}:{port}/moto-api/reset", data=b"").close()
        fs = fsspec.filesystem("s3", skip_instance_cache=True)
        fs.mkdir("scans")
        yield fs
    running.stop()


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory, s3: Any) -> Path:
    """Labelled CT on disk, and the same in the bucket."""
    root = tmp_path_factory.mktemp("in") / "ct"
    for n in range(6):
        write_nifti(root / f"p{n}_img.nii.gz", phantom(n))
        write_nifti(root / f"p{n}_lab.nii.gz", (phantom(n) > 0).astype(np.uint8))
    s3.put(str(root), "scans/ct", recursive=True)
    return root


def source(path: str | Path) -> SourceConfig:
    return SourceConfig(
        path=path, name="ct", modality="CT", include=("*_img.nii.gz",), label_glob="*_lab.nii.gz",
        labels={1: "bone"}, split={"train": 1.0},
    )  # fmt: skip


@pytest.mark.parametrize("workers", [0, 1])
def test_from_a_bucket_into_a_bucket(s3: Any, local: Path, tmp_path: Path, workers: int) -> None:
    out = f"s3://scans/out-{workers}"
    report = build(
        [source("s3://scans/ct")], out, tmp_path / "p", workers=workers, shard_samples=2, progress=False
    )
    assert report.samples == 6
    assert verify(out) == []
    manifest = Manifest.open(out)
    reader = ShardReader(out, manifest)
    values = manifest.row(0)
    assert reader.read_box(0, "seg", None, (0, 0, 0), values["shape"][1:]).max() == 1
    assert inspect(out).png.startswith(b"\x89PNG")
    entry = json.loads((tmp_path / "p" / "index.jsonl").read_text().splitlines()[0])
    assert entry["paths"] == ["s3://scans/ct/p0_img.nii.gz"]
    text = b"".join(s3.cat_file(p) for p in s3.ls(f"scans/out-{workers}", detail=False) if p.endswith("json"))
    assert b"p0_img" not in text
    assert b"scans/ct" not in text
    if workers == 0:
        again = build([source("s3://scans/ct")], out, tmp_path / "p", shard_samples=2, progress=False)
        assert again.read == 0


def test_the_bytes_of_a_local_build(s3: Any, local: Path, tmp_path: Path) -> None:
    """Local scans into the bucket: every file as it would be on disk."""
    build([source(local)], tmp_path / "o", shard_samples=2, progress=False)
    (tmp_path / "p").mkdir()
    shutil.copy(tmp_path / "o-private" / "hash.key", tmp_path / "p" / "hash.key")
    build([source(local)], "s3://scans/copy", tmp_path / "p", shard_samples=2, progress=False)
    place = Place("s3://scans/copy")
    assert place.names() == sorted(p.name for p in (tmp_path / "o").iterdir())
    for name in place.names():
        assert place.read(name) == (tmp_path / "o" / name).read_bytes(), name


def test_a_flipped_byte_in_the_bucket_is_found(s3: Any, local: Path, tmp_path: Path) -> None:
    build([source(local)], "s3://scans/flip", tmp_path / "p", shard_samples=2, progress=False)
    name = next(n for n in Place("s3://scans/flip").names() if n.endswith(".tar"))
    manifest = Manifest.open("s3://scans/flip")
    row = manifest.row(0)
    data = bytearray(s3.cat_file(f"scans/flip/{name}"))
    data[row["image_offset"] + row["image_size"] // 2] ^= 1
    s3.pipe_file(f"scans/flip/{name}", bytes(data))
    [damage] = verify("s3://scans/flip")
    assert (damage.shard, damage.key, damage.member) == (name, row["key"], "image")
    s3.rm_file(f"scans/flip/{name}")
    assert "missing" in str(verify("s3://scans/flip")[0])


def test_an_address_nobody_knows(tmp_path: Path, local: Path) -> None:
    with pytest.raises(UserError, match="nowhere"):
        build([source(local)], "nowhere://x/y", tmp_path / "p", progress=False)


def test_a_store_that_does_not_answer(tmp_path: Path, local: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec

    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    fsspec.filesystem("s3").clear_instance_cache()
    with pytest.raises(UserError, match=r"s3://scans/x: cannot be reached|s3://scans/x") as caught:
        build([source(local)], "s3://scans/x", tmp_path / "p", progress=False)
    fsspec.filesystem("s3").clear_instance_cache()
    assert "\n" not in str(caught.value)
    assert "testing" not in str(caught.value)
