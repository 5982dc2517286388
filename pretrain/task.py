"""Pretraining as the engine sees it: the network, its batches, its held-out evaluation and its export."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor, nn

from data_pipeline.geometry import PATCH
from data_pipeline.manifest import Manifest
from data_pipeline.order import ORDER_VERSION, Order
from data_pipeline.stream import open_stream
from data_pipeline.stream_log import StreamLog
from engine.errors import UserError
from model.plan import AdaptationPlan, plan_text
from model.weights import ENCODER_PREFIX, save_encoder
from pretrain.batch import Batch, Collate
from pretrain.cost import activation_bytes, step_flops
from pretrain.mae import MaskedAutoencoder
from pretrain.pictures import save
from pretrain.quality import Quality, voxel_dtype
from pretrain.recipe import PretrainRecipe
from pretrain.selection import select_rows


class PretrainTask:
    """`engine.task.Task` of masked autoencoding.

    Attributes: `model`; `order` of the training crops; `quality`, what evaluations measure.
    """

    def __init__(self, recipe: PretrainRecipe) -> None:
        for kind, patch in recipe.encoder.patch.items():
            if tuple(patch) != PATCH[kind]:
                raise UserError(
                    f"encoder.patch.{kind}: crops are cut for patches of {PATCH[kind]}, not {tuple(patch)}"
                )
        self._recipe = recipe
        self.manifest = Manifest.open(recipe.data.root)
        rows = select_rows(self.manifest, recipe.data, recipe.data.split)
        seed = recipe.engine.seed
        self.order = Order(self.manifest, rows, recipe.tokens, recipe.mixture, seed)
        missing = {spec.geometry for spec in self.order.composition} - set(recipe.encoder.patch)
        if missing:
            raise UserError(
                f"encoder.patch has no stem for {', '.join(sorted(missing))}, which {recipe.data.root} holds"
            )
        self.samples_per_update = self.order.batch_size
        self.data = StreamLog(
            self.order, recipe.data.root, recipe.data.cache, max_damage=recipe.data.max_damage,
            updates=recipe.engine.updates,
        )  # fmt: skip
        torch.manual_seed(seed)  # the weights' start; nothing else in the run draws from torch's generator
        self.network = MaskedAutoencoder(recipe.encoder, recipe.objective, self.order.batch_size)
        self.model: nn.Module = self.network
        self.collate = Collate(
            self.order.composition, recipe.objective, self.network.encoder.depth, seed,
            dtype=voxel_dtype(self.manifest),
        )  # fmt: skip
        self.quality = Quality(recipe, self.manifest)
        self._plan_text = ""  # of all exports; at a million samples it takes seconds to make
        self._scores: list[dict[str, float]] = []  # of this launch's evaluations
        self._findings: list[str] = []

    def micro_steps(self, world: int) -> int:
        """Groups a rank takes an update."""
        return -(-self._recipe.mixture.groups // world)

    @property
    def flops_per_update(self) -> int:
        """Operations of forward and backward of an update over all ranks."""
        recipe = self._recipe
        return recipe.mixture.groups * step_flops(recipe.encoder, recipe.objective, self.order.composition)

    batch_fields = "mixture.rows_per_group or tokens.slots"

    def activation_bytes(self, checkpointing: bool) -> int:
        """Most bytes of activations in a micro-step of a rank."""
        recipe = self._recipe
        return activation_bytes(
            recipe.encoder, recipe.objective, self.order.composition,
            element=2 if recipe.engine.precision == "bf16" else 4, checkpointing=checkpointing,
        )  # fmt: skip

    @property
    def tokens_per_update(self) -> int:
        """Token slots of an update over all ranks, hidden and unfilled ones counted (`slot_waste` says how
        many are unfilled)."""
        return self.order.token_slots

    def sample_keys(self, position: int) -> list[str]:
        """Keys of the samples of the update at `position`, of all groups, in the order of the draws."""
        return self.order.keys(position)

    def batches(self, start_update: int, rank: int, world: int) -> Iterator[Batch]:
        """The rank's batches from `start_update` on, without end."""
        return self.data.follow(
            open_stream(
                self.manifest.root, self.manifest, self.order, rank=rank, world=world,
                start_update=start_update, workers=self._recipe.engine.workers, collate=self.collate,
                max_damage=1.0, cache=self._recipe.data.cache,
            )
        )  # fmt: skip

    def recipe(self) -> PretrainRecipe:
        """The resolved recipe."""
        return self._recipe

    def data_identity(self) -> dict[str, str]:
        """The dataset and the rule by which samples are drawn."""
        return {"manifest": self.manifest.hash[:16], "order": str(ORDER_VERSION)}

    def optimizer_groups(self) -> list[dict[str, Any]]:
        """Matrices decay; biases, norms, gains, learned tokens and positions do not (He et al. 2022)."""
        matrices: list[nn.Parameter] = []
        others: list[nn.Parameter] = []
        for name, parameter in self.network.named_parameters():
            single = parameter.ndim == 1 or name.endswith(("prefix.tokens", "positions.table"))
            (others if single else matrices).append(parameter)
        decay = self._recipe.engine.weight_decay
        return [{"params": matrices, "weight_decay": decay}, {"params": others, "weight_decay": 0.0}]

    def evaluate(self, update: int, rank: int, world: int, writer: Any) -> dict[str, float]:
        """Held-out loss and probes (see `Quality`)."""
        device = next(self.network.parameters()).device
        scores = self.quality.score(self.network, rank, world, device)
        self._findings = [] if self._scores else [self.quality.describe()]
        if scores:
            self._findings += [f"update {update}", self.quality.report(scores, self._scores)]
        self._scores.append(scores)
        return scores

    def findings(self) -> str:
        """What the last `evaluate` found, as lines for people."""
        return "\n".join(self._findings)

    def pictures(self, update: int, rank: int, world: int, writer: Any) -> None:
        """Reconstructions that the last `evaluate` kept, to the trackers and `RUN/pictures`; by rank 0."""
        if rank == 0:
            save(self.quality.pictures, update, writer)

    def export(self, state: Mapping[str, Tensor], folder: Path) -> None:
        """Write `encoder.safetensors` and `plan.json` from the whole network's float32 state dict."""
        encoder = {
            name.removeprefix(ENCODER_PREFIX): tensor
            for name, tensor in state.items()
            if name.startswith(ENCODER_PREFIX)
        }
        self._plan_text = self._plan_text or plan_text(self.plan())
        save_encoder(folder, encoder, self._plan_text)

    def plan(self) -> AdaptationPlan:
        """The adaptation plan of this run's encoder, with a summary of what it was trained on.

        Keyed hashes of the subjects and hashes of the images stand in it, so that a later evaluation can
        tell whether it was seen in pretraining.
        """
        rows = select_rows(self.manifest, self._recipe.data, self._recipe.data.split)
        spacing = self.manifest.column("spacing")[rows]
        names = ["source", "subject", "content_hash", "modality"]
        chosen = self.manifest.table.select(names).take(pa.array(rows))
        sources = _counts(chosen.column("source"))
        subjects = _sorted(pc.unique(chosen.column("subject")))
        licences = [s for s in self.manifest.info.get("sources", []) if s.get("name") in sources]
        return AdaptationPlan(
            architecture=self._recipe.encoder,
            spacing_range=(float(spacing.min()), float(spacing.max())),
            stems=tuple(sorted({spec.geometry for spec in self.order.composition})),
            training_data={
                "manifest": self.manifest.hash,
                "split": self._recipe.data.split,
                "samples": len(rows),
                "subjects": len(subjects),
                "subject_keys": subjects,
                "content_hashes": _sorted(pc.unique(chosen.column("content_hash"))),
                "samples_by_modality": _counts(chosen.column("modality")),
                "samples_by_source": sources,
                "sources": licences,
            },
        )


def _sorted(texts: pa.Array) -> list[str]:
    """In the order of Python's texts; sorted without the interpreter's lock."""
    found: list[str] = texts.take(pc.sort_indices(texts)).to_pylist()
    return found


def _counts(texts: pa.ChunkedArray) -> dict[str, int]:
    pairs = ((pair["values"], pair["counts"]) for pair in pc.value_counts(texts).to_pylist())
    return dict(sorted(pairs))


def open_task(recipe: PretrainRecipe, run: Path) -> PretrainTask:
    """The task of a recipe whose files go to `run`.

    Raises UserError for a recipe without data and for whatever is wrong with the data or the encoder.
    """
    if not recipe.data.root:
        raise UserError(
            "data.root is not set; give the shard folder: --data.root DIR (made by `medfm shards build`)"
        )
    return PretrainTask(recipe.model_copy(update={"run": os.fspath(run)}))
