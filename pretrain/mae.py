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
from pretrain.decoder import Decoder, Places
from pretrain.objective import ObjectiveConfig
from pretrain.tokens import Patch, Tokeniser, Tokens, index_centres

Metrics = dict[str, tuple[Tensor, Tensor]]


class Reconstruction(NamedTuple):
    """What the network made of one row block."""

    tokens: Tokens
    prediction: (
        Tensor  # (n, p, P) float32, in the units of `tokens.target` (of the normalised patch for norm_pix)
    )
    crop_error: Tensor  # (n,) float32: mean squared error over the crop's scored voxels; 0 without any
    crop_loss: Tensor  # (n,) float32: what is trained on: that, and the gradient term where there is one


class Score(nn.Module):
    """The loss of a block's predictions; a module without weights, so that it is compiled with the blocks."""

    def __init__(self, objective: ObjectiveConfig) -> None:
        super().__init__()
        self.norm_pix, self.gradient_weight = objective.norm_pix, objective.gradient_weight

    def forward(self, tokens: Tokens, prediction: Tensor, patch: Patch) -> tuple[Tensor, Tensor]:
        """`crop_error` and `crop_loss` (n,) of a `Reconstruction`; prediction: (n, p, P) float32."""
        target = patch_normalised(tokens) if self.norm_pix else tokens.target
        error = crop_error(prediction, target, tokens.scored)
        if not self.gradient_weight:
            return error, error
        difference = gradient_error(prediction - target, tokens.scored, patch)
        return error, error + self.gradient_weight * difference


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
        self.decoder = Decoder(config, objective)
        self.heads = nn.ModuleDict(
            {kind: _head(objective.decoder_width, math.prod(patch)) for kind, patch in config.patch.items()}
        )
        # Not submodules: ZeRO 3 wants their calls alike on all ranks, and these have one a row class.
        self.around = (Tokeniser(), Score(objective))
        self.drop_rates: Tensor
        self.register_buffer("drop_rates", torch.tensor(self.encoder.drop_rates), persistent=False)

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
        """Recompute every block in the backward pass; a hook of the engine."""
        self.encoder.set_checkpointing(on)
        self.decoder.checkpointing = on

    def blocks_to_compile(self) -> list[nn.Module]:
        """What is compiled part by part; a hook of the engine.

        Blocks are compiled once for all row classes, the parts before and after them once a row class.
        """
        return [*self.encoder.blocks, *self.decoder.blocks, *self.around]

    def reconstruct(self, batch: Batch) -> list[Reconstruction]:
        """Predictions for every row block of the batch, in its order."""
        return self._run(batch)[0]

    def _run(self, batch: Batch) -> tuple[list[Reconstruction], Tensor]:
        """Reconstructions, and a 0 through which heads without any crop take part in the backward pass.

        Every stem, block and head is called exactly once and in the same order on every rank, without rows if
        need be: at ZeRO 3 a call gathers the layer's weights from all ranks, so that neither the calls nor
        their order may depend on what a rank drew.
        """
        patches, (tokenise, score) = self.encoder.config.patch, self.around
        order = [name for kind in patches for name in batch if geometry_of_block(name) == kind]
        kinds = [geometry_of_block(name) for name in order]
        blocks = [batch[name] for name in order]
        tokens = [tokenise(block, patches[kind]) for block, kind in zip(blocks, kinds)]
        layout = tuple((len(t.attend), t.attend.shape[1]) for t in tokens)
        asked_layout = tuple((len(t.predicted), t.predicted.shape[1]) for t in tokens)
        attend, predicted = _packed(t.attend for t in tokens), _packed(t.predicted for t in tokens)
        seen, asked = self._places(kinds, blocks, tokens)
        features = self.encoder.trunk(
            self._embed(kinds, tokens, seen), seen.centres, layout, attend, self._drop(blocks)
        )[-1]
        decoded = self.decoder(features, seen, asked, layout, asked_layout, attend, predicted)

        rows = decoded.split([n * length for n, length in asked_layout])
        found: dict[str, Reconstruction] = {}
        idle = decoded.new_zeros((), dtype=torch.float32)
        for kind, patch in patches.items():
            mine = [number for number, other in enumerate(kinds) if other == kind]
            out = self.heads[kind](torch.cat([decoded[:0], *(rows[number] for number in mine)])).float()
            idle = idle + out[:0].sum()
            for number, part in zip(mine, out.split([len(rows[number]) for number in mine]) if mine else ()):
                prediction = part.unflatten(0, asked_layout[number])
                scores = score(tokens[number], prediction, patch)
                found[order[number]] = Reconstruction(tokens[number], prediction, *scores)
        return [found[name] for name in batch], idle

    def _places(
        self, kinds: list[Kind], blocks: list[RowBlock], tokens: list[Tokens]
    ) -> tuple[Places, Places]:
        """Where the visible and the predicted tokens of all blocks lie."""
        patches, by_index = self.encoder.config.patch, self.encoder.config.rotary == "index"
        places = []
        for visible in (True, False):
            ids = [t.visible_ids if visible else t.target_ids for t in tokens]
            centres = [t.visible_centres if visible else t.target_centres for t in tokens]
            if by_index:
                centres = [index_centres(b, i, patches[k]) for b, i, k in zip(blocks, ids, kinds)]
            places.append(
                Places(
                    _packed(centres),
                    torch.cat([i.flatten() for i in ids]),
                    _packed(block.grid[:, None].expand(*i.shape, 3) for block, i in zip(blocks, ids)),
                )
            )
        return places[0], places[1]

    def _embed(self, kinds: list[Kind], tokens: list[Tokens], seen: Places) -> Tensor:
        """Visible tokens (V, D) of all blocks, which come in the order of the encoder's stems."""
        embedded, start = [], 0
        for kind, patch in self.encoder.config.patch.items():
            none = tokens[0].visible.new_zeros(0, math.prod(patch))
            values = torch.cat([none, *(t.visible.flatten(0, 1) for t, k in zip(tokens, kinds) if k == kind)])
            here = slice(start, start + len(values))
            start += len(values)
            # A token a sequence, so that blocks of different lengths go through the stem together.
            stem = self.encoder.stem(kind, values[:, None], seen.grid[here], seen.ids[here, None])
            embedded.append(stem[:, 0])
        return torch.cat(embedded)

    def _drop(self, blocks: list[RowBlock]) -> Tensor | None:
        """Drop-path decisions (crops, depth) bool from the crops' own uniform numbers; None in eval mode."""
        if not self.training or self.encoder.config.drop_path == 0.0:
            return None
        return torch.cat([b.drop for b in blocks]) < self.drop_rates


def crop_error(prediction: Tensor, target: Tensor, scored: Tensor) -> Tensor:
    """Mean squared error (n,) float32 over each crop's scored voxels; all inputs (n, p, P) or broadcastable
    to it.
    """
    squared = torch.where(scored, (prediction - target).square(), 0.0)
    return squared.sum(dim=(1, 2)) / scored.sum(dim=(1, 2)).clamp(min=1)


def gradient_error(error: Tensor, scored: Tensor, patch: Patch) -> Tensor:
    """Mean squared difference (n,) float32 of the error (n, p, P) between voxels that are neighbours in a
    patch.

    The differences of prediction and of target along each axis, compared: the mean over all pairs of scored
    neighbours on all axes, in units of a voxel, whatever the spacing.
    """
    volume, there = error.unflatten(2, patch), scored.unflatten(2, patch)
    total, pairs = error.new_zeros(len(error)), error.new_zeros(len(error))
    for axis, size in enumerate(patch, start=2):
        both = there.narrow(axis, 1, size - 1) & there.narrow(axis, 0, size - 1)
        step = volume.diff(dim=axis)
        total = total + torch.where(both, step.square(), 0.0).flatten(1).sum(1)
        pairs = pairs + both.flatten(1).sum(1)
    return total / pairs.clamp(min=1)


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
    slots = torch.cat([b.weight * b.slots for b in blocks])
    valid = torch.cat([b.weight * b.valid for b in blocks])
    found["slot_waste"] = ((slots - valid).sum(), slots.sum())
    found["substituted"] = (torch.cat([b.substituted for b in blocks]).sum(), weight.sum())
    return found


def _packed(parts: Iterable[Tensor]) -> Tensor:
    """The sequences (n, length, ...) of each block one after another: (S, ...)."""
    return torch.cat([part.flatten(0, 1) for part in parts])


def _head(width: int, voxels: int) -> nn.Linear:
    head = nn.Linear(width, voxels)
    nn.init.trunc_normal_(head.weight, std=0.02)
    nn.init.zeros_(head.bias)
    return head
