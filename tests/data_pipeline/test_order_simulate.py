"""What a run would read: the bound on each node's traffic, the play against slow references, the page."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.blocks import Blocks
from data_pipeline.crop_cost import crop_cost
from data_pipeline.deal import dealing
from data_pipeline.errors import UserError
from data_pipeline.geometry import TokenConfig
from data_pipeline.manifest import MEMBERS, Manifest
from data_pipeline.node_reads import Layout, Pieces, fetch, node_lanes, play
from data_pipeline.order import Order
from data_pipeline.schedule import MixtureConfig
from data_pipeline.simulate import Cache, simulate
from data_pipeline.simulation_page import page
from data_pipeline.storage import chunk_shape
from tests.data_pipeline.paper_dataset import Part, paper_dataset

SIDES = (96, 128, 200, 300)
SHAPES: dict[str, tuple[list[Part], int, str]] = {
    "one source, one kind of row": ([Part(12000)], 20, "modality"),
    "samples of very different size": ([Part(8000, sides=(128, 200, 300, 400))], 20, "modality"),
    "three modalities, several kinds of rows": (
        [
            Part(5000, "a", "CT", sides=(40, 60, 96, 128, 200)),
            Part(4000, "b", "MR", sides=(40, 60, 80, 128)),
            Part(6000, "c", "XR", "planar", sides=(256, 512, 1024)),
        ],
        40,
        "modality",
    ),
    "several sources of a modality": (
        [Part(3000, name, sides=SIDES[i:]) for i, name in enumerate("abc")],
        20,
        "modality",
    ),
    "fewer shards than lanes": ([Part(2000, sides=(200,))], 64, "modality"),
    "small sources, repeated": (
        [Part(12000, "a"), Part(600, "b", "MR", sides=(64,)), Part(40, "c", "PT")],
        40,
        "modality",
    ),
    "one huge source": (
        [Part(64 * 30 * 20, "a", sides=(64,)), Part(1500, "b", "MR", sides=(96,))],
        20,
        "source",
    ),
    "shards smaller than a block": ([Part(30000, sides=(48,), voxel_bytes=0.5)], 64, "modality"),
}


@pytest.mark.parametrize("name", SHAPES)
def test_each_node_fetches_its_share_of_the_data(name: str, tmp_path: Path) -> None:
    """At 1, 8 and 64 nodes, a cache of 16 shards a lane: at most 1.2 x (dataset bytes / nodes) an epoch."""
    parts, shard_samples, by = SHAPES[name]
    manifest = paper_dataset(tmp_path, parts, shard_samples=shard_samples)
    order = Order(manifest, np.arange(len(manifest)), TokenConfig(), MixtureConfig(groups=64, by=by), 0)
    layout = Layout.of(manifest)
    for nodes in (1, 8, 64):
        s = simulate(manifest, order, nodes=nodes, layout=layout)
        assert s.played.updates == s.played.longest_epoch
        assert (len(s.played.nodes), s.played.lanes) == (nodes, 64 // nodes)  # nothing was left out
        assert s.share_bytes == layout.bytes.sum() / nodes
        assert min(s.epochs.values()) >= 0.95
        assert s.blocks.most <= 1.2, f"{nodes} nodes"


def test_an_epoch_of_one_source_fetches_the_dataset_once(tmp_path: Path) -> None:
    """Where everything comes round exactly once, the share is the data and all of it is fetched."""
    manifest = paper_dataset(tmp_path, [Part(640)], shard_samples=20)
    order = Order(manifest, np.arange(640), TokenConfig(), MixtureConfig(groups=8), 0)
    s = simulate(manifest, order)
    assert s.epochs == {"CT": 1.0}
    layout = Layout.of(manifest)
    assert s.share_per_crop * 640 == pytest.approx(layout.bytes.sum(), rel=1e-5)
    assert (
        s.blocks.least
        == s.blocks.most
        == pytest.approx(layout.blocks.size.sum() / layout.bytes.sum(), rel=1e-5)
    )
    assert s.lane.correlation < 0.3


def test_blocks_and_the_deal_are_what_saves_traffic(tmp_path: Path) -> None:
    """The bound is not met by any fetching whatever: whole shards miss it."""
    manifest = paper_dataset(tmp_path, [Part(8000, sides=(128, 200, 300, 400))], shard_samples=20)
    order = Order(manifest, np.arange(8000), TokenConfig(), MixtureConfig(groups=64), 0)
    s = simulate(manifest, order, nodes=64)
    assert s.whole_shards.most > 2 > 1.2 >= s.blocks.most


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Manifest, Order]:
    parts = [Part(900, "a", "CT", sides=(48, 96, 130)), Part(500, "b", "MR", sides=(40, 64))]
    manifest = paper_dataset(tmp_path_factory.mktemp("paper"), parts, shard_samples=16)
    mixture = MixtureConfig(groups=6, crops_per_volume=2)
    return manifest, Order(manifest, np.arange(len(manifest)), TokenConfig(), mixture, 3)


def test_the_layout_is_that_of_blocks(small: tuple[Manifest, Order]) -> None:
    manifest, _ = small
    layout, blocks = Layout.of(manifest), Blocks(manifest)
    for row in range(0, len(manifest), 7):
        block = blocks.of(row)
        same = np.flatnonzero(layout.blocks.of == layout.blocks.of[row])
        assert (same[0], same[-1] + 1) == (block.rows.start, block.rows.stop)
        assert layout.blocks.size[layout.blocks.of[row]] == block.size
        start, end = blocks.span(row)
        assert layout.bytes[row] == end - start


def test_played_rows_are_the_draws(small: tuple[Manifest, Order]) -> None:
    _, order = small
    lanes = node_lanes(1, 2, 2, 6)
    assert lanes == [3, 4, 5]
    rows = [d.row for u in range(3, 6) for lane in lanes for d in order.group_draws(u, lane)]
    assert play(order, lanes, range(3, 6)).tolist() == rows


@pytest.mark.parametrize(("nodes", "ranks", "groups"), product((1, 3, 5), (1, 2, 4), (1, 8, 13)))
def test_every_lane_is_on_one_node(nodes: int, ranks: int, groups: int) -> None:
    lanes = [lane for n in range(nodes) for lane in node_lanes(n, nodes, ranks, groups)]
    assert sorted(lanes) == list(range(groups))


@given(
    sizes=st.lists(st.integers(1, 50), min_size=1, max_size=8),
    drawn=st.lists(st.integers(0, 19), min_size=1, max_size=60),
    cache=st.integers(0, 200),
)
@settings(max_examples=200, deadline=None)
def test_the_cache_drops_what_was_used_longest_ago(sizes: list[int], drawn: list[int], cache: int) -> None:
    of = np.arange(20) % len(sizes)
    held: list[int] = []
    total = count = 0
    for row in drawn:
        piece = int(of[row])
        if piece in held:
            held.remove(piece)
        else:
            total, count = total + sizes[piece], count + 1
        held.append(piece)
        while sum(sizes[p] for p in held) > cache and len(held) > 1:
            held.pop(0)
    assert fetch(np.array(drawn), Pieces(of, np.array(sizes)), cache) == (total, count)


@given(
    shards=st.lists(st.integers(1, 12), min_size=1, max_size=20),
    size=st.integers(1 << 18, 1 << 25),
    lanes=st.integers(1, 9),
)
@settings(max_examples=200, deadline=None)
def test_dealing_keeps_every_block_whole(shards: list[int], size: int, lanes: int) -> None:
    shard = np.repeat(np.arange(len(shards)), shards)
    first = np.concatenate([np.arange(n) * size for n in shards])
    dealt = dealing(shard, first, lanes)
    assert sorted(dealt.tolist()) == list(range(len(shard)))
    block = np.stack([shard, first >> 23])[:, dealt]
    begins = 1 + int((block[:, 1:] != block[:, :-1]).any(axis=0).sum())
    assert begins == len(np.unique(block, axis=1).T)


def test_lanes_get_samples_of_all_sizes() -> None:
    """Sorted by size, 30-fold: each lane's part of the bytes stays within a tenth of the mean."""
    size = np.sort(np.random.default_rng(0).uniform(1e6, 3e7, 16 * 200))
    shard = np.arange(len(size)) // 50
    first = np.concatenate([np.cumsum(part) - part for part in np.split(size, len(size) // 50)])
    held = size[dealing(shard, first.astype(np.int64), 16)].reshape(16, -1).sum(axis=1)
    assert abs(held / held.mean() - 1).max() < 0.1
    assert size.reshape(16, -1).sum(axis=1).max() / held.mean() > 1.8  # as plain parts would be


def test_costs_of_crops_against_chunks_counted_one_by_one(small: tuple[Manifest, Order]) -> None:
    manifest, order = small
    for draw in (order.draw(i) for i in range(0, 400, 9)):
        cost = crop_cost(manifest, [draw])
        row = manifest.row(draw.row)
        scale = 2**draw.level
        shape = [-(-n // scale) for n in row["shape"][1:]]
        chunk = chunk_shape((1, *shape), "volume", draw.axes)[1:]
        inside = [set(np.arange(o, o + e) // c) for o, e, c in zip(draw.origin, draw.extent, chunk)]
        touched = list(product(*inside))
        chunks = np.prod([-(-n // c) for n, c in zip(shape, chunk)])
        size = row[f"{MEMBERS[draw.level]}_size"]
        assert cost.used == np.prod(draw.extent)
        assert cost.decompressed == len(touched) * np.prod(chunk)
        assert cost.touched_bytes == pytest.approx(size * len(touched) / chunks)
        assert cost.touched_bytes <= cost.read_bytes <= size + row["idx_size"] + 1e-6
        assert 2 <= cost.requests <= 1 + len(touched)


def test_large_runs_are_sampled_and_say_so(small: tuple[Manifest, Order]) -> None:
    s = simulate(*small, nodes=3, budget=150)
    assert len(s.played.nodes) * s.played.lanes * s.played.updates * small[1].group_size <= 150
    assert s.played.updates < s.played.longest_epoch
    assert f"the longest epoch takes {s.played.longest_epoch}" in page(small[1], s)
    whole = simulate(*small, nodes=3)
    assert whole.played.updates == whole.played.longest_epoch
    assert "every sample is drawn" in page(small[1], whole)


def test_crops_of_one_volume_share_its_bytes(tmp_path: Path) -> None:
    manifest = paper_dataset(tmp_path, [Part(640)], shard_samples=20)
    traffic = []
    for crops in (1, 4):
        mixture = MixtureConfig(groups=8, crops_per_volume=crops)
        order = Order(manifest, np.arange(640), TokenConfig(), mixture, 0)
        s = simulate(manifest, order)
        assert s.epochs == {"CT": 1.0}
        assert s.played.updates == 80 * crops
        traffic.append(s.blocks.most)
    assert traffic[0] == pytest.approx(traffic[1], rel=0.02)


def test_a_larger_cache_never_fetches_more(small: tuple[Manifest, Order]) -> None:
    tight, wide = (simulate(*small, nodes=2, cache=Cache(bytes=size)) for size in (3e6, 1e12))
    assert tight.blocks.most > wide.blocks.most
    assert tight.half_cache.most >= tight.blocks.most >= tight.double_cache.most
    assert tight.working_set
    assert tight.working_set == wide.working_set
    enough = simulate(*small, nodes=2, cache=Cache(bytes=tight.working_set))
    assert enough.blocks.most <= 1.2


def test_the_page_and_json_hold_every_figure(small: tuple[Manifest, Order]) -> None:
    s = simulate(*small, nodes=8, ranks_per_node=2)
    text = page(small[1], s)
    for word in ("2 nodes without a lane", "whole shards", "chunk by chunk", "working set", "decompressed"):
        assert word in text
    assert json.loads(json.dumps(asdict(s)))["played"]["nodes"] == list(s.played.nodes)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda m, o: simulate(m, o, nodes=0), "0 nodes"),
        (lambda m, o: simulate(m, o, updates=-1), "-1 updates"),
        (lambda m, o: Cache.parse("lots"), "'lots'"),
        (lambda m, o: Cache.parse("-3GB"), "'-3GB'"),
    ],
)
def test_wrong_words_are_one_line(
    small: tuple[Manifest, Order], wrong: Callable[[Manifest, Order], object], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        wrong(*small)


def test_sizes_of_caches() -> None:
    assert Cache.parse("16") == Cache(shards=16.0)
    assert Cache.parse("200GB").bytes_per_lane(4, 1e9) == 50e9
    assert Cache.parse("2").bytes_per_lane(4, 1e9) == 2e9
