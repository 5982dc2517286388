"""BIDS: images by file name, sequences by suffix and sidecar, labels from derivatives joined by entities.

Source: bids-specification.readthedocs.io, version 1.10 (file names, inheritance, segmentations).
``participants.tsv`` and every other table of people is never opened.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from data_pipeline.errors import Quarantined, UserError, shown
from data_pipeline.layout_described import NotJson, read_json
from data_pipeline.layout_folder import image_files
from data_pipeline.layout_table import text_table
from data_pipeline.layouts import Case, Discovery
from data_pipeline.locations import Location, fetched, relative

IMAGES = (".nii", ".nii.gz", ".png", ".jpg", ".jpeg", ".tif", ".tiff")
#: suffix: (modality, MR sequence; "" where the sidecar has to tell).
# fmt: off
SUFFIXES: dict[str, tuple[str, str]] = {
    "T1w": ("MR", "T1w"), "inplaneT1": ("MR", "T1w"), "UNIT1": ("MR", "T1w"), "T2w": ("MR", "T2w"),
    "inplaneT2": ("MR", "T2w"), "PDw": ("MR", "PDw"), "PD": ("MR", "PDw"), "FLAIR": ("MR", "FLAIR"),
    "T2starw": ("MR", "T2star"), "T2star": ("MR", "T2star"), "FLASH": ("MR", ""),
    "PDT2": ("MR", ""),
    "angio": ("MR", "MRA"), "swi": ("MR", "SWI"), "SWI": ("MR", "SWI"), "GRE": ("MR", ""),
    "dwi": ("MR", "DWI"),
    "bold": ("MR", "BOLD"), "cbv": ("MR", ""), "asl": ("MR", ""), "MEGRE": ("MR", ""), "MESE": ("MR", ""),
    "VFA": ("MR", ""), "IRT1": ("MR", ""), "MP2RAGE": ("MR", ""), "MPM": ("MR", ""), "MTS": ("MR", ""),
    "MTR": ("MR", ""), "pet": ("PT", ""), "ct": ("CT", ""), "cr": ("XR", ""), "dx": ("XR", ""),
}
#: suffix: (reason, what it is called) where the image is none to train on.
LEFT_OUT = {
    "phase": ("phase_image", ""), "phase1": ("phase_image", ""), "phase2": ("phase_image", ""),
    "phasediff": ("phase_image", ""), "sbref": ("left_out", "reference"), "m0scan": ("left_out", "reference"),
    "noRF": ("left_out", "reference"), "magnitude": ("left_out", "field map"),
    "magnitude1": ("left_out", "field map"), "magnitude2": ("left_out", "field map"),
    "fieldmap": ("left_out", "field map"), "epi": ("left_out", "field map"),
    "defacemask": ("left_out", "mask"),
    "mask": ("left_out", "mask"), "dseg": ("left_out", "mask"), "probseg": ("left_out", "mask"),
    "asllabeling": ("left_out", "picture"), "photo": ("left_out", "picture"),
}
MAPS = re.compile(r"(T1|T2|T2star|R1|R2|R2star|PD|MTR|MTsat|MTV|MWF|M0|S0|T1rho|Chi)map|TB1.*|RB1.*")
# fmt: on
LABELS = ("dseg", "mask")
#: Entities that a derivative adds to those of its source.
ADDED = ("space", "desc", "label", "res", "den", "seg", "atlas", "hemi", "from", "to", "mode", "mod", "rater")
NATIVE = {"orig", "native", "individual", "scanner", "T1w", "T2w", "FLAIR", "PDw", "ct", "pet", "bold", "dwi"}


@dataclass(frozen=True)
class Name:
    """A BIDS file name: entities in order, suffix and ending."""

    entities: Mapping[str, str]
    suffix: str
    ending: str


def name_of(file: str) -> Name | None:
    """The parts of a BIDS file name, or None if it is none."""
    match = re.fullmatch(r"((?:[a-zA-Z0-9]+-[a-zA-Z0-9+]+_)*)([a-zA-Z0-9]+)(\.[a-zA-Z0-9.]+)", file)
    if match is None:
        return None
    entities = dict(re.findall(r"([a-zA-Z0-9]+)-([a-zA-Z0-9+]+)_", match[1]))
    return Name(entities, match[2], match[3])


def bids(find: Discovery) -> list[Case]:
    """A case an image of ``sub-*/[ses-*/]``; images that are no acquisition of their own (phase, reference
    scans, field maps, quantitative maps, masks) are refused by name.

    ``derivatives/`` gives labels (``dseg``, ``mask``) of the images with the same entities, in the image's
    own space; a label that fits several images goes to those on its grid. Several labels for one image are a
    `UserError`: exclude the others.
    """
    dataset = _Dataset(find)
    labels = _labels(dataset)
    cases = []
    for image in dataset.images:
        name = dataset.names[image]
        subject = name.entities.get("sub", "")
        common: dict[str, Any] = {
            "source": find.src.name,
            "images": (image,),
            "subject": f"sub-{subject}" if subject else "",
            "split": None,
            "name": image.name.removesuffix(name.ending),
        }
        if (reason := _left_out(name)) is not None:
            cases.append(Case(label=None, modality=(), refused=reason.at(image), **common))
            continue
        modality, sequence = SUFFIXES[name.suffix]
        sidecar = dataset.sidecar(image) if modality in ("MR", "PT") else {}
        if modality == "MR":
            sequence = _sequence(sequence, name, sidecar)
        label = labels.get(image)
        cases.append(
            Case(
                label=label.file if label else None,
                modality=(modality,),
                label_values=label.values if label else None,
                units="SUV" if str(sidecar.get("Units", "")).upper() in ("SUV", "SUVBW") else None,
                sequence=sequence,
                **common,
            )
        )
    return cases


def _left_out(name: Name) -> Quarantined | None:
    if name.entities.get("part", "mag") != "mag":
        return Quarantined("phase_image")
    if name.suffix in LEFT_OUT:
        return Quarantined(*LEFT_OUT[name.suffix])
    if MAPS.fullmatch(name.suffix):
        return Quarantined("derived_map")
    return None if name.suffix in SUFFIXES else Quarantined("left_out", "an unknown suffix")


class _Dataset:
    """The files of a BIDS dataset by their role."""

    def __init__(self, find: Discovery) -> None:
        self.find = find
        self.root = find.src.path
        self.names: dict[Location, Name] = {}
        self.images: list[Location] = []
        self.derived: list[Location] = []
        self.json: dict[str, list[Location]] = defaultdict(list)  # folder -> sidecars in it
        self.tables: dict[str, list[Location]] = defaultdict(list)  # folder -> dseg.tsv in it
        self.read: dict[Location, dict[str, Any]] = {}
        for file in image_files(find.src, lambda: find.count("folders that cannot be listed")):
            parts = PurePosixPath(relative(file, self.root)).parts
            name = name_of(file.name)
            if name is None or parts[0] in ("sourcedata", "code", "stimuli"):
                continue
            self.names[file] = name
            folder = "/".join(parts[:-1])
            if name.ending == ".json":
                self.json[folder].append(file)
            elif name.ending == ".tsv" and name.suffix == "dseg":
                self.tables[folder].append(file)
            elif name.ending.lower() not in IMAGES:
                continue
            elif parts[0] == "derivatives":
                self.derived.append(file)
            elif parts[0].startswith("sub-"):
                self.images.append(file)

    def inherited(self, file: Location, by_folder: Mapping[str, list[Location]]) -> list[Location]:
        """Files that apply to another by the inheritance principle, from the root down."""
        name = self.names[file]
        parts = PurePosixPath(relative(file, self.root)).parts[:-1]
        found = []
        for depth in range(len(parts) + 1):
            fitting = [
                other
                for other in by_folder.get("/".join(parts[:depth]), ())
                if self.names[other].suffix == name.suffix
                and self.names[other].entities.items() <= name.entities.items()
            ]
            found += sorted(fitting, key=lambda other: len(self.names[other].entities))
        return found

    def sidecar(self, file: Location) -> dict[str, Any]:
        """The JSON fields that apply to a file; nearer files override. One that is no JSON object is counted
        and left out."""
        merged: dict[str, Any] = {}
        for path in self.inherited(file, self.json):
            if path not in self.read:
                try:
                    self.read[path] = read_json(path)
                except NotJson:
                    self.read[path] = {}
                    self.find.count("sidecars that cannot be read")
            merged |= self.read[path]
        return merged


def _sequence(by_suffix: str, name: Name, sidecar: Mapping[str, Any]) -> str:
    """The suffix's sequence; else the sidecar's (times are in seconds in BIDS); T1w with contrast by ``ce``
    or ContrastBolusIngredient."""
    from data_pipeline.sequences import sequence_of

    contrast = "ce" in name.entities or bool(str(sidecar.get("ContrastBolusIngredient", "")).strip())
    if by_suffix == "T1w":
        return "T1w-ce" if contrast else "T1w"
    if by_suffix:
        return by_suffix
    tr, te, ti = (
        _milliseconds(sidecar.get(field)) for field in ("RepetitionTime", "EchoTime", "InversionTime")
    )
    return sequence_of(
        tr,
        te,
        ti,
        _codes(sidecar.get("ScanningSequence")),
        _codes(sidecar.get("SequenceVariant")),
        contrast,
        None,
    )


def _milliseconds(seconds: Any) -> float | None:
    number = isinstance(seconds, int | float) and not isinstance(seconds, bool)
    return float(seconds) * 1000.0 if number else None


def _codes(stated: Any) -> frozenset[str]:
    words = stated if isinstance(stated, list) else re.split(r"[\\_/,\s]+", str(stated or ""))
    return frozenset(str(word).strip().upper() for word in words) - {""}


@dataclass(frozen=True)
class _Label:
    file: Location
    values: dict[int, str] | None


def _labels(dataset: _Dataset) -> dict[Location, _Label]:
    """The label of each image that has one."""
    by_entities: dict[tuple[Any, ...], list[Location]] = defaultdict(list)
    for image in dataset.images:
        if _left_out(dataset.names[image]) is None:
            by_entities[_key(dataset, image)].append(image)
    joined: dict[Location, _Label] = {}
    for file in dataset.derived:
        name = dataset.names[file]
        if name.suffix not in LABELS:
            dataset.find.count("files of derivatives that are no label")
            continue
        images = by_entities.get(_key(dataset, file), [])
        space = name.entities.get("space")
        if space is not None and space not in NATIVE:
            dataset.find.count("labels in another space than their image")
            continue
        named = [image for image in images if dataset.names[image].suffix == name.entities.get("mod", space)]
        images = named or images
        if len(images) > 1:
            images = _on_grid(file, images)
        if not images:
            dataset.find.count("labels that fit no image")
            continue
        label = _Label(file, _values(dataset, file))
        for image in images:
            if image in joined:
                raise UserError(
                    f"{shown(image)}: two labels fit, "
                    f"{shown(relative(joined[image].file, dataset.root))} and "
                    f"{shown(relative(file, dataset.root))}; leave one out with exclude: [glob]"
                )
            joined[image] = label
    return joined


def _key(dataset: _Dataset, file: Location) -> tuple[Any, ...]:
    """Folder below the subject and entities, without those that a derivative adds."""
    parts = PurePosixPath(relative(file, dataset.root)).parts
    entities = dataset.names[file].entities
    return (parts[-2], *sorted((k, v) for k, v in entities.items() if k not in ADDED))


def _on_grid(label: Location, images: list[Location]) -> list[Location]:
    """The images whose header states the label's grid."""
    import nibabel
    import numpy as np

    grids = {}
    for file in [label, *images]:
        try:
            with fetched([file]) as local:
                header: Any = nibabel.load(local[file])
                grids[file] = (header.shape[:3], np.asarray(header.affine))
        except Exception:  # a damaged file is refused when it is read
            continue
    if label not in grids:
        return []
    shape, affine = grids[label]
    return [
        image
        for image in images
        if image in grids and grids[image][0] == shape and np.allclose(grids[image][1], affine, atol=1e-3)
    ]


def _values(dataset: _Dataset, file: Location) -> dict[int, str] | None:
    """Names of a label's values: the dseg.tsv or JSON table that applies, else what the file name says."""
    name = dataset.names[file]
    for path in reversed(dataset.inherited(file, dataset.tables)):
        header, rows = text_table(path)
        if {"index", "name"} <= set(header):
            return {int(row["index"]): row["name"] for row in rows if row["index"].lstrip("-").isdigit()}
    sidecar = dataset.sidecar(file)
    for field in ("LabelMap", "LabelNames", "Labels", "labels"):
        stated = sidecar.get(field)
        if isinstance(stated, dict) and stated:
            return _either_way(stated)
    if name.suffix == "mask":
        stated = name.entities.get("label") or name.entities.get("desc") or sidecar.get("Type")
        return {1: str(stated).lower()} if stated else None
    return None


def _either_way(stated: Mapping[str, Any]) -> dict[int, str] | None:
    if all(re.fullmatch(r"\d+", str(key)) for key in stated):
        return {int(key): str(value) for key, value in stated.items()}
    if all(isinstance(value, int) for value in stated.values()):
        return {value: str(key) for key, value in stated.items()}
    return None
