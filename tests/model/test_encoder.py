"""The trunk on packed tokens, and the encoder on images."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from model.block import LayerNorm
from model.config import SIZES, EncoderConfig
from model.encoder import Encoder
from model.errors import UserError

EVERYTHING = {
    "registers": 2, "class_token": True, "qk_norm": True, "swiglu": True, "layer_scale": 0.5,
    "rotary_wavelengths": (5.0, 700.0),
}  # fmt: skip
SWITCHES = [{}, EVERYTHING, {"rotary": "off", "registers": 1}]


def build(**switches: object) -> Encoder:
    torch.manual_seed(0)
    encoder = Encoder(EncoderConfig(**{"size": "nano", **switches})).eval()
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if parameter.ndim == 1:  # biases and gains that hide nothing
                parameter.add_(0.1 * torch.randn_like(parameter))
            elif "stems" not in name:
                parameter.mul_(3)
    return encoder


def packed(lengths: list[tuple[int, int]], width: int = 96) -> tuple[Tensor, Tensor]:
    total = sum(n * length for n, length in lengths)
    generator = torch.Generator().manual_seed(total)
    return torch.randn(total, width, generator=generator), torch.rand(total, 3, generator=generator) * 200


def slow_trunk(encoder: Encoder, tokens: Tensor, centres: Tensor, attend: Tensor | None) -> Tensor:
    """Reference for one sequence: complex rotations and softmax written out, float64, a head at a time."""
    config, width, heads = encoder.config, encoder.width, encoder.heads
    state = {name: tensor.double() for name, tensor in encoder.state_dict().items()}
    x = tokens.double()
    prefix = state.get("prefix.tokens", x.new_zeros((0, width)))
    x = torch.cat((prefix, x))
    valid = torch.ones(len(x), dtype=torch.bool)
    if attend is not None:
        valid[len(prefix) :] = attend
    head, pairs = width // heads, width // heads // 6
    low, high = config.rotary_wavelengths
    angles = torch.zeros(len(x), head // 2, dtype=torch.float64)
    boxed = centres[valid[len(prefix) :]]
    centres = centres - (boxed.amin(0) + boxed.amax(0)) / 2
    if config.rotary == "mm":
        for axis in range(3):
            for i in range(pairs):
                length = low * (high / low) ** (i / (pairs - 1))
                angles[len(prefix) :, axis * pairs + i] = 2 * math.pi * centres[:, axis].double() / length

    def norm(name: str, value: Tensor) -> Tensor:
        value = value - value.mean(-1, keepdim=True)
        value = value / (value.pow(2).mean(-1, keepdim=True) + config.norm_eps).sqrt()
        return value * state[f"{name}.weight"] + state[f"{name}.bias"]

    def linear(name: str, value: Tensor) -> Tensor:
        return value @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def turn(value: Tensor) -> Tensor:
        turned = torch.complex(value[:, : head // 2], value[:, head // 2 :]) * torch.exp(1j * angles)
        return torch.cat((turned.real, turned.imag), 1)

    for number in range(encoder.depth):
        name = f"blocks.{number}"
        qkv = linear(f"{name}.attn.qkv", norm(f"{name}.norm1", x))
        out = []
        for h in range(heads):
            q, k, v = (qkv[:, part * width + h * head : part * width + (h + 1) * head] for part in range(3))
            if config.qk_norm:
                q, k = norm(f"{name}.attn.q_norm", q), norm(f"{name}.attn.k_norm", k)
            score = turn(q) @ turn(k).T / math.sqrt(head)
            out.append(score.masked_fill(~valid, -torch.inf).softmax(1) @ v)
        branch = linear(f"{name}.attn.proj", torch.cat(out, 1))
        x = x + branch * state.get(f"{name}.ls1.gamma", 1.0)
        hidden = linear(f"{name}.mlp.fc1", norm(f"{name}.norm2", x))
        if config.swiglu:
            gate, value = hidden.chunk(2, 1)
            hidden = gate / (1 + torch.exp(-gate)) * value
        else:
            hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
        x = x + linear(f"{name}.mlp.fc2", hidden) * state.get(f"{name}.ls2.gamma", 1.0)
    return norm("norm", x)[len(prefix) :]


@pytest.mark.parametrize("switches", SWITCHES)
def test_packed_sequences_against_a_slow_reference(switches: dict) -> None:
    encoder = build(**switches)
    layout = ((2, 7), (0, 5), (3, 4), (1, 0))
    tokens, centres = packed(list(layout))
    attend = torch.rand(len(tokens), generator=torch.Generator().manual_seed(1)) > 0.3
    with torch.no_grad():
        (found,) = encoder.trunk(tokens, centres, layout, attend)
        start = 0
        for n, length in layout:
            for _ in range(n):
                own = slice(start, start + length)
                if length:
                    expected = slow_trunk(encoder, tokens[own], centres[own], attend[own])
                    torch.testing.assert_close(found[own].double(), expected, rtol=1e-3, atol=2e-3)
                start += length
    assert start == len(tokens)


@pytest.mark.parametrize("switches", SWITCHES)
def test_neighbours_and_unattended_tokens_change_nothing(switches: dict) -> None:
    encoder = build(**switches)
    tokens, centres = packed([(3, 8)])
    attend = torch.ones(24, dtype=torch.bool)
    attend[5:8] = False
    other_tokens, other_centres = tokens.clone(), centres.clone()
    other_tokens[5:], other_centres[5:] = torch.randn(19, 96), torch.rand(19, 3)
    with torch.no_grad():
        (one,) = encoder.trunk(tokens, centres, ((3, 8),), attend)
        (two,) = encoder.trunk(other_tokens, other_centres, ((3, 8),), attend)
    torch.testing.assert_close(one[:5], two[:5], rtol=1e-5, atol=1e-5)
    assert (one[8:] - two[8:]).abs().max() > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("switches", SWITCHES)
def test_a_sequence_without_a_valid_key_is_finite(switches: dict, dtype: torch.dtype) -> None:
    encoder = build(**switches).to(dtype).train()
    tokens, centres = packed([(2, 6)])
    tokens = tokens.to(dtype).requires_grad_()
    attend = torch.ones(12, dtype=torch.bool)
    attend[:6] = False
    (out,) = encoder.trunk(tokens, centres, ((2, 6),), attend)
    out.float().square().mean().backward()
    assert out.dtype == dtype
    assert out.isfinite().all()
    assert tokens.grad is not None
    assert tokens.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in encoder.blocks.parameters() if p.grad is not None)


@pytest.mark.parametrize("registers", [0, 2])
def test_translation_of_the_patient_changes_nothing_but_scale_does(registers: int) -> None:
    encoder = build(registers=registers)
    tokens, centres = packed([(1, 20)])
    with torch.no_grad():
        (here,) = encoder.trunk(tokens, centres, ((1, 20),))
        (there,) = encoder.trunk(tokens, centres + torch.tensor((100.0, -37.0, 512.0)), ((1, 20),))
        (scaled,) = encoder.trunk(tokens, centres * 2, ((1, 20),))
    assert (there - here).abs().max() < 1e-3
    assert (scaled - here).abs().max() > 0.1


@pytest.mark.parametrize("switches", [{}, {"registers": 2}])
@pytest.mark.parametrize("axes", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
@pytest.mark.parametrize("kind", ["volume", "slab", "planar"])
def test_a_crop_gives_the_same_features_wherever_it_lies_in_the_volume(
    kind: str, axes: tuple, switches: dict
) -> None:
    from model.patches import patchify, token_centres

    encoder = build(**switches)
    patch, grid = encoder.patch(kind), (1, 2, 3)
    image = torch.randn(1, 1, *(g * p for g, p in zip(grid, patch)))
    spacing = torch.tensor([[3.0, 0.7, 1.3]])
    order, grids = torch.tensor([axes]), torch.tensor([grid])

    def features(start: tuple[float, float, float], spacing: Tensor) -> Tensor:
        centres = token_centres(grids, torch.tensor([start]), spacing, patch, order, capacity=6)
        tokens = encoder.stem(kind, patchify(image, patch))
        return encoder.trunk(tokens[0], centres[0], ((1, 6),))[0]

    with torch.no_grad():
        here = features((0.0, 0.0, 0.0), spacing)
        there = features((512.0, 96.0, 320.0), spacing)
        turned = features((0.0, 0.0, 0.0), spacing[:, [0, 2, 1]])
        (maps,) = encoder(image, spacing, kind, axes=axes)
    torch.testing.assert_close(maps.flatten(2)[0].T, here, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(there, here, rtol=2e-3, atol=2e-3)
    assert (turned - here).abs().max() > 0.05


def test_bf16_follows_fp32() -> None:
    encoder = build(**EVERYTHING)
    image, spacing = torch.randn(2, 1, 16, 24, 16), torch.tensor([[1.0, 1.0, 2.0]] * 2)
    with torch.no_grad():
        (full,) = encoder(image, spacing)
        (half,) = encoder.to(torch.bfloat16)(image, spacing)
    assert half.dtype == torch.bfloat16
    cosine = torch.nn.functional.cosine_similarity(full, half.float(), dim=1)
    assert cosine.min() > 0.99


def test_layer_norm_is_float32_inside_bf16() -> None:
    norm = LayerNorm(64)
    torch.nn.init.normal_(norm.weight)
    norm.bfloat16()
    x = (torch.randn(50, 64) + 30).bfloat16()
    gain, bias = norm.weight.double(), norm.bias.double()
    exact = torch.nn.functional.layer_norm(x.double(), (64,), gain, bias, norm.eps)
    torch.testing.assert_close(norm(x).double(), exact, rtol=2**-8, atol=1e-4)


def test_depths_and_the_final_norm() -> None:
    encoder = build(class_token=True)
    tokens, centres = packed([(2, 5)])
    with torch.no_grad():
        first, last, again = encoder.trunk(tokens, centres, ((2, 5),), depths=(0, 4, 0))
        torch.testing.assert_close(first, encoder.norm(tokens))
        assert torch.equal(first, again)
        assert torch.equal(last, encoder.trunk(tokens, centres, ((2, 5),))[0])
    with pytest.raises(ValueError, match="depths"):
        encoder.trunk(tokens, centres, ((2, 5),), depths=(5,))
    with pytest.raises(ValueError, match="layout"):
        encoder.trunk(tokens, centres, ((2, 4),))


def test_keyed_drop_path() -> None:
    encoder = build(drop_path=0.4, registers=1)
    assert encoder.drop_rates == pytest.approx((0, 0.4 / 3, 0.8 / 3, 0.4))
    layout = ((2, 5), (1, 3))
    tokens, centres = packed(list(layout))
    drop = torch.zeros(3, 4, dtype=torch.bool)
    drop[1] = True
    with torch.no_grad():
        (out,) = encoder.trunk(tokens, centres, layout, drop=drop)
        torch.testing.assert_close(out[5:10], encoder.norm(tokens[5:10]))  # only the norm is left
        full = encoder.trunk(tokens, centres, layout)[0]
        assert (out[:5] - full[:5]).abs().max() > 0.01  # what stays is scaled up
        alone = encoder.trunk(tokens[:5], centres[:5], ((1, 5),), drop=drop[:1])[0]
        torch.testing.assert_close(out[:5], alone, rtol=1e-4, atol=1e-4)
        plain = build(drop_path=0.0, registers=1)
        unscaled = plain.trunk(tokens, centres, layout, drop=drop & False)[0]
        torch.testing.assert_close(unscaled, full)
    with pytest.raises(ValueError, match="drop"):
        encoder.trunk(tokens, centres, layout, drop=drop[:2])


@pytest.mark.parametrize("switches", [{}, {**EVERYTHING, "drop_path": 0.3}])
def test_checkpointing_gives_the_same_gradients(switches: dict) -> None:
    encoder = build(**switches).train()
    tokens, centres = packed([(2, 6)])
    drop = torch.rand(2, 4, generator=torch.Generator().manual_seed(2)) < 0.5
    gradients = []
    for on in (False, True):
        encoder.set_checkpointing(on)
        encoder.zero_grad()
        encoder.trunk(tokens, centres, ((2, 6),), drop=drop)[0].square().mean().backward()
        gradients.append([p.grad.clone() for p in encoder.blocks.parameters() if p.grad is not None])
    assert gradients[0]
    for one, two in zip(*gradients, strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("switches", SWITCHES)
@pytest.mark.parametrize(
    ("geometry", "size"), [("volume", (16, 11, 20)), ("slab", (3, 20, 33)), ("planar", (1, 40, 17))]
)
def test_features_do_not_depend_on_padding(switches: dict, geometry: str, size: tuple) -> None:
    encoder = build(**switches)
    patch = encoder.patch(geometry)
    image, spacing = torch.randn(2, 1, *size), torch.tensor([[2.0, 1.0, 0.7]] * 2)
    with torch.no_grad():
        (alone,) = encoder(image, spacing, geometry)
        room = [s + -s % p + 2 * p for s, p in zip(size, patch)]
        larger = torch.randn(2, 1, *room) * 50
        valid = torch.zeros(2, *room, dtype=torch.bool)
        own = (slice(None), *[slice(s) for s in size])
        larger[:, 0][own], valid[own] = image[:, 0], True
        (padded,) = encoder(larger, spacing, geometry, valid=valid)
    grid = alone.shape[2:]
    assert tuple(grid) == tuple(-(-s // p) for s, p in zip(size, patch))
    torch.testing.assert_close(padded[:, :, : grid[0], : grid[1], : grid[2]], alone, rtol=1e-4, atol=1e-4)


def test_the_image_path_is_the_packed_path() -> None:
    """forward() on images equals stem and trunk on a row that holds them beside strangers."""
    from model.patches import patchify, token_centres

    encoder = build(registers=1)
    image, spacing = torch.randn(2, 1, 8, 16, 24), torch.tensor([[1.0, 2.0, 0.5], [3.0, 1.0, 1.0]])
    grid = torch.tensor([[1, 2, 3]] * 2)
    with torch.no_grad():
        (maps,) = encoder(image, spacing)
        tokens = encoder.stem("volume", patchify(image, (8, 8, 8)))
        axes = torch.tensor([[0, 1, 2]] * 2)
        centres = token_centres(grid, torch.full((2, 3), 40.0), spacing, (8, 8, 8), axes, 6)
        strangers = torch.randn(30, 96)
        (flat,) = encoder.trunk(
            torch.cat((strangers, tokens.flatten(0, 1))), torch.cat((torch.rand(30, 3), centres.flatten(0,
            1))), ((3, 10), (2, 6)),
        )  # fmt: skip
    found = flat[30:].view(2, 1, 2, 3, 96).permute(0, 4, 1, 2, 3)
    torch.testing.assert_close(found, maps, rtol=1e-3, atol=1e-3)


def test_spacing_and_patient_axes_are_seen() -> None:
    encoder = build()
    image = torch.randn(1, 1, 4, 32, 32)
    with torch.no_grad():
        (one,) = encoder(image, torch.tensor([[5.0, 1.0, 1.0]]), "slab")
        (two,) = encoder(image, torch.tensor([[8.0, 1.0, 1.0]]), "slab")
        (three,) = encoder(image, torch.tensor([[5.0, 1.0, 1.0]]), "slab", axes=(2, 0, 1))
    assert (one - two).abs().max() > 1e-3
    assert (one - three).abs().max() > 1e-3


def test_index_positions_count_voxels_and_do_not_see_spacing() -> None:
    encoder, in_mm = build(rotary="index"), build(rotary="mm")
    image, thick = torch.randn(1, 1, 4, 32, 48), torch.tensor([[5.0, 1.0, 0.5]])
    with torch.no_grad():
        (one,) = encoder(image, thick, "slab")
        (two,) = encoder(image, 2 * thick, "slab")
        (three,) = encoder(image, thick, "slab", axes=(2, 0, 1))
        (reference,) = in_mm(image, torch.ones(1, 3), "slab")
        (other,) = in_mm(image, thick, "slab")
    assert torch.equal(one, two)
    assert torch.equal(one, reference)
    assert (one - three).abs().max() > 1e-3
    assert (one - other).abs().max() > 1e-3


def test_a_learned_table_needs_the_grid_and_uses_it() -> None:
    encoder = build(learned_positions=(1, 4, 4))
    patches = torch.randn(1, 4, 256)
    with pytest.raises(ValueError, match="grid"):
        encoder.stem("planar", patches)
    grid, some = torch.tensor([[1, 4, 4]]), torch.tensor([[15, 0, 3, 8]])
    with torch.no_grad():
        found = encoder.stem("planar", patches, grid, some)
        expected = encoder.stems["planar"](patches) + encoder.positions.table[some]
    torch.testing.assert_close(found, expected)


def test_wrong_use_is_named() -> None:
    encoder = build(patch={"volume": (8, 8, 8)})
    with pytest.raises(UserError, match="no 'planar' stem"):
        encoder(torch.zeros(1, 1, 1, 16, 16), torch.ones(1, 3), "planar")
    with pytest.raises(ValueError, match="image must be"):
        encoder(torch.zeros(1, 2, 8, 8, 8), torch.ones(1, 3))


def test_configuration() -> None:
    assert EncoderConfig(size="small").shape == (384, 12, 6)
    assert EncoderConfig(size="giant", depth=2).shape == (1408, 2, 16)
    assert EncoderConfig(size=None, width=96, depth=2, heads=4).explicit() == EncoderConfig(
        size=None, width=96, depth=2, heads=4
    )
    assert all(shape.width % shape.heads == 0 for shape in SIZES.values())
    for wrong in (
        {"size": None, "width": 96},
        {"width": 100},
        {"size": None, "width": 12, "depth": 1, "heads": 3},
        {"size": None, "width": 12, "depth": 1, "heads": 3, "rotary": "index"},
        {"rotary_wavelengths": (4.0, 2.0)},
        {"patch": {}},
        {"colour": 1},
    ):
        with pytest.raises(ValueError):
            EncoderConfig(**wrong)


def test_start_is_a_function_of_the_seed() -> None:
    first, second = build(), build()
    for one, two in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, two)
