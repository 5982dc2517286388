"""Where tokens are, in mm along the patient's axes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.patches import gather_patches, token_centres

VOLUME = torch.tensor([[0, 1, 2]])


def centres(grid: tuple, start: tuple, spacing: tuple, patch: tuple, axes: tuple = (0, 1, 2)) -> torch.Tensor:
    return token_centres(
        torch.tensor([grid]), torch.tensor([start]), torch.tensor([spacing]), patch, torch.tensor([axes])
    )[0]


def test_the_rule_in_numbers() -> None:
    found = centres((1, 2, 1), (0.0, 0.0, 0.0), (1.0, 2.0, 0.5), (8, 8, 8))
    # voxel coordinates 3.5, (3.5, 11.5), 3.5 from voxel 0's centre, which lies half a voxel from the corner
    assert found.tolist() == [[4.0, 8.0, 2.0], [4.0, 24.0, 2.0]]


@given(
    grid=st.tuples(*[st.integers(1, 4)] * 3),
    spacing=st.tuples(*[st.floats(0.3, 6.0)] * 3),
    start=st.tuples(*[st.floats(0, 400)] * 3),
    patch=st.sampled_from([(8, 8, 8), (2, 16, 16), (1, 16, 16)]),
    axes=st.permutations([0, 1, 2]),
)
@settings(max_examples=40, deadline=None)
def test_half_the_spacing_gives_eight_centres_around_each(
    grid: tuple, spacing: tuple, start: tuple, patch: tuple, axes: list
) -> None:
    coarse = centres(grid, start, spacing, patch, tuple(axes)).view(*grid, 3)
    double = tuple(2 * g for g in grid)
    fine = centres(double, start, tuple(s / 2 for s in spacing), patch, tuple(axes))
    z, y, x = grid
    mean = fine.view(z, 2, y, 2, x, 2, 3).mean((1, 3, 5))
    torch.testing.assert_close(mean, coarse, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("axes", [(0, 1, 2), (2, 0, 1), (1, 0, 2), (2, 1, 0)])
@pytest.mark.parametrize("residual", [(1.0, 1.0, 1.0), (1.0, 0.5, 1.5)])
def test_centres_are_where_the_voxels_are(axes: tuple, residual: tuple) -> None:
    """A volume whose values are patient coordinates: the mean of a token's voxels is its centre."""
    patch, grid = (2, 4, 4), (3, 4, 3)
    voxel = np.array((0.7, 1.1, 3.0))  # source voxel, stem order
    origin = np.array((4, 1, 2))  # crop origin in source voxels, stem order
    shape = [int(g * p * r) for g, p, r in zip(grid, patch, residual)]
    where = [(origin[i] + np.arange(shape[i]) + 0.5) * voxel[i] for i in range(3)]
    mesh = np.meshgrid(*where, indexing="ij")
    found = token_centres(
        torch.tensor([grid]),
        torch.tensor((origin * voxel)[None]),
        torch.tensor((voxel * residual)[None]),
        patch,
        torch.tensor([axes]),
    )[0]
    for axis in range(3):  # stem axis, which is patient axis axes[axis]
        voxels = torch.from_numpy(mesh[axis].astype(np.float32).reshape(1, -1))
        raw, inside = gather_patches(
            voxels, torch.tensor([shape]), torch.tensor([grid]), torch.tensor([residual]),
            torch.zeros(1, 3, dtype=torch.bool), patch, 36,
        )  # fmt: skip
        assert inside.all()
        error = (raw[0].mean(1) - found[:, axes[axis]]).abs().view(grid)
        # linear interpolation is exact on coordinates but for the clamped voxel at an enlarged border
        border = 0.25 * voxel[axis] if residual[axis] < 1 else 1e-3
        assert error.max() <= border
        assert error[:, 1:-1].max() < 1e-3


def test_a_sagittal_stack_in_two_axis_orders_gives_the_same_tokens_and_centres() -> None:
    rng = np.random.default_rng(0)
    zyx = rng.integers(-900, 900, (32, 48, 6)).astype(np.int16)  # thick axis is patient x
    spacing = np.array((0.8, 0.9, 5.0))
    results = []
    for stored in ((0, 1, 2), (1, 2, 0), (2, 0, 1)):  # patient axis of each stored axis
        array = zyx.transpose(stored)
        place = [stored.index(patient) for patient in (2, 0, 1)]  # thick axis first, then z, y
        crop = array.transpose(place)
        raw, inside = gather_patches(
            torch.from_numpy(np.ascontiguousarray(crop).reshape(1, -1)), torch.tensor([crop.shape]),
            torch.tensor([[3, 2, 3]]), torch.ones(1, 3), torch.zeros(1, 3, dtype=torch.bool), (2, 16, 16), 18,
        )  # fmt: skip
        patient = torch.tensor([[stored[p] for p in place]])
        centre = token_centres(
            torch.tensor([[3, 2, 3]]), torch.zeros(1, 3), torch.tensor(spacing[patient[0].numpy()][None]),
            (2, 16, 16), patient, 18,
        )  # fmt: skip
        assert inside.all()
        results.append((raw, centre))
    for raw, centre in results[1:]:
        assert torch.equal(raw, results[0][0])
        assert torch.equal(centre, results[0][1])
    assert centre[0, 0].tolist() == pytest.approx([8 * 0.8, 8 * 0.9, 5.0])
    assert centre[0, 1].tolist() == pytest.approx([8 * 0.8, 24 * 0.9, 5.0])  # last stem axis is patient y


def test_a_flip_mirrors_content() -> None:
    """A flipped crop is a mirrored patient: content reversed within its extent, on the same regular grid."""
    crop = torch.arange(11 * 8 * 8, dtype=torch.int16).view(11, 8, 8)
    grid, flip = torch.tensor([[2, 1, 1]]), torch.tensor([[True, False, False]])
    args = (torch.tensor([[11, 8, 8]]), grid, torch.ones(1, 3))
    flipped, _ = gather_patches(crop.reshape(1, -1), *args, flip, (8, 8, 8), 2)
    mirrored, _ = gather_patches(crop.flip(0).reshape(1, -1), *args, ~flip & False, (8, 8, 8), 2)
    assert torch.equal(flipped, mirrored)


def test_chosen_tokens_and_dtype() -> None:
    common = (torch.tensor([[2, 3, 4]]), torch.zeros(1, 3), torch.ones(1, 3).double(), (8, 8, 8), VOLUME)
    every = token_centres(*common, capacity=30)
    chosen = torch.tensor([[23, 0, 7]])
    assert torch.equal(token_centres(*common, tokens=chosen), every[:, chosen[0]])
    assert every.dtype == torch.float32
    assert torch.equal(every[0, 24:], every[0, 23].expand(6, 3))
