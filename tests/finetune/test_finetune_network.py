"""Scales, convolutions that leave axes alone, and the way encoder tokens enter."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from finetune.network import Conv, meet, repeat, scales_for, window_multiple
from finetune.promptable import HeadConfig, PromptableModel, three_depths
from finetune.prompts import PromptList, collate_prompts
from model.encoder import Encoder, EncoderConfig

SMALL = HeadConfig(widths=(4, 8, 12, 16), heads=2, layers=1, window=(16, 16, 16))
CLICK = [PromptList([((3.0, 4.0, 5.0), 1)])]


def test_equal_spacing_halves_every_axis_three_times():
    assert [s.stride for s in scales_for((1, 1, 1))] == [(1, 1, 1), (2, 2, 2), (2, 2, 2), (2, 2, 2)]


def test_a_thick_axis_waits_until_the_others_have_caught_up():
    scales = scales_for((5.0, 1.0, 1.0))
    assert [s.stride[0] for s in scales] == [
        1,
        1,
        1,
        2,
    ]  # 4 mm in plane before 5 mm is less than twice as coarse
    assert scales[0].kernel == (1, 3, 3)
    assert scales[2].kernel == (3, 3, 3)


def test_a_flat_axis_is_never_strided_nor_convolved():
    for scale in scales_for((1.0, 0.5, 0.5), (True, False, False)):
        assert scale.stride[0] == scale.kernel[0] == 1


@settings(deadline=None)
@given(st.tuples(*[st.floats(0.2, 12.0)] * 3), st.sampled_from([(8, 8, 8), (2, 16, 16)]))
def test_strides_even_out_the_spacing_and_meet_the_tokens(spacing, patch):
    scales = scales_for(spacing)
    total = [1, 1, 1]
    for scale in scales:
        total = [t * s for t, s in zip(total, scale.stride)]
    reached = [s * t for s, t in zip(spacing, total)]
    # No axis may end further from the finest than it began, or than a factor of two.
    assert max(reached) / min(reached) <= max(2.0, max(spacing) / min(spacing)) + 1e-6
    for multiple, token, deepest in zip(window_multiple(scales, patch), patch, total):
        assert multiple % token == 0
        assert multiple % deepest == 0


def test_middle_slice_equals_zero_padding_at_depth_one():
    conv = Conv(2, 3, bias=True)
    x = torch.randn(1, 2, 1, 9, 7)
    whole = F.conv3d(x, conv.weight, conv.bias, padding=1)
    torch.testing.assert_close(conv(x, (1, 3, 3)), whole)


@pytest.mark.parametrize("size", [(2, 4, 4), (2, 6, 6), (4, 2, 5), (1, 5, 5), (1, 2, 2), (5, 1, 1)])
@pytest.mark.parametrize("stride", [(1, 1, 1), (1, 2, 2)])
def test_bf16_gradients_of_maps_smaller_than_the_kernel(size, stride):
    """Of these the library's own kernel makes what it finds in freed memory, at times not a number."""
    for _ in range(4):
        conv = Conv(8, 8).to(memory_format=torch.channels_last_3d)
        x = torch.randn(1, 8, *size).to(memory_format=torch.channels_last_3d)
        weight, wide = (t.detach().double().requires_grad_() for t in (conv.weight, x))
        wanted = F.conv3d(wide, weight, None, stride, 1)
        change = torch.randn_like(wanted)
        wanted.backward(change)
        x.requires_grad_()
        found = []
        for step in ("forward", "backward"):
            freed = [
                torch.full((4**n,), torch.nan, dtype=torch.bfloat16) for n in range(3, 11) for _ in "1234"
            ]
            del freed
            if step == "forward":
                with torch.autocast("cpu", torch.bfloat16):
                    found.append(conv(x, (3, 3, 3), stride))
            else:
                found[0].backward(change.to(found[0].dtype).to(memory_format=torch.channels_last_3d))
        assert found[0].dtype == torch.bfloat16
        for have, want in ((found[0], wanted), (x.grad, wide.grad), (conv.weight.grad, weight.grad)):
            assert (have.double() - want).norm() < 0.02 * want.norm()


def test_meet_repeats_and_pools_by_whole_factors():
    x = torch.arange(8.0).reshape(1, 1, 2, 2, 2)
    grown = meet(x, (4, 2, 1))
    assert grown.shape == (1, 1, 4, 2, 1)
    torch.testing.assert_close(grown[0, 0, :, 0, 0], torch.tensor([0.5, 0.5, 4.5, 4.5]))
    with pytest.raises(ValueError, match="whole factors"):
        meet(x, (3, 2, 2))


@given(st.tuples(*[st.integers(1, 3)] * 3))
@settings(max_examples=15, deadline=None)
def test_repeat_is_nearest_neighbour(factors):
    x = torch.randn(2, 3, 2, 3, 2)
    nearest = F.interpolate(x, scale_factor=[float(f) for f in factors], mode="nearest")
    torch.testing.assert_close(repeat(x, factors), nearest)


@pytest.mark.parametrize("seed", [1, 2])
def test_before_the_first_update_any_encoder_leaves_the_plain_network(seed):
    torch.manual_seed(0)
    plain = PromptableModel(SMALL)
    torch.manual_seed(seed)
    with_encoder = PromptableModel(SMALL, Encoder(EncoderConfig(size="nano")))
    with_encoder.load_state_dict(plain.state_dict(), strict=False)
    image, spacing = torch.randn(1, 1, 16, 16, 16), torch.ones(1, 3)
    prompts = collate_prompts(CLICK, spacing)
    expected, _ = plain.decode(plain.encode(image, spacing), prompts)
    got, _ = with_encoder.decode(with_encoder.encode(image, spacing), prompts)
    torch.testing.assert_close(got, expected)
    nn.init.normal_(with_encoder.entry.project[1][0].weight)
    changed, _ = with_encoder.decode(with_encoder.encode(image, spacing), prompts)
    assert not torch.allclose(changed, expected)


def test_tokens_come_from_three_depths():
    assert three_depths(12) == (4, 8, 12)
    assert three_depths(4) == (1, 3, 4)
