"""The whole masked autoencoder against a direct, slow one that shares nothing with it but the weights.

The reference goes crop by crop, token by token and voxel by voxel through images held as (z, y, x) arrays, in
float64. It knows no packing, no padding and no patchify; every rule (axes, mirroring, resampling, masks,
rotary positions, attention, loss) is written down a second time.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

import pretrain.tokens
from data_pipeline.rng import rng

PATCH = {"volume": (8, 8, 8), "slab": (2, 16, 16), "planar": (1, 16, 16)}
INVALID = -32768
Place = tuple[int, int, int]


class Image:
    """A crop as the network should see it: normalised values of its output voxels, and where they are."""

    def __init__(self, crop: Any, kind: str, flip: list[bool], tone: list[float]) -> None:
        self.crop, self.patch = crop, PATCH[kind]
        steps = [float(np.float32(r)) for r in crop.draw.residual]
        self.size = [math.ceil(n / r - 0.5 - 1e-6) for n, r in zip(crop.voxels.shape, steps)]
        self.values: dict[Place, float] = {}
        stored = crop.voxels.tolist()
        for place in np.ndindex(*self.size):
            mirrored = [n - 1 - o if turned else o for o, n, turned in zip(place, self.size, flip)]
            found = self._interpolated(stored, mirrored, steps)
            if found is not None:
                self.values[tuple(place)] = self._normalised(found, tone)
        self.air = self._normalised(-math.inf, tone)

    def _interpolated(self, stored: Any, place: list[int], steps: list[float]) -> float | None:
        corners: list[list[tuple[int, float]]] = []
        for o, r, n in zip(place, steps, self.crop.voxels.shape):
            at = min(max((o + 0.5) * r - 0.5, 0.0), n - 1.0)
            below = int(at)
            corners.append([(below, 1 - (at - below)), (min(below + 1, n - 1), at - below)])
        total = mass = 0.0
        for z, wz in corners[0]:
            for y, wy in corners[1]:
                for x, wx in corners[2]:
                    if wz * wy * wx and stored[z][y][x] != INVALID:
                        total += wz * wy * wx * stored[z][y][x]
                        mass += wz * wy * wx
        return total / mass if mass > 0.5 - 1e-6 else None

    def _normalised(self, stored: float, tone: list[float]) -> float:
        slope, intercept, low, high, center, scale, compress = (float(np.float32(v)) for v in self.crop.norm)

        def squash(real: float) -> float:
            return ((math.asinh(real / compress) if compress else real) - center) / scale

        value, bottom, top = (
            squash(min(max(stored * slope + intercept, low), high)),
            squash(low),
            squash(high),
        )
        gain, shift, exponent = tone
        if exponent != 1:
            value = bottom + (top - bottom) * ((value - bottom) / (top - bottom)) ** exponent
        return value * gain + shift

    def token(self, number: int) -> Place:
        _, gy, gx = self.crop.draw.grid
        return number // (gy * gx), number // gx % gy, number % gx

    def voxels(self, number: int) -> list[Place]:
        """All places of a token, also those past the image."""
        corner = [t * p for t, p in zip(self.token(number), self.patch)]
        return [tuple(c + o for c, o in zip(corner, offset)) for offset in np.ndindex(*self.patch)]  # type: ignore[misc]

    def patch_values(self, number: int) -> np.ndarray:
        return np.array([self.values.get(place, self.air) for place in self.voxels(number)])

    def centre(self, number: int, rotary: str) -> np.ndarray:
        found = np.zeros(3)
        for stem_axis, patient_axis in enumerate(self.crop.draw.axes):
            voxel = self.token(number)[stem_axis] * self.patch[stem_axis] + self.patch[stem_axis] / 2
            start, spacing = self.crop.draw.start_mm[stem_axis], self.crop.draw.spacing[stem_axis]
            found[patient_axis] = voxel if rotary == "index" else start + voxel * spacing
        return found

    def masks(self, objective: Any, seed: int = 0) -> tuple[list[int], list[int]]:
        """Visible and predicted tokens."""
        index, grid = self.crop.draw.index, self.crop.draw.grid
        draw, tokens = rng(seed, index, "mask"), math.prod(grid)
        if objective.masking == "random":
            order = draw.permutation(tokens).tolist()
        else:
            corner = [int(draw.integers(size)) for size in objective.mask_block]
            blocks = [
                tuple((t + c) // b for t, c, b in zip(self.token(n), corner, objective.mask_block))
                for n in range(tokens)
            ]
            counts = [max(b[axis] for b in blocks) + 1 for axis in range(3)]
            rank = np.reshape(draw.permutation(math.prod(counts)), counts)
            within = draw.random(tokens)
            order = sorted(range(tokens), key=lambda n: (rank[blocks[n]], within[n]))
        order = [n for n in order if any(place in self.values for place in self.voxels(n))]
        ratio = objective.mask_ratio
        if isinstance(ratio, tuple):
            ratio = rng(seed, index, "mask-ratio").uniform(*ratio)
        hidden = min(math.floor(len(order) * ratio + 0.5), max(len(order) - 1, 0))
        seen, masked = order[: len(order) - hidden], order[len(order) - hidden :]
        return seen, masked[: math.ceil(len(masked) * objective.predict_share)]


class Network:
    """Encoder, decoder and heads on one crop's tokens; `state` is the product's state dict."""

    def __init__(self, model: Any) -> None:
        self.state = {name: p.detach().double().numpy() for name, p in model.state_dict().items()}
        self.encoder, self.objective = model.encoder.config, model.objective

    def linear(self, name: str, x: np.ndarray) -> np.ndarray:
        return x @ self.state[f"{name}.weight"].T + self.state[f"{name}.bias"]

    def norm(self, name: str, x: np.ndarray) -> np.ndarray:
        spread = np.sqrt(x.var() + 1e-6)
        return (x - x.mean()) / spread * self.state[f"{name}.weight"] + self.state[f"{name}.bias"]

    def turned(self, head: np.ndarray, centre: np.ndarray | None) -> np.ndarray:
        if centre is None:
            return head
        half, pairs = len(head) // 2, len(head) // 6
        low, high = self.encoder.rotary_wavelengths
        out = head.copy()
        for axis in range(3):
            for pair in range(pairs):
                share = pair / (pairs - 1) if pairs > 1 else 0.0
                angle = 2 * math.pi * centre[axis] / (low * (high / low) ** share)
                i = axis * pairs + pair
                out[i] = head[i] * math.cos(angle) - head[i + half] * math.sin(angle)
                out[i + half] = head[i + half] * math.cos(angle) + head[i] * math.sin(angle)
        return out

    def attention(
        self, q: Any, k: Any, v: Any, heads: int, q_centres: Any, k_centres: Any
    ) -> list[np.ndarray]:
        """For each query the mixed values of its keys, head after head."""
        wide = len(k[0]) // heads
        found: list[list[np.ndarray]] = [[] for _ in q]
        for h in range(heads):
            cut = slice(h * wide, (h + 1) * wide)
            keys = [self.turned(key[cut], centre) for key, centre in zip(k, k_centres)]
            for mixed, query, centre in zip(found, q, q_centres):
                own = self.turned(query[cut], centre)
                scores = [float(own @ key) / math.sqrt(wide) for key in keys]
                weights = [math.exp(score - max(scores)) for score in scores]
                mixed.append(sum(w * value[cut] for w, value in zip(weights, v)) / sum(weights))
        return [np.concatenate(mixed) for mixed in found]

    def mlp(self, name: str, x: np.ndarray) -> np.ndarray:
        hidden = self.linear(f"{name}.fc1", x)
        return self.linear(
            f"{name}.fc2", np.array([h * (1 + math.erf(h / math.sqrt(2))) / 2 for h in hidden])
        )

    def block(self, name: str, x: Any, heads: int, centres: Any, gain: float = 1.0) -> list[np.ndarray]:
        joint = [self.linear(f"{name}.attn.qkv", self.norm(f"{name}.norm1", token)) for token in x]
        q, k, v = zip(*(np.split(each, 3) for each in joint))
        mixed = self.attention(q, k, v, heads, centres, centres)
        x = [token + gain * self.linear(f"{name}.attn.proj", m) for token, m in zip(x, mixed)]
        return [token + gain * self.mlp(f"{name}.mlp", self.norm(f"{name}.norm2", token)) for token in x]

    def cross_block(
        self, name: str, x: Any, memory: Any, heads: int, own: Any, other: Any
    ) -> list[np.ndarray]:
        q = [self.linear(f"{name}.query", self.norm(f"{name}.norm1", token)) for token in x]
        joint = [
            self.linear(f"{name}.key_value", self.norm(f"{name}.norm_memory", token)) for token in memory
        ]
        k, v = zip(*(np.split(each, 2) for each in joint))
        mixed = self.attention(q, k, v, heads, own, other)
        x = [token + self.linear(f"{name}.proj", m) for token, m in zip(x, mixed)]
        return [token + self.mlp(f"{name}.mlp", self.norm(f"{name}.norm2", token)) for token in x]

    def learned(self, name: str, token: Place, grid: Place) -> np.ndarray:
        """The table at the token's place in the grid, by linear interpolation."""
        size = self.encoder.learned_positions
        table = self.state[name].reshape(*size, -1)
        for t, g, n in zip(token, grid, size):
            at = min(max((t + 0.5) * n / g - 0.5, 0), n - 1)
            below = int(at)
            table = table[below] * (1 - (at - below)) + table[min(below + 1, n - 1)] * (at - below)
        return table

    def features(self, image: Image, kind: str, seen: list[int], drop: list[bool] | None) -> list[np.ndarray]:
        config, grid = self.encoder, image.crop.draw.grid
        x = [self.linear(f"encoder.stems.{kind}", image.patch_values(n)) for n in seen]
        if config.learned_positions:
            x = [t + self.learned("encoder.positions.table", image.token(n), grid) for t, n in zip(x, seen)]
        centres = [image.centre(n, config.rotary) for n in seen]
        middle = (np.min(centres, 0) + np.max(centres, 0)) / 2
        extra = config.registers + config.class_token
        x = [*self.state["encoder.prefix.tokens"], *x] if extra else x
        places: list[Any] = [*[np.zeros(3)] * extra, *(c - middle for c in centres)]
        if config.rotary == "off":
            places = [None] * len(places)
        depth = config.shape.depth
        for number in range(depth):
            gain = 1.0
            if drop is not None:
                gain = 0.0 if drop[number] else 1 / (1 - config.drop_path * number / max(1, depth - 1))
            x = self.block(f"encoder.blocks.{number}", x, config.shape.heads, places, gain)
        return [self.norm("encoder.norm", token) for token in x[extra:]]

    def predictions(
        self, image: Image, kind: str, seen: list[int], asked: list[int], drop: list[bool] | None
    ) -> list[np.ndarray]:
        objective, rotary, grid = self.objective, self.encoder.rotary, image.crop.draw.grid
        visible = [self.linear("decoder.embed", f) for f in self.features(image, kind, seen, drop)]
        masked = [self.state["decoder.mask_token"] for _ in asked]
        if rotary == "off":
            for tokens, numbers in ((visible, seen), (masked, asked)):
                for place, n in enumerate(numbers):
                    tokens[place] = tokens[place] + self.learned(
                        "decoder.positions.table", image.token(n), grid
                    )
        own: list[Any] = [None if rotary == "off" else image.centre(n, rotary) for n in asked]
        other: list[Any] = [None if rotary == "off" else image.centre(n, rotary) for n in seen]
        heads, x = objective.decoder_heads, masked
        for number in range(objective.decoder_depth):
            name = f"decoder.blocks.{number}"
            if objective.decoder == "cross":
                x = self.cross_block(name, x, visible, heads, own, other)
            else:
                both = self.block(name, [*visible, *x], heads, [*other, *own])
                visible, x = both[: len(visible)], both[len(visible) :]
        return [self.linear(f"heads.{kind}", self.norm("decoder.norm", token)) for token in x]

    def loss(self, image: Image, asked: list[int], guesses: list[np.ndarray]) -> tuple[float, set[Place]]:
        """Loss of the crop, and the voxels that are scored."""
        errors: dict[Place, float] = {}
        steps: list[float] = []
        for number, guess in zip(asked, guesses):
            places = image.voxels(number)
            inside = {place: image.values[place] for place in places if place in image.values}
            if self.objective.norm_pix:
                mean = sum(inside.values()) / len(inside)
                variance = sum((v - mean) ** 2 for v in inside.values()) / len(inside)
                inside = {place: (v - mean) / math.sqrt(variance + 1e-6) for place, v in inside.items()}
            error = {place: g - inside[place] for place, g in zip(places, guess) if place in inside}
            for z, y, x in error:
                after = ((z + 1, y, x), (z, y + 1, x), (z, y, x + 1))
                steps += [(error[place] - error[z, y, x]) ** 2 for place in after if place in error]
            errors |= error
        total = sum(e * e for e in errors.values()) / max(len(errors), 1)
        return total + self.objective.gradient_weight * sum(steps) / max(len(steps), 1), set(errors)


def crops_of(hand: Any) -> tuple[list[Any], list[Any], list[str]]:
    """Row blocks of all three stems with an empty slot each, their crops, and the crops' geometries."""
    specs = [hand.spec("volume", 3, 1, 150), hand.spec("slab", 2, 1, 80), hand.spec("planar", 2, 1, 60)]
    crops = [
        hand.crop("volume", (20, 29, 13), index=2, slot=0, modality="MR", spacing=(2.5, 0.7, 0.9), seed=1),
        hand.crop(
            "volume", (11, 28, 15), index=24, slot=2, modality="PT", residual=(0.7, 1.3, 1.1), invalid=0.3,
            seed=2,
        ),
        hand.crop(
            "slab", (3, 40, 25), index=15, spec=1, slot=1, modality="MR", axes=(2, 0, 1), invalid=0.1,
            spacing=(5.0, 0.8, 0.6), seed=3,
        ),
        hand.crop(
            "planar", (1, 70, 45), index=10, spec=2, slot=0, modality="XR", spacing=(1.0, 0.4, 0.3),
            residual=(1.0, 0.9, 0.8), seed=4,
        ),
    ]  # fmt: skip
    crops[0].voxels[:, :16, :] = INVALID  # whole tokens of nothing, mirrored or not
    crops[1].voxels[:, :14] = INVALID
    return specs, crops, ["volume", "volume", "slab", "planar"]


_images: dict[tuple[Any, ...], Image] = {}  # the same crops in every case


def image_of(crop: Any, kind: str, block: Any) -> Image:
    slot = crop.draw.slot
    flip, tone = block.flip[slot].tolist(), block.tone[slot].tolist()
    key = (crop.draw.index, *flip, *tone)
    if key not in _images:
        _images[key] = Image(crop, kind, flip, tone)
    return _images[key]


def compare(model: Any, batch: Any, crops: list[Any], kinds: list[str], *, drop: bool = False) -> None:
    network = Network(model)
    with torch.no_grad():
        results = dict(zip(batch, model(batch, reconstruct=True)))
        loss = float(model(batch)[0])
    total = 0.0
    for crop, kind in zip(crops, kinds):
        name = next(n for n in batch if n.startswith(kind))
        block, result, slot = batch[name], results[name], crop.draw.slot
        image = image_of(crop, kind, block)
        seen, asked = image.masks(model.objective)
        tokens = result.tokens
        assert tokens.visible_ids[slot][tokens.attend[slot]].tolist() == seen
        assert tokens.target_ids[slot][tokens.predicted[slot]].tolist() == asked
        dropped = (block.drop[slot] < torch.tensor(model.encoder.drop_rates)).tolist() if drop else None
        guesses = network.predictions(image, kind, seen, asked, dropped)
        own = result.prediction[slot, : len(asked)].double().numpy()
        np.testing.assert_allclose(own, np.array(guesses), atol=2e-4, rtol=1e-3)
        expected, scored = network.loss(image, asked, guesses)
        mine = {
            place
            for row, number in enumerate(tokens.target_ids[slot].tolist())
            for place, counts in zip(image.voxels(number), tokens.scored[slot, row].tolist())
            if counts
        }
        assert not mine ^ scored  # as one set: pytest's diff of thousands of voxels takes minutes
        assert float(result.crop_loss[slot]) == pytest.approx(expected, rel=2e-4)
        total += expected
    assert loss == pytest.approx(total / len(crops), rel=2e-4)


CASES: dict[str, dict[str, Any]] = {
    "defaults, one block": {},
    "two blocks, low ratio": {"decoder_depth": 2, "mask_ratio": 0.5},
    "other wavelengths": {"encoder": {"rotary_wavelengths": (5.0, 300.0)}},
    "cross": {"decoder": "cross", "decoder_depth": 2},
    "ranged ratio, share": {"mask_ratio": (0.3, 0.9), "predict_share": 0.4},
    "ranged ratio, cross": {"mask_ratio": (0.5, 0.9), "decoder": "cross", "predict_share": 0.5},
    "blocks": {"masking": "block", "mask_block": (1, 2, 2), "mask_ratio": 0.6},
    "norm_pix": {"norm_pix": True},
    "gradient": {"gradient_weight": 0.7},
    "gradient of norm_pix": {"gradient_weight": 1.5, "norm_pix": True, "predict_share": 0.6},
    "registers": {"encoder": {"registers": 2, "class_token": True}},
    "index": {"encoder": {"rotary": "index"}, "decoder_depth": 2},
    "index, cross": {"encoder": {"rotary": "index", "registers": 1}, "decoder": "cross"},
    "off": {"encoder": {"rotary": "off", "learned_positions": (2, 3, 4)}},
    "off, cross": {"encoder": {"rotary": "off", "learned_positions": (3, 3, 3)}, "decoder": "cross"},
    "mm and learned": {"encoder": {"learned_positions": (2, 2, 2)}},
}
SMALL = {"width": 24, "depth": 2, "heads": 2, "mlp_ratio": 2.0}


def built(hand: Any, changes: dict[str, Any]) -> tuple[Any, Any, list[Any], list[str]]:
    """A small network with weights that are all in use, its batch, the crops and their geometries."""
    specs, crops, kinds = crops_of(hand)
    settings = {"decoder_width": 24, "decoder_heads": 2} | changes
    settings["encoder"] = SMALL | changes.get("encoder", {})
    model, batch = hand.build(specs, crops, **settings)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval(), batch, crops, kinds


@pytest.mark.parametrize("name", CASES)
def test_predictions_and_loss_are_those_of_the_direct_implementation(name: str, hand: Any) -> None:
    compare(*built(hand, CASES[name]))


def test_drop_path_leaves_out_the_blocks_that_the_crop_drew(hand: Any) -> None:
    changes = {"encoder": {"drop_path": 0.6, "depth": 3}}
    model, batch, crops, kinds = built(hand, changes)
    compare(model, batch, crops, kinds)
    with pytest.raises(AssertionError):
        compare(model.train(), batch, crops, kinds)
    compare(model, batch, crops, kinds, drop=True)


def test_crops_are_mirrored_resampled_and_partly_missing(hand: Any) -> None:
    """What the cases above are meant to cover is in them."""
    _, batch, crops, _ = built(hand, {})
    assert all(block.flip.any() for block in batch.values())
    assert any((block.tone[:, 2] != 1).any() for block in batch.values())
    for crop, name in zip(crops, ("volume-3", "volume-3", "slab-2", "planar-2")):
        tokens, slot = math.prod(crop.draw.grid), crop.draw.slot
        missing = tokens - int(batch[name].valid[slot])
        assert (missing > 0) == (crop.draw.index in (2, 24))
        assert len(set(crop.draw.grid)) > 1


@pytest.mark.parametrize("what", ["scored", "target", "target_centres"])
def test_a_transposed_mask_is_noticed(what: str, hand: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fault of a published codebase, which on cubes goes unseen: the loss mask in another axis order."""
    model, batch, crops, kinds = built(hand, {})
    right = pretrain.tokens.tokenise

    def wrong(block: Any, patch: Any) -> Any:
        gz, gy, gx = block.grid[:, None].unbind(2)
        ids = block.target_ids
        z, y, x = ids // (gy * gx), ids // gx % gy, ids % gx
        swapped = right(block._replace(target_ids=(x * gy + y) * gz + z), patch)
        return right(block, patch)._replace(**{what: getattr(swapped, what)})

    monkeypatch.setattr(pretrain.tokens, "tokenise", wrong)
    with pytest.raises(AssertionError):
        compare(model, batch, crops, kinds)
