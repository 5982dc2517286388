"""A long run: memory, descriptors and maps of the training process and of every worker stay what they were.

`MEDFM_SOAK_CROPS` sets how long; the claim is about an hour, which is 5 million on two cores.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
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

#: The first half settles heap and caches, the second is measured: as many crops on a busy machine.
CROPS = int(os.environ.get("MEDFM_SOAK_CROPS", "6000"))
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


def measured(folder: Path, cached: bool) -> dict[str, Any]:
    """Figures (when, process, figure) of a stream over its second half, and the crops at which they were
    taken: of the training process first, which is this one, then of its workers.
    """
    root = folder / "shards"
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
    cache = CacheConfig(folder=str(folder / "blocks"), gb=0.002) if cached else None  # a few blocks fit
    taken: list[list[list[float]]] = []
    at: list[int] = []
    with open_stream(
        root, manifest, order, rank=0, world=1, start_update=0, workers=2, collate=collate, max_damage=1.0,
        cache=cache,
    ) as stream:  # fmt: skip
        workers = sorted({next(stream)["worker"] for _ in range(4)})
        processes = [psutil.Process(), *map(psutil.Process, workers)]
        while stream.crops < CROPS:
            next(stream)
            if stream.crops > CROPS / 2 and (not at or stream.crops - at[-1] >= CROPS / 80):
                gc.collect()
                at.append(stream.crops)
                taken.append([figures(process, (f"{root}/", f"{folder}/blocks/")) for process in processes])
        return {"at": at, "taken": taken, "damaged": stream.damaged}


@pytest.mark.slow
@pytest.mark.timeout(CROPS / 50 + 300)
@pytest.mark.parametrize("cached", [False, True])
def test_nothing_grows(tmp_path: Path, cached: bool) -> None:
    """In a process of its own: what earlier tests left in this one comes and goes."""
    here = {"PYTHONPATH": os.pathsep.join(sys.path), "MEDFM_CACHE": str(tmp_path / "manifests")}
    done = subprocess.run(
        [sys.executable, __file__, str(tmp_path), str(cached)], stdout=subprocess.PIPE, text=True, check=True,
        env=os.environ | here,
    )  # fmt: skip
    found = json.loads(done.stdout)
    at, values = found["at"], np.array(found["taken"])
    print(f"{'through a cache' if cached else 'in place'}: {CROPS} crops, {found['damaged']} replaced")
    grown = []
    assert values.shape[1] == 3
    # One more while the next is opened, before the oldest is closed; two for each download under way.
    most = OPEN_FILES + 1 + (2 * CacheConfig().downloads if cached else 0)
    for who in range(values.shape[1]):
        assert values[:, who, 3].max() <= most, "more shards and blocks open than a reader keeps"
        for what, allowed in enumerate(GROWTH):
            line = values[:, who, what]
            rise = float(np.polyfit(at, line, 1)[0]) * (at[-1] - at[0])
            name = "training process" if who == 0 else f"worker {who}"
            told = f"{name}: {line[0]:.1f} → {line[-1]:.1f} {FIGURES[what]}, risen by {rise:+.2f}"
            print(f"{told} (least {line.min():.1f}, most {line.max():.1f})")
            if rise > allowed:
                grown.append(told)
    assert found["damaged"] > 0
    assert not grown, "; ".join(grown)


if __name__ == "__main__":
    print(json.dumps(measured(Path(sys.argv[1]), sys.argv[2] == "True")))
