"""A few labelled images of a shard dataset, each as one crop around a labelled structure.

A *task* is what a person would name one: the images of one source, modality and geometry. Of every task
`shots` images of one split are learnt from and `cases` of another are scored. Which ones follows from a hash
of the image's key, so that the choice stays as it is when the dataset grows; nobody is in both.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import numpy as np
import pyarrow.compute as pc
import torch
from torch import Tensor

from data_pipeline.crops import place
from data_pipeline.geometry import Triple, fit_grid
from data_pipeline.manifest import Manifest
from data_pipeline.shard_reader import INVALID, DamagedSample, ShardReader
from engine.errors import UserError
from model.config import EncoderConfig, Kind
from model.normalise import normalise
from model.patches import patchify

IGNORE = 255  # label value of a voxel whose class is not known


class Task(NamedTuple):
    """What the images of one probe have in common."""

    source: str
    modality: str
    geometry: Kind


@dataclass(frozen=True)
class Labelled:
    """A crop of a labelled image; axes in stem order (thick axis of a slab first).

    voxels (z, y, x) as stored and labels (layer, z, y, x) uint8, both padded to whole tokens; inside (z, y,
    x) bool, False for padding and voxels without a value; grid: tokens an axis; axes: patient axis of each
    axis; spacing in mm; norm: the seven numbers of `model.normalise`; annotated: classes that were looked for
    (the others are unknown, not background).
    """

    key: str
    subject: str
    task: Task
    voxels: np.ndarray
    labels: np.ndarray
    inside: np.ndarray
    grid: Triple
    patch: Triple
    axes: Triple
    spacing: tuple[float, float, float]
    norm: np.ndarray
    annotated: frozenset[int]

    def patches(self, device: torch.device) -> Tensor:
        """Normalised patches (N, P) float32; voxels that are not there hold air."""
        raw = torch.from_numpy(self.voxels[None].astype(np.float32)).to(device)
        inside = torch.from_numpy(self.inside[None]).to(device)
        norm = torch.from_numpy(self.norm[None])
        return self._patches(normalise(raw.nan_to_num(0.0), norm.to(device), inside)[0])

    def is_class(self, label: int, device: torch.device) -> Tensor:
        """(N, P) bool: voxels of a class, in whichever layer it lies."""
        return self._patches(torch.from_numpy((self.labels == label).any(0)).to(device))

    def holds(self, label: int) -> bool:
        """Whether a class was looked for in this image and is in the crop."""
        return label in self.annotated and bool((self.labels == label).any())

    def known(self, device: torch.device) -> Tensor:
        """(N, P) bool: voxels of the image whose annotated classes are known."""
        known = self.inside & (self.labels != IGNORE).all(0)
        return self._patches(torch.from_numpy(known).to(device))

    def learnable(self, device: torch.device) -> Tensor:
        """(N,) bool: tokens to learn from, which hold part of the image and no ignored voxel.

        Padding takes part as background, which it is: nothing lies beyond the edge of the image.
        """
        ignored = self._patches(torch.from_numpy((self.labels == IGNORE).any(0)).to(device))
        return self.attend(device) & ~ignored.any(1)

    def attend(self, device: torch.device) -> Tensor:
        """(N,) bool: tokens that hold part of the image."""
        return self._patches(torch.from_numpy(self.inside).to(device)).any(1)

    def _patches(self, volume: Tensor) -> Tensor:
        return patchify(volume[None, None], self.patch)[0]


def choose(
    manifest: Manifest,
    split: str,
    kinds: Collection[str],
    sources: Collection[str],
    classes: Collection[str],
    most: int,
    seed: int,
    without: Collection[str] = (),
) -> dict[Task, list[int]]:
    """Rows of at most `most` labelled images of each task, by the hash of their keys.

    kinds: geometries the encoder can see. classes: names of which an image has to hold one; none given: any.
    without: subjects to leave out. Labels made by a model are no truth and are left out too.
    """
    table = manifest.table
    good = pc.and_(pc.equal(table["split"], split), pc.greater(pc.list_value_length(table["classes"]), 0))
    good = pc.and_(good, pc.not_equal(table["label_origin"], "model"))
    rows = np.flatnonzero(pc.fill_null(good, False).to_numpy())
    keys = manifest.column("key")
    found: dict[Task, list[int]] = {}
    for row in sorted(rows.tolist(), key=lambda row: _hash(seed, str(keys[row]))):
        source, modality, kind, subject = (
            str(manifest.value(row, name)) for name in ("source", "modality", "geometry", "subject")
        )
        task = Task(source, modality, cast(Kind, kind))
        if kind not in kinds or (sources and source not in sources) or subject in without:
            continue
        if len(found.get(task, ())) < most and (
            not classes or set(classes) & set(manifest.value(row, "classes"))
        ):
            found.setdefault(task, []).append(row)
    return dict(sorted(found.items()))


def read(
    reader: ShardReader,
    manifest: Manifest,
    row: int,
    encoder: EncoderConfig,
    window: int,
    classes: Collection[int],
    seed: int,
) -> Labelled:
    """One crop of at most `window` tokens at native resolution, around a structure of the image.

    The whole image where it fits. The structure is drawn by the hash of the key among those of `classes`; the
    crop's middle is the known voxel of it that lies nearest to their mean. Several channels: the first.

    Raises UserError for a damaged sample.
    """
    about = manifest.row(row)
    task = Task(about["source"], about["modality"], about["geometry"])
    a, b, c = (int(v) for v in about["axes"])
    shape = [int(about["shape"][1 + axis]) for axis in (a, b, c)]
    patch = encoder.patch[task.geometry]
    grid = fit_grid([-(-n // p) for n, p in zip(shape, patch)], window)
    extent = [min(n, g * p) for n, g, p in zip(shape, grid, patch)]
    middle = _middle(about, classes, seed)
    origin = place(shape, extent, (0.5, 0.5, 0.5), [middle[axis] for axis in (a, b, c)])
    box = np.empty((2, 3), int)
    box[:, [a, b, c]] = origin, extent
    try:
        voxels = reader.read_box(row, "image", 0, box[0].tolist(), box[1].tolist())
        labels = reader.read_box(row, "seg", None, box[0].tolist(), box[1].tolist())
    except DamagedSample as damage:
        raise UserError(f"probes.data: {damage}; run `medfm shards verify {manifest.root}`") from None
    numbers = {name: int(number) for number, name in manifest.info.get("labels", {}).items()}
    spacing = [float(about["spacing"][axis]) for axis in (a, b, c)]
    room = [g * p - e for g, p, e in zip(grid, patch, extent)]
    voxels = _padded(voxels.transpose(a, b, c), room)
    labels = _padded(labels.transpose(0, 1 + a, 1 + b, 1 + c), room)
    there = voxels != INVALID if voxels.dtype == np.int16 else np.isfinite(voxels)
    there &= _padded(np.ones(extent, bool), room)
    return Labelled(
        key=about["key"],
        subject=about["subject"],
        task=task,
        voxels=voxels,
        labels=labels,
        inside=there,
        grid=grid,
        patch=patch,
        axes=(a, b, c),
        spacing=(spacing[0], spacing[1], spacing[2]),
        norm=np.array(about["norm"][0], dtype=np.float32),
        annotated=frozenset(numbers[name] for name in about["annotated"] if name in numbers),
    )


def _middle(about: dict[str, Any], classes: Collection[int], seed: int) -> list[int]:
    """Stored (z, y, x) of a voxel in the middle of a structure of the image, or of the image itself."""
    structures = [found for found in about["foreground"] if found["class"] in classes and found["voxels"]]
    if not structures:
        return [n // 2 for n in about["shape"][1:]]
    drawn = structures[_hash(seed, about["key"] + ":structure") % len(structures)]
    voxels = np.stack(np.unravel_index(drawn["voxels"], about["shape"][1:]), axis=1)
    nearest = np.square(voxels - voxels.mean(axis=0)).sum(axis=1).argmin()
    return [int(n) for n in voxels[nearest]]


def _padded(array: np.ndarray, room: Sequence[int]) -> np.ndarray:
    """Zeros behind the last three axes."""
    ahead = [(0, 0)] * (array.ndim - 3)
    return np.pad(array, [*ahead, *((0, n) for n in room)])


def _hash(seed: int, text: str) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed}:{text}".encode(), digest_size=8).digest(), "little")
