"""The stream: exact order at any worker count, resume, damage, signals, and an end to every worker."""

from __future__ import annotations

import gc
import itertools
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from stream_samples import NORM, stage, voxels_of, write_dataset

from data_pipeline.errors import UserError
from data_pipeline.geometry import TokenConfig, level_factors
from data_pipeline.manifest import Manifest
from data_pipeline.order import Order, lanes_of
from data_pipeline.schedule import MixtureConfig
from data_pipeline.shard_cache import CacheConfig
from data_pipeline.storage import block_mean
from data_pipeline.stream import Crop, Stream, open_stream


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("shards")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEDFM_CACHE", str(tmp_path_factory.mktemp("cache")))
        write_dataset(folder, [stage(folder, n) for n in range(24)], 4)
        yield folder


def an_order(root: Path, **mixture: Any) -> tuple[Manifest, Order]:
    manifest = Manifest.open(root)
    tokens = TokenConfig(slots=64, classes=(1, 2))
    return manifest, Order(
        manifest, manifest.select(split="train"), tokens, MixtureConfig(groups=3, **mixture), 1
    )


def collate(update: int, group: int | None, crops: list[Crop]) -> dict[str, Any]:
    return {
        "place": (update, group),
        "index": [crop.draw.index for crop in crops],
        "voxels": [torch.from_numpy(crop.voxels) for crop in crops],
        "substituted": [crop.substituted for crop in crops],
        "key": [crop.key for crop in crops],
        "threads": torch.get_num_threads(),
        "worker": os.getpid(),
    }


def a_stream(
    root: Path, workers: int = 0, rank: int = 0, world: int = 1, start: int = 0, **more: Any
) -> Stream[Any]:
    manifest, order = an_order(root)
    return open_stream(
        root,
        manifest,
        order,
        rank=rank,
        world=world,
        start_update=start,
        workers=workers,
        collate=collate,
        **more,
    )


def take(stream: Stream[Any], n: int) -> list[dict[str, Any]]:
    with stream:
        return list(itertools.islice(stream, n))


def same(first: list[dict[str, Any]], second: list[dict[str, Any]]) -> bool:
    return len(first) == len(second) and all(
        a["place"] == b["place"]
        and a["index"] == b["index"]
        and all(torch.equal(v, w) for v, w in zip(a["voxels"], b["voxels"], strict=True))
        for a, b in zip(first, second)
    )


def test_crops_are_what_the_volumes_hold(root: Path) -> None:
    manifest, order = an_order(root, foreground=0.3)
    shapes, keys = manifest.column("shape"), manifest.column("key")
    seen = set()
    stream = open_stream(
        root, manifest, order, rank=0, world=1, start_update=0, workers=0, collate=lambda u, g, crops: crops
    )
    for crop in itertools.chain.from_iterable(take(stream, 30)):
        draw = crop.draw
        kind = order.composition[draw.spec].geometry
        whole = voxels_of(int(keys[draw.row], 16), tuple(shapes[draw.row].tolist()))
        if draw.level:
            whole = block_mean(whole, level_factors(kind, draw.axes)[draw.level])
        box = tuple(slice(o, o + e) for o, e in zip(draw.origin, draw.extent))
        expected = whole[draw.channel][box].transpose(draw.axes)
        np.testing.assert_array_equal(crop.voxels, expected)
        assert crop.voxels.flags.c_contiguous
        assert crop.voxels.dtype == np.int16
        assert crop.norm.tolist() == NORM
        assert crop.modality == manifest.row(draw.row)["modalities"][draw.channel]
        assert crop.seg is None
        seen |= {("level", draw.level), ("axes", draw.axes), ("channel", draw.channel)}
    assert {("level", 0), ("level", 1), ("axes", (0, 1, 2)), ("axes", (1, 0, 2)), ("channel", 1)} <= seen


def test_all_channels_and_labels_lie_over_the_same_voxels(root: Path) -> None:
    manifest = Manifest.open(root)
    order = Order(
        manifest, np.arange(len(manifest)), TokenConfig(), MixtureConfig(groups=2), 0, window=(16, 24, 20)
    )
    stream = open_stream(
        root, manifest, order, rank=0, world=1, start_update=0, workers=0,
        collate=lambda u, g, crops: crops, with_seg=True, all_channels=True,
    )  # fmt: skip
    for crop in itertools.chain.from_iterable(take(stream, 10)):
        assert crop.voxels.shape[0] == 2
        assert crop.norm.shape == (2, 7)
        assert crop.seg is not None
        assert crop.seg.dtype == np.uint8
        np.testing.assert_array_equal(crop.seg[0], crop.voxels[0] % 5)


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_workers_give_the_same_batches_in_the_same_order(root: Path, workers: int) -> None:
    plain = take(a_stream(root), 14)
    assert [b["place"] for b in plain] == [(m // 3, m % 3) for m in range(14)]
    loaded = take(a_stream(root, workers=workers), 14)
    assert same(plain, loaded)
    assert {b["threads"] for b in loaded} == {1}
    assert len({b["worker"] for b in loaded}) == workers
    assert os.getpid() not in {b["worker"] for b in loaded}


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_ranks_together_give_the_batch(root: Path, world: int) -> None:
    whole = {b["place"]: b for b in take(a_stream(root), 6)}
    micro = len(lanes_of(0, world, 3))
    found: dict[tuple[int, int], dict[str, Any]] = {}
    for rank in range(world):
        batches = take(a_stream(root, rank=rank, world=world), 2 * micro)
        assert [b["place"][0] for b in batches] == [m // micro for m in range(2 * micro)]
        for batch in batches:
            if batch["place"][1] is None:
                assert batch["index"] == []
            else:
                found[batch["place"]] = batch
    assert sorted(found) == sorted(whole)
    assert all(same([found[place]], [whole[place]]) for place in whole)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resume_continues_where_the_run_stood(root: Path, workers: int) -> None:
    through = take(a_stream(root, workers=workers), 12)
    for update in (1, 3):
        assert same(
            through[3 * update :], take(a_stream(root, workers=workers, start=update), 12 - 3 * update)
        )


def test_a_late_start_costs_nothing(root: Path) -> None:
    started = time.process_time()
    late = take(a_stream(root, start=10**9), 1)
    assert late[0]["place"] == (10**9, 0)
    assert time.process_time() - started < 5


def test_the_training_process_keeps_its_random_state(root: Path) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    take(a_stream(root, workers=1), 2)
    take(a_stream(root), 2)
    assert torch.equal(before, torch.get_rng_state())


@pytest.fixture
def damaged(root: Path) -> Iterator[str]:
    """Flip a byte of one sample's every image chunk; yields its key."""
    manifest = Manifest.open(root)
    row = 5
    path = root / str(manifest.column("shard")[row])
    path.chmod(0o644)
    original = path.read_bytes()
    broken = bytearray(original)
    for member in ("image", "l1"):
        offset, size = (int(manifest.column(f"{member}_{what}")[row]) for what in ("offset", "size"))
        for at in range(offset, offset + size, 50):
            broken[at] ^= 0xFF
    path.write_bytes(broken)
    yield str(manifest.column("key")[row])
    path.write_bytes(original)


def test_damage_is_replaced_counted_and_the_same_everywhere(root: Path, damaged: str) -> None:
    plain = a_stream(root, max_damage=1.0)
    batches = list(itertools.islice(plain, 18))
    replaced = sum(sum(b["substituted"]) for b in batches)
    assert replaced > 0
    assert plain.damaged == replaced
    manifest, order = an_order(root)
    for batch in batches:
        for i, key, substituted in zip(batch["index"], batch["key"], batch["substituted"]):
            assert key != damaged
            assert substituted == (manifest.column("key")[order.draw(i).row] == damaged)
    loaded = a_stream(root, workers=2, max_damage=1.0)
    assert same(batches, list(itertools.islice(loaded, 18)))
    assert loaded.damaged == replaced
    loaded.close()


@pytest.mark.parametrize("workers", [0, 2])
def test_too_much_damage_ends_with_one_line(root: Path, damaged: str, workers: int) -> None:
    stream = a_stream(root, workers=workers, max_damage=0.0)
    with pytest.raises(UserError, match=f"{damaged}.*shards verify") as error:
        list(itertools.islice(stream, 60))
    assert "\n" not in str(error.value)
    assert next(stream, None) is None


def test_a_killed_worker_is_a_failure_that_another_start_may_mend(root: Path) -> None:
    stream = a_stream(root, workers=1)
    worker = next(stream)["worker"]
    os.kill(worker, signal.SIGKILL)
    for _ in range(50):
        time.sleep(0.01)  # the training process, a save for instance, is not interrupted
    with pytest.raises(RuntimeError, match="worker was killed"):
        list(itertools.islice(stream, 50))


def test_workers_pass_the_signals_that_end_a_job_on_to_a_parent_that_hears_them(root: Path) -> None:
    heard: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, _: heard.append(number))
    try:
        with a_stream(root, workers=1) as stream:
            os.kill(next(stream)["worker"], signal.SIGUSR1)
            for _ in itertools.islice(stream, 500):
                if heard:
                    break
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert heard == [signal.SIGUSR1]


def test_workers_outlive_the_signals_that_end_a_job(root: Path) -> None:
    stream = a_stream(root, workers=2)
    workers = {next(stream)["worker"], next(stream)["worker"]}
    assert len(workers) == 2
    for sent, worker in itertools.product((signal.SIGTERM, signal.SIGINT, signal.SIGUSR1), workers):
        os.kill(worker, sent)
    assert {b["worker"] for b in itertools.islice(stream, 12)} == workers
    started = time.monotonic()
    stream.close()
    _, alive = psutil.wait_procs([p for p in map(process, workers) if p], timeout=60)
    assert not alive
    assert time.monotonic() - started < 60


def process(pid: int) -> psutil.Process | None:
    try:
        return psutil.Process(pid)
    except psutil.NoSuchProcess:
        return None


SCRIPT = """
    import importlib.util, os, sys, pathlib
    spec = importlib.util.spec_from_file_location("test_stream", sys.argv[1])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    stream = module.a_stream(pathlib.Path(sys.argv[2]), workers=2)
    print(*{next(stream)["worker"] for _ in range(4)}, flush=True)
    if sys.argv[3] == "wait":
        sys.stdin.read()
"""


@pytest.mark.parametrize("end", ["exit", "wait"])
def test_workers_end_with_their_parent(root: Path, end: str) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(SCRIPT), __file__, str(root), end],
        stdout=subprocess.PIPE,
        stdin=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert parent.stdout is not None
    workers = [int(word) for word in parent.stdout.readline().split()]
    assert len(workers) == 2
    watched = [p for p in map(process, workers) if p]
    if end == "wait":
        assert len(watched) == 2
        parent.kill()
    assert parent.wait(timeout=120) == (-signal.SIGKILL if end == "wait" else 0)
    _, alive = psutil.wait_procs(watched, timeout=60)
    assert not alive
    parent.stdout.close()


def test_two_streams_at_once(root: Path) -> None:
    """A held-out evaluation inside training: the heap stays frozen until the last worker is gone."""
    plain = take(a_stream(root), 12)
    assert gc.get_freeze_count() == 0
    first = a_stream(root, workers=1)
    early = list(itertools.islice(first, 5))
    frozen = gc.get_freeze_count()
    assert frozen > 0
    second = a_stream(root, workers=1, start=2)
    assert same(plain[6:9], take(second, 3))
    second.close()
    assert 0 < gc.get_freeze_count() <= frozen
    assert same(plain, early + list(itertools.islice(first, 7)))
    first.close()
    assert gc.get_freeze_count() == 0


def ended(thread: threading.Thread) -> bool:
    """Within the time that a download under way may take."""
    thread.join(20)
    return not thread.is_alive()


def descriptors() -> set[tuple[str, str]]:
    """Number and file of every open descriptor. Those of earlier tests may close meanwhile."""
    found = set()
    for link in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # that of the listing
            found.add((link.name, os.readlink(link)))
    return found


def test_a_cached_stream_in_this_process_leaves_nothing(root: Path, tmp_path: Path) -> None:
    """Closed in the middle of fetching ahead, and read from no more."""
    take(a_stream(root), 1)
    gc.collect()
    before, threads = descriptors(), set(threading.enumerate())
    for _ in range(3):
        stream = a_stream(root, cache=CacheConfig(folder=str(tmp_path), gb=0.002))
        next(stream)
        assert "medfm-fetch" in {thread.name for thread in threading.enumerate()}
        held = stream._items  # as by the traceback of an error
        stream.close()
        stream.close()
        assert next(stream, None) is None
        assert not [t for t in threading.enumerate() if t.name == "medfm-fetch" and not ended(t)]
    del stream, held  # with its manifest
    gc.collect()
    assert set(threading.enumerate()) <= threads
    assert descriptors() <= before


def test_memory_stays_flat(root: Path) -> None:
    stream = a_stream(root)
    for _ in range(60):
        next(stream)
    gc.collect()
    before = psutil.Process().memory_info().rss
    for _ in range(300):
        next(stream)
    gc.collect()
    assert psutil.Process().memory_info().rss - before < 20 << 20
