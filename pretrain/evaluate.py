"""Held-out loss by modality, beside two predictors without parameters on the same masks.

The held-out crops and masks come from their own order over the held-out split, with a fixed seed, no flips
and no change of intensity, and the network in eval mode; so the same network gives the same figures,
whatever the number of ranks. The ranks share the crops, and a crop's errors are added up in the order of
its index, not of its rank.
"""

from __future__ import annotations

from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from data_pipeline.geometry import TokenConfig
from data_pipeline.manifest import Manifest
from data_pipeline.order import MixtureConfig, Order
from data_pipeline.shard_cache import CacheConfig
from data_pipeline.stream import Stream, open_stream
from pretrain.baselines import baseline_errors
from pretrain.batch import MODALITIES, Batch, Collate, RowBlock, to_device
from pretrain.mae import Reconstruction, crop_error, patch_normalised
from pretrain.objective import ObjectiveConfig
from pretrain.pictures import Picture, picture_of
from pretrain.recipe import EvaluationConfig

PREDICTORS = (
    "",
    "_mean",
    "_interpolation",
)  # endings of the logged names: network, visible mean, interpolation


class HeldOut:
    """The held-out crops of a run.

    Args:
        manifest: the dataset.
        rows: its held-out rows.
        tokens, mixture: as for training; only the foreground share is set to zero.
        objective: masking and target.
        depth: encoder blocks.
        config: how many crops, and their seed.
        dtype: voxel dtype of the run.
        cache: how shards are brought to this machine.
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
        self.collate = Collate(
            self.order.composition, objective, depth, config.seed, augment=False, dtype=dtype
        )
        self.pictures: list[Picture] = []

    def score(self, model: nn.Module, rank: int, world: int, device: torch.device) -> dict[str, float]:
        """Mean squared error of each modality for the network and both predictors: `val/CT`, `val/CT_mean`,
        `val/CT_interpolation` and so on, and `val/CT_crops`. Keeps pictures of the first crops of each
        modality.

        With `norm_pix` the squared errors of patches of unit variance have no interpolation to compare with;
        `_mean` is then the error of predicting each patch's own mean.
        """
        steps = self.config.batches * -(-self.order.groups // world)
        table = torch.zeros(
            self.config.batches * self.order.batch_size, 1 + len(PREDICTORS), dtype=torch.float64
        )
        self.pictures = []
        stream: Stream[Batch] = open_stream(
            self.manifest.root, self.manifest, self.order, rank=rank, world=world, start_update=0, workers=0,
            collate=self.collate, max_damage=1.0, cache=self.cache,
        )  # fmt: skip
        was_training = model.training
        model.eval()  # no drop-path; masking does not depend on the mode
        with torch.no_grad(), stream:
            for batch in islice(stream, steps):
                placed = to_device(batch, device)
                results = model(placed, reconstruct=True)
                for (name, block), result in zip(placed.items(), results):
                    self._enter(table, block, result)
                    self._keep_pictures(name, block, result)
        model.train(was_training)
        if world > 1 and dist.is_initialized():
            shared = table.to(device)
            dist.all_reduce(shared)
            table = shared.cpu()
        return self._means(table)

    def _enter(self, table: Tensor, block: RowBlock, result: Reconstruction) -> None:
        """Write the errors of a block's crops into their rows of the table."""
        if self.objective.norm_pix:
            mean = crop_error(
                torch.zeros_like(result.prediction), patch_normalised(result.tokens), result.tokens.scored
            )
            interpolated = torch.full_like(mean, torch.nan)
        else:
            mean, interpolated = baseline_errors(result.tokens)
        scored = result.tokens.scored.any(dim=2).any(dim=1)
        here = ((block.weight > 0) & scored).cpu()
        errors = torch.stack([block.modality + 1.0, result.crop_loss, mean, interpolated], dim=1)
        table[block.number.cpu()[here]] = errors.cpu()[here].double()

    def _means(self, table: Tensor) -> dict[str, float]:
        found: dict[str, float] = {}
        for number, name in enumerate(MODALITIES):
            mine = table[table[:, 0] == number + 1]
            if not len(mine):
                continue
            for ending, value in zip(PREDICTORS, mine[:, 1:].mean(dim=0).tolist()):
                if value == value:  # not the interpolation of norm_pix
                    found[f"val/{name}{ending}"] = value
            found[f"val/{name}_crops"] = float(len(mine))
        return found

    def _keep_pictures(self, name: str, block: RowBlock, result: Reconstruction) -> None:
        for slot in range(len(block.weight)):
            modality = MODALITIES[int(block.modality[slot])]
            already = sum(p.modality == modality for p in self.pictures)
            if block.weight[slot] > 0 and already < self.config.pictures:
                self.pictures.append(picture_of(name, block, result, slot, modality, self.objective.norm_pix))


def held_out_mixture(mixture: MixtureConfig, manifest: Manifest, rows: np.ndarray) -> MixtureConfig:
    """The training mixture without preference for labelled voxels and without sources that `rows` lack."""
    weights = mixture.weights
    if weights is not None:
        there = set(manifest.column(mixture.by)[rows])
        weights = {name: weight for name, weight in weights.items() if name in there}
    return mixture.model_copy(update={"foreground": 0.0, "weights": weights})


class Line(NamedTuple):
    """One modality of a held-out table."""

    modality: str
    loss: float
    mean: float
    interpolation: float | None
    crops: int

    @property
    def learnt(self) -> bool:
        """Whether the network is below every predictor that has no parameters."""
        return self.loss < min(v for v in (self.mean, self.interpolation) if v is not None)


def lines_of(scores: dict[str, float]) -> list[Line]:
    """The held-out table of `HeldOut.score`'s figures."""
    return [
        Line(
            name,
            scores[f"val/{name}"],
            scores[f"val/{name}_mean"],
            scores.get(f"val/{name}_interpolation"),
            int(scores[f"val/{name}_crops"]),
        )
        for name in MODALITIES
        if f"val/{name}" in scores
    ]


def describe(scores: dict[str, float]) -> str:
    """The held-out table as text for people, a line a modality."""
    lines = [f"held out  {'loss':>8} {'mean':>8} {'interp.':>8} {'crops':>6}"]
    for line in lines_of(scores):
        interpolation = "       –" if line.interpolation is None else f"{line.interpolation:8.4f}"
        verdict = "below both" if line.learnt else "not yet below both"
        figures = f"{line.loss:8.4f} {line.mean:8.4f} {interpolation} {line.crops:6d}"
        lines.append(f"{line.modality:<8}  {figures}  {verdict}")
    return "\n".join(lines)
