"""Ten million rows: what opening such a manifest costs, and what each worker of a stream over it holds."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from stream_samples import stage

from data_pipeline.geometry import TokenConfig
from data_pipeline.manifest import FORMAT_VERSION, SCHEMA, Manifest
from data_pipeline.order import Order
from data_pipeline.place import Place
from data_pipeline.schedule import MixtureConfig
from data_pipeline.shard_writer import ShardPlan, write_shard
from data_pipeline.stream import Crop, open_stream

ROWS = 10_000_000
PART = 1_000_000
SHARD_ROWS = 1000
PRIVATE = 50 << 20  # bytes that a worker may have of its own


def private(pid: int) -> int:
    """Bytes of a process that no other has: USS."""
    return int(psutil.Process(pid).memory_full_info().uss)


@pytest.fixture(scope="module")
def huge(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Ten million rows over a few real samples, in ten thousand shards that are links to one file."""
    root = tmp_path_factory.mktemp("huge")
    if shutil.disk_usage(root).free < 8 << 30:
        pytest.skip("needs 8 GB of disk")
    samples = tuple(stage(root, n) for n in range(12))
    shard = write_shard(ShardPlan("few.tar", samples), Place(root), root)
    few = pa.Table.from_pylist(shard.rows, schema=SCHEMA)
    names = [f"train-ct-volume-{n:06d}.tar" for n in range(ROWS // SHARD_ROWS)]
    for name in names:
        os.link(root / "few.tar", root / name)
    entries = [{**shard.entry, "name": name} for name in names]
    place = SCHEMA.get_field_index("shard")
    once = few.take(pa.array(np.arange(SHARD_ROWS) * len(samples) // SHARD_ROWS))
    part = pa.concat_tables([once] * (PART // SHARD_ROWS)).combine_chunks()
    with pq.ParquetWriter(
        root / "manifest.parquet", SCHEMA, compression="lz4", write_statistics=False
    ) as writer:
        for first in range(0, ROWS, PART):
            number = np.arange(first, first + PART)
            shards = pa.array(names, pa.string()).take(pa.array(number // SHARD_ROWS))
            writer.write_table(part.set_column(place, "shard", shards))
    digest = hashlib.sha256((root / "manifest.parquet").read_bytes()).hexdigest()
    info = {"format_version": FORMAT_VERSION, "labels": {}, "shards": entries, "manifest_sha256": digest}
    (root / "dataset.json").write_text(json.dumps(info))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEDFM_CACHE", str(root / "cache"))
        yield root
    shutil.rmtree(root)


def collate(update: int, group: int | None, crops: list[Crop]) -> dict[str, Any]:
    return {"voxels": [torch.from_numpy(crop.voxels) for crop in crops], "worker": os.getpid()}


OPEN = """
import re, sys, time
from data_pipeline.manifest import Manifest
def peak(): return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read()).group(1)) * 1024
before, started = peak(), time.monotonic()
Manifest.open(sys.argv[1])
print(peak() - before, time.monotonic() - started)
"""


@pytest.mark.slow
def test_opening_takes_the_memory_of_a_column(huge: Path) -> None:
    """Alone in a process, whose peak it is."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", OPEN, str(huge)]
    told = subprocess.check_output(command, text=True, env=environment).split()
    print(f"first opening on a node: {float(told[1]):.1f} s, peak {int(told[0]) >> 20} MiB")
    assert 0 < int(told[0]) < 1536 << 20


@pytest.mark.slow
def test_a_worker_holds_little_of_its_own(huge: Path) -> None:
    started = time.monotonic()
    manifest = Manifest.open(huge)
    assert len(manifest) == ROWS
    opened = time.monotonic()
    rows = manifest.select(split="train", source="a")
    assert len(rows) == ROWS
    selected = time.monotonic()
    order = Order(manifest, rows, TokenConfig(slots=64, classes=(1, 2)), MixtureConfig(groups=4), 1)
    ordered = time.monotonic()
    stream = open_stream(
        huge, manifest, order, rank=0, world=1, start_update=10**9, workers=2, collate=collate
    )
    with stream:
        workers = sorted({next(stream)["worker"] for _ in range(2)})
        begun = time.monotonic()
        used = []
        for _ in range(8):
            for _ in itertools.islice(stream, 100):
                pass
            used.append([private(pid) for pid in workers])
    print(f"open again {opened - started:.1f} s, select {selected - opened:.1f} s")
    print(f"order {ordered - selected:.1f} s, two workers and first batches {begun - ordered:.2f} s")
    print(f"private MiB of each worker: {[[n >> 20 for n in each] for each in used]}")
    assert len(workers) == 2
    assert max(map(max, used)) < PRIVATE
