"""Prompt maps in mm, exact voxels, boxes, tokens."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.prompts import LOGIT_RANGE, PromptList, SparsePrompts, collate_prompts, point_sigma, prompt_maps

SHAPE = (9, 12, 12)


def maps_of(prompts: PromptList, spacing=(1.0, 1.0, 1.0), shape=SHAPE, previous=None):
    return prompt_maps(collate_prompts([prompts], torch.tensor([spacing])), shape, previous)[0]


@given(
    st.tuples(*[st.floats(0.3, 8.0)] * 3),
    st.lists(st.tuples(st.integers(0, 8), st.integers(0, 11), st.integers(0, 11)), min_size=1, max_size=3),
)
@settings(max_examples=40, deadline=None)
def test_points_are_gaussians_in_mm(spacing, points):
    """Against the definition, voxel by voxel."""
    maps = maps_of(PromptList([((float(z), float(y), float(x)), 1) for z, y, x in points]), spacing)
    fine = sorted(spacing)[:2]
    sigma = np.maximum(2 * np.sqrt(fine[0] * fine[1]), 0.5 * np.array(spacing))
    grid = np.stack(np.meshgrid(*[np.arange(n) for n in SHAPE], indexing="ij"), -1)
    expected = np.zeros(SHAPE)
    for point in points:
        distance = (grid - np.array(point)) * np.array(spacing) / sigma
        expected = np.maximum(expected, np.exp(-0.5 * (distance**2).sum(-1)))
    np.testing.assert_allclose(maps[0].numpy(), expected, atol=1e-5)
    assert float(maps[1].abs().max()) == 0


def test_the_exact_voxel_has_its_own_channel_and_sign():
    maps = maps_of(PromptList([((1.0, 2.0, 3.0), 1), ((8.0, 11.0, 0.0), -1)]))
    assert maps[2].nonzero().tolist() == [[1, 2, 3], [8, 11, 0]]
    assert maps[2, 1, 2, 3] == 1
    assert maps[2, 8, 11, 0] == -1
    assert maps[1, 8, 11, 0] == 1


def test_a_point_on_thick_slices_does_not_span_them():
    """A 4-voxel ball would reach 30 mm; a neighbouring 7.5 mm slice must be nearly free of the point."""
    maps = maps_of(PromptList([((4.0, 6.0, 6.0), 1)]), (7.5, 0.5, 0.5))
    assert float(maps[0, 5, 6, 6]) < 0.15


def test_a_point_is_never_wider_than_a_quarter_of_the_box():
    boxes = torch.tensor([[[[2.0, 2.0, 2.0], [3.0, 9.0, 9.0]]]])
    sigma = point_sigma(torch.ones(1, 3), boxes, torch.ones(1, 1, dtype=torch.bool))
    torch.testing.assert_close(sigma, torch.tensor([[0.5, 2.0, 2.0]]))


def test_boxes_are_inclusive_and_filled():
    maps = maps_of(PromptList(boxes=[((1.0, 2.0, 3.0), (2.0, 4.0, 3.0))]))
    assert int(maps[3].sum()) == 2 * 3 * 1
    assert maps[3, 2, 4, 3] == 1


def test_points_outside_the_window_are_drawn_as_far_as_they_reach():
    maps = maps_of(PromptList([((-1.0, 2.0, 3.0), 1)]))
    assert float(maps[2].abs().max()) == 0
    assert float(maps[0, 0, 2, 3]) == pytest.approx(np.exp(-0.125), abs=1e-5)


def test_previous_logits_are_clipped():
    previous = torch.full((1, 1, *SHAPE), 100.0)
    assert float(maps_of(PromptList(), previous=previous)[4].max()) == 1
    assert float(maps_of(PromptList(), previous=previous * 0 + LOGIT_RANGE / 2)[4].max()) == pytest.approx(
        0.5
    )


def test_padding_a_list_of_prompts_changes_nothing():
    short = PromptList([((1.0, 1.0, 1.0), 1)])
    long = PromptList([((1.0, 2.0, 1.0), 1), ((4.0, 4.0, 4.0), -1)], [((0.0, 0.0, 0.0), (3.0, 3.0, 3.0))])
    together = prompt_maps(collate_prompts([short, long], torch.ones(2, 3)), SHAPE, None)
    torch.testing.assert_close(together[0], maps_of(short))
    tokens, real = SparsePrompts(8)(collate_prompts([short, long], torch.ones(2, 3)))
    assert tokens.shape == (2, 4, 8)
    assert real.tolist() == [[True, False, False, False], [True, True, True, True]]
