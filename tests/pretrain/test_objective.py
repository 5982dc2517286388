"""The loss against a slow reference that loops over tokens and indexes volumes, and what it must not depend
on.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from data_pipeline.geometry import PATCH
from data_pipeline.rng import rng
from pretrain.batch import MODALITIES, Collate, draw_tone
from pretrain.objective import AugmentConfig


def reference(crop: Any, block: Any, slot: int, result: Any, ratio: float) -> float:
    """Loss of one crop straight from its volume: normalise, mirror, pad, cut out each masked token,
    average.
    """
    patch, grid = PATCH[crop.geometry], crop.draw.grid
    slope, intercept, low, high, center, scale, compress = crop.norm
    real = np.clip(crop.voxels.astype(np.float64) * slope + intercept, low, high)
    if compress > 0:
        real = np.arcsinh(real / compress)
    x = (real - center) / scale
    ends = (np.array([low, high]) if compress == 0 else np.arcsinh(np.array([low, high]) / compress)) - center
    ends = ends / scale
    gain, shift, exponent = (float(v) for v in block.tone[slot])
    x = ends[0] + (ends[1] - ends[0]) * ((x - ends[0]) / (ends[1] - ends[0])) ** exponent
    x = x * gain + shift
    there = crop.voxels != INVALID
    for axis in range(3):
        if block.flip[slot, axis]:
            x, there = np.flip(x, axis), np.flip(there, axis)
    pad = [(0, g * p - n) for g, p, n in zip(grid, patch, x.shape)]
    x, there = np.pad(x, pad), np.pad(there, pad)

    def cut(volume: np.ndarray, token: int) -> np.ndarray:
        z, y, x_ = np.unravel_index(token, grid)
        return volume[
            z * patch[0] : (z + 1) * patch[0],
            y * patch[1] : (y + 1) * patch[1],
            x_ * patch[2] : (x_ + 1) * patch[2],
        ]

    order = rng(0, crop.draw.index, "mask").permutation(int(np.prod(grid))).tolist()
    valid = [t for t in order if cut(there, t).any()]
    hidden = min(int(np.floor(len(valid) * ratio + 0.5)), len(valid) - 1)
    masked = valid[len(valid) - hidden :]
    assert int(block.valid[slot]) == len(valid)
    seen = result.tokens.visible_ids[slot][result.tokens.attend[slot]].tolist()
    assert seen == valid[: len(valid) - hidden]
    asked = result.tokens.predicted[slot]
    assert result.tokens.target_ids[slot][asked].tolist() == masked
    total, count = 0.0, 0
    for place, token in enumerate(masked):
        guess = result.prediction[slot, place].detach().double().numpy().reshape(patch)
        inside = cut(there, token)
        total += float(((guess - cut(x, token)) ** 2)[inside].sum())
        count += int(inside.sum())
    return total / count if count else 0.0


INVALID = -32768
CASES = {
    "non-cubic, padded": ("volume", (20, 45, 30), {}),
    "anisotropic": ("volume", (16, 24, 60), {"spacing": (2.5, 0.7, 0.9), "modality": "MR"}),
    "invalid voxels": ("volume", (24, 17, 40), {"invalid": 0.4}),
    "slab, sagittal": (
        "slab",
        (7, 50, 33),
        {"axes": (2, 0, 1), "spacing": (5.0, 0.8, 0.6), "modality": "MR"},
    ),
    "radiograph": ("planar", (1, 100, 70), {"modality": "XR", "spacing": (1.0, 0.4, 0.4)}),
    "pet": ("volume", (9, 33, 25), {"modality": "PT"}),
}


@pytest.mark.parametrize("ratio", [0.75, 0.5])
@pytest.mark.parametrize("name", CASES)
def test_loss_equals_the_reference(name: str, ratio: float, hand: Any) -> None:
    geometry, shape, more = CASES[name]
    crop = hand.crop(geometry, shape, index=11, slot=1, **more)
    crop.geometry = geometry
    whole = crop.voxels.copy()
    if name == "invalid voxels":
        whole[:8, :8, 8:24] = INVALID  # whole tokens of nothing
    crop.voxels = whole
    model, batch = hand.build([hand.spec(geometry, 2, 1, 200)], [crop], mask_ratio=ratio)
    (block,), (result,) = batch.values(), model.reconstruct(batch)
    expected = reference(crop, block, 1, result, ratio)
    assert float(result.crop_loss[1].detach()) == pytest.approx(expected, rel=1e-4)
    loss, metrics = model(batch)
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-4)  # the empty slot 0 adds nothing
    assert float(metrics[f"loss/{crop.modality}"][0]) == pytest.approx(expected, rel=1e-4)
    assert float(metrics[f"loss/{crop.modality}"][1]) == 1.0
    assert sum(float(metrics[f"loss/{m}"][1]) for m in MODALITIES) == 1.0


def test_predictions_see_visible_tokens_and_nothing_of_masked_ones(hand: Any) -> None:
    crop = hand.crop("volume", (16, 40, 24))
    specs = [hand.spec("volume", 1, 1, 32)]
    model, batch = hand.build(specs, [crop], augment=False)
    (before,) = model.reconstruct(batch)
    patch, grid = PATCH["volume"], crop.draw.grid

    def scrambled(token: int) -> Any:
        z, y, x = np.unravel_index(token, grid)
        changed = hand.crop("volume", (16, 40, 24))
        cut = tuple(slice(i * p, (i + 1) * p) for i, p in zip((z, y, x), patch))
        changed.voxels[cut] = 2000 - changed.voxels[cut]
        return hand.build(specs, [changed], augment=False)[1]

    masked = int(before.tokens.target_ids[0, 3])
    (after,) = model.reconstruct(scrambled(masked))
    assert torch.equal(after.prediction, before.prediction)
    assert not torch.equal(after.crop_loss, before.crop_loss)
    seen = int(before.tokens.visible_ids[0, 2])
    (after,) = model.reconstruct(scrambled(seen))
    assert not torch.allclose(after.prediction, before.prediction)


def test_nothing_is_computed_for_masked_tokens_in_the_encoder(hand: Any) -> None:
    crops = [hand.crop("volume", (32, 32, 32), slot=0), hand.crop("planar", (1, 64, 80), index=1, spec=1)]
    model, batch = hand.build([hand.spec("volume", 2, 1, 128), hand.spec("planar", 1, 1, 20)], crops)
    rows: dict[str, int] = {}
    for name, module in model.encoder.named_modules():
        if name.startswith(("stems.", "blocks.")):
            module.register_forward_hook(lambda _, args, __, name=name: rows.update({name: len(args[0])}))
    model(batch)
    assert rows.pop("stems.volume") == 2 * 16  # a quarter of the slots
    assert rows.pop("stems.slab") == 0
    assert rows.pop("stems.planar") == 5
    assert len(rows) > 2 * 4
    assert max(rows.values()) == 2 * 16 + 5


def test_voxels_held_as_float32_give_the_same_tokens_and_loss(hand: Any) -> None:
    specs = [hand.spec("volume", 2, 1, 100), hand.spec("slab", 1, 1, 40)]
    crops = [
        hand.crop("volume", (20, 29, 13), invalid=0.3, residual=(0.7, 1.3, 1.1)),
        hand.crop("volume", (24, 17, 20), index=1, slot=1, invalid=0.2),
        hand.crop("slab", (5, 40, 30), index=2, spec=1, modality="MR", invalid=0.1),
    ]
    crops[1].voxels[:, :, :14] = INVALID  # whole tokens of nothing
    model, narrow = hand.build(specs, crops)
    wide = Collate(specs, model.objective, model.encoder.depth, 0, dtype="float32")(0, 0, crops)
    assert wide["volume-2"].voxels.dtype == torch.float32
    assert int(wide["volume-2"].valid[1]) < math.prod(crops[1].draw.grid)
    for one, two in zip(model.reconstruct(narrow), model.reconstruct(wide), strict=True):
        assert all(torch.equal(*pair) for pair in zip(one.tokens, two.tokens))
        assert torch.equal(one.crop_loss, two.crop_loss)
    crops[0].voxels = crops[0].voxels.astype(np.float32)
    with pytest.raises(ValueError, match="float32 crop in a run of int16"):
        hand.build(specs, crops)


def encoded(model: Any, batch: Any) -> torch.Tensor:
    """The encoder's features (n, v, D) of the first row block."""
    found = []
    hook = model.decoder.register_forward_pre_hook(lambda _, args: found.append((args[0], args[3][0])))
    model(batch)
    hook.remove()
    features, (n, length) = found[0]
    return features[: n * length].unflatten(0, (n, length))


@pytest.mark.parametrize("ratio", [0.75, (0.4, 0.9)])
@pytest.mark.parametrize("decoder", ["self", "cross"])
def test_a_crop_does_not_depend_on_neighbours_padding_or_row_class(
    decoder: str, ratio: Any, hand: Any
) -> None:
    changes: Any = {
        "decoder": decoder, "decoder_depth": 2, "mask_ratio": ratio, "gradient_weight": 0.5,
        "encoder": {"registers": 2, "drop_path": 0.5},
    }  # fmt: skip
    crop = hand.crop("volume", (20, 30, 18), index=5, invalid=0.1)
    model, alone = hand.build([hand.spec("volume", 1, 1, 40)], [crop], **changes)
    moved = hand.crop("volume", (20, 30, 18), index=5, slot=2, invalid=0.1)
    others = [
        hand.crop("volume", (32, 32, 40), index=6, slot=0, seed=3),
        hand.crop("volume", (9, 8, 8), index=7, slot=3, seed=4, residual=(1.2, 1.0, 1.0)),
        hand.crop("slab", (6, 60, 60), index=8, spec=1, seed=5),
    ]
    specs = [hand.spec("volume", 4, 1, 400), hand.spec("slab", 1, 1, 64)]
    _, crowd = hand.build(specs, [moved, *others], **changes)
    for drawn in ("flip", "tone", "drop"):
        assert torch.equal(getattr(alone["volume-1"], drawn)[0], getattr(crowd["volume-4"], drawn)[2])
    with torch.no_grad():
        first, second = model.reconstruct(alone)[0], model.reconstruct(crowd)[0]
        features = encoded(model, alone)[0], encoded(model, crowd)[2]
    assert first.prediction.shape[1] < second.prediction.shape[1]  # padding there, or more of it
    assert float(second.crop_loss[2]) == pytest.approx(float(first.crop_loss[0]), rel=1e-5)
    n, seen = int(first.tokens.predicted[0].sum()), int(first.tokens.attend[0].sum())
    assert torch.allclose(first.prediction[0, :n], second.prediction[2, :n], atol=1e-5)
    assert torch.allclose(features[0][:seen], features[1][:seen], atol=1e-5)


def test_the_loss_of_an_update_is_the_sum_of_its_shares(hand: Any) -> None:
    crops = [hand.crop("volume", (16, 24, 24), index=i, slot=i, seed=i) for i in range(4)]
    model, whole = hand.build([hand.spec("volume", 4, 1, 128)], crops, crops_per_update=4)
    parts, measured = [], []
    with torch.no_grad():
        for chosen in (crops[:2], crops[2:], []):
            batch = hand.build([hand.spec("volume", 4, 1, 128)], chosen, crops_per_update=4)[1]
            loss, metrics = model(batch)
            parts.append(float(loss))
            measured.append(metrics)
        total, expected = model(whole)
    assert parts[2] == 0.0
    assert sum(parts) == pytest.approx(float(total), rel=1e-6)
    for name, pair in expected.items():
        for place, value in enumerate(pair):
            found = sum(float(metrics[name][place]) for metrics in measured)
            assert found == pytest.approx(float(value), rel=1e-6), name


@pytest.mark.parametrize("decoder", ["self", "cross"])
def test_the_order_of_the_row_blocks_changes_nothing(decoder: str, hand: Any) -> None:
    """Blocks of one geometry need not stand together, nor in the order of the stems."""
    specs = {
        "volume-2": hand.spec("volume", 2, 1, 64), "slab-1": hand.spec("slab", 1, 1, 40),
        "planar-1": hand.spec("planar", 1, 1, 20), "volume-1": hand.spec("volume", 1, 1, 64),
    }  # fmt: skip
    crops = {
        "volume-2": hand.crop("volume", (24, 30, 15), index=0, slot=1),
        "slab-1": hand.crop("slab", (6, 40, 33), index=1, modality="MR", axes=(2, 0, 1)),
        "planar-1": hand.crop("planar", (1, 60, 70), index=2, modality="XR"),
        "volume-1": hand.crop("volume", (20, 30, 40), index=3, modality="PT"),
    }
    found = []
    for names in (list(specs), ["planar-1", "volume-1", "slab-1", "volume-2"]):
        for number, name in enumerate(names):
            crops[name].draw.spec = number
        changes: Any = {"decoder": decoder, "encoder": {"drop_path": 0.5, "learned_positions": (2, 3, 4)}}
        model, batch = hand.build([specs[name] for name in names], list(crops.values()), **changes)
        assert list(batch) == names
        with torch.no_grad():
            found.append(dict(zip(names, model(batch, reconstruct=True), strict=True)))
    for name, one in found[0].items():
        other = found[1][name]
        assert torch.equal(one.tokens.target, other.tokens.target)
        torch.testing.assert_close(one.prediction, other.prediction, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(one.crop_loss, other.crop_loss, rtol=1e-5, atol=0)


def test_the_tone_curve_bends_only_where_units_are_arbitrary() -> None:
    config = AugmentConfig()
    for index in range(20):
        for modality in MODALITIES:
            gain, shift, exponent = draw_tone(0, index, modality, config)
            assert abs(gain - 1) <= config.gain
            assert abs(shift) <= config.shift
            assert (exponent != 1.0) == (modality in ("MR", "XR"))
            assert abs(math.log(exponent)) <= config.gamma
    assert draw_tone(0, 1, "MR", config) != draw_tone(0, 2, "MR", config)
    still = AugmentConfig(gain=0.0, shift=0.0, gamma=0.0)
    assert draw_tone(0, 1, "MR", still) == (1.0, 0.0, 1.0)


def test_crops_without_anything_valid_or_masked_stay_finite(hand: Any) -> None:
    nothing = hand.crop("volume", (16, 16, 16), index=0, slot=0, invalid=1.0)
    one_token = hand.crop("volume", (5, 8, 3), index=1, slot=1)
    model, batch = hand.build([hand.spec("volume", 2, 1, 64)], [nothing, one_token])
    loss, metrics = model(batch)
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)
    assert float(metrics["slot_waste"][0]) == 64 - 1


@pytest.mark.parametrize("geometry", ["volume", "slab", "planar"])
def test_every_parameter_takes_part_whatever_is_drawn(geometry: str, hand: Any) -> None:
    shape = {"volume": (16, 16, 16), "slab": (4, 32, 32), "planar": (1, 64, 48)}[geometry]
    model, batch = hand.build(
        [hand.spec(geometry, 1, 1, 16)], [hand.crop(geometry, shape)],
        encoder={"registers": 2, "class_token": True},
    )  # fmt: skip
    model(batch)[0].backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None]
    assert not missing
    for kind in ("volume", "slab", "planar"):
        moved = bool(model.encoder.stems[kind].weight.grad.abs().sum() > 0)
        assert moved == (kind == geometry)


@pytest.mark.parametrize("share", [1.0, 0.4])
def test_predict_share_and_norm_pix(share: float, hand: Any) -> None:
    crop = hand.crop("volume", (16, 32, 24))
    model, batch = hand.build(
        [hand.spec("volume", 1, 1, 24)], [crop], predict_share=share, norm_pix=True, augment=False
    )
    (result,) = model.reconstruct(batch)
    assert result.prediction.shape[1] == int(np.ceil(18 * share))
    with torch.no_grad():
        for head in model.heads.values():
            head.weight.zero_()
    assert float(model(batch)[0]) == pytest.approx(1.0, abs=1e-3)  # a zero guess of unit-variance patches


def test_drop_path_is_keyed_by_crop_and_off_in_eval(hand: Any) -> None:
    crops = [hand.crop("volume", (16, 24, 24), index=i, slot=i) for i in range(4)]
    model, batch = hand.build([hand.spec("volume", 4, 1, 128)], crops, encoder={"drop_path": 0.5, "depth": 4})
    first, again = model.reconstruct(batch)[0].crop_loss, model.reconstruct(batch)[0].crop_loss
    assert torch.equal(first, again)
    model.eval()
    assert not torch.equal(model.reconstruct(batch)[0].crop_loss, first)
