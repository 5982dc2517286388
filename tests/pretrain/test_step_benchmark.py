"""The benchmark's textbook autoencoder computes what ours computes when ours is set to do the same."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.step_peers import PlainAutoencoder, Setting
from model.config import Shape

RENAMED = {
    "encoder.stems.volume.": "embed.",
    "encoder.blocks.": "blocks.",
    "encoder.norm.": "norm.",
    "encoder.positions.table": "positions",
    "decoder.embed.": "narrow.",
    "decoder.mask_token": "mask_token",
    "decoder.positions.table": "decoder_positions",
    "decoder.blocks.": "decoder_blocks.",
    "decoder.norm.": "decoder_norm.",
    "heads.volume.": "head.",
}


def test_plain_and_ours_give_the_same_loss_and_gradients(hand: Any) -> None:
    width, heads = 48, 2
    setting = Setting("nano", 24, 3)
    crops = [
        hand.crop("volume", (24, 24, 24), index=i, slot=i, seed=i, modality="CT")
        for i in range(setting.batch)
    ]
    ours, batch = hand.build(
        [hand.spec("volume", 1, setting.batch, setting.tokens)],
        crops,
        augment=False,
        encoder={"rotary": "off", "learned_positions": (3, 3, 3)},
    )
    plain = PlainAutoencoder(setting, Shape(width, 2, heads), Shape(width, 1, heads))
    state = ours.state_dict()
    taken = {
        theirs + name.removeprefix(own): tensor
        for name, tensor in state.items()
        for own, theirs in RENAMED.items()
        if name.startswith(own)
    }
    plain.load_state_dict(taken)  # strict: every weight of the plain one comes from ours

    block = batch["volume-1"]
    slope, intercept, _, _, center, scale, _ = block.norm[0]  # no voxel reaches the clip window's ends
    voxels = (block.voxels.view(-1, 1, 24, 24, 24) * slope + intercept - center) / scale
    expected = plain(voxels, torch.cat((block.visible_ids, block.target_ids), 1))
    loss, _ = ours(batch)
    torch.testing.assert_close(loss, expected)

    loss.backward()
    expected.backward()
    theirs = dict(plain.named_parameters())
    for own, other in (
        ("encoder.stems.volume.weight", "embed.weight"),
        ("encoder.blocks.0.attn.qkv.weight", "blocks.0.attn.qkv.weight"),
        ("decoder.blocks.0.mlp.fc2.weight", "decoder_blocks.0.mlp.fc2.weight"),
        ("decoder.mask_token", "mask_token"),
    ):
        gradient = ours.get_parameter(own).grad
        assert gradient is not None
        torch.testing.assert_close(gradient, theirs[other].grad, rtol=1e-4, atol=1e-7)
