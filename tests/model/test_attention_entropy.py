"""Entropy of the attention against a dense softmax, a token at a time."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from model import attention_entropy as module
from model.config import EncoderConfig
from model.encoder import Encoder
from model.positions import apply_rotary, from_middle, rotary


def build(**switches: object) -> Encoder:
    torch.manual_seed(0)
    encoder = Encoder(EncoderConfig(**{"size": "nano", **switches})).eval()
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            parameter.mul_(6 if parameter.ndim == 2 and "stems" not in name else 1)
    return encoder


def slow_entropy(encoder: Encoder, tokens: Tensor, centres: Tensor, attend: Tensor) -> list[list[Tensor]]:
    """Per block and head the relative entropies of one sequence's attended tokens."""
    width = encoder.width // encoder.heads
    prefix = encoder.prefix.tokens if encoder.prefix is not None else tokens[:0]
    x = torch.cat((prefix, tokens))
    keys = torch.cat((torch.ones(len(prefix), dtype=torch.bool), attend))
    tables = None
    if encoder.config.rotary != "off":
        local = torch.cat(
            (centres.new_zeros(len(prefix), 3), from_middle(centres, ((1, len(tokens)),), attend))
        )
        tables = rotary(local, width)
    found = []
    for block in encoder.blocks:
        q, k, _ = block.attn.qkv(block.norm1(x)).view(len(x), 3, encoder.heads, width).unbind(1)
        q, k = block.attn.q_norm(q), block.attn.k_norm(k)
        if tables is not None:
            q, k = apply_rotary(q, *tables), apply_rotary(k, *tables)
        found.append([])
        for head in range(encoder.heads):
            rows = []
            for token in range(len(prefix), len(x)):
                share = (k[keys, head] @ q[token, head] / math.sqrt(width)).double().softmax(0)
                entropy = -(share * share.clamp(min=1e-300).log()).sum()
                if keys[token] and keys.sum() > 1:
                    rows.append(entropy / math.log(int(keys.sum())))
            found[-1].append(torch.stack(rows) if rows else torch.zeros(0, dtype=torch.float64))
        x = block(x, ((1, len(x)),), tables, [keys[None, None, None]])
    return found


@pytest.mark.parametrize("at_a_time", [2**24, 40])
@pytest.mark.parametrize(
    "switches", [{}, {"registers": 2, "qk_norm": True}, {"rotary": "off", "class_token": True}]
)
def test_against_a_dense_softmax(switches: dict, at_a_time: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SCORES", at_a_time)  # 40: a query at a time
    encoder = build(**switches)
    layout = ((2, 7), (0, 5), (3, 4), (1, 1))
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randn(27, 96, generator=generator)
    centres = torch.rand(27, 3, generator=generator) * 100
    attend = torch.rand(27, generator=generator) > 0.3
    attend[14:18] = False  # a crop without any valid token
    attend[26] = True
    pooled: list[list[list[Tensor]]] = [[[] for _ in range(3)] for _ in range(4)]
    start = 0
    with torch.no_grad():
        for n, length in layout:
            for _ in range(n):
                own = slice(start, start + length)
                for block, heads in enumerate(slow_entropy(encoder, tokens[own], centres[own], attend[own])):
                    for head, values in enumerate(heads):
                        pooled[block][head].append(values)
                start += length
    expected = torch.tensor([[torch.cat(values).mean() for values in heads] for heads in pooled])
    found = encoder.attention_entropy(tokens, centres, layout, attend)
    assert found.dtype == torch.float32
    assert found.shape == (4, 3)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)
    assert found.min() > 0.05
    assert found.max() < 0.999  # neither end, so that the comparison says something


def test_uniform_is_one_and_a_single_key_is_zero() -> None:
    encoder = build(rotary="off")
    tokens, centres = torch.randn(20, 96), torch.zeros(20, 3)
    with torch.no_grad():
        for block in encoder.blocks:
            block.attn.qkv.weight[:192] = 0
    layout = ((4, 5),)
    torch.testing.assert_close(encoder.attention_entropy(tokens, centres, layout), torch.ones(4, 3))
    with torch.no_grad():
        for block in encoder.blocks:
            block.attn.qkv.weight[:192] = 300 * torch.randn(192, 96)
    assert encoder.attention_entropy(tokens, centres, layout).max() < 0.01
    assert encoder.attention_entropy(tokens, centres, ((20, 1),)).isnan().all()  # nobody has a choice


def test_under_autocast_it_is_float32_and_close() -> None:
    encoder = build(registers=1)
    tokens, centres = torch.randn(16, 96), torch.rand(16, 3) * 80
    exact = encoder.attention_entropy(tokens, centres, ((2, 8),))
    with torch.autocast("cpu", torch.bfloat16):
        found = encoder.attention_entropy(tokens, centres, ((2, 8),))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, exact, rtol=0.05, atol=0.01)
