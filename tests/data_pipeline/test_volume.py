"""Reorientation and coordinates of `Volume`, against SimpleITK."""

from __future__ import annotations

from itertools import permutations, product

import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.volume import Channel, Volume, corner_distance, nearest_lps

SHAPE = (3, 4, 5)  # z, y, x
MR = Channel("MR", "MR", "arbitrary")
AXIS_DIRECTIONS = [
    np.eye(3)[:, order] * signs
    for order in permutations(range(3))
    for signs in product((1.0, -1.0), repeat=3)
]


def rotation(x: float, y: float, z: float) -> np.ndarray:
    cx, sx, cy, sy, cz, sz = np.cos(x), np.sin(x), np.cos(y), np.sin(y), np.cos(z), np.sin(z)
    return (
        np.array([[cz, -sz, 0], [sz, cz, 0], [0, 0, 1]])
        @ np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
        @ np.array([[1, 0, 0], [0, cx, -sx], [0, sx, cx]])
    )


def volume_of(
    direction: np.ndarray, spacing_xyz=(0.7, 1.3, 2.9), origin=(11.0, -7.0, 3.5), channels: int = 2
) -> Volume:
    affine = np.eye(4)
    affine[:3, :3] = direction * np.array(spacing_xyz)
    affine[:3, 3] = origin
    size = channels * int(np.prod(SHAPE))
    voxels = np.arange(size, dtype=np.int16).reshape(channels, *SHAPE)
    invalid = np.zeros(voxels.shape, bool)
    invalid[0, 0, 0, 0] = True
    return Volume.on_grid(voxels, (MR,) * channels, affine, invalid=invalid)


def sitk_of(volume: Volume) -> sitk.Image:
    image = sitk.GetImageFromArray(volume.voxels[0])
    spacing = np.linalg.norm(volume.affine[:3, :3], axis=0)
    image.SetSpacing(spacing.tolist())
    image.SetOrigin(volume.affine[:3, 3].tolist())
    image.SetDirection((volume.affine[:3, :3] / spacing).ravel().tolist())
    return image


tilts = st.tuples(*[st.integers(-3000, 3000).map(lambda n: n / 10000)] * 3)


@settings(max_examples=150, deadline=None)
@given(number=st.integers(0, 47), tilt=tilts)
def test_to_lps_is_what_simpleitk_does_and_comes_back(number: int, tilt: tuple[float, float, float]) -> None:
    source = volume_of(rotation(*tilt) @ AXIS_DIRECTIONS[number])
    canonical = source.to_lps()
    reference = sitk.DICOMOrient(sitk_of(source), "LPS")
    np.testing.assert_array_equal(canonical.voxels[0], sitk.GetArrayFromImage(reference))
    np.testing.assert_allclose(canonical.affine[:3, 3], reference.GetOrigin(), atol=1e-9)
    np.testing.assert_allclose(canonical.spacing, reference.GetSpacing()[::-1], rtol=1e-12)
    np.testing.assert_allclose(canonical.affine, sitk_affine(reference), atol=1e-9)
    np.testing.assert_array_equal(canonical.to_source(canonical.voxels), source.voxels)
    np.testing.assert_array_equal(canonical.to_source(canonical.invalid[0]), source.invalid[0])
    np.testing.assert_array_equal(canonical.from_source(source.voxels), canonical.voxels)
    assert canonical.source_shape == source.shape
    assert canonical.voxels.flags.c_contiguous


def sitk_affine(image: sitk.Image) -> np.ndarray:
    affine = np.eye(4)
    affine[:3, :3] = np.array(image.GetDirection()).reshape(3, 3) * np.array(image.GetSpacing())
    affine[:3, 3] = image.GetOrigin()
    return affine


def test_every_axis_order_gives_the_same_canonical_grid() -> None:
    """One object stored in all 48 ways: the same voxels in the same places after `to_lps`."""
    reference = volume_of(np.eye(3), spacing_xyz=(1.0, 2.0, 3.0), origin=(5.0, 6.0, 7.0))
    seen = set()
    for direction in AXIS_DIRECTIONS:
        order = tuple(
            int(np.argmax(np.abs(direction[:, n]))) for n in range(3)
        )  # patient axis of image x, y, z
        array = reference.voxels.transpose(0, *(1 + 2 - order[2 - n] for n in range(3)))
        affine = np.eye(4)
        affine[:3, 3] = reference.affine[:3, 3]
        for n in range(3):
            step = reference.affine[:3, order[n]]
            sign = direction[order[n], n]
            affine[:3, n] = step * sign
            if sign < 0:
                array = np.flip(array, 3 - n)
                affine[:3, 3] += step * (array.shape[3 - n] - 1)
        canonical = Volume.on_grid(array, (MR,) * 2, affine).to_lps()
        np.testing.assert_array_equal(canonical.voxels, reference.voxels)
        np.testing.assert_allclose(canonical.affine, reference.affine, atol=1e-12)
        seen.add((canonical.axes, canonical.flips))
    assert len(seen) == 48


@settings(max_examples=100, deadline=None)
@given(
    number=st.integers(0, 47),
    tilt=tilts,
    index=st.tuples(st.integers(0, 4), st.integers(0, 3), st.integers(0, 2)),
)
def test_index_and_mm_agree_with_simpleitk(number: int, tilt: tuple, index: tuple[int, int, int]) -> None:
    volume = volume_of(rotation(*tilt) @ AXIS_DIRECTIONS[number])
    image = sitk_of(volume)
    point = volume.lps_mm_of_index(index)
    np.testing.assert_allclose(point, image.TransformIndexToPhysicalPoint(index), atol=1e-9)
    assert tuple(np.rint(volume.index_of_lps_mm(point)).astype(int)) == image.TransformPhysicalPointToIndex(
        point.tolist()
    )
    off = point + 0.2
    np.testing.assert_allclose(
        volume.index_of_lps_mm(off), image.TransformPhysicalPointToContinuousIndex(off.tolist()), atol=1e-9
    )


def test_one_point_is_the_same_voxel_before_and_after() -> None:
    for direction in AXIS_DIRECTIONS:
        source = volume_of(rotation(0.1, -0.2, 0.15) @ direction)
        canonical = source.to_lps()
        i, j, k = np.rint(canonical.index_of_lps_mm(source.lps_mm_of_index((4, 1, 2)))).astype(int)
        assert canonical.voxels[0, k, j, i] == source.voxels[0, 2, 1, 4]


def test_nearest_lps_prefers_the_axes_as_they_are() -> None:
    assert nearest_lps(np.eye(4)) == ((0, 1, 2), (False, False, False))
    assert nearest_lps(np.diag([-1.0, -1.0, 1.0, 1.0])) == ((0, 1, 2), (False, True, True))


def test_real_values_are_scaled_per_channel_and_nan_where_invalid() -> None:
    volume = Volume.on_grid(
        np.full((2, 1, 1, 2), 4, np.int16), (MR, MR), np.eye(4), slope=(0.5, 2.0), intercept=(1.0, -3.0),
        invalid=np.array([[[[True, False]]], [[[False, False]]]]),
    )  # fmt: skip
    assert np.isnan(volume.real(0)[0, 0, 0])
    assert volume.real(0)[0, 0, 1] == 3.0
    assert volume.real(1)[0, 0, 0] == 5.0


def test_corner_distance_counts_voxels_of_the_first_grid() -> None:
    a, b = np.diag([2.0, 1.0, 1.0, 1.0]), np.diag([2.0, 1.0, 1.0, 1.0])
    b[0, 3] = 1.0
    assert corner_distance(a, b, SHAPE) == pytest.approx(0.5)
    b = np.diag([2.0, 1.01, 1.0, 1.0])
    assert corner_distance(a, b, (2, 100, 2)) == pytest.approx(0.995)


def test_arrays_on_another_grid_are_refused() -> None:
    volume = volume_of(AXIS_DIRECTIONS[17]).to_lps()
    with pytest.raises(ValueError, match="not on the volume's grid"):
        volume.to_source(np.zeros((2, 2, 2)))
