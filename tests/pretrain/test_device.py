"""What a device asks of the network: it looks at no value, compiles block by block, recomputes if told."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from pretrain.batch import geometry_of_block, to_device
from pretrain.tokens import tokenise

MIXED: dict[str, Any] = {"drop_path": 0.5, "registers": 1}


def mixed(hand: Any, **changes: Any) -> tuple[Any, Any]:
    """A network and a batch of all three stems, with invalid voxels, resampling and an empty slot."""
    specs = [hand.spec("volume", 2, 2, 60), hand.spec("slab", 1, 1, 40), hand.spec("planar", 1, 1, 30)]
    crops = [
        hand.crop("volume", (20, 30, 18), index=0, slot=0, invalid=0.2, residual=(0.9, 0.8, 1.1)),
        hand.crop("volume", (16, 16, 24), index=1, slot=3, modality="PT"),
        hand.crop("slab", (5, 40, 30), index=2, spec=1, modality="MR"),
        hand.crop("planar", (1, 60, 70), index=3, spec=2, modality="XR"),
    ]
    return hand.build(specs, crops, **changes)


class NoCopies(TorchFunctionMode):
    """Refuses what makes the host wait for a device and goes unseen on the meta device."""

    forbidden = (torch.tensor, torch.as_tensor, torch.from_numpy, torch.repeat_interleave)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in self.forbidden, func
        assert func is not torch.Tensor.repeat_interleave
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "changes",
    [
        {"encoder": MIXED},
        {"encoder": MIXED, "decoder": "cross", "mask_ratio": (0.5, 0.9)},
        {"encoder": {"rotary": "index"}, "norm_pix": True, "gradient_weight": 1.0},
        {"encoder": {"rotary": "off", "learned_positions": (2, 3, 2)}, "predict_share": 0.5},
    ],
)
@pytest.mark.parametrize("training", [True, False])
def test_forward_and_backward_never_look_at_a_value(changes: Any, training: bool, hand: Any) -> None:
    model, batch = mixed(hand, **changes)
    model.to("meta").train(training)
    placed = to_device(batch, torch.device("meta"))
    with NoCopies():
        loss, metrics = model(placed)
        loss.backward()
        assert len(model(placed, reconstruct=True)) == 3
    assert loss.shape == ()
    assert all(value.shape == () for pair in metrics.values() for value in pair)
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("decoder", ["self", "cross"])
def test_a_gpu_computes_the_same_and_is_never_waited_for(decoder: str, hand: Any) -> None:
    model, batch = mixed(hand, decoder=decoder, encoder=MIXED)
    expected = model.eval()(batch)[0]
    model.cuda()
    placed = to_device(batch, torch.device("cuda"))
    first = model(placed)[0]  # constants go over at the first call
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.autocast("cuda", torch.bfloat16):
            model(placed)[0].backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert first.item() == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize(
    "look",
    [
        lambda block: block.weight.sum().item(),
        lambda block: bool(block.weight.any()),
        lambda block: block.grid[block.weight > 0],
        lambda block: torch.tensor([1.0], device=block.weight.device),
        lambda block: block.grid.repeat_interleave(block.valid, 0),
    ],
)
def test_a_look_at_a_value_would_be_noticed(look: Any, hand: Any) -> None:
    block = to_device(mixed(hand)[1], torch.device("meta"))["slab-1"]
    with NoCopies(), pytest.raises((RuntimeError, NotImplementedError, AssertionError)):
        look(block)


def test_tokens_are_the_same_without_a_look_at_what_could_be_left_out(
    hand: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The CPU skips interpolation, tone curves and asinh where no crop asks for them; a device never does."""
    model, batch = mixed(hand)

    def cut() -> list[Any]:
        return [tokenise(b, model.encoder.patch(geometry_of_block(name))) for name, b in batch.items()]

    before = cut()
    for module in ("pretrain.tokens", "model.normalise"):
        monkeypatch.setattr(f"{module}.may_look", lambda _: False)
    for one, two in zip(before, cut(), strict=True):
        for name, *pair in zip(one._fields, one, two, strict=True):
            assert torch.equal(*pair), name


@pytest.mark.parametrize("decoder", ["self", "cross"])
def test_recomputing_the_blocks_changes_no_gradient(decoder: str, hand: Any) -> None:
    model, batch = mixed(hand, decoder=decoder, encoder=MIXED)
    found, calls = [], [0]
    blocks = [*model.encoder.blocks, *model.decoder.blocks]
    for block in blocks:
        block.register_forward_pre_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
    for on in (False, True):
        model.set_checkpointing(on)
        model.zero_grad()
        calls[0] = 0
        model(batch)[0].backward()
        found.append([parameter.grad.clone() for parameter in model.parameters()])
        assert calls[0] == len(blocks) * (2 if on else 1)
    assert all(torch.equal(*pair) for pair in zip(*found))


@pytest.mark.parametrize("decoder", ["self", "cross"])
def test_bf16_gives_the_gradients_of_float32_to_rounding(decoder: str, hand: Any) -> None:
    """Through the CPU's own attention: recomputed or not the same bits, without gradients the same loss."""
    model, batch = mixed(hand, decoder=decoder, encoder=MIXED)
    with torch.no_grad():
        for block in (*model.encoder.blocks, *model.decoder.blocks):
            for parameter in block.parameters():
                parameter.mul_(3 if parameter.ndim > 1 else 1)  # attention that is not uniform

    def gradients(on: bool) -> tuple[torch.Tensor, torch.Tensor]:
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=on):
            loss = model(batch)[0]
        loss.backward()
        return loss.detach(), torch.cat([parameter.grad.flatten() for parameter in model.parameters()])

    _, exact = gradients(False)
    loss, kept = gradients(True)
    assert (kept - exact).norm() < 0.05 * exact.norm()
    model.set_checkpointing(True)
    again, recomputed = gradients(True)
    assert torch.equal(loss, again)
    assert torch.equal(kept, recomputed)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(batch)[0], loss)


def compiled(parts: Any) -> Any:
    """Compile these modules as the engine does; returns the counter of graphs."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    for part in parts:
        part.compile(backend=counter, fullgraph=True, dynamic=False)
    return counter


@pytest.mark.parametrize("decoder", ["self", "cross"])
def test_a_decoder_block_compiles_once_for_all_row_classes_and_batches(decoder: str, hand: Any) -> None:
    model, batch = mixed(hand, decoder=decoder)
    expected, names = model(batch)[0].item(), list(model.state_dict())
    counter = compiled(model.decoder.blocks)
    for seed in range(3):
        loss = model(mixed(hand, decoder=decoder, seed=seed)[1])[0]
        loss.backward()
        assert seed or loss.item() == pytest.approx(expected, rel=1e-5)
    assert counter.frame_count == 1
    assert list(model.state_dict()) == names


@pytest.mark.slow
def test_cutting_out_and_scoring_compile_once_a_row_class(hand: Any) -> None:
    changes: Any = {"gradient_weight": 0.5, "norm_pix": True}
    model, batch = mixed(hand, **changes)
    eager = model.reconstruct(batch)
    counter = compiled(model.around)
    for seed in range(2):
        model(mixed(hand, seed=seed, **changes)[1])[0].backward()
    assert counter.frame_count == 3 + 3
    for before, after in zip(eager, model.reconstruct(batch)):
        for name, one, two in zip(before.tokens._fields, before.tokens, after.tokens):
            assert torch.allclose(one.double(), two.double(), atol=1e-6, rtol=1e-6), name
        for one, two in zip(before[1:], after[1:]):
            assert torch.allclose(one, two, atol=1e-5, rtol=1e-5)


def test_all_of_it_is_compiled(hand: Any) -> None:
    model, _ = mixed(hand)
    assert set(model.blocks_to_compile()) == {*model.encoder.blocks, *model.decoder.blocks, *model.around}


def test_evaluation_repeats_and_leaves_drop_path_out(hand: Any) -> None:
    """In eval mode the loss depends on weights, crops and the evaluation's seed alone."""
    changes: Any = {"encoder": MIXED, "augment": False}
    model, batch = mixed(hand, **changes)
    model.eval()
    with torch.no_grad():
        first = [result.crop_loss for result in model(batch, reconstruct=True)]
        torch.manual_seed(123)
        _, again = mixed(hand, **changes)
        second = [result.crop_loss for result in model(again, reconstruct=True)]
        _, other = mixed(hand, seed=1, **changes)
        masked_otherwise = [result.crop_loss for result in model(other, reconstruct=True)]
        trained = [result.crop_loss for result in model.train()(batch, reconstruct=True)]
    assert all(torch.equal(*pair) for pair in zip(first, second))
    assert not any(torch.equal(*pair) for pair in zip(first, masked_otherwise))
    assert not all(torch.equal(*pair) for pair in zip(first, trained))
    assert not any(
        block.flip.any() or (block.tone != torch.tensor([1.0, 0, 1])).any() for block in batch.values()
    )
