"""Reconstructions in intensity space: input, what was visible, reconstruction, difference; one slice of a
crop.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_pipeline.geometry import PATCH
from engine.task import Writer
from model.normalise import denormalise
from model.patches import unpatchify
from pretrain.batch import RowBlock, geometry_of_block
from pretrain.mae import Reconstruction, patch_moments

UNITS = {"CT": "HU", "PT": "SUV or stored units", "MR": "scanner units", "XR": "stored units"}


@dataclass(frozen=True)
class Picture:
    """A crop and its reconstruction as real values (z, y, x) float32, stem axis order; NaN where there is
    no voxel.
    """

    modality: str
    geometry: str
    index: int
    spacing: tuple[float, float, float]
    image: np.ndarray
    visible: np.ndarray  # NaN also at masked tokens
    reconstruction: np.ndarray  # the prediction at masked tokens, the image at visible ones

    def middle(self) -> int:
        """Slice along the first axis in the middle of the crop's middle token."""
        patch = PATCH[self.geometry][0]
        return (self.image.shape[0] // patch // 2) * patch + patch // 2


def picture_of(
    name: str, block: RowBlock, result: Reconstruction, slot: int, modality: str, norm_pix: bool
) -> Picture:
    """Assemble crop `slot` of a block. With `norm_pix` predictions take the true mean and variance of their
    patch.
    """
    geometry = geometry_of_block(name)
    tokens, grid = result.tokens, [int(g) for g in block.grid[slot]]
    prediction = result.prediction
    if norm_pix:
        mean, deviation = patch_moments(tokens)
        prediction = prediction * deviation + mean
    seen, asked = tokens.attend[slot], tokens.predicted[slot]
    seen_ids, asked_ids = tokens.visible_ids[slot][seen], tokens.target_ids[slot][asked]
    empty = torch.full((grid[0] * grid[1] * grid[2], tokens.visible.shape[-1]), torch.nan)
    visible = empty.clone()
    visible[seen_ids.cpu()] = _where(tokens.visible[slot][seen], tokens.visible_inside[slot][seen])
    image, reconstruction = visible.clone(), visible.clone()
    image[asked_ids.cpu()] = _where(tokens.target[slot][asked], tokens.scored[slot][asked])
    reconstruction[asked_ids.cpu()] = _where(prediction[slot][asked], tokens.scored[slot][asked])
    norm = block.norm[slot : slot + 1].float().cpu()

    def real(values: Tensor) -> np.ndarray:
        restored = torch.where(values.isnan(), torch.nan, denormalise(values.nan_to_num()[None], norm)[0])
        return unpatchify(restored[None], grid, PATCH[geometry])[0, 0].numpy()

    return Picture(
        modality=modality,
        geometry=geometry,
        index=int(block.number[slot]),
        spacing=tuple(float(s) for s in block.spacing[slot]),  # type: ignore[arg-type]
        image=real(image),
        visible=real(visible),
        reconstruction=real(reconstruction),
    )


def _where(values: Tensor, inside: Tensor) -> Tensor:
    return torch.where(inside, values.float(), torch.nan).cpu()


def draw(picture: Picture, title: str = "") -> Any:
    """A matplotlib figure: input, visible part, reconstruction and their difference with its own scale."""
    from matplotlib.figure import Figure

    place = picture.middle()
    image, visible, reconstruction = (
        a[place] for a in (picture.image, picture.visible, picture.reconstruction)
    )
    known = image[np.isfinite(image)]
    low, high = (float(v) for v in np.percentile(known, (1, 99))) if known.size else (0.0, 1.0)
    high = max(high, low + 1e-6)
    difference = reconstruction - image
    panels = (
        ("input", image),
        ("visible", visible),
        ("reconstruction", reconstruction),
        ("difference", difference),
    )
    figure = Figure(figsize=(12, 3.4), layout="constrained")
    figure.suptitle(f"{title}{picture.modality} ({picture.geometry}), {UNITS[picture.modality]}", fontsize=10)
    aspect = picture.spacing[1] / picture.spacing[2]
    for axes, (label, panel) in zip(figure.subplots(1, 4), panels):
        span = (high - low) / 2
        limits = (-span, span) if label == "difference" else (low, high)
        colours = "RdBu_r" if label == "difference" else "gray"
        shown = axes.imshow(
            panel, cmap=colours, vmin=limits[0], vmax=limits[1], aspect=aspect, interpolation="nearest"
        )
        axes.set_facecolor("#30405a")  # where there is no voxel, or a masked one
        axes.set_title(label, fontsize=9)
        axes.set_xticks([])
        axes.set_yticks([])
        if label in ("input", "difference"):
            figure.colorbar(shown, ax=axes, shrink=0.8)
    return figure


def save(pictures: list[Picture], update: int, writer: Writer) -> None:
    """Give each picture to the run's trackers as `pictures/MODALITY-K`."""
    counts: dict[str, int] = {}
    for picture in sorted(pictures, key=lambda p: (p.modality, p.index)):
        number = counts.get(picture.modality, 0)
        counts[picture.modality] = number + 1
        writer.add_figure(
            f"pictures/{picture.modality}-{number}", draw(picture, f"update {update}: "), update
        )
