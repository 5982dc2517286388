"""The stream from stores that fail: the batches of the local folder, bit for bit, or one clear line."""

from __future__ import annotations

import itertools
import logging
import multiprocessing
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from faulty_server import FaultyServer, serving
from stream_samples import stage, write_dataset

from data_pipeline import remote_files
from data_pipeline.errors import UserError
from data_pipeline.geometry import TokenConfig
from data_pipeline.manifest import Manifest
from data_pipeline.order import Order
from data_pipeline.prefetch import Prefetch
from data_pipeline.schedule import MixtureConfig
from data_pipeline.shard_cache import CacheConfig, CachedFiles, open_files
from data_pipeline.stream import Crop, Stream, Work, open_stream
from data_pipeline.traffic import Meter

GROUPS = 4


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("shards")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEDFM_CACHE", str(tmp_path_factory.mktemp("manifests")))
        samples = [stage(folder, n, (20, 50)) for n in range(32)]
        data = tmp_path_factory.mktemp("dataset")
        write_dataset(data, samples, 4)
        yield data


@pytest.fixture
def server(root: Path) -> Iterator[FaultyServer]:
    with serving(root) as running:
        yield running


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_files, "FIRST_WAIT_S", 0.01)


def collate(update: int, group: int | None, crops: list[Crop]) -> dict[str, Any]:
    return {
        "place": (update, group),
        "index": [crop.draw.index for crop in crops],
        "key": [crop.key for crop in crops],
        "voxels": [torch.from_numpy(crop.voxels) for crop in crops],
        "substituted": [crop.substituted for crop in crops],
    }


def a_stream(
    root: str | Path, *, rank: int = 0, world: int = 1, workers: int = 0, **more: Any
) -> Stream[Any]:
    """A stream of the whole dataset."""
    manifest = Manifest.open(root)
    tokens = TokenConfig(slots=64, classes=(1, 2))
    order = Order(manifest, manifest.select(split="train"), tokens, MixtureConfig(groups=GROUPS), 1)
    return open_stream(
        root, manifest, order, rank=rank, world=world, start_update=0, workers=workers, collate=collate,
        **more,
    )  # fmt: skip


def config(folder: Path | str, **more: Any) -> CacheConfig:
    return CacheConfig(folder=str(folder), **{"gb": 1.0, "patience_s": 60.0, "timeout_s": 30.0, **more})


def take(stream: Stream[Any], n: int) -> list[dict[str, Any]]:
    with stream:
        return list(itertools.islice(stream, n))


def same(first: list[dict[str, Any]], second: list[dict[str, Any]]) -> bool:
    return len(first) == len(second) and all(
        all(a[name] == b[name] for name in ("place", "index", "key", "substituted"))
        and all(torch.equal(v, w) for v, w in zip(a["voxels"], b["voxels"], strict=True))
        for a, b in zip(first, second)
    )


@pytest.fixture(scope="module")
def plain(root: Path) -> list[dict[str, Any]]:
    """What the local folder gives."""
    return take(a_stream(root), 3 * GROUPS)


FAULTS: list[str | int] = ["drop", "reset", "short", "flip", "slow", "hang", 500, 503, 429]


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_store_that_fails_at_first_gives_the_same_batches(
    server: FaultyServer, plain: list[dict[str, Any]], tmp_path: Path, fault: str | int, cached: bool
) -> None:
    server.hang_s, server.slow_s = 0.7, 0.1
    timeout_s = 0.4 if fault == "hang" else 30.0
    failed: set[str] = set()

    def once_a_file(name: str, start: int, before: int) -> str | int | None:
        if name in failed:
            return None
        failed.add(name)
        return fault

    def each_place_once(name: str, start: int, before: int) -> str | int | None:
        return None if before or name.endswith("json") or name.endswith("parquet") else fault

    if fault == "flip":  # of a manifest it is an error, not a fault that goes away
        failed |= {"dataset.json", "manifest.parquet"}
    server.plan = once_a_file if cached or fault in ("hang", "slow", "flip") else each_place_once
    with a_stream(server.url, cache=config(tmp_path if cached else "", timeout_s=timeout_s)) as stream:
        assert same(plain, list(itertools.islice(stream, 3 * GROUPS)))
        assert stream.damaged == 0
        if fault == "slow":
            assert stream.traffic.retries == 0
        elif fault == "reset":  # where it had kept the connection open, the client asks once more by itself
            assert server.asked.total() > stream.traffic.requests
        elif fault == "flip":
            assert stream.traffic.damaged > 0
        else:
            assert stream.traffic.retries > 0
        if cached:
            assert stream.traffic.fetched == 8
            assert stream.traffic.uncached == 0
        assert stream.traffic.bytes > 0


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(("fault", "text"), [(503, "resumed"), (403, "refuses access"), ("ignore", "Range")])
def test_a_store_that_fails_for_good_is_one_line(
    server: FaultyServer, tmp_path: Path, cached: bool, workers: int, fault: str | int, text: str
) -> None:
    cache = config(tmp_path if cached else "", patience_s=0.3)
    started = time.monotonic()
    with a_stream(server.url, workers=workers, cache=cache) as stream:
        server.plan = lambda name, start, before: fault
        with pytest.raises(UserError, match=text) as caught:
            take(stream, 40)
        assert "\n" not in str(caught.value)
        assert server.url in str(caught.value)
        assert next(stream, None) is None
    assert time.monotonic() - started < 30


@pytest.mark.parametrize("cached", [True, False])
def test_a_missing_shard_is_replaced_as_in_a_folder(
    root: Path, server: FaultyServer, tmp_path: Path, cached: bool
) -> None:
    other = tmp_path / "data"
    shutil.copytree(root, other)
    local = a_stream(other, max_damage=1.0)
    (other / "train-000008.tar").unlink()
    expected = take(local, 3 * GROUPS)
    assert any(any(b["substituted"]) for b in expected)
    server.plan = lambda name, start, before: 404 if name == "train-000008.tar" else None
    for workers in (0, 2):
        cache = config(tmp_path / "cache" if cached else "")
        stream = a_stream(server.url, max_damage=1.0, cache=cache, workers=workers)
        assert same(expected, take(stream, 3 * GROUPS))
        assert stream.damage == local.damage
        assert stream.traffic.retries == 0


def whole_epochs(rank: int, url: str, folder: Path, batches: int, results: Any) -> None:
    stream = a_stream(url, rank=rank, world=2, workers=2, cache=config(folder))
    taken = take(stream, batches)
    found = [(b["place"], b["index"], [v.numpy().tobytes() for v in b["voxels"]]) for b in taken]
    results.put((found, stream.traffic))


def test_ranks_share_a_cache_and_each_byte_crosses_once(
    root: Path, server: FaultyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """2 ranks of 2 workers, more than an epoch, from a server that fails now and then."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    updates = 6
    expected = {
        b["place"]: (b["index"], [v.numpy().tobytes() for v in b["voxels"]])
        for b in take(a_stream(root), GROUPS * updates)
    }
    faults = {"train-000004.tar": 503, "train-000012.tar": "drop", "train-000020.tar": "slow"}
    server.plan = lambda name, start, before: None if before else faults.get(name)
    fork = multiprocessing.get_context("fork")
    results = fork.SimpleQueue()
    ranks = [
        fork.Process(target=whole_epochs, args=(r, server.url, tmp_path, GROUPS * updates // 2, results))
        for r in range(2)
    ]
    for process in ranks:
        process.start()
    (first, cost), (second, more) = results.get(), results.get()
    for process in ranks:
        process.join(60)
        assert process.exitcode == 0
    found = {tuple(place): (index, voxels) for place, index, voxels in first + second}
    assert found == expected
    shards = {p.name: p.stat().st_size for p in root.glob("*.tar")}
    sent = sum(n for name, n in server.sent.items() if name in shards)
    assert sent <= 1.2 * sum(shards.values())
    assert 0.5 * sum(shards.values()) < (cost + more).bytes <= sent + 1
    assert (cost + more).fetched == len(shards)
    assert (cost + more).retries == 2


def test_a_manifest_in_a_store_is_read_with_retries(
    root: Path, server: FaultyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.plan = lambda name, start, before: "drop" if not before else None
    assert Manifest.open(server.url).hash == Manifest.open(root).hash
    monkeypatch.setattr("data_pipeline.manifest.OPEN_PATIENCE_S", 1.0)
    server.plan = lambda name, start, before: 503
    with pytest.raises(UserError, match=r"manifest\.parquet: could not be read"):
        Manifest.open(server.url)
    server.plan = lambda name, start, before: 404
    with pytest.raises(UserError, match="shard dataset"):
        Manifest.open(server.url)
    with pytest.raises(UserError, match="must not carry"):
        Manifest.open("https://name:word@host/data")


@pytest.mark.parametrize("cached", [True, False])
def test_s3(root: Path, plain: list[dict[str, Any]], tmp_path: Path, cached: bool) -> None:
    pytest.importorskip("s3fs", reason="s3fs is not installed: pip install medfm[s3]")
    moto = pytest.importorskip("moto.server", reason="moto is not installed: pip install -e .[dev]")
    import fsspec

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    running = moto.ThreadedMotoServer(port=0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    bucket = f"data{cached:d}"
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "testing-secret",
            "AWS_DEFAULT_REGION": "us-east-1",
        }.items():
            patch.setenv(name, value)
        fs = fsspec.filesystem("s3", skip_instance_cache=True)
        fs.mkdir(bucket)
        for path in root.iterdir():
            fs.put_file(str(path), f"{bucket}/set/{path.name}")
        cache = config(tmp_path if cached else "", patience_s=2.0, timeout_s=30.0)
        for workers in (0, 2):
            stream = a_stream(f"s3://{bucket}/set", workers=workers, cache=cache)
            assert same(plain, take(stream, 3 * GROUPS))
            assert stream.traffic.retries == 0
            assert stream.traffic.fetched == (8 if cached and not workers else 0)
        fs.rm_file(f"{bucket}/set/train-000008.tar")
        shutil.rmtree(tmp_path, ignore_errors=True)
        stream = a_stream(f"s3://{bucket}/set", cache=cache, max_damage=1.0)
        assert any(any(b["substituted"]) for b in take(stream, 3 * GROUPS))
        stream = a_stream(f"s3://{bucket}/set", cache=cache, max_damage=1.0)
        running.stop()
        shutil.rmtree(tmp_path, ignore_errors=True)
        with pytest.raises(UserError, match=rf"s3://{bucket}/set/.*resumed") as caught:
            take(stream, 1)
        assert "\n" not in str(caught.value)
        assert "testing" not in str(caught.value)


class Watched(CachedFiles):
    """Notes how many bytes are expected at most."""

    most = 0

    def expect(self, block: Any) -> None:
        super().expect(block)
        self.most = max(self.most, sum(b.size for b in self._expected))


@pytest.mark.parametrize("lookahead", [0, 3, 100])
def test_prefetch_keeps_order_and_bounds(root: Path, tmp_path: Path, lookahead: int) -> None:
    manifest = Manifest.open(root)
    order = Order(
        manifest, manifest.select(split="train"), TokenConfig(slots=64, classes=(1, 2)),
        MixtureConfig(groups=GROUPS), 1,
    )  # fmt: skip
    cache = config(tmp_path)
    inner = open_files(root, manifest, cache, Meter())
    assert isinstance(inner, CachedFiles)
    files = Watched(inner.origin, manifest, inner.folder, cache, inner.meter)
    works = [Work(u, g) for u in range(5) for g in (*range(GROUPS), None)]
    step = []
    for work in works:
        rows = [] if work.group is None else [d.row for d in order.group_draws(work.update, work.group)]
        step.append(sum(block.size for block in {files.blocks.of(row) for row in rows}))
    budget = 2 * max(step)
    pulled = 0

    def source() -> Iterator[Work]:
        nonlocal pulled
        for work in works:
            pulled += 1
            yield work

    seen = []
    for work in Prefetch(files, order, lookahead, budget)(source()):
        seen.append(work)
        assert pulled <= len(seen) + lookahead
    assert seen == works
    assert 0 < files.most <= budget + max(step)
    assert not files._expected
    assert os.getpid() == files._pid
