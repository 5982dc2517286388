"""Counted operations against those that PyTorch counts while a step runs."""

from __future__ import annotations

from typing import Any

import pytest
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pretrain.cost import crop_flops, step_flops


@pytest.mark.parametrize("ratio", [0.75, (0.5, 0.9)])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"decoder": "cross", "predict_share": 0.4, "decoder_depth": 2},
        {"encoder": {"registers": 3, "class_token": True, "swiglu": True, "width": 96}},
    ],
)
def test_operations_are_those_that_a_step_makes(changes: dict[str, Any], ratio: Any, hand: Any) -> None:
    specs = [hand.spec("volume", 2, 1, 80), hand.spec("slab", 1, 1, 50), hand.spec("planar", 1, 2, 60)]
    crops = [hand.crop("volume", (24, 32, 16)), hand.crop("planar", (1, 70, 50), index=1, spec=2)]
    model, batch = hand.build(specs, crops, mask_ratio=ratio, **changes)
    expected = step_flops(model.encoder.config, model.objective, specs)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # flash counts recomputing
        model(batch)[0].backward()
    assert counter.get_total_flops() == expected
    each = [crop_flops(model.encoder.config, model.objective, s.geometry, s.capacity) for s in specs]
    assert expected == 2 * each[0] + each[1] + 2 * each[2]


def test_the_default_decoder_costs_more_than_the_small_encoder(hand: Any) -> None:
    """At 96³: visible tokens are a quarter, the decoder of He et al. sees all."""
    from model.config import EncoderConfig
    from pretrain.objective import ObjectiveConfig

    encoder = EncoderConfig(size="small")
    own, cross = (crop_flops(encoder, ObjectiveConfig(decoder=d), "volume", 1728) for d in ("self", "cross"))
    assert 1e11 < cross < own < 3e11
