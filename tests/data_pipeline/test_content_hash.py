"""The content hash depends on decoded values and grid, and on nothing else."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations, product

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from data_pipeline.content_hash import GRID_DECIMALS, content_hash
from data_pipeline.volume import Channel, Volume

MR = Channel("MR", "MR", "arbitrary")


def volume(voxels: np.ndarray, slope: float = 1.0, intercept: float = 0.0, **changes: object) -> Volume:
    c = len(voxels)
    made = Volume.on_grid(voxels, (MR,) * c, np.diag([0.7, 0.7, 3.0, 1.0]), slope=(slope,) * c,
                          intercept=(intercept,) * c)  # fmt: skip
    return replace(made, **changes)


def slow(volume: Volume) -> tuple[str, str]:
    """The definition, in float64 throughout and all at once."""
    real = np.stack([volume.real(n) for n in range(len(volume.voxels))])
    with np.errstate(over="ignore"):
        real32 = real.astype("<f4")
    real32[real32 == 0] = 0
    real32[np.isnan(real32)] = np.nan
    values = repr(volume.voxels.shape).encode() + real32.tobytes()
    grid = np.round(volume.affine, GRID_DECIMALS)
    grid[grid == 0] = 0
    whole = values + grid.astype("<f8").tobytes()
    return xxhash.xxh3_128_hexdigest(values), xxhash.xxh3_128_hexdigest(whole)


DTYPES = [np.uint8, np.int8, np.int16, np.uint16, np.int32, np.uint32, np.int64, np.float32, np.float64]
SCALES = [(1.0, 0.0), (1.0, -1024.0), (1.0, 0.25), (2.0, 0.0), (-1.0, 7.0), (0.3, -0.1), (1.0, 2.0**24)]


@settings(max_examples=150, deadline=None)
@given(st.data(), st.sampled_from(DTYPES), st.sampled_from(SCALES), st.booleans())
def test_the_fast_ways_equal_the_definition(
    data: st.DataObject, dtype: type, scale: tuple[float, float], masked: bool
) -> None:
    shape = data.draw(hnp.array_shapes(min_dims=4, max_dims=4, max_side=4))
    elements = st.floats(-(2.0**100), 2.0**100, width=32) if np.dtype(dtype).kind == "f" else None
    voxels = data.draw(hnp.arrays(dtype, shape, elements=elements))
    invalid = data.draw(hnp.arrays(bool, shape)) if masked else None
    made = volume(voxels, *scale, invalid=invalid)
    assert content_hash(made) == slow(made)


@settings(max_examples=100, deadline=None)
@given(
    hnp.arrays(np.int16, (2, 3, 4, 5), elements=st.integers(0, 255)),
    st.sampled_from([(1.0, 0.0), (1.0, -100.0), (0.5, 3.0), (-2.0, 10.0)]),
)
def test_equal_values_hash_alike_from_any_dtype_and_scaling(
    real: np.ndarray, scale: tuple[float, float]
) -> None:
    """Whole numbers and their halves, stored as integers, as floats, and as integers with another rescale."""
    slope, intercept = scale
    expected = content_hash(volume(real * slope + intercept))
    for dtype in DTYPES:
        if dtype != np.int8:
            assert content_hash(volume(real.astype(dtype), slope, intercept)) == expected
    assert content_hash(volume((real * slope + intercept).astype(np.float32))) == expected
    assert content_hash(volume((real.astype(np.int32) + 300), slope, intercept - 300 * slope)) == expected
    assert content_hash(volume(np.asfortranarray(real), slope, intercept)) == expected


def test_minus_zero_is_zero() -> None:
    zeros = np.zeros((1, 2, 2, 2), np.float32)
    assert content_hash(volume(-zeros)) == content_hash(volume(zeros.astype(np.int16)))
    assert content_hash(volume(zeros.astype(np.uint8), -1.0)) == content_hash(volume(zeros))


@given(hnp.arrays(np.int16, (1, 2, 3, 4)), st.integers(0, 23), st.integers(1, 99))
@settings(max_examples=60, deadline=None)
def test_one_other_voxel_is_another_hash(voxels: np.ndarray, place: int, change: int) -> None:
    other = voxels.astype(np.int32)
    other.flat[place] += change
    mine, theirs = content_hash(volume(voxels)), content_hash(volume(other))
    assert mine[0] != theirs[0]
    assert mine[1] != theirs[1]


def test_what_an_invalid_voxel_holds_does_not_count_but_where_it_is_does() -> None:
    voxels = np.arange(24, dtype=np.int16).reshape(1, 2, 3, 4)
    invalid = voxels > 20
    filled = np.where(invalid, -2000, voxels)
    plain = content_hash(volume(voxels, invalid=invalid))
    assert content_hash(volume(filled, invalid=invalid)) == plain
    assert content_hash(volume(voxels, invalid=voxels > 19)) != plain
    assert content_hash(volume(voxels)) != plain
    assert content_hash(volume(voxels, invalid=np.zeros_like(invalid))) == content_hash(volume(voxels))


def test_the_grid_counts_to_a_hundredth_of_a_millimetre_and_only_in_the_second_hash() -> None:
    voxels = np.arange(24, dtype=np.int16).reshape(1, 2, 3, 4)
    here = volume(voxels)
    moved = here.affine.copy()
    moved[0, 3] += 0.004
    assert content_hash(replace(here, affine=moved)) == content_hash(here)
    moved[0, 3] += 1.0
    assert content_hash(replace(here, affine=moved))[0] == content_hash(here)[0]
    assert content_hash(replace(here, affine=moved))[1] != content_hash(here)[1]


def test_the_shape_counts() -> None:
    voxels = np.arange(24, dtype=np.int16)
    hashes = {content_hash(volume(voxels.reshape(s)))[0] for s in [(1, 2, 3, 4), (1, 4, 3, 2), (2, 1, 3, 4)]}
    assert len(hashes) == 3


@pytest.mark.parametrize("order", permutations(range(3)))
def test_axis_order_of_the_file_does_not_count(order: tuple[int, int, int]) -> None:
    voxels = np.random.default_rng(0).integers(-500, 500, (1, 3, 4, 5)).astype(np.int16)
    canonical = Volume.on_grid(voxels, (MR,), np.diag([1.0, 2.0, 3.0, 1.0])).to_lps()
    for signs in product((1, -1), repeat=3):
        array, affine = voxels.transpose(0, *(1 + a for a in order)), np.eye(4)
        for n in range(3):  # array axis n, counted z, y, x, is canonical axis order[n]
            step = np.diag([3.0, 2.0, 1.0])[order[n]][::-1]
            length = voxels.shape[1 + order[n]]
            affine[:3, 2 - n] = step * signs[n]
            if signs[n] < 0:
                affine[:3, 3] += step * (length - 1)
                array = np.flip(array, 1 + n)
        assert content_hash(Volume.on_grid(array, (MR,), affine).to_lps()) == content_hash(canonical)
