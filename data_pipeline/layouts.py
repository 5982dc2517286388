"""Which files of a source are images, which are their labels, and whose they are: `discover`."""

from __future__ import annotations

import csv
import io
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeAlias, cast

from data_pipeline.errors import Quarantined, UserError, shown
from data_pipeline.labels import DicomLabel
from data_pipeline.locations import Location, fetched, is_remote, relative, store_errors
from data_pipeline.privacy import KeyedHash
from data_pipeline.quiet import quiet_libraries
from data_pipeline.readers import MEASURED_BY, SUFFIXES, companions, read_all, read_channels
from data_pipeline.sources import SourceConfig, has_wildcards, matches, substitute
from data_pipeline.volume import Triple, Volume

#: (function, list of argument tuples) -> results in order: how header reading is spread over processes.
Each: TypeAlias = Callable[[Callable[..., Any], list[tuple[Any, ...]]], list[Any]]


@dataclass(frozen=True)
class Case:
    """One image (one file, several files as channels, or one DICOM series) and what is known of it.

    ``name`` and ``subject`` come from files and headers and may identify: hash them before they are written.
    ``modality`` holds one entry per channel, or is empty where the DICOM header decides. ``label_values``
    maps a value of the label file to a name; ``label_regions`` maps a name to all its values (overlaps
    allowed); ``annotated`` are the names that were looked for; values in ``ignore`` are neither class nor
    background. ``series`` tells the DICOM series of one subject apart (by UID) and ``files`` are its slices.
    ``sequence`` is the MR sequence where a dataset file or the recipe says it. ``dicom_labels`` are the
    RTSTRUCT and SEG files that refer to the series. ``refused`` is set where discovery can tell already that
    the input is no image; it is to be quarantined, not read. ``spacing`` (z, y, x) mm is what a file beside
    the image says, for formats that state none.
    """

    source: str
    images: tuple[Location, ...]
    label: Location | None
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
    files: tuple[Location, ...] | None = None
    name: str = ""
    sequence: str = ""
    dicom_labels: tuple[DicomLabel, ...] = ()
    refused: Quarantined | None = None
    spacing: Triple | None = None


@dataclass
class Discovery:
    """What the finders of one source share: how to spread work, how to hash names, what to count."""

    src: SourceConfig
    each: Each | None = None
    hashes: KeyedHash | None = None
    notes: Counter[str] | None = None

    def count(self, note: str, number: int = 1) -> None:
        """Count something left out, under words that may stand in a dataset."""
        if self.notes is not None and number:
            self.notes[note] += number


def discover(
    src: SourceConfig,
    each: Each | None = None,
    hashes: KeyedHash | None = None,
    notes: Counter[str] | None = None,
) -> list[Case]:
    """Every case of a source, in a stable order.

    ``each`` spreads the reading of headers over processes (None: this one). ``hashes`` turns label names that
    are not in the vocabulary into ``roi_<hash>``; without it such a name is an error. ``notes`` receives
    counts of what was left out, under words that may stand in a dataset. Raises `UserError` where a
    declaration is missing or wrong.
    """
    if not _exists(src.path):
        raise UserError(f"{shown(src.path)}: no such file or folder; check the path of source {src.name!r}")
    from data_pipeline import (
        layout_bids,
        layout_described,
        layout_dicom,
        layout_folder,
        layout_table,
        layout_webdataset,
    )

    finders: dict[str, Callable[[Discovery], list[Case]]] = {
        "msd": layout_described.msd,
        "nnunet": layout_described.nnunet,
        "bids": layout_bids.bids,
        "table": layout_table.table,
        "folder": layout_folder.folder,
        "dicom": layout_dicom.dicom_tree,
        "webdataset": layout_webdataset.webdataset,
    }
    find = Discovery(src, each, hashes, notes)
    layout = layout_folder.detect(src) if src.layout == "auto" else src.layout
    cases = finders[layout](find)
    if not cases:
        raise UserError(
            f"{shown(src.path)}: no images found in layout {layout}; readable: {' '.join(SUFFIXES)} and DICOM"
        )
    if src.label_glob is not None and all(case.label is None for case in cases):
        raise UserError(
            f"{shown(src.path)}: label_glob {src.label_glob!r} of source {src.name!r} finds no label file"
        )
    names = _LabelNames(find)
    return _assign_subjects(src, [_declare(src, names.public(case), names) for case in cases])


@quiet_libraries()
def read_case(case: Case, src: SourceConfig, seed: int = 0) -> list[Volume]:
    """The volumes of a case: one, or several frames where a single file without channel names has a time
    axis, or several acquisitions of a DICOM series. Remote files are fetched for the time of the call."""
    if case.refused is not None:
        raise case.refused
    with local_case(replace(case, label=None, dicom_labels=())) as near:
        volumes = _read_local(near, src, seed)
    if not case.sequence:
        return volumes
    return [
        replace(v, provenance={**v.provenance, "sequence": case.sequence})
        if v.channels[0].modality == "MR" and v.provenance.get("sequence", "unknown") == "unknown"
        else v
        for v in volumes
    ]


def _read_local(case: Case, src: SourceConfig, seed: int) -> list[Volume]:
    if len(case.images) > 1 or case.channel_names is not None:
        volume = read_channels(
            case.images,
            modality=case.modality or None,
            channel_names=case.channel_names,
            spacing=src.spacing or case.spacing,
            field_mm=src.field_mm,
            accept_no_form=src.accept_no_form,
            units=case.units,
            series=case.files or case.series,
            accept_secondary=src.accept_secondary,
            shear=src.shear,
            voi_lut=src.voi_lut,
        )
        return [volume]
    return read_all(
        case.images[0],
        more_frames=src.more_frames,
        seed=seed,
        modality=case.modality[0] if case.modality else None,
        spacing=src.spacing or case.spacing,
        field_mm=src.field_mm,
        accept_no_form=src.accept_no_form,
        units=case.units,
        series=case.files or case.series,
        accept_secondary=src.accept_secondary,
        shear=src.shear,
        voi_lut=src.voi_lut,
    )


@contextmanager
def local_case(case: Case) -> Iterator[Case]:
    """The case with every remote file in a temporary folder, which goes when the block ends.

    A file that is not there stays an address, and is refused as missing when it is read.
    """
    labels = [label.path for label in case.dicom_labels] + ([case.label] if case.label is not None else [])
    wanted = [*case.images, *(case.files or ()), *labels]
    if not any(is_remote(path) for path in wanted):
        yield case
        return
    if case.files:  # the series' folder is its name only
        wanted = [path for path in wanted if path not in case.images or path in case.files]
    with fetched([*wanted, *(c for path in wanted for c in companions(path))]) as local:
        addresses: dict[object, Location] = {near: far for far, near in local.items()}
        if case.files and case.files[0] in local:
            local = {**dict.fromkeys(case.images, local[case.files[0]].parent), **local}
        try:
            yield replace(
                case,
                images=tuple(local.get(path, path) for path in case.images),
                files=tuple(local.get(path, path) for path in case.files) if case.files else case.files,
                label=None if case.label is None else local.get(case.label, case.label),
                dicom_labels=tuple(replace(d, path=local.get(d.path, d.path)) for d in case.dicom_labels),
            )
        except Quarantined as error:  # named by its address: the copy is gone when a person reads it
            where = addresses.get(error.path, case.images[0])
            raise type(error)(error.code, error.detail, where) from error.__cause__


def _exists(path: Location) -> bool:
    """Whether a file or folder is there (of an object store: whether anything lies under the address)."""
    if not is_remote(path):
        return path.exists()
    with store_errors(path):
        return bool(path.exists())


def stem(path: Location) -> str:
    """File name without its image suffix (both parts of ``.nii.gz``)."""
    name = path.name
    for suffix in sorted(SUFFIXES, key=len, reverse=True):
        if name.lower().endswith(suffix):
            return name[: -len(suffix)]
    return name


def label_for(src: SourceConfig, rel: str) -> Location | None:
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
        root = src.path.parent if src.path.is_file() else src.path
        return root / name if (root / name).is_file() else None
    return None


class _LabelNames:
    """Names of labels in dataset files, as they may stand in a dataset."""

    def __init__(self, find: Discovery) -> None:
        self.find = find
        self.known: dict[str, str] = {}

    def public(self, case: Case) -> Case:
        regions: dict[str, tuple[int, ...]] = {}
        for name, values in (case.label_regions or {}).items():
            own = self._name(name)
            regions[own] = tuple(dict.fromkeys((*regions.get(own, ()), *values)))
        named = {v: self._name(n) for v, n in (case.label_values or {}).items() if v != 0}
        return replace(case, label_regions=regions or None, label_values=named or None)

    def _name(self, name: str) -> str:
        if name not in self.known:
            self.known[name] = self._public(name)
        return self.known[name]

    def _public(self, name: str) -> str:
        from data_pipeline.label_names import allowed_name, public_name, stated_name

        src, hashes = self.find.src, self.find.hashes
        if hashes is not None:
            return public_name(name, src, lambda text: hashes.of("roi", text))
        found = stated_name(name, src) or allowed_name(name)
        if found is None:
            raise UserError(
                f"{shown(src.path)}: label {name!r} is no name of anatomy or lesion that may stand in a "
                f"dataset; state label_names: {{{name}: name}}"
            )
        return found


def _declare(src: SourceConfig, case: Case, names: _LabelNames) -> Case:
    """Apply what the recipe states over what a dataset file says."""
    if case.refused is not None:
        return case
    rel = relative(case.images[0], src.path)
    declared = src.modality_of(rel)
    changes: dict[str, object] = {}
    many = case.channel_names is not None and len(case.channel_names) > 1
    if declared is not None and not many:
        changes["modality"] = (declared,)
    elif (
        isinstance(src.modality, dict) and not case.modality and src.layout != "dicom" and case.series is None
    ):
        raise UserError(
            f"{shown(case.images[0])}: no glob of modality in source {src.name!r} matches this image"
        )
    changes["units"] = _units(src, case, changes.get("modality", case.modality))
    values, regions = src.labels or case.label_values, src.regions or case.label_regions
    if src.labels is not None and src.regions is None:
        regions = None
    if case.label is not None and values is None and regions is None:
        raise UserError(
            f"{shown(case.label)}: source {src.name!r} has labels but no names; "
            "state labels: {1: name, ...}"
        )
    ignore = frozenset(src.ignore) | case.ignore
    if regions is None and values is not None:
        values = {v: n for v, n in values.items() if v != 0 and v not in ignore}
        together = dict.fromkeys(values.values())
        regions = {name: tuple(v for v, n in values.items() if n == name) for name in together}
    annotated = tuple(regions or ())
    if src.annotated is not None:
        stated = tuple(names.known.get(name, name) for name in src.annotated)
        if unknown := set(stated) - set(annotated):
            raise UserError(
                f"source {src.name!r}: annotated names {sorted(unknown)} are not among its labels "
                f"{list(annotated)}"
            )
        annotated = stated
    split = src.split_of(rel) or case.split
    known = {"train", "val", "test", *(src.split or ()), *(src.splits or {}).values()}
    if split is not None and split not in known:  # it becomes part of file names: no table's own words
        raise UserError(
            f"{shown(case.images[0])}: split {shown(split)!r} is none of {', '.join(sorted(known))}; "
            "name it in split or splits of the source"
        )
    if split is not None and not split.isalnum():
        raise UserError(
            f"{shown(case.images[0])}: split {split!r}: a split is named by letters and digits, like train"
        )
    return replace(
        case,
        label_values=values,
        label_regions=regions,
        ignore=ignore,
        split=split,
        sequence=src.sequence_of(rel) or case.sequence,
        annotated=annotated if case.label is not None else (),
        **changes,  # type: ignore[arg-type]
    )


def _units(src: SourceConfig, case: Case, modality: object) -> str | None:
    """The units stated for the images of a case: one for all, taken by the channels that can have them."""
    stated = {u for image in case.images if (u := src.units_of(relative(image, src.path))) is not None}
    if len(stated) > 1:
        raise UserError(
            f"{shown(case.images[0])}: source {src.name!r} states units {' and '.join(sorted(stated))} for "
            "channels of one case; state those of PET alone, CT is in HU"
        )
    units = next(iter(stated), None)
    if units in MEASURED_BY and modality and MEASURED_BY[units] not in cast("tuple[str, ...]", modality):
        raise UserError(
            f"{shown(case.images[0])}: source {src.name!r} states units {units}, which are those of "
            f"{MEASURED_BY[units]}; state units: {{glob: units}} for the files that have them"
        )
    return units


def _assign_subjects(src: SourceConfig, cases: list[Case]) -> list[Case]:
    if src.subjects is not None:
        groups = _subjects_table(src.subjects)
        missing = [c.name for c in cases if c.name not in groups and c.refused is None]
        if missing:
            raise UserError(
                f"{shown(src.subjects)}: {len(missing)} of {len(cases)} cases are not listed, "
                f"first {missing[0]!r}"
            )
        return [replace(c, subject=groups.get(c.name, c.subject)) for c in cases]
    if src.subject_pattern is not None:
        pattern = re.compile(src.subject_pattern)
        found = [pattern.search(relative(c.images[0], src.path)) for c in cases]
        bad = next((c.images[0] for c, m in zip(cases, found) if m is None and c.refused is None), None)
        if bad is not None:
            raise UserError(
                f"{shown(bad)}: subject_pattern {src.subject_pattern!r} of source {src.name!r} does not match"
            )
        return [c if m is None else replace(c, subject=m.group(1)) for c, m in zip(cases, found)]
    # Where file names repeat from folder to folder (S1/ct, S2/ct), the folder is the subject; else the file
    # is.
    names = Counter(c.name for c in cases if not c.subject)
    by_folder = sum(names.values()) > 1 and max(names.values()) > 1
    return [
        c if c.subject else replace(c, subject=c.images[0].parent.name if by_folder else c.name)
        for c in cases
    ]


def _subjects_table(path: Location) -> dict[str, str]:
    try:
        with store_errors(path):
            text = path.read_bytes().decode("utf-8-sig")
        rows = list(csv.DictReader(io.StringIO(text, newline="")))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(
            f"{shown(path)}: the subjects table cannot be read ({type(error).__name__})"
        ) from error
    if not rows or not {"case", "group"} <= set(rows[0]):
        raise UserError(f"{shown(path)}: the subjects table needs the columns case,group")
    return {row["case"]: row["group"] for row in rows}
