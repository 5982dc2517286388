"""From the crops of one group to the windows of one micro-step; runs in the loader's workers.

A batch is a list of `Windows`, one for each geometry, axis order, size and set of strides among the crops,
so that every row of one is convolved alike. Voxels are normalised here: a crop may be rotated and zoomed,
which needs values in the network's range and no gradient. Every random choice comes from `rng(seed, index,
purpose)`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from data_pipeline.geometry import PATCH
from data_pipeline.rng import rng
from engine.errors import UserError
from finetune.network import Scale, Triple, scales_for, window_multiple
from finetune.recipe import AugmentConfig
from model.normalise import background, normalise

if TYPE_CHECKING:  # evaluation reads crops by itself and does without webdataset
    from data_pipeline.stream import Crop

INVALID = -32768
IGNORE = 255
_STANDARDISED = ("MR", "XR")


@dataclass
class Windows:
    """B windows that are convolved alike, one object asked for in each.

    image (B, c, Z, Y, X) float32 normalised; truth (B, Z, Y, X) bool; known (B, Z, Y, X) bool, False
    outside the image and where the label is ignored or not annotated; valid (B, Z, Y, X) bool, True inside
    the image; spacing (B, 3) mm; weight (B,) 0 where there is nothing to ask for; index (B,) place in the
    order.
    """

    image: Tensor
    truth: Tensor
    known: Tensor
    valid: Tensor
    spacing: Tensor
    weight: Tensor
    index: Tensor
    geometry: str
    axes: tuple[int, int, int]

    def to(self, device: torch.device | str) -> Windows:
        """The same windows on `device`."""
        tensors = ("image", "truth", "known", "valid", "spacing", "weight", "index")
        return replace(self, **{name: getattr(self, name).to(device) for name in tensors})


@dataclass
class Batch:
    """One micro-step: the update it belongs to and its windows."""

    update: int
    windows: list[Windows]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The same batch on `device`."""
        return Batch(self.update, [w.to(device) for w in self.windows])


class Collate:
    """Callable `(update, group, crops) -> Batch` for `data_pipeline.stream.open_stream`; picklable.

    Args:
        geometries: geometry of each row specification of the order, by number.
        window: (z, y, x) voxels; crops are padded to it, rounded up to whole strides and tokens.
        channels: image channels.
        augment: None for no augmentation.
        minimum_voxels: smaller objects are not asked for.
        seed: of all draws.
        patches: token patch of each geometry; the encoder's, or the default.
    """

    def __init__(
        self,
        geometries: Sequence[str],
        window: tuple[int, int, int],
        channels: int,
        augment: AugmentConfig | None,
        minimum_voxels: int,
        seed: int,
        patches: Mapping[str, tuple[int, int, int]] | None = None,
    ) -> None:
        self.geometries = tuple(geometries)
        self.window = window
        self.channels = channels
        self.augment = augment
        self.minimum_voxels = minimum_voxels
        self.seed = seed
        self.patches = dict(patches or PATCH)

    def __call__(self, update: int, group: int | None, crops: Sequence[Crop]) -> Batch:
        """The windows of one group; no crops give one window of weight 0, so that every parameter still
        takes part."""
        batches: dict[Shape, list[_Row]] = {}
        for crop in crops:
            key, row = self._row(crop)
            batches.setdefault(key, []).append(row)
        if not batches:
            return Batch(update, [self._nothing()])
        return Batch(update, [_stack(key, rows) for key, rows in batches.items()])

    def _row(self, crop: Crop) -> tuple[Shape, _Row]:
        draw = crop.draw
        geometry = self.geometries[draw.spec]
        voxels = crop.voxels if crop.voxels.ndim == 4 else crop.voxels[None]
        if len(voxels) != self.channels:
            raise UserError(
                f"sample {crop.key} has {len(voxels)} channels, the recipe's head.channels is "
                f"{self.channels}; set head.channels, or choose other data.sources"
            )
        size, scales = window_size(self.window, voxels.shape[1:], draw.spacing, self.patches[geometry])
        norm = np.asarray(crop.norm, dtype=np.float64).reshape(-1, 7)
        image, valid = normalised(voxels, norm)
        truth, known = self._object(crop)
        generator = rng(self.seed, draw.index, "augment") if self.augment else None
        flat_first = geometry != "volume"
        matrix = (
            draw_affine(generator, self.augment, draw.spacing, flat_first)
            if generator is not None
            else np.eye(3)
        )
        fill = background(torch.from_numpy(norm)).numpy()
        image, valid, truth, known = place(image, valid, truth, known, size, matrix, generator, fill)
        if self.augment is not None and generator is not None:
            image = np.where(valid, change_tone(image, crop.modality, generator, self.augment), image)
            turned = tuple(a for a in range(3) if size[a] > 1 and generator.random() < self.augment.flip)
            image = np.flip(image, tuple(1 + axis for axis in turned))
            valid, truth, known = (np.flip(a, turned) for a in (valid, truth, known))
        weight = float(truth.any())
        row = _Row(image, truth, known & valid, valid, np.asarray(draw.spacing), weight, draw.index)
        a, b, c = (int(v) for v in draw.axes)
        return Shape(geometry, (a, b, c), size, scales), row

    def _object(self, crop: Crop) -> tuple[np.ndarray, np.ndarray]:
        """The object asked for and the voxels whose answer is known, drawn evenly among the classes in the
        crop."""
        if crop.seg is None:
            raise UserError(f"sample {crop.key} has no label; fine-tuning needs labelled shards")
        found = []
        for layer, seg in enumerate(crop.seg):
            counts = np.bincount(seg.ravel(), minlength=IGNORE + 1)
            found += [(layer, c, int(counts[c])) for c in range(1, IGNORE) if counts[c]]
        enough = [f for f in found if f[2] >= self.minimum_voxels] or found
        if not enough:
            empty = np.zeros(crop.seg.shape[1:], dtype=bool)
            return empty, empty
        layer, label, _ = enough[int(rng(self.seed, crop.draw.index, "class").integers(len(enough)))]
        return crop.seg[layer] == label, crop.seg[layer] != IGNORE

    def _nothing(self) -> Windows:
        geometry = self.geometries[0] if self.geometries else "volume"
        size, scales = window_size((1, 1, 1), (2, 2, 2), (1.0, 1.0, 1.0), self.patches[geometry])
        off = np.zeros(size, dtype=bool)
        image = np.zeros((self.channels, *size), dtype=np.float32)
        row = _Row(image, off, off, ~off, np.ones(3), 0.0, -1)
        return _stack(Shape(geometry, (0, 1, 2), size, scales), [row])


class Shape(NamedTuple):
    """What the windows of one batch have in common."""

    geometry: str
    axes: Triple
    size: Triple
    scales: tuple[Scale, ...]


class _Row(NamedTuple):
    image: np.ndarray
    truth: np.ndarray
    known: np.ndarray
    valid: np.ndarray
    spacing: np.ndarray
    weight: float
    place: int


def _stack(shape: Shape, rows: Sequence[_Row]) -> Windows:
    def tensor(values: Sequence[np.ndarray], dtype: torch.dtype) -> Tensor:
        return torch.from_numpy(np.stack(values)).to(dtype)

    return Windows(
        tensor([r.image for r in rows], torch.float32),
        tensor([r.truth for r in rows], torch.bool),
        tensor([r.known for r in rows], torch.bool),
        tensor([r.valid for r in rows], torch.bool),
        tensor([r.spacing for r in rows], torch.float32),
        torch.tensor([r.weight for r in rows]),
        torch.tensor([r.place for r in rows]),
        shape.geometry,
        shape.axes,
    )


def window_size(
    window: Sequence[int], shape: Sequence[int], spacing: Sequence[float], patch: Triple
) -> tuple[Triple, tuple[Scale, ...]]:
    """Window lengths rounded up to whole strides and tokens, and its scales; an image axis of length 1
    stays 1."""
    flat = [n == 1 for n in shape]
    scales = scales_for(spacing, flat)
    multiple = window_multiple(scales, patch)
    z, y, x = (1 if f else -(-n // m) * m for n, m, f in zip(window, multiple, flat))
    return (z, y, x), scales


def normalised(voxels: np.ndarray, norm: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Network input (c, z, y, x) float32 from stored voxels, and where any channel is valid (z, y, x).

    norm: (c, 7). Invalid voxels (INVALID as int16, NaN as float32) take the channel's lowest value.
    """
    there = voxels != INVALID if voxels.dtype == np.int16 else np.isfinite(voxels)
    values = voxels.astype(np.float32) if there.all() else np.where(there, voxels, 0).astype(np.float32)
    image = normalise(torch.from_numpy(values), torch.from_numpy(norm), torch.from_numpy(there)).numpy()
    return image, there.any(axis=0)


def draw_affine(
    generator: np.random.Generator, config: AugmentConfig | None, spacing: Sequence[float], in_plane: bool
) -> np.ndarray:
    """A 3x3 matrix from output to input voxel offsets: rotation in mm and one zoom, or the identity.

    `in_plane` keeps the first axis as it is.
    """
    if config is None or generator.random() >= config.affine:
        return np.eye(3)
    angles = np.deg2rad(generator.uniform(-config.degrees, config.degrees, 3))
    matrix = np.eye(3)
    for axis in (0,) if in_plane else (0, 1, 2):
        a, b = (other for other in range(3) if other != axis)
        turn = np.eye(3)
        turn[a, a] = turn[b, b] = math.cos(angles[axis])
        turn[a, b], turn[b, a] = -math.sin(angles[axis]), math.sin(angles[axis])
        matrix = matrix @ turn
    scale = math.exp(generator.uniform(-config.zoom, config.zoom))
    matrix = matrix @ np.diag([1.0 if in_plane else scale, scale, scale])
    mm = np.asarray(spacing, dtype=np.float64)
    return matrix * mm[None, :] / mm[:, None]


def place(
    image: np.ndarray,
    valid: np.ndarray,
    truth: np.ndarray,
    known: np.ndarray,
    size: Triple,
    matrix: np.ndarray,
    generator: np.random.Generator | None,
    fill: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The crop in a window of `size`, turned by `matrix` about its centre; where it lies follows the
    generator.

    Voxels from outside the crop are invalid, unknown, and `fill` (c,) in the image. Without a generator the
    crop is centred.
    """
    shape = valid.shape
    room = np.array(size) - np.array(shape)
    where = room // 2 if generator is None else np.floor(room * generator.random(3)).astype(int)
    if np.array_equal(matrix, np.eye(3)):
        put = [_padded(a, size, where) for a in (valid, truth, known)]
        moved = np.stack([_padded(c, size, where, f) for c, f in zip(image, fill)])
        return moved, put[0], put[1], put[2]
    centre = (np.array(shape) - 1) / 2
    offset = centre - matrix @ (centre + where)
    # Masks go as one small-integer image, nearest neighbour; the image linearly. Neither carries a gradient.
    code = valid.astype(np.uint8) + 2 * truth + 4 * known
    code = ndimage.affine_transform(code, matrix, offset, size, order=0, mode="constant", cval=0)
    moved = np.stack(
        [ndimage.affine_transform(c, matrix, offset, size, order=1, mode="nearest") for c in image]
    )
    inside = (code & 1) > 0
    moved = np.where(inside, moved, fill[:, None, None, None].astype(np.float32))
    return moved, inside, (code & 2) > 0, (code & 4) > 0


def _padded(array: np.ndarray, size: Triple, where: np.ndarray, fill: float = 0) -> np.ndarray:
    out = np.full(size, fill, dtype=array.dtype)
    to = tuple(slice(max(w, 0), min(w + n, s)) for w, n, s in zip(where, array.shape, size))
    of = tuple(slice(max(-w, 0), max(-w, 0) + t.stop - t.start) for w, t in zip(where, to))
    out[to] = array[of]
    return out


def change_tone(
    image: np.ndarray, modality: str, generator: np.random.Generator, config: AugmentConfig
) -> np.ndarray:
    """Gain, shift, tone curve (arbitrary units only) and noise, drawn once for all channels; float32 (c, z,
    y, x)."""
    gain, shift, gamma, noise = generator.uniform(-1.0, 1.0, 4)
    if modality in _STANDARDISED and config.gamma:
        low, high = float(image.min()), float(image.max())
        if high > low:
            image = ((image - low) / (high - low)) ** math.exp(gamma * config.gamma) * (high - low) + low
    image = image * np.float32(1 + gain * config.gain) + np.float32(shift * config.shift)
    strength = np.float32(max(noise, 0.0) * config.noise)
    if strength:
        image = image + strength * generator.standard_normal(image.shape, dtype=np.float32)
    return image.astype(np.float32, copy=False)
