"""The cache: right bytes, one download a block, a bound that holds, and nothing that a crash could break."""

from __future__ import annotations

import errno
import logging
import multiprocessing
import os
import pickle
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from faulty_server import FaultyServer, serving
from stream_samples import stage, write_dataset

from data_pipeline import block_folder, remote_files
from data_pipeline.block_folder import BlockFolder
from data_pipeline.errors import UserError
from data_pipeline.manifest import Manifest
from data_pipeline.shard_cache import CacheConfig, CachedFiles, open_files
from data_pipeline.shard_reader import DamagedSample, ShardReader
from data_pipeline.traffic import Meter

FORK = multiprocessing.get_context("fork")
SHARDS = 8


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Two samples a shard, so a block is a shard without its first header and its end."""
    folder = tmp_path_factory.mktemp("shards")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEDFM_CACHE", str(tmp_path_factory.mktemp("manifests")))
        write_dataset(folder, [stage(folder, n, (20, 40)) for n in range(2 * SHARDS)], 2)
        yield folder


@pytest.fixture
def server(root: Path) -> Iterator[FaultyServer]:
    with serving(root) as running:
        yield running


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_files, "FIRST_WAIT_S", 0.01)


def cached(root: Path, server: FaultyServer | Path, folder: Path, **more: Any) -> CachedFiles:
    config = CacheConfig(folder=str(folder), **{"gb": 1.0, "patience_s": 60.0, "timeout_s": 30.0, **more})
    address = server.url if isinstance(server, FaultyServer) else server
    files = open_files(address, Manifest.open(root), config, Meter())
    assert isinstance(files, CachedFiles)
    return files


def members(root: Path) -> list[tuple[str, int, int]]:
    """(shard, offset, size) of every member of every sample."""
    manifest = Manifest.open(root)
    rows = [manifest.row(n) for n in range(len(manifest))]
    names = ("image", "l1", "seg", "idx", "json")
    return [(r["shard"], r[f"{m}_offset"], r[f"{m}_size"]) for r in rows for m in names]


def right(root: Path, files: CachedFiles, places: list[tuple[str, int, int]] | None = None) -> bool:
    """Whether members read as they are on disk."""
    return all(
        files.read(shard, offset, size) == (root / shard).read_bytes()[offset : offset + size]
        for shard, offset, size in (places if places is not None else members(root))
    )


def downloads(server: FaultyServer) -> Counter[str]:
    """How often each shard's block was asked for."""
    counts: Counter[str] = Counter()
    for (name, _), n in server.asked.items():
        counts[name] += n if name.endswith(".tar") else 0
    return +counts


def on_disk(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file() and ".block" in p.name)


def test_each_block_is_fetched_once_and_read_from_disk(
    root: Path, server: FaultyServer, tmp_path: Path
) -> None:
    files = cached(root, server, tmp_path)
    assert right(root, files)
    assert right(root, files)
    assert set(downloads(server).values()) == {1}
    assert len(downloads(server)) == len(on_disk(tmp_path)) == SHARDS
    total = files.meter.total
    assert (total.fetched, total.requests, total.bytes) == (SHARDS, SHARDS, sum(server.sent.values()))
    assert total.wait_s > 0
    again = cached(root, server, tmp_path)
    assert right(root, again)
    assert right(root, pickle.loads(pickle.dumps(files)))
    assert again.meter.total.requests == 0
    assert set(downloads(server).values()) == {1}
    with pytest.raises(ValueError):
        files.read("train-000000.tar", 1 << 40, 5)


def test_a_local_dataset_through_the_cache(root: Path, tmp_path: Path) -> None:
    files = cached(root, root, tmp_path)
    assert right(root, files)
    assert files.meter.total.fetched == SHARDS
    assert len(on_disk(tmp_path)) == SHARDS


def run_together(count: int, work: Callable[[int], None]) -> list[int]:
    """Exit codes of `count` forked processes that start `work` at one moment."""
    barrier = FORK.Barrier(count)

    def start(n: int) -> None:
        barrier.wait(30)
        work(n)

    processes = [FORK.Process(target=start, args=(n,)) for n in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    return [process.exitcode or 0 for process in processes]


def test_processes_that_start_at_once_share_every_download(
    root: Path, server: FaultyServer, tmp_path: Path
) -> None:
    server.plan = lambda name, start, before: "slow"
    server.slow_s = 0.1
    files = cached(root, server, tmp_path)

    def work(n: int) -> None:
        places = members(root)
        for place in places[:: 5 if n % 2 else -5]:
            files.expect(files.blocks.at(place[0], place[1]))
        assert right(root, files, places if n % 2 else places[::-1])

    assert run_together(4, work) == [0] * 4
    assert set(downloads(server).values()) == {1}
    files.folder.prepare()  # deletes the empty file of a process that ended while a thread of it waited
    assert len(on_disk(tmp_path)) == SHARDS


def test_the_bound_holds_while_processes_fetch(root: Path, server: FaultyServer, tmp_path: Path) -> None:
    largest = max(p.stat().st_size for p in root.glob("*.tar"))
    limit = 3 * largest
    files = cached(root, server, tmp_path, gb=limit / 1e9)
    most, stop = [0], threading.Event()

    def watch() -> None:
        while not stop.is_set():
            sizes = []
            for path in on_disk(tmp_path):
                try:
                    sizes.append(path.stat().st_size)
                except FileNotFoundError:
                    sizes.append(0)
            most.append(sum(sizes))

    watcher = threading.Thread(target=watch)
    watcher.start()

    def work(n: int) -> None:
        places = members(root)
        for _ in range(2):
            np.random.default_rng(n).shuffle(places)
            assert right(root, files, places)
        assert files.meter.total.evicted > 0

    assert run_together(3, work) == [0] * 3
    stop.set()
    watcher.join()
    # A listing is not of one moment: a block may be renamed or replaced while the watcher counts.
    assert largest < max(most) <= limit + largest
    assert sum(p.stat().st_size for p in on_disk(tmp_path)) <= limit


def test_the_least_recently_used_goes_first(root: Path, server: FaultyServer, tmp_path: Path) -> None:
    sizes = [p.stat().st_size for p in sorted(root.glob("*.tar"))]
    files = cached(root, server, tmp_path, gb=sum(sizes[:4]) * 1.06 / 1e9)
    firsts = {shard: (shard, offset, 8) for shard, offset, _ in reversed(members(root))}
    shards = sorted(firsts)
    for shard in [*shards[:4], shards[0]]:
        assert right(root, files, [firsts[shard]])
        files.close()  # the time of use is noted when a block is opened
        time.sleep(0.02)
    files.read(*firsts[shards[4]])
    left = {p.name.split("@")[0] for p in on_disk(tmp_path)}
    assert {shards[0], shards[4]} <= left
    assert shards[1] not in left


def test_blocks_too_large_for_the_folder_are_read_past_it(
    root: Path, server: FaultyServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = cached(root, server, tmp_path, gb=1e-6)
    with caplog.at_level(logging.WARNING):
        assert right(root, files, members(root)[:9])
    assert files.meter.total.uncached == 9
    assert files.meter.total.fetched == 0
    assert [r.message for r in caplog.records if "raise data.cache.gb" in r.message]
    assert sum("raise data.cache.gb" in r.message for r in caplog.records) == 1
    assert not on_disk(tmp_path)


def test_a_cache_that_is_too_small_counts_what_comes_twice(
    root: Path, server: FaultyServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    largest = max(p.stat().st_size for p in root.glob("*.tar"))
    files = cached(root, server, tmp_path, gb=1.5 * largest / 1e9)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert right(root, files)
    total = files.meter.total
    assert total.fetched == 3 * SHARDS
    assert total.refetched == 2 * SHARDS
    assert sum("data.cache.gb" in r.message for r in caplog.records) == 1


def test_a_killed_download_leaves_nothing_that_breaks(
    root: Path, server: FaultyServer, tmp_path: Path
) -> None:
    server.plan = lambda name, start, before: "hang" if not before else None
    files = cached(root, server, tmp_path, timeout_s=20.0)
    place = members(root)[0]
    process = FORK.Process(target=files.read, args=place)
    process.start()
    while not server.asked:
        time.sleep(0.01)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    [left] = on_disk(tmp_path)
    assert left.name.endswith(".partial")
    taken = cached(root, server, tmp_path / "other")  # another folder does not matter
    assert taken.meter.total.fetched == 0
    assert right(root, files, [place])
    assert [p.name for p in on_disk(tmp_path)] == [left.name.removesuffix(".partial")]
    ledger = BlockFolder(tmp_path, 1 << 30)
    with ledger._ledger() as held:
        assert ledger._noted(held) == sum(p.stat().st_size for p in on_disk(tmp_path))


def test_what_a_dead_process_left_is_deleted_at_the_next_start(
    root: Path, server: FaultyServer, tmp_path: Path
) -> None:
    right(root, cached(root, server, tmp_path), members(root)[:1])
    [block] = on_disk(tmp_path)
    left = block.with_name("train-000099.tar@512.block.partial")
    left.write_bytes(bytes(10_000))
    (tmp_path / "mine.txt").write_text("not a block")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine.block").write_text("not a block of ours")
    cached(root, server, tmp_path, gb=1e-9)  # everything that is ours has to go
    assert {p.name for p in tmp_path.rglob("*") if p.is_file()} == {"mine.txt", "mine.block", "ledger"}


@pytest.mark.parametrize("harm", ["flip", "cut", "empty", "delete", "swap"])
@pytest.mark.parametrize("opened", [True, False])
def test_a_cached_block_that_is_harmed_is_fetched_again(
    root: Path, server: FaultyServer, tmp_path: Path, harm: str, opened: bool
) -> None:
    files, plain = cached(root, server, tmp_path), ShardReader(root, Manifest.open(root))
    reader = ShardReader(root, files.manifest, files)
    box = ("image", None, (0, 0, 0), (20, 20, 20))
    for row in range(2 * SHARDS):
        reader.read_box(row, *box)
    if not opened:
        files.close()
        reader._indices.clear()
    blocks = on_disk(tmp_path)
    for path in blocks:
        data = bytearray(path.read_bytes())
        if harm == "flip":
            data[: -len(data) // 3] = bytes(b ^ 255 for b in data[: -len(data) // 3])
        if harm == "cut":
            del data[len(data) // 8 :]
        if harm == "empty":
            data.clear()
        if harm == "swap":  # the block of another shard, in the right size
            data = bytearray(blocks[0].read_bytes()[: len(data)].ljust(len(data), b"\0"))
        if harm == "delete":
            path.unlink()
        else:
            path.write_bytes(data)
    for row in range(2 * SHARDS):
        assert np.array_equal(reader.read_box(row, *box), plain.read_box(row, *box))
    if harm != "delete":
        assert max(downloads(server).values()) == 2


def test_damage_on_the_way_is_fetched_again(root: Path, server: FaultyServer, tmp_path: Path) -> None:
    server.plan = lambda name, start, before: "flip" if downloads(server)[name] == 1 else None
    files = cached(root, server, tmp_path)
    assert right(root, files)
    assert SHARDS / 2 < files.meter.total.damaged <= SHARDS  # a flip may hit a tar header, which nobody reads


def test_damage_at_the_source_is_found_once_and_believed(
    root: Path, server: FaultyServer, tmp_path: Path
) -> None:
    server.plan = lambda name, start, before: "flip" if name == "train-000004.tar" else None
    files = cached(root, server, tmp_path)
    reader = ShardReader(root, files.manifest, files)
    whole = [files.manifest.row(n)["shape"] for n in range(2 * SHARDS)]
    damaged = set()
    for _ in range(3):
        for row, (_, *extent) in enumerate(whole):
            for member in ("image", "seg"):
                try:
                    reader.read_box(row, member, None, (0, 0, 0), extent)
                except DamagedSample as damage:
                    damaged.add(damage.shard)
                    reader._indices.clear()
    assert damaged <= {"train-000004.tar"}
    assert downloads(server)["train-000004.tar"] <= 3  # and both of its samples may be damaged
    assert sum(downloads(server).values()) <= SHARDS + 2


def test_two_datasets_in_one_folder(root: Path, tmp_path: Path, tmp_path_factory: Any) -> None:
    other = tmp_path_factory.mktemp("other")
    write_dataset(other, [stage(other, n, (20, 30)) for n in range(100, 104)], 2)
    first, second = cached(root, root, tmp_path), cached(other, other, tmp_path)
    assert right(root, first)
    assert right(other, second)
    assert right(root, first)
    assert len(on_disk(tmp_path)) == SHARDS + 2


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_a_disk_that_takes_nothing(
    root: Path,
    server: FaultyServer,
    tmp_path: Path,
    number: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def full(*_: Any) -> int:
        raise OSError(number, os.strerror(number))

    files = cached(root, server, tmp_path)
    with caplog.at_level(logging.WARNING), monkeypatch.context() as patch:
        patch.setattr(block_folder.os, "pwrite", lambda fd, data, at: len(data) if len(data) == 8 else full())
        assert right(root, files)
    assert files.meter.total.uncached == len(members(root))
    assert [os.strerror(number) in r.message for r in caplog.records] == [True]
    assert not on_disk(tmp_path)


def test_a_disk_that_fails_is_no_damage(
    root: Path, server: FaultyServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A folder has the name of a block: it cannot be read, and cannot be deleted."""
    files = cached(root, server, tmp_path)
    place = members(root)[0]
    assert right(root, files, [place])
    [path] = on_disk(tmp_path)
    files.close()
    path.unlink()
    path.mkdir()
    with caplog.at_level(logging.WARNING):
        assert right(root, files)
    assert ["the cache cannot be used" in r.message for r in caplog.records] == [True]
    assert files.meter.total.uncached == 10  # the members of a shard
    with pytest.raises(UserError, match=r"its disk fails.*data\.cache\.folder"):
        files.renew(*place[:2])


def test_locks_that_do_not_hold_are_refused(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(block_folder.fcntl, "flock", lambda fd, how: None)
    with pytest.raises(UserError, match="locks do not hold"):
        cached(root, root, tmp_path)


def test_blocks_used_before_the_clock_was_set_back_go_first(
    root: Path, server: FaultyServer, tmp_path: Path
) -> None:
    sizes = [p.stat().st_size for p in sorted(root.glob("*.tar"))]
    files = cached(root, server, tmp_path, gb=sum(sizes[:4]) * 1.06 / 1e9)
    firsts = list({shard: (shard, offset, 8) for shard, offset, _ in reversed(members(root))}.values())[::-1]
    for place in firsts[:4]:
        assert right(root, files, [place])
    files.close()
    early = on_disk(tmp_path)[:2]
    for path in early:
        os.utime(path, (time.time() + 3600,) * 2)
    assert right(root, files, firsts[4:6])
    assert not any(path.exists() for path in early)
    assert right(root, files, firsts[2:4])
    assert max(downloads(server).values()) == 1


def test_a_disk_that_fills_up_keeps_what_fits(
    root: Path,
    server: FaultyServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Writing fails while the folder holds more than three blocks' worth."""
    room = 3 * max(p.stat().st_size for p in root.glob("*.tar"))
    files, write = cached(root, server, tmp_path), os.pwrite

    def pwrite(fd: int, data: Any, at: int) -> int:
        if sum(p.stat().st_size for p in on_disk(tmp_path)) > room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(fd, data, at)

    with caplog.at_level(logging.WARNING):
        monkeypatch.setattr(block_folder.os, "pwrite", pwrite)
        assert right(root, files)
    assert files.meter.total.uncached == 0
    assert files.meter.total.evicted > 0
    assert ["the disk is full" in r.message for r in caplog.records] == [True]


def test_folders_that_cannot_be_used(root: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"data\.cache\.folder"):
        cached(root, root, tmp_path / "file")
    with pytest.raises(UserError, match="NOT_SET_ANYWHERE"):
        cached(root, root, Path("$NOT_SET_ANYWHERE"))
    if os.getuid():
        (tmp_path / "locked").mkdir(mode=0o500)
        with pytest.raises(UserError, match=r"data\.cache\.folder"):
            cached(root, root, tmp_path / "locked" / "x")


def test_variables_in_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JOB_DISK", str(tmp_path))
    assert CacheConfig(folder="$JOB_DISK/blocks").path() == tmp_path / "blocks"


def test_blocks_expected_are_there_when_they_are_read(
    root: Path, server: FaultyServer, tmp_path: Path
) -> None:
    files = cached(root, server, tmp_path)
    for shard, offset, _ in members(root):
        files.expect(files.blocks.at(shard, offset))
    deadline = time.monotonic() + 20
    while len(on_disk(tmp_path)) < SHARDS or any(p.suffix == ".partial" for p in on_disk(tmp_path)):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    asked = sum(server.asked.values())
    assert right(root, files)
    assert sum(server.asked.values()) == asked == SHARDS
    assert files.meter.total.wait_s == 0
    threads = list(files._threads)
    assert len(threads) == files.config.downloads
    files.close()
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()


@pytest.mark.parametrize(("fault", "error"), [(404, FileNotFoundError), (503, UserError), (403, UserError)])
def test_what_goes_wrong_ahead_is_raised_where_it_is_read(
    root: Path, server: FaultyServer, tmp_path: Path, fault: int, error: type[Exception]
) -> None:
    server.plan = lambda name, start, before: fault if name == "train-000002.tar" else None
    files = cached(root, server, tmp_path, patience_s=0.2)
    places = members(root)
    for shard, offset, _ in places:
        files.expect(files.blocks.at(shard, offset))
    for place in places:
        if place[0] == "train-000002.tar":
            with pytest.raises(error):
                files.read(*place)
        else:
            assert right(root, files, [place])
    assert len(on_disk(tmp_path)) == SHARDS - 1
    files.close()


def test_a_fork_starts_its_own_threads(root: Path, server: FaultyServer, tmp_path: Path) -> None:
    files = cached(root, server, tmp_path)
    places = members(root)
    files.expect(files.blocks.at(*places[0][:2]))
    assert right(root, files, places[:5])

    def work(n: int) -> None:
        files.expect(files.blocks.at(*places[-1][:2]))
        assert right(root, files)

    assert run_together(2, work) == [0, 0]
    assert right(root, files)
    files.close()
