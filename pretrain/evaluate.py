"""Held-out loss by modality and mask ratio, beside two predictors without parameters on the same masks.

The held-out crops and masks come from their own order over the held-out split, with a fixed seed, no flips
and no change of intensity, and the network in eval mode; so the same network gives the same figures,
whatever the number of ranks. The ranks share the crops, and a crop's errors are added up in the order of
its index, not of its rank. Every mask ratio sees the same crops, and a token hidden at one ratio is hidden
at every higher one.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from data_pipeline.geometry import TokenConfig
from data_pipeline.manifest import Manifest
from data_pipeline.order import MixtureConfig, Order
from data_pipeline.shard_cache import CacheConfig
from data_pipeline.stream import Crop, Stream, open_stream
from pretrain.baselines import interpolation, visible_mean
from pretrain.batch import MODALITIES, Batch, Collate, RowBlock, to_device
from pretrain.mae import Reconstruction, crop_error, patch_normalised
from pretrain.objective import ObjectiveConfig
from pretrain.pictures import Picture, picture_of
from pretrain.recipe import EvaluationConfig
from pretrain.tokens import Tokens

CONSTANT = 0.1
"""Largest range (max - min) of the valid voxels of a constant patch, in normalised units: 50 HU in CT, a
tenth of the standard deviation in MR and X-ray. On real scans these are patches of air, a seventh of all in
CT and half in PET; homogeneous tissue is noisier."""

PREDICTORS = ("", "_mean", "_interpolation")  # the network, the visible mean, interpolation
_MODALITY, _HAS_CONTENT, _ERRORS = 0, 1, 2  # columns of the table: then (all voxels, content) by predictor


class HeldOut:
    """The held-out crops of a run.

    Args:
        manifest: the dataset.
        rows: its held-out rows.
        tokens, mixture: as for training; only the foreground share is set to zero.
        objective: masking and target.
        depth: encoder blocks.
        config: how many crops, their seed, and further mask ratios.
        dtype: voxel dtype of the run.
        cache: how shards are brought to this machine.

    Attributes: `ratio`, that of training (the middle of its range); `ratios`, every ratio scored, that one
    first; `pictures` of the last `score`.
    """

    def __init__(
        self,
        manifest: Manifest,
        rows: np.ndarray,
        tokens: TokenConfig,
        mixture: MixtureConfig,
        objective: ObjectiveConfig,
        depth: int,
        config: EvaluationConfig,
        dtype: str,
        cache: CacheConfig,
    ) -> None:
        self.manifest, self.config, self.objective, self.cache = manifest, config, objective, cache
        held_out = held_out_mixture(mixture, manifest, rows)
        self.order = Order(manifest, rows, tokens, held_out, config.seed)
        self.ratio = sum(objective.ratios) / 2
        self.ratios = tuple(dict.fromkeys((self.ratio, *config.mask_ratios)))
        fixed = [objective.model_copy(update={"mask_ratio": ratio}) for ratio in self.ratios]
        self.collate = EveryRatio(
            [
                Collate(self.order.composition, one, depth, config.seed, augment=False, dtype=dtype)
                for one in fixed
            ]
        )
        self.pictures: list[Picture] = []
        # The predictors without parameters depend on crops and masks alone, which never change.
        self._baselines = torch.full((len(self.ratios), self.crops, 4), torch.nan, dtype=torch.float64)
        self._known = torch.zeros(len(self.ratios), self.crops, dtype=torch.bool)

    @property
    def crops(self) -> int:
        """Crops scored at each ratio."""
        return self.config.batches * self.order.batch_size

    def score(self, model: nn.Module, rank: int, world: int, device: torch.device) -> dict[str, float]:
        """Mean squared errors of each modality; keeps pictures of the first crops of each modality.

        `val/CT`, `val/CT_mean` and `val/CT_interpolation` are those of the network and of both predictors at
        the mask ratio of training, `val/CT_share` is the network's divided by the interpolation's.
        `val/CT_content…` are the same over patches that are not constant (see `CONSTANT`), and
        `val/CT_content_crops` of the `val/CT_crops` crops have any. At each of `config.mask_ratios` there
        are `val/CT@0.50`, `…_share`, `…_content` and `…_content_share`.

        With `norm_pix` the squared errors of patches of unit variance have no interpolation to compare with,
        hence no share; `_mean` is then the error of predicting each patch's own mean.
        """
        table = torch.zeros(len(self.ratios), self.crops, _ERRORS + 2 * len(PREDICTORS), dtype=torch.float64)
        self.pictures = []
        steps = self.config.batches * -(-self.order.groups // world)
        stream: Stream[list[Batch]] = open_stream(
            self.manifest.root, self.manifest, self.order, rank=rank, world=world, start_update=0, workers=0,
            collate=self.collate, max_damage=1.0, cache=self.cache,
        )  # fmt: skip
        was_training = model.training
        model.eval()  # no drop-path; masking does not depend on the mode
        with torch.no_grad(), stream:
            for batches in islice(stream, steps):
                for number, batch in enumerate(batches):
                    results = model(to_device(batch, device), reconstruct=True)
                    for (name, block), result in zip(batch.items(), results):
                        self._enter(table, number, block, result)
                        if number == 0:
                            self._keep_pictures(name, block, result)
        model.train(was_training)
        if world > 1 and dist.is_initialized():
            shared = table.to(device)
            dist.all_reduce(shared)
            table = shared.cpu()
        return self._figures(table)

    def _enter(self, table: Tensor, number: int, block: RowBlock, result: Reconstruction) -> None:
        """Write the errors of a block's crops at ratio `number` into their rows of the table."""
        tokens = result.tokens
        target = patch_normalised(tokens) if self.objective.norm_pix else tokens.target
        content = tokens.scored & ~constant(tokens)[..., None]
        network = _errors(result.prediction, target, tokens.scored, content)
        has_scored, has_content = (part.any(dim=2).any(dim=1) for part in (tokens.scored, content))
        here = (block.weight > 0) & has_scored.cpu()
        rows = block.number[here]
        if not bool(self._known[number, rows].all()):
            # Predicting each patch's own mean is predicting 0 of a normalised patch.
            predictions = (
                [torch.zeros_like(target[..., :1])]
                if self.objective.norm_pix
                else [visible_mean(tokens), interpolation(tokens)]
            )
            errors = [_errors(guess, target, tokens.scored, content) for guess in predictions]
            found = torch.cat(errors, dim=1).cpu()[here].double()
            self._baselines[number, rows, : found.shape[1]] = found
            self._known[number, rows] = True
        table[number, rows, _MODALITY] = (block.modality[here] + 1).double()
        table[number, rows, _HAS_CONTENT] = has_content.cpu()[here].double()
        table[number, rows, _ERRORS : _ERRORS + 2] = network.cpu()[here].double()
        table[number, rows, _ERRORS + 2 :] = self._baselines[number, rows]

    def _figures(self, table: Tensor) -> dict[str, float]:
        found: dict[str, float] = {}
        for code, modality in enumerate(MODALITIES):
            for number, ratio in enumerate(self.ratios):
                rows = table[number][table[number, :, _MODALITY] == code + 1]
                if not len(rows):
                    continue
                figures = _means(rows)
                if number == 0:
                    found |= {f"val/{modality}{ending}": value for ending, value in figures.items()}
                if ratio in self.config.mask_ratios:
                    at = {
                        e: v for e, v in figures.items() if e in ("", "_share", "_content", "_content_share")
                    }
                    found |= {f"val/{modality}@{ratio:.2f}{ending}": value for ending, value in at.items()}
        return found

    def _keep_pictures(self, name: str, block: RowBlock, result: Reconstruction) -> None:
        for slot in range(len(block.weight)):
            modality = MODALITIES[int(block.modality[slot])]
            already = sum(p.modality == modality for p in self.pictures)
            if block.weight[slot] > 0 and already < self.config.pictures:
                self.pictures.append(picture_of(name, block, result, slot, modality, self.objective.norm_pix))


class EveryRatio:
    """Collate function that makes one batch for each mask ratio of the same crops."""

    def __init__(self, collates: Sequence[Collate]) -> None:
        self.collates = tuple(collates)

    def __call__(self, update: int, group: int | None, crops: Sequence[Crop]) -> list[Batch]:
        """A batch for each ratio."""
        return [collate(update, group, crops) for collate in self.collates]


def constant(tokens: Tokens) -> Tensor:
    """(n, p) bool: predicted patches whose valid voxels lie within `CONSTANT` of each other."""
    low = torch.where(tokens.scored, tokens.target, torch.inf).amin(dim=-1)
    high = torch.where(tokens.scored, tokens.target, -torch.inf).amax(dim=-1)
    return high - low <= CONSTANT


def held_out_mixture(mixture: MixtureConfig, manifest: Manifest, rows: np.ndarray) -> MixtureConfig:
    """The training mixture without preference for labelled voxels and without sources that `rows` lack."""
    weights = mixture.weights
    if weights is not None:
        there = set(manifest.column(mixture.by)[rows])
        weights = {name: weight for name, weight in weights.items() if name in there}
    return mixture.model_copy(update={"foreground": 0.0, "weights": weights})


def _errors(prediction: Tensor, target: Tensor, scored: Tensor, content: Tensor) -> Tensor:
    """(n, 2) mean squared errors of each crop: over all scored voxels, over those of `content`."""
    return torch.stack([crop_error(prediction, target, voxels) for voxels in (scored, content)], dim=1)


def _means(rows: Tensor) -> dict[str, float]:
    """Figures of the crops of one modality by the ending of their names; of norm_pix no interpolation."""
    found: dict[str, float] = {}
    parts = (("", rows, _ERRORS), ("_content", rows[rows[:, _HAS_CONTENT] > 0], _ERRORS + 1))
    for part, mine, column in parts:
        if len(mine):
            for ending, value in zip(PREDICTORS, mine[:, column::2].mean(dim=0).tolist()):
                if value == value:  # not the interpolation of norm_pix
                    found[f"{part}{ending}"] = value
            if under := found.get(f"{part}_interpolation"):
                found[f"{part}_share"] = found[part] / under
        found[f"{part}_crops"] = float(len(mine))
    return found
