"""What a training log says of its data."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from stream_samples import stage, write_dataset

from data_pipeline.errors import UserError
from data_pipeline.geometry import TokenConfig
from data_pipeline.manifest import Manifest
from data_pipeline.order import Order
from data_pipeline.schedule import MixtureConfig
from data_pipeline.shard_cache import CacheConfig
from data_pipeline.stream import Stream, open_stream
from data_pipeline.stream_log import StreamLog


@pytest.fixture
def order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Order:
    monkeypatch.setenv("MEDFM_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "shards"
    folder.mkdir()
    write_dataset(folder, [stage(folder, number) for number in range(24)], 4)
    manifest = Manifest.open(folder)
    return Order(
        manifest,
        manifest.select(split="train"),
        TokenConfig(slots=64, classes=(1,)),
        MixtureConfig(groups=3),
        1,
    )


def opened(log: StreamLog, order: Order, cache: CacheConfig) -> Stream[Any]:
    manifest = order.manifest
    assert isinstance(manifest, Manifest)
    return log.follow(
        open_stream(
            manifest.root, manifest, order, rank=0, world=1, start_update=0, workers=0,
            collate=lambda update, group, crops: crops, max_damage=1.0, cache=cache,
        )
    )  # fmt: skip


def test_a_run_is_told_how_often_its_sources_come_round(order: Order) -> None:
    text = StreamLog(order, "shards", CacheConfig(), max_damage=1.0, updates=400).describe()
    assert order.describe() in text
    crops = 400 * order.batch_size
    for name, share, counts in zip(order.sources, order.weights, order.counts):
        assert f"{name} {crops * share / counts.sum():.3g}" in text.splitlines()[-1]


def test_counts_of_a_local_stream(order: Order) -> None:
    log = StreamLog(order, "shards", CacheConfig(), max_damage=1.0, updates=400)
    assert log.counts() == {}
    with opened(log, order, CacheConfig()) as stream:
        list(islice(stream, 9))
    counts = log.counts()
    assert counts.pop("damaged_crops") == 0
    assert counts.keys() == {f"crops/{name}" for name in order.sources}
    assert sum(counts.values()) == 9 * order.group_size
    assert log.notices() == []


def test_a_cache_reports_its_traffic(order: Order, tmp_path: Path) -> None:
    cache = CacheConfig(folder=str(tmp_path / "blocks"), gb=1.0)
    log = StreamLog(order, str(tmp_path / "shards"), cache, max_damage=1.0, updates=400)
    with opened(log, order, cache) as stream:
        list(islice(stream, 60))
    counts = log.counts()
    size = sum(shard.stat().st_size for shard in (tmp_path / "shards").glob("*.tar")) / 1e6
    assert 0 < counts["fetch/MB"] <= size
    assert counts["fetch/fetched"] > 0
    assert counts["fetch/refetched"] == 0


def test_a_damaged_sample_is_named_once(order: Order, tmp_path: Path) -> None:
    manifest = order.manifest
    assert isinstance(manifest, Manifest)
    row = int(order.draw(0).row)
    path = tmp_path / "shards" / manifest.value(row, "shard")
    path.chmod(0o644)
    with path.open("r+b") as file:
        file.seek(manifest.value(row, "idx_offset"))
        file.write(b"broken")
    log = StreamLog(order, "shards", CacheConfig(), max_damage=1.0, updates=400)
    with opened(log, order, CacheConfig()) as stream:
        list(islice(stream, 3))
        assert [manifest.value(row, "key") in line for line in log.notices()] == [True]
        list(islice(stream, 60))
        assert log.notices() == []
    assert log.counts()["damaged_crops"] >= 1


def test_damage_is_judged_over_all_ranks(order: Order) -> None:
    """One bad shard is 4 % of one rank of eight, and nothing to end a run for; 4 % of all is."""
    name = order.sources[0]

    def of_ranks(crops: float, damaged: float) -> dict[str, float]:
        return {f"crops/{other}": 0.0 for other in order.sources} | {
            f"crops/{name}": crops, "damaged_crops": damaged
        }  # fmt: skip

    log = StreamLog(order, "shards", CacheConfig(), max_damage=0.01, updates=400)
    for step in range(1, 50):
        log.check(of_ranks(8000 * step, 40 * step))
    steps = iter([of_ranks(8000 * (49 + step), 40 * 49 + 320 * step) for step in range(1, 50)])
    with pytest.raises(UserError, match=r"samples \(allowed: 1.00%.*shards verify shards") as said:
        list(map(log.check, steps))
    assert len(list(steps)) > 43, "what is counted is the last of it, not the whole run"
    assert "\n" not in str(said.value)
    log = StreamLog(order, "shards", CacheConfig(), max_damage=0.01, updates=400)
    with pytest.raises(UserError):
        log.check(of_ranks(8000, 81))
