"""From the crops of one group to the tensors of one micro-step; runs in the loader's workers.

A batch is a plain dict from row-block name to `RowBlock`, one block for each geometry and row class of the
order's composition. Its shapes depend on the composition alone. Voxels stay as stored (int16, or float32
where the manifest holds any); all arithmetic on them happens on the device. Masks and every other random
choice about a crop are drawn here from `rng(seed, index, purpose)`, so they depend neither on the rank nor on
the worker nor on the crop's neighbours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from data_pipeline.geometry import PATCH, Kind
from data_pipeline.order import RowSpec
from data_pipeline.rng import rng
from pretrain.masking import draw_mask, places
from pretrain.objective import AugmentConfig, ObjectiveConfig
from pretrain.validity import valid_tokens

if TYPE_CHECKING:
    from data_pipeline.stream import Crop

MODALITIES = ("CT", "MR", "PT", "XR")
_STANDARDISED = ("MR", "XR")  # arbitrary units, where a change of the tone curve is not a change of meaning


class RowBlock(NamedTuple):
    """The n = rows * k crops of one row specification; all in stem axis order (thick axis of a slab first).

    Crop `row * k + j` is the j-th of its row. v and p are what a crop of the largest size needs at the
    lowest and at the highest mask ratio. A slot without a crop has `weight` 0 and no token.
    """

    voxels: Tensor  # (n, V) int16 or float32 as stored: the crop in C-order, then zeros
    extent: Tensor  # (n, 3) int64: the crop's voxels per axis
    grid: Tensor  # (n, 3) int64: its tokens per axis
    residual: Tensor  # (n, 3) float32: stored voxels per output voxel
    start_mm: Tensor  # (n, 3) float32: corner of the crop from the corner of the volume
    spacing: Tensor  # (n, 3) float32: mm per output voxel
    axes: Tensor  # (n, 3) int64: patient axis (0 z, 1 y, 2 x) of each stem axis
    flip: Tensor  # (n, 3) bool: reverse the content along this axis
    norm: Tensor  # (n, 7) float32: slope, intercept, low, high, center, scale, compress
    tone: Tensor  # (n, 3) float32: gain, shift, exponent of the intensity change; (1, 0, 1) leaves it alone
    visible_ids: Tensor  # (n, v) int64: tokens to encode, C-order numbers over the grid; then zeros
    target_ids: Tensor  # (n, p) int64: tokens to predict; then zeros
    visible: Tensor  # (n,) int64: how many of `visible_ids` count
    predicted: Tensor  # (n,) int64: how many of `target_ids` count
    valid: Tensor  # (n,) int64: tokens of the crop that hold any voxel
    slots: Tensor  # (n,) int64: tokens there would be room for
    drop: Tensor  # (n, depth) float32: uniform numbers for drop-path
    weight: Tensor  # (n,) float32: 1, or 0 where there is no crop
    modality: Tensor  # (n,) int64: place in MODALITIES
    number: Tensor  # (n,) int64: place i in the order, -1 where there is no crop
    substituted: Tensor  # (n,) float32: 1 where damage made the stream serve another crop


Batch = dict[str, RowBlock]


def block_name(spec: RowSpec) -> str:
    """Name of a specification's block in a batch, such as `volume-4`."""
    return f"{spec.geometry}-{spec.k}"


def geometry_of_block(name: str) -> Kind:
    """Geometry of a block by its name: the inverse of `block_name`."""
    return cast(Kind, name.rsplit("-", 1)[0])


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The same batch on `device`."""
    return {
        name: RowBlock(*(t.to(device, non_blocking=True) for t in block)) for name, block in batch.items()
    }


class Collate:
    """Callable `(update, group, crops) -> Batch` for `data_pipeline.stream.open_stream`; picklable.

    Args:
        composition: the order's row specifications.
        objective: masking and augmentation.
        depth: encoder blocks, for drop-path.
        seed: seed of all draws.
        augment: False for evaluation: no flips, no change of intensity.
        dtype: `int16` or `float32`.
    """

    def __init__(
        self,
        composition: Sequence[RowSpec],
        objective: ObjectiveConfig,
        depth: int,
        seed: int,
        *,
        augment: bool = True,
        dtype: str = "int16",
    ) -> None:
        self.composition = tuple(composition)
        self.objective = objective
        self.depth = depth
        self.seed = seed
        self.augment = augment
        self.dtype = np.dtype(dtype)

    def __call__(self, update: int, group: int | None, crops: Sequence[Crop]) -> Batch:
        """Tensors of one group; `group` None and no crops give a batch of the same shapes and weight zero."""
        by_spec: list[list[Crop]] = [[] for _ in self.composition]
        for crop in crops:
            by_spec[crop.draw.spec].append(crop)
        return {
            block_name(spec): self._block(spec, by_spec[number])
            for number, spec in enumerate(self.composition)
        }

    def _block(self, spec: RowSpec, crops: Sequence[Crop]) -> RowBlock:
        a = _empty(spec, places(spec.capacity, self.objective), self.depth, self.dtype)
        for crop in crops:
            draw, slot = crop.draw, crop.draw.slot
            flat = np.ascontiguousarray(crop.voxels).reshape(-1)
            if flat.size > spec.voxels:
                raise ValueError(
                    f"crop {draw.index} has {flat.size} voxels, its row block holds {spec.voxels}; "
                    "the order and the collate function were made from different recipes"
                )
            stored = as_stored(flat, self.dtype)
            a["voxels"][slot, : flat.size] = stored
            a["extent"][slot] = crop.voxels.shape
            a["grid"][slot] = draw.grid
            a["residual"][slot] = draw.residual
            a["start_mm"][slot] = draw.start_mm
            a["spacing"][slot] = draw.spacing
            a["axes"][slot] = draw.axes
            a["norm"][slot] = crop.norm
            a["drop"][slot] = rng(self.seed, draw.index, "drop-path").random(self.depth, dtype=np.float32)
            a["weight"][slot] = 1.0
            a["modality"][slot] = MODALITIES.index(crop.modality)
            a["number"][slot] = draw.index
            a["substituted"][slot] = crop.substituted
            if self.augment:
                config = self.objective.augment
                a["flip"][slot] = rng(self.seed, draw.index, "flip").random(3) < config.flip
                a["tone"][slot] = draw_tone(self.seed, draw.index, crop.modality, config)
            valid = valid_tokens(
                stored.reshape(crop.voxels.shape), draw.grid, draw.residual, a["flip"][slot].tolist(),
                PATCH[spec.geometry],
            )  # fmt: skip
            visible, target = draw_mask(self.seed, draw.index, draw.grid, valid, self.objective)
            a["visible_ids"][slot, : len(visible)] = visible
            a["target_ids"][slot, : len(target)] = target
            a["visible"][slot], a["predicted"][slot] = len(visible), len(target)
            a["valid"][slot] = valid.sum()
        return RowBlock(**{name: torch.from_numpy(array) for name, array in a.items()})


def draw_tone(seed: int, index: int, modality: str, config: AugmentConfig) -> tuple[float, float, float]:
    """Gain, shift and exponent of a crop's intensity change; the exponent only where units are arbitrary."""
    gain, shift, gamma = rng(seed, index, "intensity").uniform(-1.0, 1.0, 3)
    exponent = math.exp(gamma * config.gamma) if modality in _STANDARDISED else 1.0
    return 1.0 + gain * config.gain, shift * config.shift, exponent


def as_stored(voxels: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Voxels in the run's dtype: int16 widens to float32 with INVALID as NaN, the reverse is refused."""
    if voxels.dtype == dtype:
        return voxels
    if voxels.dtype == np.int16 and dtype == np.float32:
        return np.where(voxels == -32768, np.float32(np.nan), voxels.astype(np.float32))
    raise ValueError(f"a {voxels.dtype} crop in a run of {dtype} voxels; open the dataset again")


def _empty(spec: RowSpec, places: tuple[int, int], depth: int, dtype: np.dtype) -> dict[str, np.ndarray]:
    """Arrays of a block without crops; places: most visible and most predicted tokens."""
    n = spec.crops
    norm = np.tile(np.array([1, 0, 0, 1, 0, 1, 0], dtype=np.float32), (n, 1))
    return {
        "voxels": np.zeros((n, spec.voxels), dtype),
        "extent": np.ones((n, 3), np.int64),
        "grid": np.ones((n, 3), np.int64),
        "residual": np.ones((n, 3), np.float32),
        "start_mm": np.zeros((n, 3), np.float32),
        "spacing": np.ones((n, 3), np.float32),
        "axes": np.tile(np.arange(3, dtype=np.int64), (n, 1)),
        "flip": np.zeros((n, 3), bool),
        "norm": norm,
        "tone": np.tile(np.array([1, 0, 1], dtype=np.float32), (n, 1)),
        "visible_ids": np.zeros((n, places[0]), np.int64),
        "target_ids": np.zeros((n, places[1]), np.int64),
        "visible": np.zeros(n, np.int64),
        "predicted": np.zeros(n, np.int64),
        "valid": np.zeros(n, np.int64),
        "slots": np.full(n, spec.capacity, np.int64),
        "drop": np.ones((n, depth), np.float32),
        "weight": np.zeros(n, np.float32),
        "modality": np.zeros(n, np.int64),
        "number": np.full(n, -1, np.int64),
        "substituted": np.zeros(n, np.float32),
    }
