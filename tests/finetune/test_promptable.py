"""The two halves of the model: what a click costs, inputs of every geometry, channels, gradients."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from finetune.batch import Batch, Collate
from finetune.clicks import ClickTraining
from finetune.inference import Predictor
from finetune.promptable import FIRST, LATER, HeadConfig, PromptableModel
from finetune.prompts import PromptList, collate_prompts
from finetune.recipe import EncoderChoice, PromptTraining
from finetune.weights import build_model
from model.encoder import Encoder, EncoderConfig
from model.weights import save_encoder

SMALL = HeadConfig(widths=(4, 8, 12, 16), heads=2, layers=1, window=(16, 16, 16))
NANO = EncoderConfig(size="nano")


def model(channels=1, encoder=True, frozen=False):
    torch.manual_seed(0)
    head = SMALL.model_copy(update={"channels": channels, "encoder": encoder})
    net = PromptableModel(
        head, Encoder(NANO.model_copy(update={"channels": channels})) if encoder else None, frozen
    )
    if encoder:
        for weight in net.entry.parameters():
            nn.init.normal_(weight, std=0.05)
    return net


def click(*where, sign=1):
    return PromptList([(tuple(map(float, where)), sign)])


def test_a_click_costs_the_prompt_half_only():
    net = model().eval()
    calls = {"encoder": 0, "trunk": 0, "prompt": 0}
    for name in calls:
        getattr(net, name).register_forward_hook(
            lambda *_, name=name: calls.__setitem__(name, calls[name] + 1)
        )
    predictor = Predictor(net, torch.randn(1, 14, 15, 16).numpy(), (1, 1, 1))
    said = PromptList()
    for where in ((3, 4, 5), (8, 8, 8), (1, 2, 3)):
        said.clicks += click(*where).clicks
        predictor.predict(said, click(*where))
    assert calls == {"encoder": 1, "trunk": 1, "prompt": 3}


@pytest.mark.parametrize(
    ("geometry", "shape", "spacing", "axes"),
    [
        ("volume", (16, 24, 16), (1.0, 1.0, 1.0), (0, 1, 2)),
        ("slab", (6, 32, 32), (5.0, 0.8, 0.8), (2, 0, 1)),
        ("planar", (1, 48, 32), (1.0, 0.3, 0.3), (1, 0, 2)),
    ],
)
def test_every_geometry_gives_masks_at_full_resolution(geometry, shape, spacing, axes):
    net = model(channels=2)
    image, mm = torch.randn(2, 2, *shape), torch.tensor([spacing] * 2)
    features = net.encode(image, mm, geometry, axes)
    prompts = collate_prompts([click(0, 5, 5), PromptList(boxes=[((0.0, 1.0, 1.0), (0.0, 9.0, 9.0))])], mm)
    logits, iou = net.decode(features, prompts)
    assert logits.shape == (2, 4, *shape)
    assert logits.dtype == torch.float32
    assert bool(((iou >= 0) & (iou <= 1)).all())
    assert logits[:, FIRST].shape[1] == 3
    assert logits[:, LATER].shape[1] == 1


def test_rows_of_a_batch_do_not_see_each_other():
    net = model().eval()
    images, mm = torch.randn(2, 1, 16, 16, 16), torch.ones(2, 3)
    lists = [click(3, 4, 5), PromptList([*click(1, 1, 1).clicks, *click(9, 9, 9, sign=-1).clicks])]
    together, _ = net.decode(net.encode(images, mm), collate_prompts(lists, mm))
    for row in range(2):
        alone, _ = net.decode(
            net.encode(images[row : row + 1], mm[:1]), collate_prompts(lists[row : row + 1], mm[:1])
        )
        torch.testing.assert_close(together[row], alone[0], atol=1e-4, rtol=1e-4)


def test_rows_with_other_strides_are_refused():
    with pytest.raises(ValueError, match="like spacing"):
        model().encode(torch.randn(2, 1, 16, 16, 16), torch.tensor([[1.0, 1, 1], [4.0, 1, 1]]))


def test_k_equal_channels_give_the_encoder_features_of_one(tmp_path):
    torch.manual_seed(1)
    encoder = Encoder(NANO)
    save_encoder(tmp_path, encoder)
    net = build_model(SMALL.model_copy(update={"channels": 2}), EncoderChoice(path=str(tmp_path)), seed=0)
    image, mm = torch.randn(1, 1, 16, 16, 16), torch.ones(1, 3)
    one = encoder(image, mm)[0]
    assert net.encoder is not None
    two = net.encoder(image.repeat(1, 2, 1, 1, 1), mm)[0]
    torch.testing.assert_close(two, one, atol=1e-5, rtol=1e-4)


def test_the_matched_control_shares_the_head_but_not_the_encoder(tmp_path):
    save_encoder(tmp_path, Encoder(NANO))
    nets = [
        build_model(SMALL, EncoderChoice(path=str(tmp_path), from_scratch=scratch), seed=3)
        for scratch in (False, True)
    ]
    a, b = (net.state_dict() for net in nets)
    assert a.keys() == b.keys()
    for name in a:
        same = torch.equal(a[name], b[name])
        if not name.startswith("encoder."):
            assert same, name
    assert not torch.equal(a["encoder.stems.volume.weight"], b["encoder.stems.volume.weight"])


@pytest.mark.parametrize("rounds", [1, 3])
@pytest.mark.parametrize("empty", [False, True])
def test_every_parameter_takes_part_in_every_call(rounds, empty):
    """Otherwise ranks with other data deadlock: also with one round only, and without any crop."""
    net = model()
    training = ClickTraining(net, PromptTraining(rounds=(rounds, rounds)), samples_per_update=2, seed=0)
    collate = Collate(["volume"], (16, 16, 16), 1, None, 1, 0)
    batch = collate(0, None, [])
    if not empty:
        windows = batch.windows[0]
        image = torch.randn(2, 1, 16, 16, 16)
        truth = torch.zeros(2, 16, 16, 16, dtype=torch.bool)
        truth[:, 4:9, 5:12, 3:10] = True
        known = torch.ones_like(truth)
        batch = Batch(0, [type(windows)(image, truth, known, known, torch.ones(2, 3), torch.ones(2),
                                        torch.tensor([0, 1]), "volume", (0, 1, 2))])  # fmt: skip
    loss, metrics = training(batch)
    loss.backward()
    assert [name for name, p in training.named_parameters() if p.grad is None] == []
    if empty:
        assert float(loss.detach()) == 0
        assert all(float(p.grad.abs().max()) == 0 for p in training.parameters() if p.grad is not None)
        assert all(float(count) == 0 for _, count in metrics.values())
    else:
        assert float(metrics["loss/round_1"][1]) == 2


def test_a_frozen_encoder_gets_no_gradient():
    net = model(frozen=True)
    logits, _ = net.decode(net.encode(torch.randn(1, 1, 16, 16, 16), torch.ones(1, 3)),
                           collate_prompts([click(1, 2, 3)], torch.ones(1, 3)))  # fmt: skip
    logits.mean().backward()
    assert net.encoder is not None
    assert all(p.grad is None for p in net.encoder.parameters())
    assert next(net.entry.parameters()).grad is not None


def test_unknown_voxels_enter_neither_loss_nor_clicks():
    net = model(encoder=False).eval()
    training = ClickTraining(net, PromptTraining(rounds=(3, 3), box=0.0), samples_per_update=1, seed=0)
    truth = torch.zeros(1, 16, 16, 16, dtype=torch.bool)
    truth[:, 4:9, 5:12, 3:10] = True
    known = torch.ones_like(truth)
    known[:, :, :, 8:] = False
    other = truth.clone()
    other[:, :, :, 8:] = torch.rand(1, 16, 16, 8) > 0.5
    image = torch.randn(1, 1, 16, 16, 16)
    template = Collate(["volume"], (16, 16, 16), 1, None, 1, 0)(0, None, []).windows[0]
    losses = []
    for label in (truth, other):
        windows = type(template)(image, label, known, torch.ones_like(known), torch.ones(1, 3), torch.ones(1),
                                 torch.tensor([5]), "volume", (0, 1, 2))  # fmt: skip
        losses.append(float(training(Batch(0, [windows]))[0]))
    assert losses[0] == losses[1]
