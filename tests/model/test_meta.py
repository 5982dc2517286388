"""The network never looks at a value: it runs on the meta device, where a look raises."""

from __future__ import annotations

import pytest
import torch

from model.config import EncoderConfig
from model.encoder import Encoder
from model.patches import gather_patches, output_extent, token_centres

EVERYTHING = {
    "registers": 2, "class_token": True, "qk_norm": True, "swiglu": True, "layer_scale": 0.5,
    "drop_path": 0.2, "learned_positions": (2, 3, 4),
}  # fmt: skip


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("switches", [{}, EVERYTHING, {"rotary": "index"}, {"rotary": "off"}])
def test_training_step_of_stems_and_trunk(switches: dict, checkpointing: bool) -> None:
    layout = ((3, 6), (0, 8), (2, 5))
    with torch.device("meta"):
        encoder = Encoder(EncoderConfig(size="nano", **switches)).train()
        encoder.set_checkpointing(checkpointing)
        grid = torch.ones(3, 3, dtype=torch.int64)
        volume = encoder.stem("volume", torch.randn(3, 6, 512), grid)
        slab = encoder.stem("slab", torch.randn(2, 5, 512), grid[:2], torch.zeros(2, 5, dtype=torch.int64))
        planar = encoder.stem("planar", torch.randn(0, 7, 256), grid[:0])
        tokens = torch.cat((volume.flatten(0, 1), planar.flatten(0, 1), slab.flatten(0, 1)))
        centres = torch.cat(
            (
                token_centres(grid, torch.zeros(3, 3), torch.ones(3, 3), (8, 8, 8), grid, capacity=6).flatten(
                    0, 1
                ),
                torch.zeros(10, 3),
            )
        )
        attend, drop = torch.ones(28, dtype=torch.bool), torch.zeros(5, 4, dtype=torch.bool)
        first, last = encoder.trunk(tokens, centres, layout, attend, drop, depths=(1, 4))
        (first.float().mean() + last.float().square().mean()).backward()
    assert last.shape == (28, 96)
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is not None, name


@pytest.mark.parametrize("rotary", ["mm", "index"])
def test_images_and_entropy(rotary: str) -> None:
    with torch.device("meta"):
        encoder = Encoder(EncoderConfig(size="nano", rotary=rotary, learned_positions=(1, 2, 3)))
        image, valid = torch.randn(2, 1, 9, 16, 24), torch.ones(2, 9, 16, 24, dtype=torch.bool)
        (out,) = encoder(image, torch.ones(2, 3), valid=valid, axes=(2, 0, 1))
        out.sum().backward()
        entropy = encoder.attention_entropy(torch.randn(12, 96), torch.zeros(12, 3), ((2, 6),))
    assert out.shape == (2, 96, 2, 2, 3)
    assert entropy.shape == (4, 3)


def test_cutting_patches() -> None:
    with torch.device("meta"):
        whole, scale = torch.ones(2, 3, dtype=torch.int64), torch.ones(2, 3)
        voxels = torch.zeros(2, 1000, dtype=torch.int16)
        raw, inside = gather_patches(voxels, whole, whole, scale, whole > 0, (2, 16, 16), 5, resample=True)
        assert output_extent(whole, whole, scale, (2, 16, 16)).shape == (2, 3)
    assert raw.shape == inside.shape == (2, 5, 512)
