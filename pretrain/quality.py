"""What is measured of a network on data it does not train on: between steps of a run, and off-line alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from data_pipeline.manifest import Manifest
from pretrain.evaluate import HeldOut
from pretrain.held_out_table import describe
from pretrain.mae import MaskedAutoencoder
from pretrain.pictures import Picture
from pretrain.probe import Probe
from pretrain.recipe import PretrainRecipe
from pretrain.selection import select_rows


class Quality:
    """Held-out loss (`HeldOut`) and few-shot probes (`Probe`) as a recipe asks for them.

    Args:
        recipe: `data`, `evaluation` and `probes` say what is measured.
        manifest: of `recipe.data.root`.

    Attributes: `recipe`; `held_out`, None where the split has no samples; `probe`, None where the recipe
    names no labelled dataset.
    """

    def __init__(self, recipe: PretrainRecipe, manifest: Manifest) -> None:
        self.recipe = recipe
        rows = select_rows(manifest, recipe.data, recipe.data.held_out, may_be_empty=True)
        self.held_out = (
            HeldOut(
                manifest, rows, recipe.tokens, recipe.mixture, recipe.objective, recipe.encoder.shape.depth,
                recipe.evaluation, voxel_dtype(manifest), recipe.data.cache,
            )
            if len(rows)
            else None
        )  # fmt: skip
        self.probe = Probe(recipe.probes, recipe.encoder, recipe.data.cache) if recipe.probes.data else None

    def describe(self) -> str:
        """Lines for people: what is measured, and what is not."""
        crops = f"held out: {self.held_out.crops} crops" if self.held_out else "held out: no samples, no loss"
        return "\n".join(
            [crops, self.probe.describe() if self.probe else "probes: none, `probes.data` is empty"]
        )

    def score(
        self, network: MaskedAutoencoder, rank: int, world: int, device: torch.device
    ) -> dict[str, float]:
        """Every figure by name, the same on all ranks; see `HeldOut.score` and `Probe.score`."""
        held_out = self.held_out.score(network, rank, world, device) if self.held_out else {}
        probes = self.probe.score(network.encoder, rank, world, device) if self.probe else {}
        return held_out | probes

    def score_alone(self, network: MaskedAutoencoder) -> dict[str, float]:
        """`score` by this process alone, in the recipe's precision, as the engine does it between steps."""
        device = next(network.parameters()).device
        bf16 = self.recipe.engine.precision == "bf16"
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            return self.score(network, 0, 1, device)

    def report(self, scores: Mapping[str, float], earlier: Sequence[Mapping[str, float]]) -> str:
        """Figures for people, and a line for every sign of collapse. earlier: scores before, oldest first."""
        lines = [describe(scores)]
        if self.probe:
            lines += [probe_line(scores), *(f"ALARM: {line}" for line in self.probe.alarms(scores, earlier))]
        return "\n".join(line for line in lines if line)

    @property
    def pictures(self) -> list[Picture]:
        """Reconstructions that the last `score` kept on this rank."""
        return self.held_out.pictures if self.held_out else []


def probe_line(scores: Mapping[str, float]) -> str:
    """The main figures of `Probe.score` in one line."""
    parts = [
        f"Dice of few shots: linear {scores['probe/linear_dice']:.3f}, kNN {scores['probe/knn_dice']:.3f}, "
        f"linear on raw voxels {scores['probe/raw_linear_dice']:.3f}",
        f"features' rank {scores['collapse/rank']:.0f}, {scores['collapse/rank_share']:.0%} of the width",
    ]
    if "collapse/attention_entropy_min" in scores:
        low, high = (scores[f"collapse/attention_entropy_{end}"] for end in ("min", "max"))
        parts.append(f"attention entropy {low:.2f} to {high:.2f}")
    return "; ".join(parts)


def voxel_dtype(manifest: Manifest) -> str:
    """dtype of the batches of a dataset: float32 where it holds any, else int16."""
    return "float32" if (manifest.column("dtype") == "float32").any() else "int16"
