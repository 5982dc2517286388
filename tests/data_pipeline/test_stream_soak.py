"""A long run: memory, descriptors and maps of the training process and of every worker stay what they were.

`MEDFM_SOAK_S` sets how long, in seconds; the claim is about an hour.
"""

from __future__ import annotations

import gc
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from stream_samples import stage, write_dataset

from data_pipeline.geometry import TokenConfig
from data_pipeline.manifest import Manifest
from data_pipeline.order import Order
from data_pipeline.schedule import MixtureConfig
from data_pipeline.shard_cache import CacheConfig
from data_pipeline.shard_files import OPEN_FILES
from data_pipeline.stream import Crop, open_stream

SECONDS = float(os.environ.get("MEDFM_SOAK_S", "10"))
WARM = 4000  # crops that settle heap and caches
FIGURES = ("MiB", "descriptors", "maps")
#: What each figure may rise by over the second half of the run, by a line fitted to it.
GROWTH = (1.5, 2.0, 8.0)


def figures(process: psutil.Process, data: tuple[str, ...]) -> list[float]:
    """Memory that the process holds beside files (heap, stacks, batches), open descriptors, memory maps, and
    descriptors of files in the folders `data`, which are not among the others: those come and go.

    Pages that it still shares with the process it was forked from count, too. One by one they become copies
    of its own: the free ones of the heap are used, others hold a reference count. That adds to nothing but
    `Private_Dirty`, and ends when all are copied.
    """
    folder = Path(f"/proc/{process.pid}")
    status = dict(line.split(":") for line in (folder / "status").read_text().splitlines())
    held = sum(int(status[name].split()[0]) for name in ("RssAnon", "RssShmem")) / 1024
    opened = []
    for link in (folder / "fd").iterdir():
        with suppress(FileNotFoundError):  # closed since it was listed
            opened.append(os.readlink(link).startswith(data))
    maps = len((folder / "maps").read_text().splitlines())
    return [held, len(opened) - sum(opened), maps, sum(opened)]


def collate(update: int, group: int | None, crops: list[Crop]) -> dict[str, Any]:
    return {"voxels": [torch.from_numpy(crop.voxels) for crop in crops], "worker": os.getpid()}


@pytest.mark.slow
@pytest.mark.timeout(SECONDS + 300)
@pytest.mark.parametrize("cached", [False, True])
def test_nothing_grows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cached: bool) -> None:
    monkeypatch.setenv("MEDFM_CACHE", str(tmp_path / "manifests"))
    root = tmp_path / "shards"
    root.mkdir()
    write_dataset(root, [stage(root, n) for n in range(80)], 2)  # more shards than a reader keeps open
    manifest = Manifest.open(root)
    for row in (3, 40):  # damage at the source, which a cache has to go through, too
        with (root / manifest.value(row, "shard")).open("r+b") as file:
            file.seek(manifest.value(row, "image_offset"))
            file.write(bytes(manifest.value(row, "image_size")))
    order = Order(
        manifest, np.arange(len(manifest)), TokenConfig(slots=64, classes=(1, 2)), MixtureConfig(groups=2), 1
    )
    cache = CacheConfig(folder=str(tmp_path / "blocks"), gb=0.002) if cached else None  # a few blocks fit
    taken: list[list[list[float]]] = []
    times: list[float] = []
    with open_stream(
        root, manifest, order, rank=0, world=1, start_update=0, workers=2, collate=collate, max_damage=1.0,
        cache=cache,
    ) as stream:  # fmt: skip
        workers = sorted({next(stream)["worker"] for _ in range(4)})
        processes = [psutil.Process(), *map(psutil.Process, workers)]
        while stream.crops < WARM:
            next(stream)
        started = time.monotonic()
        every = max(0.25, SECONDS / 400)
        while time.monotonic() - started < SECONDS:
            next(stream)
            if not times or time.monotonic() - started - times[-1] >= every:
                gc.collect()
                times.append(time.monotonic() - started)
                taken.append([figures(process, (f"{root}/", f"{tmp_path}/blocks/")) for process in processes])
        crops, damaged = stream.crops, stream.damaged
    late = np.array(times) > SECONDS / 2
    at, values = np.array(times)[late], np.array(taken)[late]
    print(f"{'through a cache' if cached else 'in place'}: {crops} crops, {damaged} replaced, {SECONDS:g} s")
    grown = []
    for who in range(len(processes)):
        assert values[:, who, 3].max() <= OPEN_FILES, "more shards and blocks open than a reader keeps"
        for what, allowed in enumerate(GROWTH):
            line = values[:, who, what]
            rise = float(np.polyfit(at, line, 1)[0]) * float(at[-1] - at[0])
            name = "training process" if who == 0 else f"worker {who}"
            told = f"{name}: {line[0]:.1f} → {line[-1]:.1f} {FIGURES[what]}, risen by {rise:+.2f}"
            print(f"{told} (least {line.min():.1f}, most {line.max():.1f})")
            if rise > allowed:
                grown.append(told)
    assert damaged > 0
    assert not grown, "; ".join(grown)
