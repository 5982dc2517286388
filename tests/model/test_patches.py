"""Token and voxel order, and gathering of packed crops, against slow references."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.patches import INVALID, gather_patches, output_extent, patchify, unpatchify

SIZES = st.tuples(*[st.integers(1, 3)] * 3)
PATCHES = st.sampled_from([(8, 8, 8), (2, 16, 16), (1, 16, 16), (2, 3, 4)])


def pack(crops: list[np.ndarray], dtype: torch.dtype = torch.int16) -> tuple[torch.Tensor, torch.Tensor]:
    """Ravel crops and pad them with garbage, as the contract allows anything there."""
    room = max(crop.size for crop in crops) + 5
    voxels = torch.full((len(crops), room), 777, dtype=dtype)
    for row, crop in zip(voxels, crops):
        row[: crop.size] = torch.from_numpy(np.ascontiguousarray(crop).ravel()).to(dtype)
    return voxels, torch.tensor([crop.shape for crop in crops])


def slow_gather(crop: np.ndarray, grid: tuple, residual: tuple, flip: tuple, patch: tuple) -> tuple:
    """Reference, one output voxel at a time: values and inside on the token grid's voxels."""
    size = [g * p for g, p in zip(grid, patch)]
    count = []
    for e, r, s in zip(crop.shape, residual, size):
        count.append(min(s, sum(1 for o in range(4 * max(e, 1) + 4) if (o + 0.5) * r < e - 1e-5)))
    values, inside = np.zeros(size, np.float32), np.zeros(size, bool)
    for output in itertools.product(*map(range, count)):
        at = [n - 1 - o if f else o for o, n, f in zip(output, count, flip)]
        source = [min(max((o + 0.5) * r - 0.5, 0), e - 1) for o, r, e in zip(at, residual, crop.shape)]
        total = mass = 0.0
        for corner in itertools.product((0, 1), repeat=3):
            place, weight = [], 1.0
            for c, s, e in zip(corner, source, crop.shape):
                low = int(np.floor(s))
                place.append(min(low + c, e - 1))
                weight *= (s - low) if c else 1 - (s - low)
            value = float(crop[tuple(place)])
            if value != INVALID and np.isfinite(value):
                total, mass = total + weight * value, mass + weight
        if mass > 0.5 - 1e-6:
            values[output], inside[output] = total / mass, True
    return values, inside


@given(grid=SIZES, patch=PATCHES, channels=st.integers(1, 3))
@settings(max_examples=30, deadline=None)
def test_patchify_order_and_inverse(grid: tuple, patch: tuple, channels: int) -> None:
    size = [g * p for g, p in zip(grid, patch)]
    image = torch.arange(2 * channels * int(np.prod(size)), dtype=torch.float64).view(2, channels, *size)
    tokens = patchify(image, patch)
    number = 0
    for gz, gy, gx in itertools.product(*map(range, grid)):
        (z, y, x), (pz, py, px) = (gz * patch[0], gy * patch[1], gx * patch[2]), patch
        block = image[:, :, z : z + pz, y : y + py, x : x + px]
        assert torch.equal(tokens[:, number], block.reshape(2, -1))
        number += 1
    assert tokens.shape[1] == number
    assert torch.equal(unpatchify(tokens, grid, patch, channels), image)


@pytest.mark.parametrize("axes", list(itertools.permutations(range(3))))
@pytest.mark.parametrize(
    ("patch", "grid"), [((8, 8, 8), (2, 3, 1)), ((2, 16, 16), (3, 1, 2)), ((1, 16, 16), (1, 2, 3))]
)
@pytest.mark.parametrize("flip", [(True, False, False), (False, True, True), (True, True, True)])
def test_a_flipped_anisotropic_volume_comes_back_exactly(
    flip: tuple, patch: tuple, grid: tuple, axes: tuple
) -> None:
    """From patient order to the stem's, to tokens, flipped on the way, and back, each voxel its own value."""
    size = [g * p for g, p in zip(grid, patch)]
    stem = torch.from_numpy(np.random.default_rng(0).permutation(int(np.prod(size))).reshape(size))
    patient = stem.permute(*np.argsort(axes)).to(torch.int16)  # stem axis i lies along patient axis axes[i]
    crop = patient.permute(*axes)
    assert torch.equal(crop, stem.to(torch.int16))
    away = [axis for axis in range(3) if flip[axis]]
    tokens = patchify(crop.flip(away)[None, None], patch)
    back = unpatchify(tokens, grid, patch)[0, 0].flip(away).permute(*np.argsort(axes))
    assert torch.equal(back, patient)
    raw, inside = gather_patches(
        crop.reshape(1, -1), torch.tensor([size]), torch.tensor([grid]), torch.ones(1, 3),
        torch.tensor([flip]), patch, int(np.prod(grid)),
    )  # fmt: skip
    assert inside.all()
    assert torch.equal(raw, tokens.float())


def test_patchify_refuses_a_remainder() -> None:
    with pytest.raises(ValueError, match="multiple of patch"):
        patchify(torch.zeros(1, 1, 9, 8, 8), (8, 8, 8))


@given(data=st.data(), patch=PATCHES, dtype=st.sampled_from([torch.int16, torch.float32]))
@settings(max_examples=40, deadline=None)
def test_without_resampling_it_is_patchify_of_the_flipped_padded_crop(
    data: st.DataObject, patch: tuple, dtype: torch.dtype
) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    capacity, crops, grids, flips = 0, [], [], []
    for _ in range(data.draw(st.integers(1, 3))):
        grid = data.draw(SIZES)
        extent = [
            data.draw(st.integers(1, g * p + 4)) for g, p in zip(grid, patch)
        ]  # may reach past the grid
        crops.append(rng.integers(-2000, 3000, extent))
        grids.append(grid)
        flips.append(data.draw(st.tuples(*[st.booleans()] * 3)))
        capacity = max(capacity, int(np.prod(grid)))
    capacity += data.draw(st.integers(0, 3))
    voxels, extent = pack(crops, dtype)
    raw, inside = gather_patches(
        voxels, extent, torch.tensor(grids), torch.ones(len(crops), 3), torch.tensor(flips), patch, capacity
    )
    assert raw.dtype == torch.float32
    assert raw.shape == inside.shape == (len(crops), capacity, int(np.prod(patch)))
    for crop, grid, flip, found, there in zip(crops, grids, flips, raw, inside):
        size = [g * p for g, p in zip(grid, patch)]
        kept = crop[tuple(slice(s) for s in size)]
        kept = np.flip(kept, [a for a in range(3) if flip[a]])
        padding = [(0, s - k) for s, k in zip(size, kept.shape)]
        count = int(np.prod(grid))
        for want, have in (
            (np.pad(kept, padding), found),
            (np.pad(np.ones(kept.shape), padding), there),
        ):
            expected = patchify(torch.from_numpy(want.astype(np.float32))[None, None], patch)[0]
            assert torch.equal(have[:count].float(), expected)
        assert not there[count:].any()
        assert not found[count:].any()


@given(data=st.data(), patch=st.sampled_from([(2, 3, 4), (1, 4, 4), (3, 3, 3)]))
@settings(max_examples=25, deadline=None)
def test_resampling_against_a_slow_reference(data: st.DataObject, patch: tuple) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    grid = data.draw(SIZES)
    residual = data.draw(st.tuples(*[st.floats(0.5, 2.0)] * 3))
    flip = data.draw(st.tuples(*[st.booleans()] * 3))
    extent = [data.draw(st.integers(1, int(g * p * r) + 2)) for g, p, r in zip(grid, patch, residual)]
    crop = rng.integers(-1000, 1000, extent)
    crop[rng.random(extent) < data.draw(st.sampled_from([0.0, 0.3, 1.0]))] = INVALID
    voxels, shape = pack([crop])
    capacity = int(np.prod(grid)) + 1
    raw, inside = gather_patches(
        voxels, shape, torch.tensor([grid]), torch.tensor([residual], dtype=torch.float64),
        torch.tensor([flip]), patch, capacity, resample=True,
    )  # fmt: skip
    values, there = slow_gather(crop, grid, residual, flip, patch)
    expected = patchify(torch.from_numpy(values)[None, None], patch)[0]
    mask = patchify(torch.from_numpy(there)[None, None], patch)[0]
    assert torch.equal(inside[0, :-1], mask)
    torch.testing.assert_close(raw[0, :-1], expected, rtol=1e-4, atol=0.05)
    assert not inside[0, -1].any()


def test_the_resampling_path_copies_exactly_at_residual_one() -> None:
    rng = np.random.default_rng(3)
    crop = rng.integers(-1000, 1000, (9, 14, 6))
    crop[rng.random(crop.shape) < 0.2] = INVALID
    voxels, extent = pack([crop])
    common = (
        voxels,
        extent,
        torch.tensor([[2, 2, 1]]),
        torch.ones(1, 3),
        torch.tensor([[True, False, True]]),
    )
    fast = gather_patches(*common, (8, 8, 8), 4, resample=False)
    slow = gather_patches(*common, (8, 8, 8), 4, resample=True)
    assert torch.equal(fast[0], slow[0])
    assert torch.equal(fast[1], slow[1])
    assert 0 < fast[1].sum() < crop.size


def test_invalid_voxels_neither_bleed_nor_count() -> None:
    """A constant volume with holes stays constant wherever it is there, in both storage types."""
    crop = np.full((8, 8, 8), 100.0)
    crop[:, :, 3:] = np.nan
    residual = torch.full((1, 3), 0.75)
    for dtype in (torch.int16, torch.float32):
        stored = np.where(np.isnan(crop), INVALID, crop) if dtype == torch.int16 else crop
        voxels, extent = pack([stored], dtype)
        raw, inside = gather_patches(
            voxels,
            extent,
            torch.ones(1, 3, dtype=torch.int64),
            residual,
            torch.zeros(1, 3, dtype=torch.bool),
            (8, 8, 8),
            1,
        )
        assert set(raw[inside].tolist()) == {100.0}
        columns = inside.view(8, 8, 8)[0, 0]
        assert columns.tolist() == [True] * 4 + [False] * 4  # centres at 0.375 + 0.75 o < 3 in source voxels


def test_only_some_tokens() -> None:
    rng = np.random.default_rng(0)
    crops = [rng.integers(-500, 500, (12, 20, 9)), rng.integers(-500, 500, (16, 16, 16))]
    voxels, extent = pack(crops)
    grid = torch.tensor([[2, 3, 2], [2, 2, 2]])
    residual, flip = (
        torch.tensor([[1.0, 1.3, 1.0], [0.8, 1.0, 1.0]]),
        torch.tensor([[True, False, False]] * 2),
    )
    every = gather_patches(voxels, extent, grid, residual, flip, (8, 8, 8), 14)
    chosen = torch.tensor([[11, 0, 5], [7, 13, 2]])  # 13 lies past the second grid
    some = gather_patches(voxels, extent, grid, residual, flip, (8, 8, 8), 14, tokens=chosen)
    for one, other in zip(every, some):
        assert torch.equal(one.gather(1, chosen[..., None].expand(-1, -1, 512)), other)


def test_output_extent_counts_centres_inside() -> None:
    found = output_extent(
        torch.tensor([[10, 10, 1]]), torch.tensor([[9, 9, 9]]), torch.tensor([[0.5, 1.5, 1.0]]), (8, 8, 8)
    )
    assert found.tolist() == [[20, 7, 1]]  # 1.5: centres 0.75, 2.25, ..., 9.75


def test_other_storage_types_are_refused() -> None:
    ones = torch.ones(1, 3, dtype=torch.int64)
    with pytest.raises(TypeError, match="int16 or float32"):
        gather_patches(torch.zeros(1, 8, dtype=torch.float64), ones, ones, ones, ones > 1, (2, 2, 2), 1)
