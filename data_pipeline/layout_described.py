"""Layouts that a ``dataset.json`` describes: Medical Segmentation Decathlon and nnU-Net raw (v1 and v2).

Sources: medicaldecathlon.com dataset.json; nnU-Net documentation/dataset_format.md.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

from data_pipeline.channel_words import channel_name, modality_of, sequence_of
from data_pipeline.errors import Quarantined, UserError, shown
from data_pipeline.layouts import Case, Discovery, stem
from data_pipeline.locations import Location, joined, relative, store_errors
from data_pipeline.readers import is_image
from data_pipeline.sources import SourceConfig

SPLITS = {"training": None, "validation": "val", "test": "test"}
FOLDERS = (("imagesTr", "labelsTr", None), ("imagesTs", "labelsTs", "test"))


def msd(find: Discovery) -> list[Case]:
    """Medical Segmentation Decathlon: dataset.json lists images and labels; its ``modality`` names the
    channels, which lie on the fourth axis (or in a list of files)."""
    dataset = _Dataset(find)
    cases = []
    labels: dict[tuple[Location, ...], Location | None] = {}
    for part, split in SPLITS.items():
        listed = dataset.info.get(part) or []
        if not isinstance(listed, list):
            raise UserError(f"{shown(dataset.where)}: {part} is not a list of images")
        for number, entry in enumerate(listed):
            images, label = dataset.entry(part, number, entry)
            if images in labels:
                if label is not None and label != labels[images]:
                    raise UserError(
                        f"{shown(dataset.where)}: {shown(images[0])} is listed twice with different labels; "
                        "keep one entry"
                    )
                find.count("entries of a dataset file listed twice")
                continue
            labels[images] = label
            if find.src.selects(relative(images[0], find.src.path)):
                cases.append(dataset.case(images, label, split, stem(images[0])))
    return cases


def nnunet(find: Discovery) -> list[Case]:
    """nnU-Net raw (v1 and v2): imagesTr/CASE_0000.ext one file a channel, labelsTr/CASE.ext, imagesTs; or the
    files that ``dataset`` of dataset.json lists."""
    dataset = _Dataset(find)
    listed = dataset.info.get("dataset")
    found = _listed(dataset, listed) if isinstance(listed, dict) and listed else _in_folders(dataset)
    cases = []
    for images, label, split, name in found:
        if not find.src.selects(relative(images[0], find.src.path)):
            continue
        case = dataset.case(images, label, split, name)
        if len(images) > len(dataset.names):
            detail = f"{len(images)} files for {len(dataset.names)} channels"
            case = Case(
                case.source, images, None, "", split, (), name=name,
                refused=Quarantined("channel_count", detail, images[0]),
            )  # fmt: skip
        cases.append(case)
    return cases


class _Dataset:
    """A dataset.json: its channels and labels, and the cases that share them."""

    def __init__(self, find: Discovery) -> None:
        self.src, self.count = find.src, find.count
        self.where = find.src.path / "dataset.json"
        self.info = read_json(self.where)
        self.names = channels_of(
            self.info.get("channel_names") or self.info.get("modality"), self.where, self.src
        )
        self.modality = _modalities(self.names, self.src)
        labels = self.info.get("labels") or {}
        self.values, self.regions, self.ignore = parse_labels(labels, self.where)
        sequences = {sequence_of(n) or "" for n, m in zip(self.names, self.modality) if m == "MR"}
        self.sequence = sequences.pop() if len(sequences) == 1 else ""

    def entry(self, part: str, number: int, entry: Any) -> tuple[tuple[Location, ...], Location | None]:
        image = entry.get("image") if isinstance(entry, dict) else entry
        label = entry.get("label") if isinstance(entry, dict) else None
        images = image if isinstance(image, list) else [image]
        if not images or not all(isinstance(text, str) and text for text in images):
            raise UserError(f"{shown(self.where)}: entry {number} of {part} names no image")
        if label is not None and not isinstance(label, str):
            raise UserError(f"{shown(self.where)}: entry {number} of {part} does not name one label file")
        return tuple(self.file(str(text)) for text in images), self.file(label) if label else None

    def file(self, text: str) -> Location:
        try:
            return joined(self.src.path, text)
        except ValueError as error:
            raise UserError(f"{shown(self.where)}: {error}") from error

    def case(
        self, images: tuple[Location, ...], label: Location | None, split: str | None, name: str
    ) -> Case:
        return Case(
            source=self.src.name,
            images=images,
            label=label,
            subject="",
            split=split,
            modality=self.modality,
            channel_names=tuple(channel_name(n, i) for i, n in enumerate(self.names)),
            label_values=self.values,
            label_regions=self.regions,
            ignore=self.ignore,
            sequence=self.sequence,
            name=name,
        )


_Found = tuple[tuple[Location, ...], Location | None, str | None, str]


def _in_folders(dataset: _Dataset) -> Iterator[_Found]:
    ending, count = str(dataset.info.get("file_ending") or ""), dataset.count
    for images, labels, split in FOLDERS:
        numbered: dict[tuple[str, str], dict[int, Location]] = defaultdict(dict)
        for file in _listing(dataset.src.path / images):
            tail = file.name[len(stem(file)) :]
            match = re.fullmatch(r"(.+)_(\d{4})", stem(file), re.DOTALL)
            if match and is_image(file) and (not ending or tail == ending):
                numbered[match.group(1), tail][int(match.group(2))] = file
            else:
                count("files that are no numbered channel of the dataset's file ending")
        labelled = {file.name: file for file in _listing(dataset.src.path / labels)}
        unused = len(labelled.keys() - {f"{name}{tail}" for (name, tail) in numbered})
        count("labels that fit no image", unused)
        for (name, tail), files in sorted(numbered.items()):
            if 0 not in files:
                count("cases without a first channel")
                continue
            channels = max(len(dataset.names), max(files) + 1)
            folder = dataset.src.path / images
            every = tuple(files.get(n, folder / f"{name}_{n:04d}{tail}") for n in range(channels))
            label = labelled.get(f"{name}{tail}")
            if label is None and labels == "labelsTr":
                if not labelled:
                    raise UserError(
                        f"{shown(dataset.src.path / labels)}: nnU-Net needs a label for every training case; "
                        "there is none at all"
                    )
                count("training images without a label")
            yield every, label, split, name


def _listed(dataset: _Dataset, listed: Mapping[str, Any]) -> Iterator[_Found]:
    for number, (name, entry) in enumerate(sorted(listed.items())):
        if not isinstance(entry, dict):
            raise UserError(f"{shown(dataset.where)}: entry {number} of dataset names no images")
        stated = {"image": entry.get("images"), "label": entry.get("label")}
        images, label = dataset.entry("dataset", number, stated)
        yield images, label, None, str(name)


def parse_labels(
    labels: Mapping[str, Any], where: Location
) -> tuple[dict[int, str] | None, dict[str, tuple[int, ...]] | None, frozenset[int]]:
    """``labels`` of a dataset.json written either way round, with nnU-Net regions and ``ignore``.

    Returns value → name (None if there are regions), name → values, and the values to ignore. Background is
    left out.
    """
    named: dict[str, tuple[int, ...]] = {}
    try:
        for key, value in labels.items():
            if isinstance(value, str) and re.fullmatch(r"\d+", key):
                named[value] = (*named.get(value, ()), int(key))
            else:
                named[key] = tuple(int(v) for v in value) if isinstance(value, list) else (int(value),)
    except (AttributeError, TypeError, ValueError) as error:
        raise UserError(f"{shown(where)}: labels must map values to names or names to values") from error
    ignore = frozenset(named.pop("ignore", ()))
    named = {n: tuple(v for v in values) for n, values in named.items() if set(values) != {0}}
    every = [v for values in named.values() for v in values]
    if len(every) == len(set(every)):
        return {v: n for n, values in named.items() for v in values}, named, ignore
    return None, named, ignore


def channels_of(described: Any, where: Location, src: SourceConfig) -> tuple[str, ...]:
    """Names of the channels in order, from {number: name}, a list or one name."""
    if isinstance(described, str) and described:
        return (described,)
    if isinstance(described, dict) and described:
        try:
            ordered = sorted(described, key=int)
        except ValueError as error:
            raise UserError(f"{shown(where)}: channels must be numbered from 0") from error
        return tuple(str(described[key]) for key in ordered)
    if isinstance(described, list) and described:
        return tuple(str(name) for name in described)
    if isinstance(src.modality, str):
        return (src.modality,)
    raise UserError(
        f"{shown(where)}: names no channels (modality or channel_names); state modality: CT, MR, XR or PT"
    )


def _modalities(names: tuple[str, ...], src: SourceConfig) -> tuple[str, ...]:
    found = [modality_of(n) or (src.modality if isinstance(src.modality, str) else None) for n in names]
    if None in found and (len(names) > 1 or not isinstance(src.modality, dict)):  # a glob names a whole case
        unclear = names[found.index(None)]
        raise UserError(
            f"{shown(src.path)}: channel {unclear!r} does not name a modality; "
            "state modality: CT, MR, XR or PT"
        )
    return tuple(f for f in found if f is not None)


class NotJson(UserError):
    """A file that holds no JSON object, where its store did give it."""


def read_json(path: Location) -> dict[str, Any]:
    """A JSON object. Raises `NotJson`, or `UserError` where the store fails."""
    try:
        with store_errors(path):
            raw = path.read_bytes()
        described = json.loads(raw.decode("utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise NotJson(f"{shown(path)}: cannot be read as JSON ({type(error).__name__})") from error
    if not isinstance(described, dict):
        raise NotJson(f"{shown(path)}: is not a JSON object")
    return described


def _listing(folder: Location) -> list[Location]:
    """Files in a folder, without hidden ones (the ``._`` twins that macOS leaves)."""
    with store_errors(folder):
        try:
            found: list[Location] = sorted(folder.iterdir(), key=str)
        except (FileNotFoundError, NotADirectoryError):
            return []
    return [file for file in found if not file.name.startswith(".")]
