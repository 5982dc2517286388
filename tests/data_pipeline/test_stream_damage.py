"""Damage: whatever happens to shards, every crop is the truth or a flagged substitute that is the truth."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from stream_samples import members_of, stage, write_dataset

from data_pipeline.damage import FLOOR, RECENT, DamageCount
from data_pipeline.errors import UserError
from data_pipeline.frame_index import MEMBER, PREFIX, checksum, write_index
from data_pipeline.geometry import TokenConfig
from data_pipeline.manifest import MEMBERS, Manifest
from data_pipeline.order import Order
from data_pipeline.schedule import MixtureConfig
from data_pipeline.shard_cache import CacheConfig
from data_pipeline.shard_reader import INVALID, DamagedSample
from data_pipeline.storage import chunk_shape, encode
from data_pipeline.stream import LEVELS, Crop, Stream, open_stream

SAMPLES = 15
SIDE = (12, 28)
EACH = 50  # corruptions a seed


class Dataset:
    """A dataset on disk, what its shards held, and what each of its crops has to be."""

    def __init__(self, root: Path) -> None:
        self.root, self.manifest = root, Manifest.open(root)
        self.keys = self.manifest.column("key").tolist()
        self.shards = {p.name: p.read_bytes() for p in sorted(root.glob("*.tar"))}
        rows = range(len(self.manifest))
        tokens = TokenConfig(slots=16, classes=(1, 2))
        self.zoomed = Order(self.manifest, np.array(rows), tokens, MixtureConfig(groups=2), 1)
        self.window = Order(
            self.manifest, np.array(rows), TokenConfig(), MixtureConfig(groups=2), 2, window=(8, 16, 16)
        )
        self.members = {}
        for row in rows:
            told = self.manifest.row(row)
            self.members[told["key"]] = members_of(
                int(told["key"], 16), tuple(told["shape"]), told["geometry"], tuple(told["axes"]),
                levels=2, hide=told["hide_size"] > 0,
            )  # fmt: skip

    def place(self, row: int, member: str) -> tuple[int, int]:
        """Offset and size of a member in its shard."""
        return self.manifest.value(row, f"{member}_offset"), self.manifest.value(row, f"{member}_size")

    def stream(self, labelled: bool, workers: int = 0, **more: Any) -> Stream[list[Crop]]:
        """Crops with a zoom, or with every channel and the labels."""
        return open_stream(
            self.root, self.manifest, self.window if labelled else self.zoomed, rank=0, world=1,
            start_update=0, workers=workers, collate=lambda u, g, crops: crops,
            with_seg=labelled, all_channels=labelled, **{"max_damage": 1.0, **more},
        )  # fmt: skip

    def check(self, crop: Crop, labelled: bool) -> None:
        """A crop is bit for bit what its key says; it is flagged if the order chose another sample."""
        draw, members = crop.draw, self.members[crop.key]
        whole = members[LEVELS[draw.level]]
        if draw.level == 0 and "hide" in members:
            whole = np.where(members["hide"] > 0, np.int16(INVALID), whole)
        box = tuple(slice(o, o + e) for o, e in zip(draw.origin, draw.extent))
        expected = whole[(slice(None) if labelled else draw.channel, *box)]
        lead = expected.ndim - 3
        turn = (*range(lead), *(lead + a for a in draw.axes))
        np.testing.assert_array_equal(crop.voxels, expected.transpose(turn))
        if labelled:
            assert crop.seg is not None
            np.testing.assert_array_equal(
                crop.seg, members["seg"][(slice(None), *box)].transpose(0, *(1 + a for a in draw.axes))
            )
        order = self.window if labelled else self.zoomed
        assert crop.substituted == (self.keys[order.draw(draw.index).row] != crop.key)

    def restore(self) -> None:
        """Every shard as it was written."""
        for name, data in self.shards.items():
            path = self.root / name
            if path.is_dir():
                path.rmdir()
            if not path.exists() or path.read_bytes() != data:
                path.write_bytes(data)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Dataset]:
    folder = tmp_path_factory.mktemp("shards")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEDFM_CACHE", str(tmp_path_factory.mktemp("cache")))
        samples = [stage(folder, n, SIDE, levels=2, hide=n % 4 == 2) for n in range(SAMPLES)]
        write_dataset(folder, samples, 5)
        yield Dataset(folder)


@pytest.fixture(autouse=True)
def _whole_again(dataset: Dataset) -> Iterator[None]:
    yield
    dataset.restore()


@dataclass
class Corruption:
    """Random damage to a dataset."""

    dataset: Dataset
    generator: np.random.Generator

    def row(self) -> int:
        return int(self.generator.integers(SAMPLES))

    def path(self, row: int | None = None) -> Path:
        row = self.row() if row is None else row
        return self.dataset.root / self.dataset.manifest.value(row, "shard")

    def write(self, row: int, offset: int, data: bytes) -> None:
        with self.path(row).open("r+b") as file:
            file.seek(offset)
            file.write(data)

    def member(self) -> tuple[int, int, int, str]:
        """A random member of a random sample: row, offset, size, name."""
        while True:
            row, name = self.row(), str(self.generator.choice(MEMBERS))
            offset, size = self.dataset.place(row, name)
            if size > 0:
                return row, offset, size, name

    def flip(self, row: int, at: int) -> None:
        old = self.dataset.shards[self.path(row).name][at]
        self.write(row, at, bytes([old ^ 1 << int(self.generator.integers(8))]))

    def bit(self) -> str:
        row = self.row()
        at = int(self.generator.integers(self.path(row).stat().st_size))
        self.flip(row, at)
        return f"bit at {at} of {self.path(row).name}"

    def bit_of_member(self) -> str:
        row, offset, size, name = self.member()
        self.flip(row, offset + int(self.generator.integers(size)))
        return f"bit of {name} of row {row}"

    def bit_of_index(self) -> str:
        row = self.row()
        offset, size = self.dataset.place(row, "idx")
        self.flip(row, offset + int(self.generator.integers(size)))
        return f"bit of idx of row {row}"

    def frame_edge(self) -> str:
        row, offset, size, name = self.member()
        self.flip(row, offset + int(self.generator.choice([0, 1, 11, 14, 16, 23, 39, 47, size - 1]) % size))
        return f"header or end of {name} of row {row}"

    def tar_header(self) -> str:
        row, offset, _, name = self.member()
        self.write(row, offset - 512, self.generator.bytes(512))
        return f"tar header of {name} of row {row}"

    def zeros(self) -> str:
        row, offset, size, name = self.member()
        length = min(int(self.generator.integers(1, 4096)), size)
        at = offset + int(self.generator.integers(size - length + 1))
        self.write(row, at, bytes(length))
        return f"{length} zeros in {name} of row {row}"

    def noise(self) -> str:
        row, offset, size, name = self.member()
        self.write(row, offset, self.generator.bytes(size))
        return f"noise for {name} of row {row}"

    def cut(self) -> str:
        path = self.path()
        length = int(self.generator.integers(path.stat().st_size))
        os.truncate(path, length)
        return f"{path.name} cut to {length}"

    def removed(self) -> str:
        path = self.path()
        path.unlink()
        return f"{path.name} removed"

    def folder(self) -> str:
        path = self.path()
        path.unlink()
        path.mkdir()
        return f"{path.name} is a folder"

    def shifted(self) -> str:
        path, data = self.path(), None
        data = path.read_bytes()
        at, length = int(self.generator.integers(len(data))), int(self.generator.integers(1, 600))
        insert = self.generator.bytes(length) if self.generator.integers(2) else None
        path.write_bytes(data[:at] + (insert + data[at:] if insert else data[at + length :]))
        return f"{length} bytes {'put in' if insert else 'taken out'} at {at} of {path.name}"

    def swapped_members(self) -> str:
        row, offset, size, name = self.member()
        other = self.row()
        start, length = self.dataset.place(other, name)
        data = self.dataset.shards[self.path(other).name][max(start, 0) : start + max(length, 0)]
        self.write(row, offset, data[:size])
        return f"{name} of row {row} from row {other}"

    def swapped_samples(self) -> str:
        one, other = self.row(), self.row()
        for row, source in ((one, other), (other, one)):
            held = self.dataset.shards[self.path(source).name]
            for name in MEMBERS:
                (offset, size), (start, length) = (self.dataset.place(r, name) for r in (row, source))
                if size > 0 and length > 0:
                    self.write(row, offset, held[start : start + min(size, length)])
        return f"rows {one} and {other} swapped"

    def swapped_shards(self) -> str:
        one, other = self.path(), self.path()
        held = one.read_bytes()
        one.write_bytes(other.read_bytes())
        other.write_bytes(held)
        return f"{one.name} and {other.name} swapped"

    def another_frame(self) -> str:
        """Frames and index that agree with each other, are of the right shape, and are another sample's."""
        row = self.row()
        told = self.dataset.manifest.row(row)
        kind, axes = told["geometry"], tuple(told["axes"])
        arrays = members_of(
            99, tuple(told["shape"]), kind, axes, levels=2, hide=told["hide_size"] > 0
        )  # fmt: skip
        frames = {name: encode(array, chunk_shape(array.shape, kind, axes)) for name, array in arrays.items()}
        written = dict(frames)
        if self.generator.integers(2):
            written["idx"] = write_index("0badc0de", frames, {"json": b"{}"})
        for name, data in written.items():
            offset, size = self.dataset.place(row, name)
            self.write(row, offset, data[:size])
        return f"another volume for {'+'.join(written)} of row {row}"


KINDS: tuple[Callable[[Corruption], str], ...] = (
    Corruption.bit, Corruption.bit_of_member, Corruption.bit_of_index, Corruption.frame_edge,
    Corruption.tar_header, Corruption.zeros, Corruption.noise, Corruption.cut, Corruption.removed,
    Corruption.folder, Corruption.shifted, Corruption.swapped_members, Corruption.swapped_samples,
    Corruption.swapped_shards, Corruption.another_frame,
)  # fmt: skip


@pytest.mark.parametrize("seed", range(8))
def test_no_damaged_voxel_reaches_a_batch(dataset: Dataset, seed: int) -> None:
    generator = np.random.default_rng(seed)
    hit = Counter[str]()
    ended = 0
    for number in range(EACH):
        kind = KINDS[(number + seed * EACH) % len(KINDS)]
        told = kind(Corruption(dataset, generator))
        labelled = bool(generator.integers(2))
        print(f"seed {seed}, corruption {number}: {told}{', labels read' if labelled else ''}")
        changed = {n for n, data in dataset.shards.items() if not _holds(dataset.root / n, data)}
        allowed = {k for row, k in enumerate(dataset.keys) if dataset.manifest.value(row, "shard") in changed}
        with dataset.stream(labelled) as stream:
            crops = []
            try:
                while len(crops) < 40:
                    crops += next(stream)
            except UserError as error:  # too few samples left to take a substitute from
                ended += "tried in its place; run `medfm shards verify" in str(error)
            for crop in crops:
                dataset.check(crop, labelled)
            assert stream.damaged == sum(crop.substituted for crop in crops)
            assert sum(stream.damage.values()) == stream.damaged
            assert set(stream.damage) <= allowed
        hit[kind.__name__] += bool(stream.damage)
        dataset.restore()
    print(f"seed {seed}: {sum(hit.values())} of {EACH} noticed {dict(hit)}; {ended} ended the stream")
    # Tar headers, KEY.json and the frames' own headers are not read for a crop; most of the rest is.
    assert sum(hit.values()) > EACH // 2
    assert ended <= EACH // 10, ended


def _holds(path: Path, data: bytes) -> bool:
    return path.is_file() and path.read_bytes() == data


@pytest.mark.parametrize("change", ["no seg", "no image", "smaller"])
def test_an_index_of_another_build_is_damage(dataset: Dataset, change: str) -> None:
    """It has the key and the checksum, but not the members that the manifest tells of."""
    for row in range(0, SAMPLES, 2):
        offset, size = dataset.place(row, "idx")
        shard = dataset.shards[dataset.manifest.value(row, "shard")]
        body = bytearray(shard[offset : offset + size - 8])
        members = np.frombuffer(body, MEMBER, PREFIX.unpack_from(body)[2], PREFIX.size)
        if change == "smaller":
            members["shape"][:] = np.maximum(1, members["shape"] - 9)
        else:
            members["name"][members["name"] == change.split()[1].encode()] = b"other"
        data = bytes(body) + checksum(bytes(body)).to_bytes(8, "little")
        Corruption(dataset, np.random.default_rng(0)).write(row, offset, data)
    with dataset.stream(labelled=True) as stream:
        for crop in itertools.chain.from_iterable(itertools.islice(stream, 30)):
            dataset.check(crop, labelled=True)
        assert set(stream.damage) == {dataset.keys[row] for row in range(0, SAMPLES, 2)}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_cache_that_rots_is_fetched_again(dataset: Dataset, tmp_path: Path, workers: int) -> None:
    """Bits flip in blocks that were checked on arrival, open ones too: no wrong crop, and no substitute."""
    generator = np.random.default_rng(0)
    cache = CacheConfig(folder=str(tmp_path), gb=1.0)
    with dataset.stream(labelled=False, workers=workers, cache=cache) as stream:
        for number, crops in enumerate(itertools.islice(stream, 60)):
            for crop in crops:
                dataset.check(crop, labelled=False)
                assert not crop.substituted or workers  # which may read while bits flip again
            for path in tmp_path.rglob("*.block") if number % 5 == 0 else ():
                with contextlib.suppress(FileNotFoundError), path.open("r+b") as file:
                    data = np.frombuffer(file.read(), np.uint8).copy()
                    data[generator.integers(len(data), size=len(data) // 50)] ^= 1
                    data[-20:-16] = 1  # "known to be damaged at the source"
                    file.seek(0)
                    file.write(data.tobytes())
        assert stream.damaged <= (3 if workers else 0)
        assert stream.traffic.damaged > 5
        assert stream.traffic.fetched > len(dataset.shards)


@pytest.mark.parametrize("workers", [0, 2])
def test_shards_change_under_the_stream(dataset: Dataset, workers: int) -> None:
    """Cut, overwritten, replaced and deleted while descriptors are open and crops are on their way."""
    names = list(dataset.shards)
    crops: list[Crop] = []
    with dataset.stream(labelled=False, workers=workers) as stream:

        def read(batches: int) -> list[bool]:
            taken = [crop for _ in range(batches) for crop in next(stream)]
            crops.extend(taken)
            return [crop.substituted for crop in taken]

        assert not any(read(10))
        os.truncate(dataset.root / names[0], len(dataset.shards[names[0]]) // 3)
        assert any(read(30))
        dataset.restore()
        read(10)
        assert not any(read(20)), "a shard that is whole again is read again"
        with (dataset.root / names[1]).open("r+b") as file:
            file.write(bytes(len(dataset.shards[names[1]])))
        assert any(read(30))
        dataset.restore()
        read(10)
        for name in names:  # readers go on with the files that they have open
            (dataset.root / f"{name}.new").write_bytes(dataset.shards[name][::-1])
            os.replace(dataset.root / f"{name}.new", dataset.root / name)
        read(30)
        for name in names:
            (dataset.root / name).unlink()
        read(30)
        assert stream.damaged == sum(crop.substituted for crop in crops)
    for crop in crops:
        dataset.check(crop, labelled=False)


def test_any_number_of_workers_takes_the_same_substitutes(dataset: Dataset) -> None:
    generator = np.random.default_rng(1)
    for kind in (Corruption.noise, Corruption.bit_of_index, Corruption.bit_of_index, Corruption.removed):
        kind(Corruption(dataset, generator))
    told: list[Any] = []
    for workers in (0, 1, 3):
        with dataset.stream(labelled=True, workers=workers) as stream:
            crops = [crop for _ in range(20) for crop in next(stream)]
            told.append(([(c.draw, c.key, c.substituted, c.voxels.tobytes()) for c in crops], stream.damage))
            assert stream.damaged > 5
            assert sum(stream.drawn.values()) == stream.crops == len(crops)
    assert told[0] == told[1] == told[2]


def test_a_source_without_a_readable_sample_is_stood_in_for(dataset: Dataset) -> None:
    """A small source may lie in one shard; losing it costs its crops, not the run."""
    manifest = dataset.manifest
    rows = [row for row, key in enumerate(dataset.keys) if int(key, 16) in (0, 3, 5, 6, 9)]  # volumes
    lost = {dataset.keys[row]: row for row in rows if manifest.value(row, "modality") == "CT"}
    for row in lost.values():
        Corruption(dataset, np.random.default_rng(0)).write(row, dataset.place(row, "idx")[0], bytes(100))
    order = Order(manifest, np.array(rows), TokenConfig(), MixtureConfig(groups=2), 1, window=(8, 16, 16))
    with open_stream(
        dataset.root, manifest, order, rank=0, world=1, start_update=0, workers=0,
        collate=lambda u, g, crops: crops, max_damage=1.0,
    ) as stream:  # fmt: skip
        crops = [crop for _ in range(20) for crop in next(stream)]
    assert stream.damage.keys() == lost.keys()
    assert not {crop.key for crop in crops} & lost.keys()
    assert [crop.draw.index for crop in crops] == list(range(len(crops)))


def test_each_damaged_sample_is_logged_once(dataset: Dataset, caplog: pytest.LogCaptureFixture) -> None:
    row = 4
    key = dataset.keys[row]
    Corruption(dataset, np.random.default_rng(0)).write(row, dataset.place(row, "idx")[0], bytes(100))
    with dataset.stream(labelled=True, workers=2) as stream, caplog.at_level(logging.WARNING):
        for _ in range(40):
            next(stream)
    assert stream.damage == {key: stream.damaged}
    assert stream.damaged > 1
    lines = [record.message for record in caplog.records if "damaged" in record.message]
    assert len(lines) == 1
    assert lines[0].startswith(f"sample {key} in ")


def fault(key: str) -> DamagedSample:
    return DamagedSample(key, "train.tar", "image", 3, "its bytes do not match their checksum")


def test_one_fault_at_the_start_ends_no_run() -> None:
    count = DamageCount(0.01, "there")
    for n in range(FLOOR // 100):
        count.add(1, [f"key{n}"], [fault(f"key{n}")])
    with pytest.raises(UserError) as caught:
        count.add(1, ["last"], [])
    said = str(caught.value)
    assert said.startswith("11 of the last 11 crops hit damaged samples (allowed: 1.00% of 1000 or more)")
    assert "key8, key9, last; run `medfm shards verify there`" in said
    assert "\n" not in said
    with pytest.raises(UserError):
        DamageCount(0.0, "there").add(1, ["a"], [])


def test_a_share_below_the_limit_runs_for_ever_and_late_damage_ends_the_run() -> None:
    count = DamageCount(0.01, "there")
    for _ in range(10 * RECENT // 1000):
        count.add(1000, ["a"] * 9, [])
    assert count.total == count.by_key["a"] == 9 * 10 * RECENT // 1000
    with pytest.raises(UserError):  # noqa: PT012
        for _ in range(RECENT // 1000):
            count.add(1000, ["b"] * 20, [])
