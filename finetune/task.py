"""Promptable fine-tuning as the engine sees it: network, batches, held-out evaluation, export."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from data_pipeline.geometry import PATCH, TokenConfig
from data_pipeline.manifest import Manifest
from data_pipeline.order import ORDER_VERSION, Order
from data_pipeline.rng import rng
from data_pipeline.stream import open_stream
from data_pipeline.stream_log import StreamLog
from engine.distributed import pick_device
from engine.errors import UserError
from engine.task import Writer
from finetune.batch import Batch, Collate
from finetune.clicks import ClickTraining
from finetune.cost import Shape, largest_shape, micro_step_bytes
from finetune.metrics import nested_mean
from finetune.recipe import FinetuneRecipe
from finetune.weights import build_model, export_model


def training_rows(manifest: Manifest, recipe: FinetuneRecipe) -> np.ndarray:
    """The labelled rows a recipe trains on, sorted; `data.cases` of them drawn by `data.case_seed`.

    Raises UserError where there are fewer than asked for.
    """
    data = recipe.data
    rows = _chosen(manifest, recipe, data.split)
    if len(rows) == 0:
        raise UserError(
            f"{data.root}: no labelled sample in split {data.split!r} of the chosen sources and modalities; "
            "see `medfm shards inspect`"
        )
    if data.cases:
        if len(rows) < data.cases:
            raise UserError(
                f"{data.root}: data.cases asks for {data.cases} labelled samples, "
                f"split {data.split!r} has {len(rows)}"
            )
        # By key, so that the draw does not depend on how the samples lie in shards.
        by_key = rows[np.argsort(manifest.column("key")[rows].astype(str))]
        rows = np.sort(rng(data.case_seed, 0, "cases").permutation(by_key)[: data.cases])
    return rows


def held_out_rows(manifest: Manifest, recipe: FinetuneRecipe) -> np.ndarray:
    """The rows of the evaluation during the run: of the sources and modalities trained on, with the model's
    channels and labels that no model made."""
    rows = _chosen(manifest, recipe, recipe.data.held_out)
    fits = manifest.column("shape")[rows, 0] == recipe.head.channels
    fits &= manifest.column("label_origin")[rows].astype(str) != "model"
    return rows[fits][: recipe.evaluation.cases]


def _chosen(manifest: Manifest, recipe: FinetuneRecipe, split: str) -> np.ndarray:
    """The labelled rows of a split of the recipe's sources and modalities, sorted."""
    rows = manifest.select(split=split, labelled=True)
    for column, wanted in (("source", recipe.data.sources), ("modality", recipe.data.modalities)):
        if wanted:
            rows = rows[np.isin(manifest.column(column)[rows].astype(str), list(wanted))]
    return rows


class FinetuneTask:
    """`engine.task.Task` of a promptable fine-tuning."""

    def __init__(self, recipe: FinetuneRecipe) -> None:
        self._recipe = recipe
        self.manifest = Manifest.open(recipe.data.root)
        self.rows = training_rows(self.manifest, recipe)
        self.net = build_model(recipe.head, recipe.encoder, recipe.engine.seed)
        self.order = Order(
            self.manifest, self.rows, tokens=TokenConfig(), mixture=recipe.mixture,
            seed=recipe.engine.seed, window=recipe.head.window,
        )  # fmt: skip
        self.samples_per_update = self.order.batch_size
        self.data = StreamLog(
            self.order, recipe.data.root, recipe.data.cache, max_damage=recipe.data.max_damage,
            updates=recipe.engine.updates,
        )  # fmt: skip
        self.training = ClickTraining(self.net, recipe.prompts, self.samples_per_update, recipe.engine.seed)
        self.model: nn.Module = self.training
        self._activation_bytes: dict[bool, int] = {}  # traced when first asked for

    def recipe(self) -> FinetuneRecipe:
        """The resolved recipe."""
        return self._recipe

    def data_identity(self) -> dict[str, str]:
        """The dataset and the rule by which samples are drawn."""
        return {"manifest": self.manifest.hash[:16], "order": str(ORDER_VERSION)}

    def micro_steps(self, world: int) -> int:
        """One micro-step a group that a rank owns."""
        return -(-self._recipe.mixture.groups // world)

    traces_activations = True
    batch_fields = "head.window, mixture.rows_per_group or prompts.rounds"

    def activation_bytes(self, checkpointing: bool) -> int:
        """Most bytes of activations, and of gradients while they come, in a micro-step of a rank."""
        again = checkpointing and self.net.encoder is not None and not self.net.frozen
        if again not in self._activation_bytes:
            engine = self._recipe.engine
            self._activation_bytes[again] = micro_step_bytes(
                self.training, self.largest_windows(), device=pick_device(engine),
                precision=engine.precision, checkpointing=again,
            )  # fmt: skip
        return self._activation_bytes[again]

    def largest_windows(self) -> list[Shape]:
        """The windows of a group of the data that take most."""
        head, rows = self._recipe.head, self.order.rows
        geometry = self.manifest.column("geometry")[rows].astype(str)
        axes = self.manifest.column("axes")[rows].astype(np.int64)
        shape = np.take_along_axis(self.manifest.column("shape")[rows][:, 1:], axes, axis=1)
        spacing = np.take_along_axis(self.manifest.column("spacing")[rows], axes, axis=1)
        found = []
        for spec in self.order.composition:
            own = geometry == spec.geometry
            patch = self._patches[spec.geometry]
            found.append(
                largest_shape(
                    spec.crops, spec.geometry, shape[own], spacing[own], head.window, patch, head.widths
                )
            )
        return found

    @property
    def _patches(self) -> Mapping[str, tuple[int, int, int]]:
        """Token patch of each geometry; the encoder's, or the default."""
        return PATCH if self.net.encoder is None else cast(Any, self.net.encoder).config.patch

    @property
    def tokens_per_update(self) -> int:
        """Tokens of the windows of an update over all ranks, each counted as a full `head.window`."""
        return self.order.token_slots

    def sample_keys(self, position: int) -> list[str]:
        """Keys of the samples of the update at `position`, of all groups, in the order of the draws."""
        return self.order.keys(position)

    def batches(self, start_update: int, rank: int, world: int) -> Iterator[Batch]:
        """Endless batches from `start_update`."""
        collate = Collate(
            [spec.geometry for spec in self.order.composition],
            self._recipe.head.window,
            self._recipe.head.channels,
            self._recipe.augment,
            self._recipe.prompts.minimum_voxels,
            self._recipe.engine.seed,
            self._patches,
        )
        return self.data.follow(
            open_stream(
                self._recipe.data.root, self.manifest, self.order, rank=rank, world=world,
                start_update=start_update, workers=self._recipe.engine.workers, collate=collate,
                with_seg=True, all_channels=True, max_damage=1.0,
                cache=self._recipe.data.cache,
            )
        )  # fmt: skip

    def evaluate(self, update: int, rank: int, world: int, writer: Writer) -> dict[str, float]:
        """Mean Dice by click on a few held-out cases, shared out over the ranks."""
        from finetune.evaluate import evaluate_clicks

        rows, clicks = held_out_rows(self.manifest, self._recipe), self._recipe.evaluation.clicks
        if len(rows) == 0:
            return {}
        images, subjects = (self.manifest.column(name)[rows].astype(str) for name in ("key", "subject"))
        of_image = {image: i for i, image in enumerate(images)}
        dice = np.zeros((2, len(rows), clicks))  # summed over an image's objects, and over how many
        mine = rows[rank::world]
        if len(mine):
            report = evaluate_clicks(
                self.net, self.manifest, mine, clicks=clicks, controls=False,
                precision=self._recipe.engine.precision,
            )  # fmt: skip
            for found in report["objects"]:
                for click, value in enumerate(found["dsc"]):
                    if value is not None:
                        dice[:, of_image[found["image"]], click] += value, 1
        if world > 1:
            shared = torch.from_numpy(dice).to(next(self.net.parameters()).device)
            dist.all_reduce(shared)
            dice = shared.cpu().numpy()
        means = {}
        for click in range(clicks):
            total, number = dice[:, :, click]
            shown = np.flatnonzero(number)
            mean = nested_mean((subjects[i], images[i], float(total[i] / number[i])) for i in shown)
            if mean is not None:
                means[f"held_out/dice_click_{click + 1}"] = mean
        return means

    def pictures(self, update: int, rank: int, world: int, writer: Writer) -> None:
        """None yet: `medfm segment` and the report draw them."""

    def export(self, state: Mapping[str, Tensor], folder: Path) -> None:
        """Write `model.safetensors`, `encoder.safetensors` where there is an encoder, and `plan.json`."""
        # Nothing is read from the network itself: it trains on meanwhile.
        full = {name.removeprefix("net."): tensor for name, tensor in state.items()}
        export_model(self.net, full, folder, self._recipe, self.manifest, self.rows)

    def optimizer_groups(self) -> list[dict[str, Any]]:
        """Head at the full rate; a pretrained encoder slower, and slower still towards its stem. No decay
        on 1-D weights."""
        choice = self._recipe.encoder
        scale = 1.0 if choice.from_scratch or not choice.path else choice.lr_scale
        depth = 0 if self.net.encoder is None else int(cast(Any, self.net.encoder).depth)
        groups: dict[tuple[float, bool], dict[str, Any]] = {}
        for name, parameter in self.model.named_parameters():
            if not parameter.requires_grad:
                continue
            rate = 1.0
            if name.startswith("net.encoder."):
                rate = scale * (choice.layer_decay ** _blocks_above(name, depth) if scale != 1.0 else 1.0)
            decays = parameter.ndim > 1
            group = groups.setdefault((rate, decays), {"params": [], "lr_scale": rate})
            if not decays:
                group["weight_decay"] = 0.0
            group["params"].append(parameter)
        return list(groups.values())


def open_task(recipe: FinetuneRecipe, run: Path) -> FinetuneTask:
    """The task of a recipe whose files go to `run`.

    Raises UserError for a recipe without data and for whatever is wrong with the data or the encoder.
    """
    if not recipe.data.root:
        raise UserError("data.root is not set; give the shard folder: --data.root DIR")
    return FinetuneTask(recipe.model_copy(update={"run": os.fspath(run)}))


def _blocks_above(name: str, depth: int) -> int:
    """How many blocks lie above an encoder parameter; stems and prefix tokens lie below all of them."""
    parts = name.split(".")
    if "blocks" in parts:
        return depth - 1 - int(parts[parts.index("blocks") + 1])
    return 0 if parts[2] == "norm" else depth
