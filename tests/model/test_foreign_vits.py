"""Differential tests: with a source's switches and weights, our encoder gives the source's features."""

from __future__ import annotations

import pytest
import torch

from model.config import EncoderConfig
from model.encoder import Encoder
from model.errors import UserError
from model.foreign import from_monai_state, from_timm_state
from model.weights import load_state

SPACING = torch.ones(2, 3)


def randomise(module: torch.nn.Module) -> None:
    """Non-trivial values everywhere, so that no zero bias or unit gain hides a mistake."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.15)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ({}, {}),
        ({"class_token": False}, {"class_token": False}),
        ({"reg_tokens": 3, "init_values": 0.1}, {"registers": 3, "layer_scale": 0.1}),
        ({"reg_tokens": 2, "no_embed_class": True}, {"registers": 2}),
        ({"qk_norm": True, "in_chans": 1}, {"qk_norm": True, "channels": 1}),
        ({"qkv_bias": False}, {}),
        ({"swiglu": True}, {"swiglu": True}),
    ],
)
def test_planar_features_are_timms(theirs: dict, ours: dict) -> None:
    from timm.layers import SwiGLUPacked
    from timm.models.vision_transformer import VisionTransformer

    if theirs.pop("swiglu", False):
        theirs = {"mlp_layer": SwiGLUPacked, "act_layer": torch.nn.SiLU, "mlp_ratio": 16 / 3}  # as in DINOv2
    source = VisionTransformer(
        img_size=(48, 80), patch_size=16, embed_dim=96, depth=3, num_heads=3, num_classes=0, global_pool="",
        **{"in_chans": 3, **theirs},
    ).eval()  # fmt: skip
    randomise(source)
    config = EncoderConfig(
        size=None, width=96, depth=3, heads=3, patch={"planar": (1, 16, 16)}, rotary="off",
        learned_positions=(1, 3, 5), **{"channels": 3, "class_token": True, **ours},
    )  # fmt: skip
    encoder = Encoder(config).eval()
    report = load_state(encoder, from_timm_state(source.state_dict(), config))
    assert report.complete, str(report)

    image = torch.randn(2, config.channels, 48, 80)
    with torch.no_grad():
        expected = source.forward_features(image)[:, source.num_prefix_tokens :]
        (found,) = encoder(image[:, :, None], SPACING, "planar")
    torch.testing.assert_close(found.flatten(2).transpose(1, 2), expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("switches", ["plain", "all"])
def test_gradients_are_timms(switches: str) -> None:
    """Every weight's gradient, carried over by the renaming that carries the weights."""
    from timm.layers import SwiGLUPacked
    from timm.models.vision_transformer import VisionTransformer

    theirs: dict = {}
    ours: dict = {}
    if switches == "all":
        theirs = {
            "reg_tokens": 2, "init_values": 0.3, "qk_norm": True,
            "mlp_layer": SwiGLUPacked, "act_layer": torch.nn.SiLU, "mlp_ratio": 16 / 3,
        }  # fmt: skip
        ours = {"registers": 2, "layer_scale": 0.3, "qk_norm": True, "swiglu": True}
    source = VisionTransformer(
        img_size=(32, 48), patch_size=16, embed_dim=96, depth=2, num_heads=3, num_classes=0, global_pool="",
        no_embed_class=True, **theirs,
    ).train()  # fmt: skip
    randomise(source)
    config = EncoderConfig(
        size=None, width=96, depth=2, heads=3, patch={"planar": (1, 16, 16)}, rotary="off", channels=3,
        learned_positions=(1, 2, 3), class_token=True, **ours,
    )  # fmt: skip
    encoder = Encoder(config).train()
    assert load_state(encoder, from_timm_state(source.state_dict(), config)).complete
    image, weight = torch.randn(2, 3, 32, 48), torch.randn(2, 6, 96)
    (source.forward_features(image)[:, source.num_prefix_tokens :] * weight).sum().backward()
    (found,) = encoder(image[:, :, None], SPACING, "planar")
    (found.flatten(2).transpose(1, 2) * weight).sum().backward()
    same_gradients(encoder, from_timm_state(gradients(source), config))


def gradients(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Gradients under the names of the weights; zero for what took no part."""
    return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in module.named_parameters()}


def same_gradients(encoder: Encoder, expected: dict[str, torch.Tensor]) -> None:
    found = gradients(encoder)
    assert found.keys() == expected.keys()
    largest = max(gradient.abs().max() for gradient in expected.values())
    for name, gradient in expected.items():
        scale = gradient.abs().max().clamp(min=1e-3 * largest)  # a bias of keys has a gradient of rounding
        torch.testing.assert_close(found[name] / scale, gradient / scale, rtol=1e-4, atol=2e-5, msg=name)


def test_intermediate_features_are_timms() -> None:
    from timm.models.vision_transformer import VisionTransformer

    source = VisionTransformer(
        img_size=32, patch_size=16, embed_dim=96, depth=4, num_heads=3, num_classes=0
    ).eval()
    randomise(source)
    config = EncoderConfig(
        size="nano", patch={"planar": (1, 16, 16)}, rotary="off", learned_positions=(1, 2, 2), channels=3,
        class_token=True,
    )  # fmt: skip
    encoder = Encoder(config).eval()
    load_state(encoder, from_timm_state(source.state_dict(), config))
    image = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = source.get_intermediate_layers(image, n=[1, 3], reshape=True, norm=True)
        found = encoder(image[:, :, None], SPACING, "planar", depths=(2, 4))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one[:, :, 0], other, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("embedding", ["conv", "perceptron"])
@pytest.mark.parametrize("channels", [1, 2])
def test_volume_features_are_monais(embedding: str, channels: int) -> None:
    from monai.networks.nets.vit import ViT

    source = ViT(
        channels,
        (16, 24, 8),
        (8, 8, 8),
        hidden_size=96,
        mlp_dim=384,
        num_layers=2,
        num_heads=3,
        proj_type=embedding,
    ).eval()
    randomise(source)
    config = EncoderConfig(
        size=None, width=96, depth=2, heads=3, patch={"volume": (8, 8, 8)}, rotary="off", norm_eps=1e-5,
        learned_positions=(2, 3, 1), channels=channels,
    )  # fmt: skip
    encoder = Encoder(config).eval()
    report = load_state(encoder, from_monai_state(source.state_dict(), config))
    assert report.complete, str(report)
    image = torch.randn(2, channels, 16, 24, 8)
    with torch.no_grad():
        expected, _ = source(image)
        (found,) = encoder(image, SPACING)
    torch.testing.assert_close(found.flatten(2).transpose(1, 2), expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("switches", [{}, {"qkv_bias": True}])
def test_gradients_are_monais(switches: dict) -> None:
    from monai.networks.nets.vit import ViT

    source = ViT(
        1, (16, 24, 8), (8, 8, 8), hidden_size=96, mlp_dim=384, num_layers=2, num_heads=3,
        proj_type="conv", **switches,
    ).train()  # fmt: skip
    randomise(source)
    config = EncoderConfig(
        size=None, width=96, depth=2, heads=3, patch={"volume": (8, 8, 8)}, rotary="off", norm_eps=1e-5,
        learned_positions=(2, 3, 1),
    )  # fmt: skip
    encoder = Encoder(config).train()
    assert load_state(encoder, from_monai_state(source.state_dict(), config)).complete
    image, weight = torch.randn(2, 1, 16, 24, 8), torch.randn(2, 6, 96)
    (source(image)[0] * weight).sum().backward()
    (found,) = encoder(image, SPACING)
    (found.flatten(2).transpose(1, 2) * weight).sum().backward()
    expected = from_monai_state(gradients(source), config)
    if not switches:  # the source has no biases of queries, keys and values, ours get gradients
        for name in [name for name in expected if name.endswith("qkv.bias")]:
            expected[name] = dict(encoder.named_parameters())[name].grad
    same_gradients(encoder, expected)


def test_a_deeper_patch_sees_a_constant_stack_as_the_image() -> None:
    from timm.models.vision_transformer import VisionTransformer

    source = VisionTransformer(img_size=32, patch_size=16, embed_dim=96, depth=1, num_heads=3, num_classes=0)
    config = EncoderConfig(
        size="nano", depth=1, patch={"slab": (2, 16, 16)}, rotary="off",
        learned_positions=(1, 2, 2), channels=3,
        class_token=True,
    )  # fmt: skip
    encoder = Encoder(config).eval()
    assert load_state(encoder, from_timm_state(source.eval().state_dict(), config, "slab")).complete
    image = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = source.forward_features(image)[:, 1:]
        (found,) = encoder(image[:, :, None].expand(-1, -1, 2, -1, -1), SPACING, "slab")
    torch.testing.assert_close(found.flatten(2).transpose(1, 2), expected, rtol=1e-4, atol=2e-5)


def test_what_does_not_fit_is_said() -> None:
    from timm.models.vision_transformer import VisionTransformer

    source = VisionTransformer(img_size=32, patch_size=16, embed_dim=96, depth=1, num_heads=3, num_classes=5)
    config = EncoderConfig(size="nano", depth=1, patch={"planar": (1, 16, 16)}, channels=3, class_token=True)
    with pytest.raises(UserError, match="positions"):
        from_timm_state(source.state_dict(), config)
    with pytest.raises(UserError, match="planar stem"):
        from_timm_state(source.state_dict(), config.model_copy(update={"channels": 1}))
    fitting = config.model_copy(update={"learned_positions": (1, 2, 2)})
    report = load_state(Encoder(fitting), from_timm_state(source.state_dict(), fitting))
    assert report.unexpected == ("head.weight", "head.bias")
