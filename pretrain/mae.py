"""The masked autoencoder: encode the visible tokens of each crop, predict its masked ones, score the valid
voxels.

After He et al., "Masked Autoencoders Are Scalable Vision Learners", CVPR 2022 (arXiv 2111.06377). Masked
tokens are removed before the stem, so nothing of them reaches the encoder and a step costs what the visible
tokens cost.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from model.config import EncoderConfig, Kind
from model.encoder import Encoder
from pretrain.batch import MODALITIES, Batch, RowBlock, geometry_of_block
from pretrain.decoder import Decoder
from pretrain.objective import ObjectiveConfig
from pretrain.tokens import Tokens, tokenise

Metrics = dict[str, tuple[Tensor, Tensor]]


class Reconstruction(NamedTuple):
    """What the network made of one row block."""

    tokens: Tokens
    prediction: (
        Tensor  # (n, p, P) float32, in the units of `tokens.target` (of the normalised patch for norm_pix)
    )
    crop_loss: Tensor  # (n,) float32: mean squared error over the crop's scored voxels; 0 without any


class MaskedAutoencoder(nn.Module):
    """Encoder, decoder and one prediction head for each stem.

    Args:
        encoder: configuration of the encoder.
        objective: masking, decoder and target.
        crops_per_update: crops in the whole batch of one update, over all ranks and micro-steps; the loss's
        divisor.
    """

    def __init__(self, encoder: EncoderConfig, objective: ObjectiveConfig, crops_per_update: int) -> None:
        super().__init__()
        self.objective = objective
        self.crops_per_update = crops_per_update
        self.encoder = Encoder(encoder)
        config = self.encoder.config
        self.decoder = Decoder(
            self.encoder.width,
            objective.decoder_width,
            objective.decoder_depth,
            objective.decoder_heads,
            objective.decoder == "cross",
            config.rotary_wavelengths,
        )
        self.heads = nn.ModuleDict(
            {kind: _head(objective.decoder_width, math.prod(patch)) for kind, patch in config.patch.items()}
        )

    def forward(self, batch: Batch, reconstruct: bool = False) -> Any:
        """Loss and metrics `(Tensor, Metrics)` of one micro-step; with `reconstruct` what `reconstruct()`
        returns.

        The loss is the sum over the batch's crops of `weight * crop loss`, divided by the crops of the
        whole update, so that the sum over all micro-steps of all ranks is the mean over the update. Each
        metric is a (sum, count) pair of 0-d tensors. Nothing waits for the device. Both ways run through
        `forward`, because the hooks that gather sharded parameters (ZeRO 3) hang on it.
        """
        results, idle = self._run(batch)
        if reconstruct:
            return results
        blocks = list(batch.values())
        total = torch.stack([(r.crop_loss * b.weight).sum() for r, b in zip(results, blocks)]).sum()
        return total / self.crops_per_update + idle, metrics(blocks, results)

    def set_checkpointing(self, on: bool) -> None:
        """Recompute the encoder's blocks in the backward pass; a hook of the engine."""
        self.encoder.set_checkpointing(on)

    def blocks_to_compile(self) -> Iterable[nn.Module]:
        """The blocks that are compiled one by one; a hook of the engine."""
        return [*self.encoder.blocks, *self.decoder.blocks]

    def reconstruct(self, batch: Batch) -> list[Reconstruction]:
        """Predictions for every row block of the batch, in its order."""
        return self._run(batch)[0]

    def _run(self, batch: Batch) -> tuple[list[Reconstruction], Tensor]:
        """Reconstructions, and a 0 through which heads without any crop take part in the backward pass.

        Every stem and head is called exactly once and in the same order on every rank, without rows if need
        be: at ZeRO 3 a call gathers the layer's weights from all ranks, so that neither the calls nor their
        order may depend on what a rank drew.
        """
        order = [
            name for kind in self.encoder.config.patch for name in batch if geometry_of_block(name) == kind
        ]
        kinds = [geometry_of_block(name) for name in order]
        blocks = [batch[name] for name in order]
        tokens = [tokenise(b, self.encoder.patch(kind), self.objective) for b, kind in zip(blocks, kinds)]
        attend = [_some_key(t.attend) for t in tokens]
        decoded = self.decoder(
            self._encode(kinds, blocks, tokens, attend),
            attend,
            [t.visible_centres for t in tokens],
            [t.target_centres for t in tokens],
            [t.predicted for t in tokens],
        )
        found: dict[str, Reconstruction] = {}
        idle = decoded[0].new_zeros((), dtype=torch.float32)
        for kind, head in self.heads.items():
            mine = [number for number, other in enumerate(kinds) if other == kind]
            rows = [decoded[number].flatten(0, 1) for number in mine]
            out = head(torch.cat([decoded[0].new_zeros(0, decoded[0].shape[-1]), *rows])).float()
            idle = idle + out[:0].sum()
            for number, part in zip(mine, out.split([len(r) for r in rows]) if rows else ()):
                prediction = part.unflatten(0, decoded[number].shape[:2])
                loss = self._crop_loss(tokens[number], prediction)
                found[order[number]] = Reconstruction(tokens[number], prediction, loss)
        return [found[name] for name in batch], idle

    def _encode(
        self, kinds: list[Kind], blocks: list[RowBlock], tokens: list[Tokens], attend: list[Tensor]
    ) -> list[Tensor]:
        """Features (n, v, D) of the visible tokens: one pass of the trunk over the segments of all blocks,
        which come in the order of the encoder's stems.
        """
        embedded = []
        for kind, patch in self.encoder.config.patch.items():
            mine = [(b, t) for b, t, other in zip(blocks, tokens, kinds) if other == kind]
            # A token a sequence, so that blocks of different lengths go through the stem together.
            none = tokens[0].visible.new_zeros(0, 1, math.prod(patch))
            stem = self.encoder.stem(
                kind,
                torch.cat([none, *(t.visible.flatten(0, 1)[:, None] for _, t in mine)]),
                torch.cat([blocks[0].grid[:0], *(_repeated(b.grid, t.visible_ids) for b, t in mine)]),
                torch.cat([tokens[0].visible_ids[:0, :1], *(t.visible_ids.reshape(-1, 1) for _, t in mine)]),
            )
            embedded.append(stem[:, 0])
        layout = tuple((t.visible_ids.shape[0], t.visible_ids.shape[1]) for t in tokens)
        flat = self.encoder.trunk(
            torch.cat(embedded),
            torch.cat([t.visible_centres.flatten(0, 1) for t in tokens]),
            layout,
            torch.cat([a.flatten() for a in attend]),
            self._drop(blocks),
            None,
        )[-1]
        parts = flat.split([n * length for n, length in layout])
        return [part.unflatten(0, shape) for part, shape in zip(parts, layout)]

    def _drop(self, blocks: list[RowBlock]) -> Tensor | None:
        """Drop-path decisions (crops, depth) bool from the crops' own uniform numbers; None in eval mode."""
        if not self.training or self.encoder.config.drop_path == 0.0:
            return None
        uniform = torch.cat([b.drop for b in blocks])
        return uniform < torch.tensor(self.encoder.drop_rates, device=uniform.device)

    def _crop_loss(self, tokens: Tokens, prediction: Tensor) -> Tensor:
        target = patch_normalised(tokens) if self.objective.norm_pix else tokens.target
        return crop_error(prediction, target, tokens.scored)


def crop_error(prediction: Tensor, target: Tensor, scored: Tensor) -> Tensor:
    """Mean squared error (n,) float32 over each crop's scored voxels; all inputs (n, p, P) or broadcastable
    to it.
    """
    squared = torch.where(scored, (prediction - target).square(), 0.0)
    return squared.sum(dim=(1, 2)) / scored.sum(dim=(1, 2)).clamp(min=1)


def patch_normalised(tokens: Tokens) -> Tensor:
    """Target with each patch's valid voxels at zero mean and unit variance (`norm_pix`)."""
    mean, deviation = patch_moments(tokens)
    return (tokens.target - mean) / deviation


def patch_moments(tokens: Tokens) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (n, p, 1) of the valid voxels of each predicted patch."""
    count = tokens.scored.sum(dim=-1, keepdim=True).clamp(min=1)
    mean = torch.where(tokens.scored, tokens.target, 0.0).sum(dim=-1, keepdim=True) / count
    variance = (
        torch.where(tokens.scored, (tokens.target - mean).square(), 0.0).sum(dim=-1, keepdim=True) / count
    )
    return mean, (variance + 1e-6).sqrt()


def metrics(blocks: list[RowBlock], results: list[Reconstruction]) -> Metrics:
    """(sum, count) of the loss over the crops of each modality, of unused token slots and of substituted
    crops.
    """
    loss = torch.cat([r.crop_loss.detach() for r in results])
    weight = torch.cat([b.weight for b in blocks])
    modality = torch.cat([b.modality for b in blocks])
    found: Metrics = {}
    for number, name in enumerate(MODALITIES):
        mine = weight * (modality == number)
        found[f"loss/{name}"] = ((loss * mine).sum(), mine.sum())
    slots = torch.cat([b.weight * b.token_order.shape[1] for b in blocks])
    valid = torch.cat([b.weight * r.tokens.valid for b, r in zip(blocks, results)])
    found["slot_waste"] = ((slots - valid).sum(), slots.sum())
    found["substituted"] = (torch.cat([b.substituted for b in blocks]).sum(), weight.sum())
    return found


def _repeated(grid: Tensor, ids: Tensor) -> Tensor:
    """The grid (n, 3) of each crop for each of its tokens `ids` (n, v): (n * v, 3)."""
    return grid.repeat_interleave(ids.shape[1], dim=0)


def _head(width: int, voxels: int) -> nn.Linear:
    head = nn.Linear(width, voxels)
    nn.init.trunc_normal_(head.weight, std=0.02)
    nn.init.zeros_(head.bias)
    return head


def _some_key(attend: Tensor) -> Tensor:
    """`attend` with the first place always on: a crop without any valid token must not make softmax divide
    by zero.
    """
    first = torch.zeros_like(attend)
    first[:, 0] = True
    return attend | first
