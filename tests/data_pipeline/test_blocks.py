"""Blocks: every sample lies whole in one, the same for every process, and none is needlessly large."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.blocks import Block, Blocks
from data_pipeline.manifest import MEMBERS, Manifest, manifest_bytes

SIZES = st.lists(st.lists(st.integers(1, 5000), min_size=1, max_size=30), min_size=1, max_size=6)


def a_manifest(cache: Path, shards: list[list[int]]) -> Manifest:
    """Samples of the given sizes, one after another in each shard, with a tar header before each member."""
    rows: list[dict[str, Any]] = []
    for number, sizes in enumerate(shards):
        at = 0
        for size in sizes:
            row: dict[str, Any] = {"key": f"{number}-{at}", "shard": f"s{number:03}.tar"}
            for member in MEMBERS:
                row[f"{member}_offset"], row[f"{member}_size"] = -1, -1
            row["image_offset"], row["image_size"] = at + 512, size
            row["idx_offset"], row["idx_size"] = at + 1024 + size, 10
            at += size + 1034
            rows.append(row)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEDFM_CACHE", str(cache))
        return Manifest.of("nowhere", manifest_bytes(rows), {})


@given(shards=SIZES, stripe=st.sampled_from([1, 1000, 4096, 1 << 20]))
@settings(deadline=None, max_examples=40)
def test_blocks_are_stripes_of_whole_samples(
    tmp_path_factory: pytest.TempPathFactory, shards: list[list[int]], stripe: int
) -> None:
    manifest = a_manifest(tmp_path_factory.getbasetemp(), shards)
    blocks = Blocks(manifest, stripe)
    slow: dict[tuple[str, int], list[int]] = {}
    for row in range(len(manifest)):
        slow.setdefault((manifest.value(row, "shard"), blocks.span(row)[0] // stripe), []).append(row)
    expected = {
        row: Block(shard, blocks.span(rows[0])[0], blocks.span(rows[-1])[1], range(rows[0], rows[-1] + 1))
        for (shard, _), rows in slow.items()
        for row in rows
    }
    everything = np.arange(len(manifest))
    assert blocks.spans(everything).tolist() == [list(blocks.span(row)) for row in everything]
    for row, block in expected.items():
        assert Blocks(manifest, stripe).of(row) == blocks.of(row) == block
        for offset, size in blocks.places(row).values():
            assert blocks.at(block.shard, offset) == blocks.at(block.shard, offset + size - 1) == block
    for shard in {block.shard for block in expected.values()}:
        assert blocks.in_shard(shard) == sorted(
            {b for b in expected.values() if b.shard == shard}, key=lambda b: b.start
        )


def test_places_without_a_sample(tmp_path: Path) -> None:
    blocks = Blocks(a_manifest(tmp_path, [[100, 100], [50]]))
    assert blocks.in_shard("s002.tar") == []
    for shard, offset in (("s000.tar", 0), ("s000.tar", 1 << 30), ("elsewhere.tar", 600)):
        with pytest.raises(ValueError, match="belongs to no sample"):
            blocks.at(shard, offset)
