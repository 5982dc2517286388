"""Stored voxels: what goes in comes out, in any box, and a damaged byte is never served."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from data_pipeline.frame_index import IndexDamaged, checksum, index_frame
from data_pipeline.storage import (
    INVALID,
    DamagedSample,
    ShardReader,
    block_mean,
    chunk_shape,
    decode,
    encode,
    invalid_of,
    level_shape,
    quantise,
    read_index,
    write_index,
)

KEY = "00c0ffee00c0ffee"


class OneSample:
    """A manifest of one row, its members laid end to end in one file."""

    def __init__(self, root: Path | str, places: dict[str, tuple[int, int]]) -> None:
        self.root = root
        self.columns: dict[str, Any] = {"key": np.array([KEY]), "shard": np.array(["shard.tar"])}
        for member, (offset, size) in places.items():
            self.columns[f"{member}_offset"] = np.array([offset])
            self.columns[f"{member}_size"] = np.array([size])

    def column(self, name: str) -> np.ndarray:
        return self.columns[name]

    def value(self, i: int, name: str) -> Any:
        return self.columns[name][i]


def write_sample(root: Path, frames: dict[str, bytes]) -> OneSample:
    members = {**frames, "json": b"{}"}
    members["idx"] = write_index(KEY, frames, {"json": b"{}"})
    places, data = {"hide": (-1, -1)}, b"\0" * 512
    for name, part in members.items():
        places[name] = (len(data), len(part))
        data += part + b"\0" * (-len(part) % 512)
    (root / "shard.tar").write_bytes(data)
    return OneSample(root, places)


@st.composite
def arrays(draw: st.DrawFn) -> tuple[np.ndarray, tuple[int, ...]]:
    shape = draw(st.tuples(st.integers(1, 3), st.integers(1, 20), st.integers(1, 20), st.integers(1, 20)))
    chunk = (1, *draw(st.tuples(*[st.integers(1, 9)] * 3)))
    dtype = draw(st.sampled_from(["<i2", "<u1", "<f4"]))
    generator = np.random.default_rng(draw(st.integers(0, 2**31)))
    array = generator.integers(0, 200, shape).astype(dtype)
    cut = draw(st.integers(0, 20))
    array[:, :cut] = draw(st.sampled_from([0, 7])) if dtype != "<f4" else draw(st.sampled_from([0, np.nan]))
    return array, chunk


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(arrays(), st.data())
def test_any_box_equals_slicing(
    tmp_path: Path, case: tuple[np.ndarray, tuple[int, ...]], data: st.DataObject
) -> None:
    array, chunk = case
    reader = ShardReader(tmp_path, write_sample(tmp_path, {"image": encode(array, chunk)}))
    for _ in range(4):
        origin = [data.draw(st.integers(0, s - 1)) for s in array.shape[1:]]
        extent = [data.draw(st.integers(1, s - o)) for s, o in zip(array.shape[1:], origin)]
        box = tuple(slice(o, o + e) for o, e in zip(origin, extent))
        channel = data.draw(st.none() | st.integers(0, array.shape[0] - 1))
        got = reader.read_box(0, "image", channel, origin, extent)
        want = array[(slice(None), *box)] if channel is None else array[channel][box]
        assert got.dtype == array.dtype
        assert got.flags.c_contiguous
        np.testing.assert_array_equal(got, want)


@settings(max_examples=60, deadline=None)
@given(arrays())
def test_the_index_is_what_blosc2_itself_finds(case: tuple[np.ndarray, tuple[int, ...]]) -> None:
    array, chunk = case
    frame = encode(array, chunk)
    member, chunks = index_frame(frame)
    opened = blosc2.ndarray_from_cframe(frame)  # owns the memory of its schunk
    schunk = opened.schunk
    assert member["count"] == len(chunks) == schunk.nchunks
    for number, found in enumerate(chunks):
        first, size = int(found["offset"]), int(found["size"])
        if found["special"]:
            voxels = np.frombuffer(schunk.decompress_chunk(number), array.dtype)
            value = np.frombuffer(int(found["check"]).to_bytes(8, "little")[: array.itemsize], array.dtype)
            np.testing.assert_array_equal(voxels, np.broadcast_to(value, voxels.shape))
        else:
            assert frame[first : first + size] == schunk.get_chunk(number)
            assert found["check"] == checksum(frame[first : first + size])


def test_a_frame_whose_pieces_lie_elsewhere_is_not_indexed() -> None:
    array = np.random.default_rng(0).normal(0, 50, (1, 16, 8, 8)).astype("<i2")
    frame = bytearray(encode(array, (1, 8, 8, 8)))
    first = int(index_frame(bytes(frame))[1]["offset"][0])
    frame[first + 12 : first + 16] = (77).to_bytes(4, "little")  # the first chunk states another size
    with pytest.raises(ValueError, match="do not lie where"):
        index_frame(bytes(frame))


def test_a_box_outside_is_refused(tmp_path: Path) -> None:
    manifest = write_sample(tmp_path, {"image": encode(np.ones((1, 4, 4, 4), "<i2"), (1, 4, 4, 4))})
    manifest.columns["shape"] = np.array([[1, 4, 4, 4]])
    reader = ShardReader(tmp_path, manifest)
    for channel, origin, extent in (
        (0, (0, 0, 1), (4, 4, 4)),
        (1, (0, 0, 0), (1, 1, 1)),
        (0, (-1, 0, 0), (1, 1, 1)),
    ):
        with pytest.raises(ValueError, match="does not lie inside"):
            reader.read_box(0, "image", channel, origin, extent)
    with pytest.raises(ValueError, match="no member"):
        reader.read_box(0, "json", 0, (0, 0, 0), (1, 1, 1))


@pytest.fixture
def textured(tmp_path: Path) -> tuple[np.ndarray, OneSample, Path]:
    array = np.random.default_rng(0).normal(0, 30, (2, 24, 20, 28)).astype("<i2")
    array[0, :8, :8, :8] = 0
    seg = (array[:1] > 20).astype("u1")
    manifest = write_sample(
        tmp_path, {"image": encode(array, (1, 8, 8, 8)), "seg": encode(seg, (1, 8, 8, 8))}
    )
    return array, manifest, tmp_path / "shard.tar"


def test_every_flipped_byte_that_is_used_is_noticed(textured: tuple[np.ndarray, OneSample, Path]) -> None:
    """Any flip either raises or lies outside the bytes of the box; the voxels served are right in both
    cases.
    """
    array, manifest, path = textured
    clean = path.read_bytes()
    generator = np.random.default_rng(1)
    index = read_index(clean[slice(*_span(manifest, "idx"))], KEY)["image"]
    start, size = (int(manifest.column(f"image_{w}")[0]) for w in ("offset", "size"))
    idx_start, idx_end = _span(manifest, "idx")
    noticed = 0
    for trial in range(600):
        where = (
            generator.integers(idx_start, idx_end)
            if trial % 3 == 0
            else generator.integers(start, start + size)
        )
        damaged = bytearray(clean)
        damaged[where] ^= 1 << int(generator.integers(8))
        path.write_bytes(damaged)
        reader = ShardReader(manifest.root, manifest)
        chunks = index.chunks[index.chunks["special"] == 0]
        relative = int(where) - start
        in_chunk = bool(
            ((chunks["offset"] <= relative) & (relative < chunks["offset"] + chunks["size"])).any()
        )
        if in_chunk or idx_start <= where < idx_end:
            noticed += 1
            with pytest.raises(DamagedSample) as caught:
                reader.read_box(0, "image", None, (0, 0, 0), array.shape[1:])
            assert (caught.value.member == "idx") == (where >= idx_start)
        else:  # Blosc2's header and offset table are not used by a read
            np.testing.assert_array_equal(
                reader.read_box(0, "image", None, (0, 0, 0), array.shape[1:]), array
            )
    assert noticed > 500


def test_a_flip_elsewhere_does_not_stop_a_read(textured: tuple[np.ndarray, OneSample, Path]) -> None:
    array, manifest, path = textured
    data = bytearray(path.read_bytes())
    index = read_index(bytes(data[slice(*_span(manifest, "idx"))]), KEY)["image"]
    last = index.chunks[-1]
    data[int(manifest.column("image_offset")[0]) + int(last["offset"]) + 40] ^= 1
    path.write_bytes(data)
    reader = ShardReader(manifest.root, manifest)
    np.testing.assert_array_equal(reader.read_box(0, "image", 0, (0, 0, 0), (8, 8, 9)), array[0, :8, :8, :9])
    with pytest.raises(DamagedSample) as caught:
        reader.read_box(0, "image", 1, (23, 19, 27), (1, 1, 1))
    assert caught.value.chunk == len(index.chunks) - 1
    copy = pickle.loads(pickle.dumps(caught.value))  # as a loader's worker hands it over
    assert (copy.key, copy.chunk, str(copy)) == (KEY, caught.value.chunk, str(caught.value))


def test_truncated_and_missing_shards_are_noticed(textured: tuple[np.ndarray, OneSample, Path]) -> None:
    array, manifest, path = textured
    clean = path.read_bytes()
    image_start, image_end = _span(manifest, "image")
    reader = ShardReader(manifest.root, manifest)
    reader.read_box(
        0, "image", 0, (0, 0, 0), (1, 1, 1)
    )  # the index is known, then the file shrinks under the open descriptor
    for length in (image_end - 700, image_start + 300, 10, 0):
        os.truncate(path, length)
        with pytest.raises(DamagedSample):
            reader.read_box(0, "image", None, (0, 0, 0), array.shape[1:])
        path.write_bytes(clean)
    path.unlink()
    with pytest.raises(DamagedSample, match="missing"):
        ShardReader(manifest.root, manifest).read_box(0, "seg", 0, (0, 0, 0), (1, 1, 1))


def test_another_samples_index_is_refused(textured: tuple[np.ndarray, OneSample, Path]) -> None:
    _, manifest, path = textured
    data = path.read_bytes()[slice(*_span(manifest, "idx"))]
    with pytest.raises(IndexDamaged, match="another sample"):
        read_index(data, "0" * 16)
    with pytest.raises(IndexDamaged):
        read_index(data[:-1], KEY)
    with pytest.raises(IndexDamaged):
        read_index(b"", KEY)


def test_a_remote_root_reads_the_same(textured: tuple[np.ndarray, OneSample, Path]) -> None:
    import fsspec

    array, manifest, path = textured
    fsspec.filesystem("memory").pipe("/medfm-test/shard.tar", path.read_bytes())
    reader = ShardReader("memory://medfm-test", manifest)
    np.testing.assert_array_equal(
        reader.read_box(0, "image", 1, (3, 4, 5), (9, 10, 11)), array[1, 3:12, 4:14, 5:16]
    )
    with pytest.raises(DamagedSample):
        ShardReader("memory://elsewhere", manifest).read_box(0, "image", 1, (3, 4, 5), (1, 1, 1))


def test_a_reader_survives_pickle_and_closing(textured: tuple[np.ndarray, OneSample, Path]) -> None:
    array, manifest, _ = textured
    reader = ShardReader(manifest.root, manifest)
    reader.read_box(0, "image", 0, (0, 0, 0), (1, 1, 1))
    reader.close()
    for copy in (reader, pickle.loads(pickle.dumps(reader))):
        np.testing.assert_array_equal(
            copy.read_box(0, "image", 0, (1, 2, 3), (5, 6, 7)), array[0, 1:6, 2:8, 3:10]
        )


def test_frames_repeat_and_open_in_blosc2() -> None:
    array = np.random.default_rng(3).normal(0, 50, (1, 40, 40, 40)).astype("<i2")
    frames = {encode(array, (1, 32, 32, 32)) for _ in range(4)}
    assert len(frames) == 1
    frame = frames.pop()
    np.testing.assert_array_equal(decode(frame), array)
    opened = blosc2.ndarray_from_cframe(frame)
    assert opened.chunks == opened.blocks == (1, 32, 32, 32)


@pytest.mark.parametrize(
    ("kind", "axes", "shape", "want"),
    [
        ("volume", (0, 1, 2), (2, 100, 20, 50), (1, 32, 20, 32)),
        ("slab", (2, 0, 1), (1, 256, 40, 20), (1, 64, 40, 8)),
        ("planar", (0, 1, 2), (1, 1, 500, 90), (1, 1, 128, 90)),
    ],
)
def test_chunks_follow_the_geometry(
    kind: str, axes: tuple[int, ...], shape: tuple[int, ...], want: tuple[int, ...]
) -> None:
    assert chunk_shape(shape, kind, axes) == want


@settings(max_examples=80, deadline=None)
@given(
    hnp.arrays(
        st.sampled_from([np.uint8, np.int16, np.uint16, np.int32]),
        hnp.array_shapes(min_dims=4, max_dims=4, max_side=6),
        elements={"min_value": 0, "max_value": 255},
    ),
    st.integers(-32768, 32000),
    st.sampled_from([(1.0, 0.0), (0.5, -1024.0), (2.0, 10.0)]),
)
def test_integers_are_stored_exactly(array: np.ndarray, shift: int, scale: tuple[float, float]) -> None:
    array = array.astype(np.int32) + shift
    stored = quantise(array, [scale[0]] * len(array), [scale[1]] * len(array))
    assert stored.voxels.dtype == np.int16
    assert stored.voxels.min() > INVALID
    assert stored.max_error == 0.0
    real = stored.voxels * np.array(stored.slope).reshape(-1, 1, 1, 1)
    np.testing.assert_array_equal(
        real + np.array(stored.intercept).reshape(-1, 1, 1, 1), array * scale[0] + scale[1]
    )


def test_the_whole_ranges_of_16_bits() -> None:
    for dtype in (np.int16, np.uint16):
        info = np.iinfo(dtype)
        near = np.arange(info.min + 1, info.max + 1, dtype=np.int64).astype(dtype).reshape(1, 1, 1, -1)
        stored = quantise(near, (1.0,), (0.0,))
        assert stored.max_error == 0
        assert stored.voxels.min() > INVALID
        np.testing.assert_array_equal(stored.voxels * stored.slope[0] + stored.intercept[0], near)
        every = np.arange(info.min, info.max + 1, dtype=np.int64).astype(dtype).reshape(1, 1, 1, -1)
        stored = quantise(every, (1.0,), (0.0,))  # one value too many: half a step of error, said so
        assert 0 < stored.max_error <= 0.51
        assert stored.voxels.min() > INVALID


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.floats(1e-3, 1e3), st.floats(-1e4, 1e4), st.integers(2, 4000))
def test_a_scaled_lattice_of_floats_is_found(seed: int, step: float, start: float, levels: int) -> None:
    counts = np.random.default_rng(seed).integers(0, levels, (1, 9, 9, 9))
    source = (counts * np.float32(step)).astype(np.float32)
    stored = quantise(source, (1.0,), (start,))
    rebuilt = stored.voxels * np.float64(stored.slope[0]) + (stored.intercept[0] - start)
    if stored.max_error == 0.0:
        np.testing.assert_allclose(rebuilt, source, rtol=1e-6, atol=1e-6 * step)
    else:
        span = float(source.max() - source.min())
        assert stored.max_error <= max(span / 65534, 1e-6 * span)
    assert (
        stored.max_error < 1e-3 * step
    )  # lattice positions, not 65,535 even steps that miss them by a fraction


@settings(max_examples=60, deadline=None)
@given(
    hnp.arrays(
        st.sampled_from([np.float32, np.float64]),
        (1, 3, 4, 5),
        elements=st.floats(-1e6, 1e6, width=32) | st.just(np.nan) | st.just(np.inf),
    ),
    st.booleans(),
)
def test_the_recorded_error_is_the_largest(array: np.ndarray, exact: bool) -> None:
    stored = quantise(array, (1.5,), (-3.0,), exact=exact)
    bad = invalid_of(stored.voxels)
    np.testing.assert_array_equal(bad, ~np.isfinite(array))
    if bad.all():
        return
    rebuilt = stored.voxels[~bad] * np.float64(stored.slope[0]) + stored.intercept[0]
    real = array[~bad].astype(np.float64) * 1.5 - 3.0
    error = float(np.abs(rebuilt - real).max())
    slack = 1e-6 * max(1.0, float(np.abs(real).max()))  # "exact" is equality as float32
    assert error <= stored.max_error + slack
    assert stored.max_error <= error + slack
    if exact and stored.voxels.dtype == np.float32:
        assert error <= slack


def test_invalid_voxels_stay_invalid() -> None:
    array = np.full((1, 2, 2, 2), -32768, np.int16)
    array[0, 0] = 5
    stored = quantise(array, (1.0,), (0.0,), array == -32768)
    np.testing.assert_array_equal(stored.voxels == INVALID, array == -32768)
    assert (stored.voxels[0, 0] * stored.slope[0] + stored.intercept[0] == 5).all()
    assert (quantise(array, (1.0,), (0.0,), np.ones(array.shape, bool)).voxels == INVALID).all()
    two = np.stack([np.full((1, 1, 2), 4, np.float32), np.array([[[0.1, 7.3]]], np.float32)])
    both = quantise(two, (1.0, 1.0), (0.0, 0.0), exact=True)
    assert both.voxels.shape == two.shape


@settings(max_examples=40, deadline=None)
@given(
    st.tuples(*[st.integers(1, 9)] * 3),
    st.tuples(*[st.sampled_from([1, 2, 4])] * 3),
    st.sampled_from(["<i2", "<f4"]),
    st.integers(0, 99),
)
def test_levels_are_means_of_the_valid_voxels(
    shape: tuple[int, ...], factors: tuple[int, ...], dtype: str, seed: int
) -> None:
    generator = np.random.default_rng(seed)
    array = generator.integers(-900, 3000, (2, *shape)).astype(dtype)
    array[generator.random(array.shape) < 0.3] = INVALID if dtype == "<i2" else np.nan
    got = block_mean(array, factors)
    assert got.dtype == array.dtype
    assert got.shape[1:] == level_shape(shape, factors)
    for place in np.ndindex(got.shape):
        block = array[place[0]][tuple(slice(p * f, p * f + f) for p, f in zip(place[1:], factors))]
        good = block[~invalid_of(block)]
        if not good.size:
            assert invalid_of(got[place].reshape(1))[0]
        else:
            mean = good.astype(np.float64).mean()
            assert got[place] == pytest.approx(np.rint(mean) if dtype == "<i2" else mean, rel=1e-6, abs=1e-4)


def _span(manifest: OneSample, member: str) -> tuple[int, int]:
    offset, size = (int(manifest.column(f"{member}_{what}")[0]) for what in ("offset", "size"))
    return offset, offset + size
