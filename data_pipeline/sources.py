"""`SourceConfig`: what a person states about one source of scans. Part of a build recipe."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    InstanceOf,
    PlainSerializer,
    field_validator,
    model_validator,
)
from upath import UPath

from data_pipeline.locations import location
from data_pipeline.sequences import SEQUENCES
from data_pipeline.volume import Modality, Triple, Units


def _written(place: Path | UPath) -> Path | str:
    return place if isinstance(place, Path) else str(place)


Place = Annotated[InstanceOf[Path] | InstanceOf[UPath], BeforeValidator(location), PlainSerializer(_written)]
Layout = Literal["auto", "msd", "nnunet", "bids", "table", "folder", "dicom", "webdataset"]


class SourceConfig(BaseModel):
    """One source. Globs are matched against paths relative to ``path``, with ``/`` and ``**`` for any depth.

    A field that may be a mapping (``modality``, ``units``, ``splits``) takes ``{glob: value}``; the first
    match wins, and a glob without ``/`` may also match the file's name alone.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    path: Place = Field(
        description="folder, file, table (.csv, .tsv, .parquet) or .tar; a local path or an address like s3://bucket/x"
    )
    name: str = Field(
        "source", pattern=r"^[A-Za-z0-9_-]{1,40}$", description="short name in manifest and reports"
    )
    layout: Layout = "auto"
    modality: Modality | dict[str, Modality] | None = None
    units: Units | dict[str, Units] | None = Field(
        None,
        description="real units, where the format does not say; HU are taken for CT channels, SUV for PT",
    )
    sequence: str | dict[str, str] | None = Field(
        None, description="MR sequence, where no header says it; one of data_pipeline.sequences.SEQUENCES"
    )
    include: tuple[str, ...] = Field((), description="globs of image files; empty: every image file")
    exclude: tuple[str, ...] = ()
    spacing: Triple | None = Field(None, description="(z, y, x) mm, for files that state none")
    field_mm: float | None = Field(
        None, gt=0, description="width of a picture's field where spacing is unknown"
    )
    accept_no_form: bool = Field(False, description="take NIfTI without sform and qform by spacing alone")
    accept_secondary: bool = Field(False, description="take DICOM with ImageType SECONDARY")
    more_frames: int = Field(3, ge=0, description="frames of a 4D series beside the first")
    shear: Literal["resample", "quarantine"] = Field(
        "resample", description="axes not at right angles (gantry tilt): shifted slice by slice, or refused"
    )
    voi_lut: bool = Field(False, description="apply the header's VOI LUT or window to DX, CR and MG")
    burned_in: Literal["accept", "quarantine", "mask"] | None = None
    deface: Literal["mask", "remove"] | None = Field(
        None, description="faces in head scans: hidden from training, or overwritten in the shards"
    )

    labels: dict[int, str] | None = Field(None, description="value: name, where no dataset file says so")
    regions: dict[str, tuple[int, ...]] | None = Field(
        None, description="name: values, for overlapping classes"
    )
    label_names: dict[str, str] | None = Field(
        None, description="{name in the files: name in the dataset}, for ROIs, segments and dataset files"
    )
    exclude_rois: tuple[str, ...] = Field(
        (
            "*body*",
            "*external*",
            "*skin*",
            "*couch*",
            "*table*",
            "*support*",
            "ptv*",
            "*isocent*",
            "*marker*",
        ),
        description="globs, any case, of RTSTRUCT and SEG names that are no anatomy or lesion",
    )
    label_glob: str | None = Field(
        None, description="label file; its * stand for what those of include matched"
    )
    label_threshold: float | None = Field(None, description="values at or above are the one declared class")
    label_geometry: Literal["image", "header"] | None = None
    label_origin: Literal["human", "model", "unknown"] = "unknown"
    annotated: tuple[str, ...] | None = Field(
        None, description="names that were looked for; None: all declared"
    )
    ignore: tuple[int, ...] = Field((), description="label values that are neither class nor background")

    subjects: Place | None = Field(None, description="csv with columns case,group")
    subject_pattern: str | None = Field(
        None, description="regular expression on the relative path; group 1 is the subject"
    )
    splits: dict[str, str] | None = Field(None, description="{glob: split}; other files are split by subject")
    split: dict[str, float] | None = Field(None, description="fractions for this source")
    geometry: Literal["volume", "slab", "planar"] | None = None
    licence: str = "not stated"
    attribution: str = ""

    @field_validator("subject_pattern")
    @classmethod
    def _one_group(cls, value: str | None) -> str | None:
        if value is not None and re.compile(value).groups != 1:
            raise ValueError("needs exactly one group ( ), which is the subject")
        return value

    @field_validator("sequence")
    @classmethod
    def _known_sequence(cls, value: str | dict[str, str] | None) -> str | dict[str, str] | None:
        stated = value.values() if isinstance(value, dict) else [value] if value is not None else []
        if unknown := set(stated) - set(SEQUENCES):
            raise ValueError(f"sequence {min(unknown)!r} is none of {' '.join(SEQUENCES)}")
        return value

    @field_validator("spacing")
    @classmethod
    def _positive(cls, value: Triple | None) -> Triple | None:
        if value is not None and min(value) <= 0:
            raise ValueError("spacing is (z, y, x) in mm, each above 0")
        return value

    @model_validator(mode="after")
    def _labels_fit(self) -> SourceConfig:
        if self.labels and any(not v >= 0 for v in self.labels):
            raise ValueError("label values are whole numbers from 0")
        if self.label_threshold is not None and self.labels and len({v for v in self.labels if v}) > 1:
            raise ValueError("label_threshold makes one class; declare one name, as labels: {1: name}")
        if self.label_glob is not None and not self.include and "*" in self.label_glob:
            raise ValueError("label_glob with * needs include, whose * it repeats")
        return self

    def selects(self, relative: str) -> bool:
        """Whether ``include`` and ``exclude`` leave an image."""
        included = not self.include or any(matches(glob, relative) is not None for glob in self.include)
        return included and not any(matches(glob, relative) is not None for glob in self.exclude)

    def modality_of(self, relative: str) -> str | None:
        """Declared modality of an image, or None."""
        return _by_glob(self.modality, relative)

    def units_of(self, relative: str) -> str | None:
        """Declared units of an image, or None."""
        return _by_glob(self.units, relative)

    def split_of(self, relative: str) -> str | None:
        """Declared split of an image, or None."""
        return _by_glob(self.splits, relative)

    def sequence_of(self, relative: str) -> str | None:
        """Declared MR sequence of an image, or None."""
        return _by_glob(self.sequence, relative)


def matches(glob: str, relative: str) -> tuple[str, ...] | None:
    """What the wildcards of ``glob`` matched in a relative path, or None. ``*`` stays inside a folder,
    ``**`` does not."""
    found = _pattern(glob).fullmatch(relative)
    return None if found is None else tuple(g or "" for g in found.groups())


def substitute(glob: str, captured: tuple[str, ...]) -> str | None:
    """``glob`` with its wildcards replaced in order, or None if their number differs."""
    literals, wild = _WILD.split(glob), _WILD.findall(glob)
    if len(wild) != len(captured):
        return None
    return "".join(a + b for a, b in zip(literals, [*captured, ""]))


def has_wildcards(glob: str) -> bool:
    """Whether a glob matches more than its own text."""
    return _WILD.search(glob) is not None


_WILD = re.compile(r"\*\*/|\*\*|\*|\?|\[[^\]]+\]")
_MEANING = {"**/": r"((?:[^/]+/)*)", "**": "(.*)", "*": "([^/]*)", "?": "([^/])"}


@lru_cache(maxsize=256)
def _pattern(glob: str) -> re.Pattern[str]:
    parts = [re.escape(text) for text in _WILD.split(glob)]
    for n, token in enumerate(_WILD.findall(glob)):
        parts[n] += _MEANING.get(token) or f"({token.replace('[!', '[^')})"
    return re.compile("".join(parts), re.DOTALL)  # a name may hold a line break


def _by_glob(value: str | Mapping[str, str] | None, relative: str) -> str | None:
    if value is None or isinstance(value, str):
        return value
    for glob, found in value.items():
        if matches(glob, relative) is not None or (
            "/" not in glob and matches(glob, PurePosixPath(relative).name) is not None
        ):
            return found
    return None
