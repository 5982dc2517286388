"""Masked autoencoders that a training step is compared with: MONAI's, and the textbook's on timm's blocks.

Both see normalised crops (n, 1, z, y, x), draw their own mask at every step, and give the mean squared error
over the voxels of the masked patches. Both are of the same width, depth, heads, MLP, patch and decoder.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from model.config import SIZES, Shape
from model.patches import patchify

DECODER = Shape(384, 4, 6)
PATCH = 8


class Setting(NamedTuple):
    """What all contestants share. `crop` is the edge in voxels; `decoder` is for the full one."""

    size: str
    crop: int
    batch: int
    mask_ratio: float = 0.75

    @property
    def grid(self) -> int:
        """Tokens along an edge."""
        return self.crop // PATCH

    @property
    def tokens(self) -> int:
        """Tokens of a crop."""
        return self.grid**3

    @property
    def visible(self) -> int:
        """Tokens of a crop that are encoded."""
        return self.tokens - math.floor(self.tokens * self.mask_ratio + 0.5)


def sincos(grid: int, width: int) -> Tensor:
    """Fixed table (grid³, width): sines and cosines of the three indices (as He et al. 2022 on two axes)."""
    pairs = width // 6
    frequency = 10_000.0 ** -(torch.arange(pairs) / pairs)
    place = torch.stack(torch.meshgrid(*[torch.arange(grid)] * 3, indexing="ij"), -1).view(-1, 3, 1)
    angle = (place * frequency).flatten(1)
    return nn.functional.pad(torch.cat((angle.sin(), angle.cos()), 1), (0, width - 6 * pairs))


class PlainAutoencoder(nn.Module):
    """Masked autoencoder as in the paper (He et al. 2022): visible patches through a linear map and timm's
    blocks, then a decoder of timm's blocks over visible and mask tokens, whose masked half is predicted.
    """

    positions: Tensor
    decoder_positions: Tensor

    def __init__(self, setting: Setting, encoder: Shape, decoder: Shape = DECODER) -> None:
        super().__init__()
        voxels = PATCH**3
        self.visible = setting.visible
        self.embed = nn.Linear(voxels, encoder.width)
        self.register_buffer("positions", sincos(setting.grid, encoder.width))
        self.blocks = nn.ModuleList(_blocks(encoder))
        self.norm = nn.LayerNorm(encoder.width, eps=1e-6)
        self.narrow = nn.Linear(encoder.width, decoder.width)
        self.mask_token = nn.Parameter(torch.randn(decoder.width) * 0.02)
        self.register_buffer("decoder_positions", sincos(setting.grid, decoder.width))
        self.decoder_blocks = nn.ModuleList(_blocks(decoder))
        self.decoder_norm = nn.LayerNorm(decoder.width, eps=1e-6)
        self.head = nn.Linear(decoder.width, voxels)

    def forward(self, crops: Tensor, order: Tensor | None = None) -> Tensor:
        """Loss of crops (n, 1, z, y, x). order: (n, tokens), visible ones first; drawn where not given."""
        patches = patchify(crops, (PATCH,) * 3)
        if order is None:
            order = torch.rand(patches.shape[:2], device=crops.device).argsort(1)
        seen, hidden = order[:, : self.visible], order[:, self.visible :]
        x = self.embed(_take(patches, seen)) + self.positions[seen]
        for block in self.blocks:
            x = block(x)
        x = self.narrow(self.norm(x)) + self.decoder_positions[seen]
        masked = self.mask_token + self.decoder_positions[hidden]
        x = torch.cat((x, masked.to(x.dtype)), 1)
        for block in self.decoder_blocks:
            x = block(x)
        prediction = self.head(self.decoder_norm(x[:, self.visible :]))
        return (prediction.float() - _take(patches, hidden).float()).square().mean()


class MonaiAutoencoder(nn.Module):
    """MONAI's `MaskedAutoEncoderViT` and the loss it leaves to its users.

    It embeds every token and predicts every token. flash: attention without its matrix, which MONAI's blocks
    can do and this network of theirs has no argument for.
    """

    def __init__(self, setting: Setting, encoder: Shape, *, flash: bool = False) -> None:
        from monai.networks.nets import MaskedAutoEncoderViT

        super().__init__()
        self.network = MaskedAutoEncoderViT(
            in_channels=1,
            img_size=setting.crop,
            patch_size=PATCH,
            hidden_size=encoder.width,
            mlp_dim=4 * encoder.width,
            num_layers=encoder.depth,
            num_heads=encoder.heads,
            masking_ratio=setting.mask_ratio,
            decoder_hidden_size=DECODER.width,
            decoder_mlp_dim=4 * DECODER.width,
            decoder_num_layers=DECODER.depth,
            decoder_num_heads=DECODER.heads,
            qkv_bias=True,
        )
        for module in self.network.modules():
            if flash and hasattr(module, "use_flash_attention"):
                setattr(module, "use_flash_attention", True)  # noqa: B010
            # The memory tracker hooks every parameter; MONAI's fixed tables are parameters without gradient.
            for name, table in [
                (n, p) for n, p in module.named_parameters(recurse=False) if not p.requires_grad
            ]:
                delattr(module, name)
                module.register_buffer(name, table.detach())

    def forward(self, crops: Tensor) -> Tensor:
        """Loss of crops (n, 1, z, y, x)."""
        prediction, mask = self.network(crops)
        error = (prediction.float() - patchify(crops, (PATCH,) * 3).float()).square().mean(-1)
        return (error * mask).sum() / mask.sum()


def plain(setting: Setting) -> PlainAutoencoder:
    """The textbook's network of a size."""
    return PlainAutoencoder(setting, SIZES[setting.size])


def monai(setting: Setting, *, flash: bool = False) -> MonaiAutoencoder:
    """MONAI's network of a size; ImportError where MONAI is not installed."""
    return MonaiAutoencoder(setting, SIZES[setting.size], flash=flash)


def blocks_of(network: nn.Module) -> list[nn.Module]:
    """The transformer blocks of a peer, which are compiled one by one."""
    return [module for module in network.modules() if type(module).__name__ in ("Block", "TransformerBlock")]


def _blocks(shape: Shape) -> list[Block]:
    norm: Any = partial(nn.LayerNorm, eps=1e-6)
    return [Block(shape.width, shape.heads, qkv_bias=True, norm_layer=norm) for _ in range(shape.depth)]


def _take(patches: Tensor, ids: Tensor) -> Tensor:
    return patches.gather(1, ids[..., None].expand(-1, -1, patches.shape[-1]))
