"""Blocks recomputed in the backward pass: the same gradients, in the encoder and in both decoders."""

from __future__ import annotations

from typing import Any

import pytest
import torch


@pytest.mark.parametrize("decoder", ["self", "cross"])
def test_every_block_runs_twice_and_the_gradients_are_the_same(hand: Any, decoder: str) -> None:
    crops = [hand.crop("volume", (16, 16, 24)), hand.crop("planar", (1, 64, 64), index=1, spec=1)]
    specs = [hand.spec("volume", 1, 1, 16), hand.spec("planar", 1, 1, 16)]
    model, batch = hand.build(specs, crops, decoder=decoder, encoder={"drop_path": 0.2})
    blocks = [*model.encoder.blocks, *model.decoder.blocks]
    runs = [0] * len(blocks)

    def count(block: torch.nn.Module, _: Any) -> None:
        runs[blocks.index(block)] += 1

    for block in blocks:
        block.register_forward_pre_hook(count)
    found = []
    for on in (False, True):
        model.set_checkpointing(on)
        model.zero_grad()
        runs[:] = [0] * len(blocks)
        loss, _ = model(batch)
        loss.backward()
        assert runs == [1 + on] * len(blocks)
        found.append([p.grad for p in model.parameters()])
    assert all(torch.equal(plain, again) for plain, again in zip(*found, strict=True))
