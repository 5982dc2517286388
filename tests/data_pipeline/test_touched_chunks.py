"""Chunks of a box: every voxel of it from one chunk, the right one; runs; single chunks decompressed."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.chunk_decoder import decode_chunk
from data_pipeline.frame_index import CHUNK, MemberIndex
from data_pipeline.storage import encode, index_frame
from data_pipeline.touched_chunks import runs, touched_chunks


@st.composite
def boxes(draw: st.DrawFn) -> tuple[MemberIndex, list[int], list[int]]:
    shape = tuple(draw(st.integers(1, 9)) for _ in range(4))
    chunk = tuple(draw(st.integers(1, n)) for n in shape)
    low = [draw(st.integers(0, n - 1)) for n in shape]
    high = [draw(st.integers(a + 1, n)) for a, n in zip(low, shape)]
    grid = tuple(-(-n // c) for n, c in zip(shape, chunk))
    records = np.zeros(int(np.prod(grid)), CHUNK)
    records["offset"] = draw(st.permutations(range(len(records))))
    index = MemberIndex("image", np.dtype("<i2"), shape, chunk, grid, 0, 0, 0, 0, 0, records)
    return index, low, high


@settings(max_examples=150, deadline=None)
@given(boxes())
def test_every_voxel_comes_from_its_own_chunk(case: tuple[MemberIndex, list[int], list[int]]) -> None:
    index, low, high = case
    number = np.arange(len(index.chunks)).reshape(index.grid)
    padded = [g * c for g, c in zip(index.grid, index.chunk)]
    place = np.arange(np.prod(padded)).reshape(padded)  # a number for every voxel, also beyond the edge
    out = np.full([b - a for a, b in zip(low, high)], -1)
    pieces = touched_chunks(index, low, high)
    for piece in pieces:
        at = tuple(int(v) for v in np.argwhere(number == piece.number)[0])
        whole = tuple(slice(p * c, p * c + c) for p, c in zip(at, index.chunk))
        assert (out[piece.target] == -1).all()
        out[piece.target] = place[whole][piece.inside]
        assert piece.offset == index.chunks["offset"][piece.number]
    np.testing.assert_array_equal(out, place[tuple(slice(a, b) for a, b in zip(low, high))])
    assert [p.number for p in pieces] == sorted({p.number for p in pieces})


@settings(max_examples=100, deadline=None)
@given(boxes(), st.integers(0, 5), st.data())
def test_runs_hold_every_piece_and_no_wide_gap(
    case: tuple[MemberIndex, list[int], list[int]], gap: int, data: st.DataObject
) -> None:
    pieces = touched_chunks(*case)
    for piece in pieces:
        piece.offset, piece.size = piece.offset * 3, data.draw(st.integers(1, 3))
    found = list(runs(pieces, gap))
    assert sorted(p.number for run in found for p in run) == [p.number for p in pieces]
    for run in found:
        for a, b in itertools.pairwise(run):
            assert 0 <= b.offset - a.offset - a.size <= gap
    for one, other in itertools.pairwise(found):
        assert other[0].offset - one[-1].offset - one[-1].size > gap
    assert list(runs([], gap)) == []


def stored(array: np.ndarray) -> memoryview:
    frame = encode(array[None], (1, *array.shape))
    record = index_frame(frame)[1][0]
    return memoryview(frame)[int(record["offset"]) : int(record["offset"]) + int(record["size"])]


def test_chunks_of_any_size_and_kind() -> None:
    g = np.random.default_rng(0)
    for side in (32, 3, 40, 1, 17, 32):
        for dtype in (np.int16, np.uint8, np.float32):
            for spread in (3, 100):
                array = (g.integers(0, spread, (side, side, 5)) + 1).astype(dtype)
                out = np.empty_like(array)
                decode_chunk(stored(array), out)
                np.testing.assert_array_equal(out, array)
    constant = np.full((9, 9, 9), 7, np.int16)
    decode_chunk(stored(constant), out := np.empty_like(constant))
    np.testing.assert_array_equal(out, constant)


def test_what_is_no_chunk_of_this_size_is_refused_and_the_next_one_read() -> None:
    array = np.random.default_rng(1).integers(0, 99, (32, 32, 32)).astype(np.int16)
    chunk, out = stored(array), np.empty_like(array)
    for bad in (chunk[:-1], chunk[:10], chunk[:0], memoryview(bytes(chunk) + b"\0"), memoryview(bytes(40))):
        with pytest.raises(ValueError, match="not a chunk"):
            decode_chunk(bad, out)
    for wrong in (np.empty((32, 32, 31), np.int16), np.empty((32, 32, 33), np.int16)):
        with pytest.raises(ValueError, match="not a chunk"):
            decode_chunk(chunk, wrong)
    noise = memoryview(bytes(chunk[:32]) + np.random.default_rng(2).bytes(len(chunk) - 32))
    with pytest.raises(RuntimeError):
        decode_chunk(noise, out)
    decode_chunk(chunk, out)
    np.testing.assert_array_equal(out, array)
