"""Which files of a source are images, which are their labels, and whose they are: `discover`."""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

from data_pipeline.errors import Quarantined, UserError
from data_pipeline.readers import MEASURED_BY, SUFFIXES, read_all, read_channels
from data_pipeline.sources import SourceConfig, has_wildcards, matches, substitute
from data_pipeline.volume import Volume


@dataclass(frozen=True)
class Case:
    """One image (one file, several files as channels, or one DICOM series) and what is known of it.

    ``name`` and ``subject`` come from files and headers and may identify: hash them before they are written.
    ``modality`` holds one entry per channel, or is empty where the DICOM header decides. ``label_values``
    maps a value of the label file to a name; ``label_regions`` maps a name to all its values (overlaps
    allowed); ``annotated`` are the names that were looked for; values in ``ignore`` are neither class nor
    background. ``series`` is the UID of a DICOM series and ``files`` its slices. ``refused`` is set where
    discovery can tell already that the input is no image; it is to be quarantined, not read.
    """

    source: str
    images: tuple[Path, ...]
    label: Path | None
    subject: str
    split: str | None
    modality: tuple[str, ...]
    channel_names: tuple[str, ...] | None = None
    label_values: Mapping[int, str] | None = None
    label_regions: Mapping[str, tuple[int, ...]] | None = None
    annotated: tuple[str, ...] = ()
    ignore: frozenset[int] = frozenset()
    units: str | None = None
    series: str | None = None
    files: tuple[Path, ...] | None = None
    name: str = ""
    refused: Quarantined | None = None


def discover(src: SourceConfig) -> list[Case]:
    """Every case of a source, in a stable order. Raises `UserError` where a declaration is missing or
    wrong."""
    if not src.path.exists():
        raise UserError(f"{src.path}: no such file or folder; check the path of source {src.name!r}")
    from data_pipeline import layout_formats as formats

    finders: dict[str, Callable[[SourceConfig], list[Case]]] = {
        "msd": formats.msd,
        "nnunet": formats.nnunet,
        "table": formats.table,
        "folder": formats.folder,
        "dicom": formats.dicom_tree,
    }
    layout = formats.detect(src) if src.layout == "auto" else src.layout
    cases = finders[layout](src)
    if not cases:
        raise UserError(
            f"{src.path}: no images found in layout {layout}; readable: {' '.join(SUFFIXES)} and DICOM"
        )
    if src.label_glob is not None and all(case.label is None for case in cases):
        raise UserError(
            f"{src.path}: label_glob {src.label_glob!r} of source {src.name!r} finds no label file"
        )
    return _assign_subjects(src, [_declare(src, case) for case in cases])


def read_case(case: Case, src: SourceConfig, seed: int = 0) -> list[Volume]:
    """The volumes of a case: one, or several frames where a single file without channel names has a time
    axis."""
    if case.refused is not None:
        raise case.refused
    if len(case.images) > 1 or case.channel_names is not None:
        volume = read_channels(
            case.images,
            modality=case.modality or None,
            channel_names=case.channel_names,
            spacing=src.spacing,
            field_mm=src.field_mm,
            accept_no_form=src.accept_no_form,
            units=case.units,
            series=case.files or case.series,
            accept_secondary=src.accept_secondary,
        )
        return [volume]
    return read_all(
        case.images[0],
        more_frames=src.more_frames,
        seed=seed,
        modality=case.modality[0] if case.modality else None,
        spacing=src.spacing,
        field_mm=src.field_mm,
        accept_no_form=src.accept_no_form,
        units=case.units,
        series=case.files or case.series,
        accept_secondary=src.accept_secondary,
    )


def stem(path: Path) -> str:
    """File name without its image suffix (both parts of ``.nii.gz``)."""
    name = path.name
    for suffix in sorted(SUFFIXES, key=len, reverse=True):
        if name.lower().endswith(suffix):
            return name[: -len(suffix)]
    return name


def relative(path: Path, root: Path) -> str:
    """Path below ``root`` with forward slashes (the name alone if it is elsewhere)."""
    try:
        return path.relative_to(root if root.is_dir() else root.parent).as_posix()
    except ValueError:
        return path.name


def label_for(src: SourceConfig, rel: str) -> Path | None:
    """The label file that ``label_glob`` names for an image, if it exists. Raises `UserError` for unequal
    wildcards."""
    if src.label_glob is None:
        return None
    for glob in src.include or ("**",):
        captured = matches(glob, rel)
        if captured is None:
            continue
        name = substitute(src.label_glob, captured if has_wildcards(src.label_glob) else ())
        if name is None:
            raise UserError(
                f"source {src.name!r}: label_glob {src.label_glob!r} and include {glob!r} differ in wildcards"
            )
        root = src.path if src.path.is_dir() else src.path.parent
        return root / name if (root / name).is_file() else None
    return None


def _declare(src: SourceConfig, case: Case) -> Case:
    """Apply what the recipe states over what a dataset file says."""
    rel = relative(case.images[0], src.path)
    declared = src.modality_of(rel)
    changes: dict[str, object] = {}
    many = case.channel_names is not None and len(case.channel_names) > 1
    if declared is not None and not many:
        changes["modality"] = (declared,)
    elif (
        isinstance(src.modality, dict) and not case.modality and src.layout != "dicom" and case.series is None
    ):
        raise UserError(f"{case.images[0]}: no glob of modality in source {src.name!r} matches this image")
    changes["units"] = _units(src, case, changes.get("modality", case.modality))
    values, regions = src.labels or case.label_values, src.regions or case.label_regions
    if src.labels is not None and src.regions is None:
        regions = None
    if case.label is not None and values is None and regions is None:
        raise UserError(
            f"{case.label}: source {src.name!r} has labels but no names; state labels: {{1: name, ...}}"
        )
    ignore = frozenset(src.ignore) | case.ignore
    if regions is None and values is not None:
        values = {v: n for v, n in values.items() if v != 0 and v not in ignore}
        names = list(dict.fromkeys(values.values()))
        regions = {name: tuple(v for v, n in values.items() if n == name) for name in names}
    names = list(regions or ())
    if src.annotated is not None and (unknown := set(src.annotated) - set(names)):
        raise UserError(
            f"source {src.name!r}: annotated names {sorted(unknown)} are not among its labels {names}"
        )
    split = src.split_of(rel) or case.split
    if split is not None and not split.isalnum():
        raise UserError(
            f"{case.images[0]}: split {split!r}: a split is named by letters and digits, like train"
        )
    return replace(
        case,
        label_values=values,
        label_regions=regions,
        ignore=ignore,
        split=split,
        annotated=(src.annotated if src.annotated is not None else tuple(names))
        if case.label is not None
        else (),
        **changes,  # type: ignore[arg-type]
    )


def _units(src: SourceConfig, case: Case, modality: object) -> str | None:
    """The units stated for the images of a case: one for all, taken by the channels that can have them."""
    stated = {u for image in case.images if (u := src.units_of(relative(image, src.path))) is not None}
    if len(stated) > 1:
        raise UserError(
            f"{case.images[0]}: source {src.name!r} states units {' and '.join(sorted(stated))} for "
            "channels of one case; state those of PET alone, CT is in HU"
        )
    units = next(iter(stated), None)
    if units in MEASURED_BY and modality and MEASURED_BY[units] not in cast("tuple[str, ...]", modality):
        raise UserError(
            f"{case.images[0]}: source {src.name!r} states units {units}, which are those of "
            f"{MEASURED_BY[units]}; state units: {{glob: units}} for the files that have them"
        )
    return units


def _assign_subjects(src: SourceConfig, cases: list[Case]) -> list[Case]:
    if src.subjects is not None:
        groups = _subjects_table(src.subjects)
        missing = [c.name for c in cases if c.name not in groups]
        if missing:
            raise UserError(
                f"{src.subjects}: {len(missing)} of {len(cases)} cases are not listed, first {missing[0]!r}"
            )
        return [replace(c, subject=groups[c.name]) for c in cases]
    if src.subject_pattern is not None:
        pattern = re.compile(src.subject_pattern)
        found = [pattern.search(relative(c.images[0], src.path)) for c in cases]
        if None in found:
            bad = cases[found.index(None)].images[0]
            raise UserError(
                f"{bad}: subject_pattern {src.subject_pattern!r} of source {src.name!r} does not match"
            )
        return [replace(c, subject=m.group(1)) for c, m in zip(cases, found) if m is not None]
    # Where file names repeat from folder to folder (S1/ct, S2/ct), the folder is the subject; else the file
    # is.
    names = Counter(c.name for c in cases)
    by_folder = len(cases) > 1 and max(names.values()) > 1
    return [
        c if c.subject else replace(c, subject=c.images[0].parent.name if by_folder else c.name)
        for c in cases
    ]


def _subjects_table(path: Path) -> dict[str, str]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: the subjects table cannot be read ({type(error).__name__})") from error
    if not rows or not {"case", "group"} <= set(rows[0]):
        raise UserError(f"{path}: the subjects table needs the columns case,group")
    return {row["case"]: row["group"] for row in rows}
