"""A network this small learns a handful of images: far below what needs no parameters, at fixed masks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from pretrain.baselines import interpolation, visible_mean
from pretrain.mae import crop_error


def ellipsoids(generator: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """A body with organs of different density and a little noise, in HU + 1024."""
    axes = np.meshgrid(*(np.linspace(-1, 1, n) if n > 1 else np.zeros(1) for n in shape), indexing="ij")
    image = np.full(shape, 24.0)
    for value, size in ((1024.0, 0.95), (1100.0, 0.4), (1180.0, 0.35), (200.0, 0.3), (1500.0, 0.15)):
        centre = generator.uniform(-0.5, 0.5, 3) * (size < 0.9)
        radius = size * generator.uniform(0.7, 1.3, 3)
        image[sum(((a - c) / r) ** 2 for a, c, r in zip(axes, centre, radius)) < 1] = value
    return (image + generator.normal(0, 10, shape)).astype(np.int16)


@pytest.mark.slow
@pytest.mark.parametrize("decoder", ["self", "cross"])
def test_loss_falls_well_below_both_baselines(decoder: str, hand: Any) -> None:
    generator = np.random.default_rng(1)
    specs = [hand.spec("volume", 4, 1, 256), hand.spec("slab", 2, 1, 64), hand.spec("planar", 2, 1, 64)]
    crops = []
    for spec, (geometry, shape, n) in enumerate(
        [("volume", (32, 32, 32), 4), ("slab", (6, 48, 48), 2), ("planar", (1, 96, 80), 2)]
    ):
        for slot in range(n):
            crop = hand.crop(geometry, shape, index=len(crops), spec=spec, slot=slot)
            crop.voxels = ellipsoids(generator, shape)
            crops.append(crop)
    model, batch = hand.build(
        specs, crops, augment=False, decoder=decoder, decoder_width=96, decoder_depth=2,
        encoder={"width": 96, "depth": 3, "heads": 4},
    )  # fmt: skip
    tokens = [r.tokens for r in model.reconstruct(batch)]
    mean, interpolated = (
        torch.cat([crop_error(guess(t), t.target, t.scored) for t in tokens]).mean()
        for guess in (visible_mean, interpolation)
    )
    peak, steps = 3e-3, 120
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = peak * min(1.0, (step + 1) / 20, 2 * (1 - step / steps))
        loss = model(batch)[0]
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    print(f"mean {mean:.3f}, interpolation {interpolated:.3f}, network {float(loss.detach()):.3f}")
    assert float(loss.detach()) < 0.5 * min(float(mean), float(interpolated))
