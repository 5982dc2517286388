"""State dicts of other people's plain ViTs under our names, for an encoder with matching switches and rotary
off.

What has no counterpart (classifier heads, say) keeps its name, so that `model.weights.load_state` reports it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from model.config import EncoderConfig, Kind
from model.errors import UserError


def from_timm_state(
    state: Mapping[str, Tensor], config: EncoderConfig, kind: Kind = "planar"
) -> dict[str, Tensor]:
    """Weights of a timm VisionTransformer (ViT, DeiT, DINOv2 with or without registers) for the stem `kind`.

    Matching config: `class_token`, `registers`, `learned_positions=(1, y, x)`, `layer_scale`, `qk_norm`,
    `swiglu` as the source has them, `rotary="off"`, and the source's channels and patch. A patch deeper than
    1 takes the 2-D kernel repeated along z and divided by its depth (Carreira & Zisserman 2017).
    """
    ours = dict(state)
    kernel = ours.pop("patch_embed.proj.weight")
    depth = config.patch[kind][0]
    _fits(kernel.shape, (config.shape.width, config.channels, *config.patch[kind][1:]), f"the {kind} stem")
    ours[f"stems.{kind}.weight"] = (kernel[:, :, None].repeat(1, 1, depth, 1, 1) / depth).flatten(1)
    ours[f"stems.{kind}.bias"] = ours.pop("patch_embed.proj.bias")
    prefix = [ours.pop(name)[0] for name in ("cls_token", "reg_token") if name in ours]
    tokens = torch.cat(prefix) if prefix else kernel.new_zeros((0, len(kernel)))
    if "pos_embed" in ours:
        table = ours.pop("pos_embed")[0]
        places = _places(config)
        extra = len(table) - places  # positions of prefix tokens come first, where the source has them
        if extra not in (0, len(tokens)):
            raise UserError(
                f"the source has {len(table)} positions, which do not fit learned_positions "
                f"{config.learned_positions} with {len(tokens)} prefix tokens; give the source's grid"
            )
        ours["positions.table"] = table[extra:]
        tokens = tokens + table[:extra] if extra else tokens
    if len(tokens):
        ours["prefix.tokens"] = tokens
    return _with_biases(ours, config)


def from_monai_state(
    state: Mapping[str, Tensor], config: EncoderConfig, kind: Kind = "volume"
) -> dict[str, Tensor]:
    """Weights of a monai.networks.nets.ViT in three dimensions, with either kind of patch embedding.

    Matching config: `norm_eps=1e-5`, `rotary="off"`, `learned_positions` its grid, `class_token` if it
    classifies, and its patch and channels.
    """
    names = {"attn.out_proj.": "attn.proj.", "mlp.linear1.": "mlp.fc1.", "mlp.linear2.": "mlp.fc2."}
    ours: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if ".norm_cross_attn." in name:  # made by MONAI's block, used by its decoders only
            continue
        for theirs, own in names.items():
            name = name.replace(theirs, own)
        ours[name] = tensor
    shape = (config.shape.width, config.channels, *config.patch[kind])
    if "patch_embedding.patch_embeddings.weight" in ours:
        kernel = ours.pop("patch_embedding.patch_embeddings.weight")
        bias = ours.pop("patch_embedding.patch_embeddings.bias")
    else:  # "perceptron": voxels of a patch in the order (z, y, x, c)
        flat = ours.pop("patch_embedding.patch_embeddings.1.weight")
        bias = ours.pop("patch_embedding.patch_embeddings.1.bias")
        _fits(flat.shape, (shape[0], config.channels * shape[2] * shape[3] * shape[4]), f"the {kind} stem")
        kernel = flat.view(shape[0], *shape[2:], shape[1]).permute(0, 4, 1, 2, 3)
    _fits(kernel.shape, shape, f"the {kind} stem")
    ours[f"stems.{kind}.weight"], ours[f"stems.{kind}.bias"] = kernel.flatten(1), bias
    if "patch_embedding.position_embeddings" in ours:
        table = ours.pop("patch_embedding.position_embeddings")[0]
        _fits(table.shape, (_places(config), shape[0]), "learned_positions")
        ours["positions.table"] = table
    if "cls_token" in ours:
        ours["prefix.tokens"] = ours.pop("cls_token")[0]
    return _with_biases(ours, config)


def _places(config: EncoderConfig) -> int:
    z, y, x = config.learned_positions or (0, 0, 0)
    return z * y * x


def _fits(found: tuple[int, ...], wanted: tuple[int, ...], what: str) -> None:
    if tuple(found) != tuple(wanted):
        raise UserError(
            f"the source has {tuple(found)} where {what} needs {tuple(wanted)}; change the configuration"
        )


def _with_biases(state: dict[str, Tensor], config: EncoderConfig) -> dict[str, Tensor]:
    """A source without biases in its attention has zero biases."""
    for block in range(config.shape.depth):
        weight = state.get(f"blocks.{block}.attn.qkv.weight")
        if weight is not None:
            state.setdefault(f"blocks.{block}.attn.qkv.bias", weight.new_zeros(len(weight)))
    return state
