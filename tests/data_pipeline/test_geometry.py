"""Geometry classes, levels, token grids, zoom and buffers."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.geometry import (
    PATCH,
    ZOOMED,
    TokenConfig,
    fit_grid,
    fit_scale,
    geometry_of,
    largest_box,
    level_factors,
    row_class,
    token_count,
)

needs = st.tuples(*[st.integers(1, 200)] * 3)


@pytest.mark.parametrize(
    ("shape", "spacing", "expected"),
    [
        ((1, 512, 512), (1.0, 0.2, 0.2), ("planar", (0, 1, 2))),
        ((512, 1, 512), (1.0, 1.0, 1.0), ("planar", (1, 0, 2))),
        ((30, 512, 512), (5.0, 0.7, 0.7), ("slab", (0, 1, 2))),
        ((512, 30, 512), (0.7, 5.0, 0.7), ("slab", (1, 0, 2))),
        ((512, 512, 30), (0.7, 0.7, 5.0), ("slab", (2, 0, 1))),
        ((100, 512, 512), (2.0, 0.7, 0.7), ("volume", (0, 1, 2))),
        ((100, 100, 100), (3.0, 1.0, 0.1), ("slab", (0, 1, 2))),
        ((100, 100, 100), (3.0, 2.0, 0.1), ("volume", (0, 1, 2))),
        ((100, 100, 100), (4.0, 4.0, 1.0), ("volume", (0, 1, 2))),
    ],
)
def test_class_follows_from_the_header(
    shape: tuple[int, ...], spacing: tuple[float, ...], expected: tuple[str, tuple[int, ...]]
) -> None:
    assert geometry_of(shape, spacing) == expected


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_a_slab_has_the_same_stem_spacing_in_every_axis_order(order: tuple[int, ...]) -> None:
    spacing = [(5.0, 0.7, 0.7)[a] for a in order]
    kind, axes = geometry_of((40, 40, 40), spacing)
    assert kind == "slab"
    assert [spacing[a] for a in axes] == [5.0, 0.7, 0.7]
    assert sorted(axes) == [0, 1, 2]


@pytest.mark.parametrize("spacing", [(0.0, 1.0, 1.0), (math.nan, 1.0, 1.0), (1.0, 1.0)])
def test_impossible_spacing_is_refused(spacing: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="spacing"):
        geometry_of((8, 8, 8), spacing)


def test_levels_leave_the_thick_axis_alone() -> None:
    assert level_factors("volume", (0, 1, 2)) == ((1, 1, 1), (2, 2, 2), (4, 4, 4))
    assert level_factors("slab", (1, 0, 2)) == ((1, 1, 1), (2, 1, 2), (4, 1, 4))
    assert level_factors("planar", (0, 1, 2)) == ((1, 1, 1), (1, 2, 2), (1, 4, 4))


@settings(deadline=None)
@given(needs, st.integers(1, 5000))
def test_a_grid_fits_and_nothing_could_be_added(need: tuple[int, int, int], capacity: int) -> None:
    grid = fit_grid(need, capacity)
    assert math.prod(grid) <= capacity
    assert all(1 <= g <= n for g, n in zip(grid, need))
    for axis in range(3):
        wider = [g + (a == axis) for a, g in enumerate(grid)]
        assert grid[axis] == need[axis] or math.prod(wider) > capacity


def test_grids_are_cubic_and_short_axes_leave_room() -> None:
    assert fit_grid((100, 100, 100), 4096) == (16, 16, 16)
    assert fit_grid((1, 100, 100), 4096) == (1, 64, 64)
    assert fit_grid((4, 100, 100), 4096) == (4, 32, 32)
    assert fit_grid((5, 7, 5), 256) == (5, 7, 5)


@settings(deadline=None)
@given(st.integers(1, 10000), st.integers(1, 4096))
def test_the_row_class_has_room_and_no_larger_one_has(tokens: int, slots: int) -> None:
    classes = (1, 2, 4, 8, 16)
    k = row_class(tokens, slots, classes)
    assert k == 1 or slots // k >= tokens
    assert all(slots // larger < tokens for larger in classes if larger > k)


@settings(deadline=None)
@given(
    st.tuples(*[st.integers(1, 1500)] * 3),
    st.sampled_from(list(PATCH)),
    st.integers(8, 4096),
)
def test_fit_scale_is_the_smallest_that_fits(shape: tuple[int, int, int], kind: str, capacity: int) -> None:
    def tokens(scale: float) -> int:
        zoomed = [math.ceil(n / scale - 1e-6) if z else n for n, z in zip(shape, ZOOMED[kind])]
        return token_count(zoomed, PATCH[kind])

    scale = fit_scale(shape, kind, capacity, 1.0, 6.0)
    assert 1.0 <= scale <= 6.0
    assert scale == 6.0 or tokens(scale * (1 + 1e-9)) <= capacity
    if scale > 1.02:
        assert tokens(scale / 1.02) > capacity


@settings(deadline=None)
@given(
    st.sampled_from(list(PATCH)),
    st.tuples(*[st.integers(1, 12)] * 3),
    st.floats(0.3, 1.5),
)
def test_the_buffer_holds_every_grid(kind: str, grid: tuple[int, int, int], residual: float) -> None:
    box = 1
    for g, p, zoom in zip(grid, PATCH[kind], ZOOMED[kind]):
        box *= math.ceil(g * p * (residual if zoom else 1.0) - 1e-6)
    assert box <= largest_box(kind, math.prod(grid), residual)


def test_the_buffer_of_native_crops_wastes_nothing() -> None:
    assert largest_box("volume", 4096, 1.0) == 128**3
    assert largest_box("slab", 4096, 1.0) == 32 * 256 * 256
    assert largest_box("planar", 4096, 1.0) == 1024**2


def test_token_config_refuses_classes_without_one() -> None:
    with pytest.raises(ValueError, match="hold 1"):
        TokenConfig(classes=(2, 4))
