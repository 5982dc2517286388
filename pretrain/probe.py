"""What an encoder's features are good for, told by a few labelled images; run between steps or off-line.

A few images of a labelled shard dataset (see `probe_data`) are encoded. A kNN and a linear probe learn from
some of them to segment the others; the same linear probe on raw voxels says what needs no encoder. On the
way the features' rank and the entropy of attention tell whether the encoder has collapsed. Nothing here
draws a random number or changes a weight, and the figures do not depend on the number of ranks: they share
the images, then exchange features, in the order of the images.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from data_pipeline.manifest import Manifest
from data_pipeline.shard_cache import CacheConfig, open_files
from data_pipeline.shard_reader import ShardReader
from data_pipeline.traffic import Meter
from engine.errors import UserError
from model.config import EncoderConfig
from model.encoder import Encoder, Layout
from model.patches import token_centres
from pretrain import collapse, knn, linear_probe
from pretrain.probe_config import ProbeConfig
from pretrain.probe_data import Labelled, Task, choose, read
from pretrain.shots import Shot, dice, overlap

ATTENTION_IMAGES = 4  # whose attention is looked at: it costs more than encoding


class _Places(NamedTuple):
    """Places of a task's images, and its classes that at least two shots and one case hold.

    One shot alone would leave nothing to choose a ridge by, and tell of that patient more than of the class.
    """

    shots: range
    cases: range
    classes: list[int]


class Probe:
    """The labelled images of a recipe, held in memory, and the probes on them.

    Args:
        config: which images, and how.
        encoder: configuration of the encoders to come.
        cache: how shards are brought to this machine.

    Attributes: `images` in fixed order; `tasks`, the places of their images in it; `classes`, names by
    number; `left_out`, why tasks are not scored. Raises UserError where nothing can be scored or a sample is
    damaged. While scoring, each rank holds the features of all images: images x window x width x 4 bytes.
    """

    def __init__(self, config: ProbeConfig, encoder: EncoderConfig, cache: CacheConfig | None = None) -> None:
        if config.depth > encoder.shape.depth:
            raise UserError(f"probes.depth {config.depth}: the encoder has {encoder.shape.depth} blocks")
        self.config = config
        manifest = Manifest.open(config.data)
        self._check_names(manifest)
        names = {int(number): name for number, name in manifest.info.get("labels", {}).items()}
        self.classes = {n: name for n, name in sorted(names.items()) if name in (config.classes or [name])}
        self.images: list[Labelled] = []
        self.tasks: dict[Task, _Places] = {}
        self.left_out: list[str] = []
        reader = ShardReader(
            config.data, manifest, open_files(config.data, manifest, cache or CacheConfig(), Meter())
        )
        try:
            self._choose(manifest, reader, encoder)
        finally:
            reader.close()
        self._raw: dict[str, float] | None = None

    def _check_names(self, manifest: Manifest) -> None:
        for field, wanted, there in (
            ("sources", self.config.sources, set(manifest.column("source"))),
            ("classes", self.config.classes, set(manifest.info.get("labels", {}).values())),
        ):
            if unknown := [name for name in wanted if name not in there]:
                held = ", ".join(sorted(there)) or "none"
                raise UserError(f"probes.{field}: no {unknown[0]!r} in {self.config.data}; it holds {held}")

    def _choose(self, manifest: Manifest, reader: ShardReader, encoder: EncoderConfig) -> None:
        config = self.config
        which = (encoder.patch, config.sources, config.classes)
        shots = choose(manifest, config.split, *which, config.shots, config.seed)
        taught = {str(manifest.value(row, "subject")) for rows in shots.values() for row in rows}
        cases = choose(manifest, config.test_split, *which, config.cases, config.seed, without=taught)
        for task in sorted({*shots, *cases}):
            learnt, scored = shots.get(task, []), cases.get(task, [])
            if len(learnt) < 2 or not scored:
                self.left_out.append(
                    f"{' '.join(task)}: {len(learnt)} labelled in {config.split!r}, {len(scored)} of other "
                    f"subjects in {config.test_split!r}; 2 and 1 are needed"
                )
                continue
            images = [
                read(reader, manifest, row, encoder, config.window, self.classes, config.seed)
                for row in learnt + scored
            ]
            first, rest = images[: len(learnt)], images[len(learnt) :]
            classes = [
                n for n in self.classes
                if sum(image.holds(n) for image in first) >= 2 and any(image.holds(n) for image in rest)
            ]  # fmt: skip
            if not classes:
                self.left_out.append(f"{' '.join(task)}: no class is in two shots and in a case")
                continue
            start, middle = len(self.images), len(self.images) + len(learnt)
            self.images += images
            self.tasks[task] = _Places(range(start, middle), range(middle, len(self.images)), classes)
        if not self.images:
            why = "; ".join(self.left_out) or f"no labelled image in split {config.split!r} that it can see"
            raise UserError(f"probes.data: nothing to score in {config.data}: {why}")

    def describe(self) -> str:
        """Lines for people: what is scored, and what is not and why."""
        lines = [
            f"probe {' '.join(task)}: {', '.join(self.classes[n] for n in places.classes)}; "
            f"{len(places.shots)} shots, {len(places.cases)} cases"
            for task, places in self.tasks.items()
        ]
        return "\n".join([*lines, *(f"probe left out: {line}" for line in self.left_out)])

    def score(self, encoder: Encoder, rank: int, world: int, device: torch.device) -> dict[str, float]:
        """Figures of an encoder by name; every rank calls this, and all get the same.

        `probe/knn_dice`, `probe/linear_dice`, `probe/raw_linear_dice` and the first two by class,
        `probe/linear_dice/CLASS`: Dice over the known voxels of a crop, mean over its classes, then a
        subject's images, then subjects. A class that neither truth nor prediction holds is left out; one
        that only one of them holds counts 0. `collapse/…`: see `collapse`. The encoder runs in the precision
        of the caller's autocast, without drop-path and uncompiled (its crops come in many shapes); the probes
        in float32 and float64.
        """
        if not dist.is_initialized():
            rank, world = 0, 1
        mine = range(rank, len(self.images), world)
        was_training = encoder.training
        encoder.eval()
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            encoded = {n: _encode(encoder, self.images[n], self.config.depth, device) for n in mine}
            looked = self._attention(encoder, mine, device)
        encoder.train(was_training)
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            features = self._shared(encoded, encoder.width, world, device)
            found = self._segmented(features, mine, device, {"knn": self._knn, "linear": _linear})
            if self._raw is None:
                patches = [image.patches(device) for image in self.images]
                self._raw = self._segmented(patches, mine, device, {"raw_linear": _linear})
            spread = collapse.spread(
                x[image.attend(device)] for x, image in zip(features, self.images, strict=True)
            )
            signs = spread | collapse.attention(looked)
        return found | self._raw | {f"collapse/{name}": value for name, value in signs.items()}

    def alarms(self, scores: Mapping[str, float], earlier: Sequence[Mapping[str, float]] = ()) -> list[str]:
        """Lines for people where features or attention have collapsed; see `collapse.alarms`."""
        return collapse.alarms(scores, earlier)

    def _attention(self, encoder: Encoder, mine: range, device: torch.device) -> Tensor:
        """Attention entropy (images, depth, heads) of a few images, evenly spaced."""
        number = min(ATTENTION_IMAGES, len(self.images))
        table = torch.zeros(number, encoder.depth, encoder.heads, device=device)
        for place in range(number):
            n = place * len(self.images) // number
            if n in mine:
                table[place] = encoder.attention_entropy(*_tokens(encoder, self.images[n], device))
        return _summed(table)

    def _shared(
        self, encoded: Mapping[int, Tensor], width: int, world: int, device: torch.device
    ) -> list[Tensor]:
        """Features of all images on every rank; those of image n come from rank n % world."""
        shared = []
        for n, image in enumerate(self.images):
            x = encoded[n] if n in encoded else torch.empty(int(np.prod(image.grid)), width, device=device)
            if world > 1:
                dist.broadcast(x, src=n % world)
            shared.append(x)
        return shared

    def _segmented(
        self,
        features: Sequence[Tensor],
        mine: range,
        device: torch.device,
        methods: Mapping[str, Callable[[list[Shot]], Segmenter]],
    ) -> dict[str, float]:
        """Dice of the cases by each method; every rank learns from all shots and segments its own cases."""
        labels = list(self.classes)
        table = torch.zeros(
            len(methods), len(self.images), len(labels), 3, dtype=torch.float64, device=device
        )
        for places in self.tasks.values():
            shots = [self._shot(n, features[n], places.classes, device) for n in places.shots]
            cases = [n for n in places.cases if n in mine]
            for row, method in zip(table, methods.values()):
                segment = method(shots)
                for n in cases:
                    image = self.images[n]
                    known = image.known(device)
                    for place, found in segment(features[n]).items():
                        label = places.classes[place]
                        if label in image.annotated:
                            counts = overlap(found, image.is_class(label, device), known)
                            row[n, labels.index(label)] = torch.tensor(counts)
        tables = zip(methods, _summed(table).tolist())
        return {name: value for method, rows in tables for name, value in self._means(method, rows).items()}

    def _means(self, method: str, rows: list[list[list[float]]]) -> dict[str, float]:
        """Means of a method's Dice over classes, images and subjects, from the counts of every image."""
        dices = [[dice(*counts) for counts in row] for row in rows]
        subjects = [image.subject for image in self.images]
        means = {f"probe/{method}_dice": _nested_mean(subjects, [_mean(row) for row in dices])}
        if method == "linear":
            for place, name in enumerate(self.classes.values()):
                means[f"probe/{method}_dice/{name}"] = _nested_mean(subjects, [row[place] for row in dices])
        return {name: value for name, value in means.items() if value is not None}

    def _shot(self, n: int, features: Tensor, classes: Sequence[int], device: torch.device) -> Shot:
        image = self.images[n]
        return Shot(
            features,
            torch.stack([image.is_class(label, device) for label in classes]),
            image.known(device),
            image.learnable(device),
            tuple(label in image.annotated for label in classes),
        )

    def _knn(self, shots: list[Shot]) -> Segmenter:
        return knn.Knn(shots, self.config.k).segment


Segmenter = Callable[[Tensor], Mapping[int, Tensor]]  # features (n, D) -> (n, P) bool by class


def _linear(shots: list[Shot]) -> Segmenter:
    maps = linear_probe.fit(shots)
    return lambda features: {label: linear.segment(features) for label, linear in maps.items()}


def _tokens(encoder: Encoder, image: Labelled, device: torch.device) -> tuple[Tensor, Tensor, Layout, Tensor]:
    """What the trunk takes for one image: tokens (N, D), centres (N, 3), layout, attend (N,)."""
    patches = image.patches(device)[None]
    grid = torch.tensor([image.grid], device=device)
    spacing = torch.tensor([image.spacing], device=device)
    if encoder.config.rotary == "index":
        spacing = torch.ones_like(spacing)
    axes = torch.tensor([image.axes], device=device)
    centres = token_centres(grid, torch.zeros_like(spacing), spacing, image.patch, axes)
    tokens = encoder.stem(image.task.geometry, patches, grid)
    return tokens[0], centres[0], ((1, patches.shape[1]),), image.attend(device)


def _encode(encoder: Encoder, image: Labelled, depth: int, device: torch.device) -> Tensor:
    """Features (N, D) float32 of an image's tokens."""
    tokens, centres, layout, attend = _tokens(encoder, image, device)
    return encoder.trunk(tokens, centres, layout, attend, depths=(depth or encoder.depth,))[0].float()


def _summed(table: Tensor) -> Tensor:
    """The sum over ranks of tables in which each row is written by one rank."""
    if dist.is_initialized():
        dist.all_reduce(table)
    return table


def _mean(values: Sequence[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return sum(there) / len(there) if there else None


def _nested_mean(subjects: Sequence[str], values: Sequence[float | None]) -> float | None:
    """Mean over subjects of the mean over their images; what is None is left out."""
    by_subject: dict[str, list[float | None]] = {}
    for subject, value in zip(subjects, values, strict=True):
        by_subject.setdefault(subject, []).append(value)
    return _mean([_mean(mine) for mine in by_subject.values()])
