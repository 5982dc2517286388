"""The engine's task: crops, simulated clicks, loss, evaluation and export of a promptable model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from data_pipeline.manifest import Manifest
from data_pipeline.order import Order
from data_pipeline.rng import rng
from data_pipeline.stream import open_stream
from engine.errors import UserError
from engine.task import Writer
from finetune.batch import Batch, Collate, Windows
from finetune.loss import mask_loss, true_iou
from finetune.promptable import FIRST, LATER, PromptableModel
from finetune.prompts import PromptList, collate_prompts
from finetune.recipe import FinetuneRecipe, PromptTraining
from finetune.simulate import correction_click, first_click, jittered_box
from finetune.weights import build_model, export_model


class ClickTraining(nn.Module):
    """`model(batch) -> (loss, metrics)`: rounds of prompts by a simulated person, a loss in every round.

    The number of rounds is drawn once per update, the same on every rank. Between rounds nothing flows back
    through the previous logits.
    """

    def __init__(
        self, model: PromptableModel, config: PromptTraining, samples_per_update: int, seed: int
    ) -> None:
        super().__init__()
        self.net = model
        self.config = config
        self.samples_per_update = samples_per_update
        self.seed = seed

    def set_checkpointing(self, on: bool) -> None:
        """Recompute the encoder's blocks in the backward pass."""
        if self.net.encoder is not None:
            cast(Any, self.net.encoder).set_checkpointing(on)

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
        device = self.net.prompt.base.device
        low, high = self.config.rounds
        rounds = int(rng(self.seed, batch.update, "rounds").integers(low, high + 1))
        total = torch.zeros((), device=device)
        metrics: dict[str, tuple[Tensor, Tensor]] = {}
        for windows in batch.windows:
            total = total + self._clicks(windows.to(device), rounds, metrics)
        if self.net.encoder is not None and not self.net.frozen:
            total = total + cast(Any, self.net.encoder).zero_touch()
        return total / self.samples_per_update, metrics

    def _clicks(self, windows: Windows, rounds: int, metrics: dict[str, tuple[Tensor, Tensor]]) -> Tensor:
        features = self.net.encode(
            windows.image, windows.spacing, windows.geometry, windows.axes, windows.valid
        )
        users = [
            SimulatedUser(self.config, rng(self.seed, int(index), "prompt"), truth, known, spacing)
            for index, truth, known, spacing in zip(
                windows.index.tolist(),
                windows.truth.cpu().numpy(),
                windows.known.cpu().numpy(),
                windows.spacing.tolist(),
            )
        ]
        previous: Tensor | None = None
        total = windows.weight.new_zeros(())
        for number in range(rounds):
            shown = None if previous is None else (previous[:, 0] > 0).cpu().numpy()
            for row, user in enumerate(users):
                user.speak(None if shown is None else shown[row])
            prompts = collate_prompts([user.said for user in users], windows.spacing.cpu()).to(
                previous_device(windows)
            )
            logits, iou = self.net.decode(features, prompts, previous)
            part = FIRST if number == 0 else LATER
            # The unused masks take part with weight zero, so that every parameter has a gradient in every
            # call.
            idle = 0.0 * (logits[:, LATER if number == 0 else FIRST].mean() + iou.mean())
            logits, iou = logits[:, part], iou[:, part]
            losses = mask_loss(logits, windows.truth, windows.known)
            best = losses.argmin(dim=1)
            each = losses.gather(1, best[:, None])[:, 0]
            each = each + self.config.spread * losses.mean(dim=1) if number == 0 else each
            reached = true_iou(logits.detach(), windows.truth, windows.known)
            each = each + self.config.iou_weight * ((iou - reached) ** 2).mean(dim=1)
            total = total + (each * windows.weight).sum() / rounds + idle
            # The person sees the mask the model itself would show.
            rows = torch.arange(len(best), device=best.device)
            shown_mask = iou.detach().argmax(dim=1)
            previous = logits.detach()[rows, shown_mask][:, None]
            seen = reached[rows, shown_mask]
            dice = (2 * seen / (1 + seen) * windows.weight).sum()
            for name, value in (
                (f"dice/round_{number + 1}", dice),
                (f"loss/round_{number + 1}", (each * windows.weight).sum().detach()),
            ):
                so_far = metrics.get(name, (0.0, 0.0))
                metrics[name] = (so_far[0] + value, so_far[1] + windows.weight.sum())
        return total


def previous_device(windows: Windows) -> torch.device:
    """Where the windows live."""
    return windows.image.device


class SimulatedUser:
    """One person with one object in mind; `said` grows by a prompt at each call of `speak`."""

    def __init__(
        self,
        config: PromptTraining,
        generator: np.random.Generator,
        truth: np.ndarray,
        known: np.ndarray,
        spacing: list[float],
    ) -> None:
        self.config = config
        self.generator = generator
        self.truth = truth & known
        self.known = known
        self.spacing = spacing
        self.said = PromptList()

    def speak(self, shown: np.ndarray | None) -> None:
        """A first prompt (box or click) while nothing is shown, then a click in the largest error; silence
        if none."""
        config, generator = self.config, self.generator
        power = float(generator.choice(np.array(config.powers)))
        if not self.truth.any():
            return
        if shown is None:
            if generator.random() < config.box:
                box = jittered_box(self.truth, generator, config.box_jitter)
                if box is not None:
                    self.said.boxes.append((_floats(box[0]), _floats(box[1])))
            else:
                where = first_click(self.truth, self.spacing, generator, power)
                if where is not None:
                    self.said.clicks.append((_floats(where), 1))
            return
        if generator.random() < config.from_truth:
            where = first_click(self.truth, self.spacing, generator, power)
            click = None if where is None else (where, 1)
        else:
            click = correction_click(shown, self.truth, self.known, self.spacing, generator, power)
        if click is not None:
            self.said.clicks.append((_floats(click[0]), click[1]))


def _floats(index: tuple[int, int, int]) -> tuple[float, float, float]:
    return float(index[0]), float(index[1]), float(index[2])


def training_rows(manifest: Manifest, recipe: FinetuneRecipe) -> np.ndarray:
    """The labelled rows a recipe trains on, sorted; `data.cases` of them drawn by `data.case_seed`.

    Raises UserError where there are fewer than asked for.
    """
    data = recipe.data
    rows = manifest.select(split=data.split, labelled=True)
    for column, wanted in (("source", data.sources), ("modality", data.modalities)):
        if wanted:
            rows = rows[np.isin(manifest.column(column)[rows].astype(str), list(wanted))]
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


class FinetuneTask:
    """`engine.task.Task` of a promptable fine-tuning."""

    def __init__(self, recipe: FinetuneRecipe) -> None:
        self._recipe = recipe
        self.manifest = Manifest.open(recipe.data.root)
        self.rows = training_rows(self.manifest, recipe)
        self.net = build_model(recipe.head, recipe.encoder, recipe.engine.seed)
        self.order = Order(
            self.manifest, self.rows, tokens=_unused_tokens(), mixture=recipe.mixture,
            seed=recipe.engine.seed, window=recipe.head.window,
        )  # fmt: skip
        self.samples_per_update = self.order.batch_size
        self.model = ClickTraining(self.net, recipe.prompts, self.samples_per_update, recipe.engine.seed)

    def recipe(self) -> FinetuneRecipe:
        """The resolved recipe."""
        return self._recipe

    def manifest_hash(self) -> str:
        """Hash of the dataset's manifest."""
        return self.manifest.hash

    def micro_steps(self, world: int) -> int:
        """One micro-step a group that a rank owns."""
        return -(-self._recipe.mixture.groups // world)

    def batches(self, start_update: int, rank: int, world: int) -> Iterator[Batch]:
        """Endless batches from `start_update`."""
        patches = None if self.net.encoder is None else cast(Any, self.net.encoder).config.patch
        collate = Collate(
            [spec.geometry for spec in self.order.composition],
            self._recipe.head.window,
            self._recipe.head.channels,
            self._recipe.augment,
            self._recipe.prompts.minimum_voxels,
            self._recipe.engine.seed,
            patches,
        )
        return cast(
            Iterator[Batch],
            open_stream(
                self._recipe.data.root,
                self.manifest,
                self.order,
                rank=rank,
                world=world,
                start_update=start_update,
                workers=self._recipe.engine.workers,
                collate=collate,
                with_seg=True,
                all_channels=True,
                max_damage=self._recipe.data.max_damage,
            ),
        )

    def evaluate(self, update: int, rank: int, world: int, writer: Writer) -> dict[str, float]:
        """Mean Dice by click on a few held-out cases, on rank 0."""
        from finetune.evaluate import evaluate_clicks

        rows = self.manifest.select(split=self._recipe.data.held_out, labelled=True)[
            : self._recipe.evaluation.cases
        ]
        if rank != 0 or len(rows) == 0:
            return {}
        report = evaluate_clicks(
            self.net, self.manifest, rows, clicks=self._recipe.evaluation.clicks, controls=False
        )
        scalars = {
            f"held_out/dice_click_{i + 1}": d for i, d in enumerate(report["mean"]["dsc"]) if d is not None
        }
        for name, value in scalars.items():
            writer.add_scalar(name, value, update)
        return scalars

    def pictures(self, update: int, rank: int, world: int, writer: Writer) -> None:
        """None yet: `medfm segment` and the report draw them."""

    def export(self, state: Mapping[str, Tensor], folder: Path) -> None:
        """Write `model.safetensors`, `encoder.safetensors` where there is an encoder, and `plan.json`."""
        full = {name: tensor.detach().float().cpu() for name, tensor in self.net.state_dict().items()}
        for name, tensor in state.items():
            full[name.removeprefix("net.")] = tensor
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


def _blocks_above(name: str, depth: int) -> int:
    """How many blocks lie above an encoder parameter; stems and prefix tokens lie below all of them."""
    parts = name.split(".")
    if "blocks" in parts:
        return depth - 1 - int(parts[parts.index("blocks") + 1])
    return 0 if parts[2] == "norm" else depth


def _unused_tokens() -> Any:
    from data_pipeline.geometry import TokenConfig

    return TokenConfig()
