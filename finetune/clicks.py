"""Training by simulated clicks: a person with an object in mind, a prediction, a correction, a loss."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from data_pipeline.rng import rng
from finetune.batch import Batch, Windows
from finetune.loss import mask_loss, true_iou
from finetune.promptable import FIRST, LATER, Features, PromptableModel
from finetune.prompts import PromptList, Prompts, collate_prompts
from finetune.recipe import PromptTraining
from finetune.simulate import correction_click, first_click, jittered_box

Metrics = dict[str, tuple[Tensor, Tensor]]


class ClickTraining(nn.Module):
    """`model(batch) -> (loss, metrics)`: rounds of prompts by a simulated person, a loss in every round.

    The number of rounds is drawn once per update, the same on every rank. Between rounds nothing flows back
    through the previous logits.
    """

    calls_vary = True  # a hook of the engine: how often the parts are called depends on a rank's windows

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

    def forward(self, batch: Batch) -> tuple[Tensor, Metrics]:
        device = self.net.prompt.base.device
        rounds = self.rounds(batch.update)
        metrics: Metrics = {}
        total = self.nothing()
        for windows in batch.windows:
            total = total + self._clicks(windows.to(device), rounds, metrics)
        return total / self.samples_per_update, metrics

    def nothing(self) -> Tensor:
        """A 0 that every parameter takes part in.

        It comes before the windows, so it is the last thing in the backward pass: gradients are then ready in
        one order on every rank, whatever its windows are, and ZeRO 2 reduces them in that order.
        """
        total = torch.zeros((), device=self.net.prompt.base.device)
        for parameter in self.parameters():
            if parameter.requires_grad:
                total = total + parameter.flatten()[:0].sum()
        return total

    def rounds(self, update: int) -> int:
        """Predictions per object in an update."""
        low, high = self.config.rounds
        return int(rng(self.seed, update, "rounds").integers(low, high + 1))

    def people(self, windows: Windows) -> People:
        """Who prompts."""
        return People(self.config, self.seed, windows)

    def features(self, windows: Windows) -> Features:
        """The image half of the windows."""
        return self.net.encode(windows.image, windows.spacing, windows.geometry, windows.axes, windows.valid)

    def _clicks(self, windows: Windows, rounds: int, metrics: Metrics) -> Tensor:
        """Summed loss of the windows' objects, averaged over rounds; adds to `metrics`."""
        device = windows.image.device
        features = self.features(windows)
        people = self.people(windows)
        previous: Tensor | None = None
        total = windows.weight.new_zeros(())
        for number in range(rounds):
            logits, iou = self.net.decode(features, people.speak(previous).to(device), previous)
            part, other = (FIRST, LATER) if number == 0 else (LATER, FIRST)
            # Masks not asked for take part at weight zero: every parameter has a gradient in every call.
            idle = 0.0 * (logits[:, other].mean() + iou.mean())
            each, previous, reached = self._round(logits[:, part], iou[:, part], windows)
            total = total + (each * windows.weight).sum() / rounds + idle
            dice = 2 * reached / (1 + reached)
            for name, value in (
                (f"dice/round_{number + 1}", dice),
                (f"loss/round_{number + 1}", each.detach()),
            ):
                so_far = metrics.get(name, (torch.zeros((), device=device), torch.zeros((), device=device)))
                metrics[name] = (so_far[0] + (value * windows.weight).sum(), so_far[1] + windows.weight.sum())
        return total

    def _round(self, logits: Tensor, iou: Tensor, windows: Windows) -> tuple[Tensor, Tensor, Tensor]:
        """Loss (B,) of one round's masks (B, M, ...), the logits (B, 1, ...) to show, their IoU (B,).

        Of several masks the best one is taught, the others a little; all learn to predict their IoU.
        """
        losses = mask_loss(logits, windows.truth, windows.known)
        each = losses.amin(dim=1)
        if losses.shape[1] > 1:
            each = each + self.config.spread * losses.mean(dim=1)
        reached = true_iou(logits.detach(), windows.truth, windows.known)
        each = each + self.config.iou_weight * ((iou - reached) ** 2).mean(dim=1)
        rows = torch.arange(len(iou), device=iou.device)
        shown = iou.detach().argmax(dim=1)
        return each, logits.detach()[rows, shown][:, None], reached[rows, shown]


class People:
    """The simulated persons of a batch of windows, one an object."""

    def __init__(self, config: PromptTraining, seed: int, windows: Windows) -> None:
        self.spacing = windows.spacing.cpu()
        rows = zip(
            windows.index.tolist(),
            windows.truth.cpu().numpy(),
            windows.known.cpu().numpy(),
            self.spacing.tolist(),
        )
        self._users = [
            SimulatedUser(config, rng(seed, index, "prompt"), truth, known, spacing)
            if index >= 0
            else Silent()
            for index, truth, known, spacing in rows
        ]

    def speak(self, previous: Tensor | None) -> Prompts:
        """All that has been said, after each has answered the logits (B, 1, ...) shown; None for none yet."""
        masks = None if previous is None else (previous[:, 0] > 0).cpu().numpy()
        for row, user in enumerate(self._users):
            user.speak(None if masks is None else masks[row])
        return collate_prompts([user.said for user in self._users], self.spacing)


class Silent:
    """Nobody: the place of an object where there is no crop."""

    def __init__(self) -> None:
        self.said = PromptList()

    def speak(self, shown: np.ndarray | None) -> None:
        """Says nothing."""


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
