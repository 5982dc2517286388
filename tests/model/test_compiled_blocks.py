"""Blocks under torch.compile: one graph a layout, no break in any, and the results of eager."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from model.config import EncoderConfig
from model.encoder import Encoder

PACKED = ((2, 12), (3, 6), (0, 4))
OTHER = ((2, 9), (3, 5), (1, 4))
EVERYTHING = {
    "registers": 2, "class_token": True, "qk_norm": True, "swiglu": True, "layer_scale": 0.5,
}  # fmt: skip


@pytest.fixture(autouse=True)
def from_nothing() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def build(**switches: object) -> Encoder:
    torch.manual_seed(0)
    return Encoder(EncoderConfig(**{"size": "nano", "depth": 2, "drop_path": 0.3, **switches})).train()


def step(encoder: Encoder, layout: tuple[tuple[int, int], ...], precision: str) -> list[Tensor]:
    """Features and all gradients of a training step with masked keys and drop-path."""
    total, rows = sum(n * length for n, length in layout), sum(n for n, _ in layout)
    generator = torch.Generator().manual_seed(total)
    tokens = torch.randn(total, 96, generator=generator).requires_grad_()
    centres = torch.rand(total, 3, generator=generator) * 100
    attend = torch.rand(total, generator=generator) > 0.2
    drop = torch.rand(rows, 2, generator=generator) < 0.3
    encoder.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        (out,) = encoder.trunk(tokens, centres, layout, attend, drop)
        loss = out.float().square().mean() + out.float()[:, 0].sum()
    loss.backward()
    gradients = [p.grad.clone() for p in encoder.blocks.parameters() if p.grad is not None]
    assert gradients
    return [out.detach(), *gradients]


@pytest.mark.parametrize(
    ("switches", "precision", "recompute"), [({}, "bf16", False), (EVERYTHING, "fp32", True)]
)
def test_one_whole_graph_a_layout_with_the_results_of_eager(
    switches: dict, precision: str, recompute: bool
) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    eager, compiled = build(**switches), build(**switches)
    compiled.set_checkpointing(recompute)
    for block in compiled.blocks:
        block.compile(backend=counter, fullgraph=True, dynamic=False)
    for number, layout in enumerate((PACKED, OTHER), start=1):
        for _ in range(2):
            found = step(compiled, layout, precision)
            assert counter.frame_count == number  # all blocks share it, however many row classes it packs
        for one, other in zip(found, step(eager, layout, precision), strict=True):
            if precision == "fp32":
                torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
            else:  # the graph rounds in other places
                assert (one - other).norm() <= 0.02 * other.norm()
