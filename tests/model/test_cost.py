"""Parameter and FLOP arithmetic against the model itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from model.config import SIZES, EncoderConfig
from model.cost import forward_flops, parameter_count, stem_flops
from model.encoder import Encoder

SWITCHED = {
    "registers": 3, "class_token": True, "qk_norm": True, "swiglu": True, "layer_scale": 0.1, "channels": 2,
    "learned_positions": (2, 3, 4),
}  # fmt: skip


@pytest.mark.parametrize("switches", [{}, SWITCHED, {"patch": {"planar": (1, 16, 16)}, "mlp_ratio": 3.0}])
@pytest.mark.parametrize("size", list(SIZES))
def test_parameters(size: str, switches: dict) -> None:
    config = EncoderConfig(size=size, **switches)
    with torch.device("meta"):
        encoder = Encoder(config)
    assert parameter_count(config) == sum(p.numel() for p in encoder.parameters())


@pytest.mark.parametrize("switches", [{}, SWITCHED])
def test_flops(switches: dict) -> None:
    config = EncoderConfig(size="nano", **switches)
    encoder = Encoder(config).eval()
    layout = ((2, 7), (3, 4), (0, 9))
    grid = torch.full((2, 3), 2)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as counter:
            encoder.trunk(torch.randn(26, 96), torch.rand(26, 3), layout)
        assert counter.get_total_flops() == forward_flops(config, layout)
        with FlopCounterMode(display=False) as counter:
            encoder.stem("slab", torch.randn(2, 5, config.channels * 512), grid)
        assert counter.get_total_flops() == stem_flops(config, "slab", 10)


def test_the_table_in_the_documentation_is_the_computed_one() -> None:
    text = (Path(__file__).parents[2] / "docs" / "model.md").read_text()
    for size, shape in SIZES.items():
        config = EncoderConfig(size=size)
        cells = [size, *shape, round(parameter_count(config) / 1e6, 2)]
        for tokens in (1024, 4096):
            flops = forward_flops(config, ((1, tokens),)) + stem_flops(config, "volume", tokens)
            cells.append(round(flops / 1e9, 1))
        assert "| " + " | ".join(map(str, cells)) + " |" in text
