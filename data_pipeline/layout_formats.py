"""The layouts `data_pipeline.layouts.discover` knows: MSD, nnU-Net raw, a table, a plain folder, a DICOM
tree.

Sources: medicaldecathlon.com dataset.json; nnU-Net documentation/dataset_format.md.
"""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from data_pipeline.errors import Quarantined, UserError
from data_pipeline.layouts import Case, label_for, relative, stem
from data_pipeline.readers import DICOM, SUFFIXES
from data_pipeline.sources import SourceConfig, matches

TABLES = (".csv", ".tsv", ".parquet")
PAIRED = (".img",)  # read through its .hdr
COLUMNS = ("image", "label", "modality", "subject", "split")
# fmt: off
MODALITY_WORDS = {
    "CT": {"ct", "cta", "cbct", "ldct"},
    "MR": {"mr", "mri", "mra", "t1", "t2", "t1w", "t2w", "t1gd", "t1ce", "t1c", "t1n", "t2f", "t2s", "flair",
           "adc", "dwi", "pd", "swi"},
    "PT": {"pt", "pet", "suv"},
    "XR": {"xr", "cxr", "xray", "dx", "cr", "mg", "radiograph"},
}
# fmt: on


def detect(src: SourceConfig) -> str:
    """The layout of ``src.path``; `UserError` where it could be two."""
    if src.path.is_file():
        if src.path.suffix.lower() in TABLES:
            return "table"
        return "dicom" if src.path.name.lower().endswith(DICOM) else "folder"
    info = src.path / "dataset.json"
    if info.is_file():
        described = _json(info)
        numbered = any(re.search(r"_\d{4}\.", p.name) for p in (src.path / "imagesTr").glob("*_0000.*"))
        if "channel_names" in described or numbered:
            return "nnunet"
        if "training" in described:
            return "msd"
    files = _files(src)
    plain = [p for p in files if _is_image(p) and not p.name.lower().endswith(DICOM)]
    dicom = [p for p in files if p.name.lower().endswith(DICOM) or _has_magic(p)]
    if plain and dicom:
        raise UserError(
            f"{src.path}: holds {len(dicom)} DICOM files and {len(plain)} other images; state the layout"
        )
    return "dicom" if dicom else "folder"


def msd(src: SourceConfig) -> list[Case]:
    """Medical Segmentation Decathlon: dataset.json lists images and labels; its ``modality`` names the
    channels."""
    info = _json(src.path / "dataset.json")
    names = _channels(info.get("modality") or info.get("channel_names"), src.path / "dataset.json")
    modality = _modalities(names, src)
    values, regions, ignore = parse_labels(info.get("labels") or {}, src.path / "dataset.json")
    cases = []
    listed = [(entry, None) for entry in info.get("training", [])] + [
        (entry, "test") for entry in info.get("test", [])
    ]
    for entry, split in listed:
        image = src.path / (entry["image"] if isinstance(entry, dict) else entry)
        label = src.path / entry["label"] if isinstance(entry, dict) and entry.get("label") else None
        if not _selected(src, relative(image, src.path)):
            continue
        cases.append(
            _described(src, (image,), label, split, stem(image), names, modality, values, regions, ignore)
        )
    return cases


def nnunet(src: SourceConfig) -> list[Case]:
    """nnU-Net raw (v1 and v2): imagesTr/CASE_0000.ext one file a channel, labelsTr/CASE.ext, imagesTs."""
    info = _json(src.path / "dataset.json")
    names = _channels(info.get("channel_names") or info.get("modality"), src.path / "dataset.json")
    modality = _modalities(names, src)
    values, regions, ignore = parse_labels(info.get("labels") or {}, src.path / "dataset.json")
    cases = []
    for images, labels, split in (("imagesTr", "labelsTr", None), ("imagesTs", "labelsTs", "test")):
        for first in sorted((src.path / images).glob("*_0000.*")):
            if not _is_image(first) or not _selected(src, relative(first, src.path)):
                continue
            name = stem(first)[: -len("_0000")]
            ending = first.name[len(stem(first)) :]
            files = tuple(first.with_name(f"{name}_{n:04d}{ending}") for n in range(len(names)))
            label = src.path / labels / f"{name}{ending}"
            if not label.is_file():
                if labels == "labelsTr":
                    raise UserError(f"{label}: nnU-Net needs a label for every training case")
                label = None  # type: ignore[assignment]
            cases.append(_described(src, files, label, split, name, names, modality, values, regions, ignore))
    return cases


def table(src: SourceConfig) -> list[Case]:
    """CSV, TSV or Parquet: ``image`` (several columns image_NAME, or ``;`` between files, for channels), and
    optionally label, modality, subject, split. Paths are relative to the table."""
    rows = _rows(src.path)
    header = list(rows[0]) if rows else []
    columns = [c for c in header if c == "image" or re.fullmatch(r"image_\w+", c)]
    if not columns:
        near = get_close_matches("image", header, 1, 0.5)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise UserError(f"{src.path}: no column 'image'{hint}; columns: {header}")
    for column in set(header) - set(COLUMNS) - set(columns):
        if near := get_close_matches(column, COLUMNS, 1, 0.8):
            raise UserError(f"{src.path}: column {column!r}: did you mean {near[0]!r}?")
    root = src.path.parent
    cases = []
    for row in rows:
        files = [part.strip() for c in columns for part in row.get(c, "").split(";") if part.strip()]
        if not files or not _selected(src, files[0]):
            continue
        many = len(files) > 1
        names = tuple(c[len("image_") :] for c in columns) if len(columns) == len(files) and many else None
        if many and names is None:
            names = tuple(str(n) for n in range(len(files)))
        stated = [m.strip() for m in row.get("modality", "").split(";") if m.strip()]
        modality = tuple(_word(m) or m for m in stated) or ((m,) if (m := src.modality_of(files[0])) else ())
        if not modality and not files[0].lower().endswith(DICOM) and not (root / files[0]).is_dir():
            raise UserError(
                f"{src.path}: no modality for {files[0]}; add a column modality, or state modality: CT"
            )
        if len(modality) not in (0, 1, len(files)):
            raise UserError(
                f"{src.path}: {len(modality)} modalities for the {len(files)} files of {files[0]}; "
                "state one, or one for each"
            )
        label = row.get("label", "")
        cases.append(
            Case(
                source=src.name,
                images=tuple(root / f for f in files),
                label=root / label if label else None,
                subject=row.get("subject", ""),
                split=row.get("split") or None,
                modality=modality * len(files) if len(modality) == 1 else modality,
                channel_names=names,
                name=stem(Path(files[0])),
            )
        )
    return cases


def folder(src: SourceConfig) -> list[Case]:
    """Every image file below the folder that include and exclude leave; labels by ``label_glob``."""
    files = [p for p in _files(src) if _is_image(p) and not p.name.lower().endswith(DICOM)]
    labels = {label_for(src, relative(p, src.path)) for p in files}
    cases = []
    for path in files:
        if path in labels:
            continue
        rel = relative(path, src.path)
        modality = src.modality_of(rel)
        if modality is None:
            hint = "state modality: CT, MR, XR or PT, or modality: {glob: CT, ...} where they differ"
            raise UserError(f"{path}: source {src.name!r} does not say what kind of image this is; {hint}")
        cases.append(Case(src.name, (path,), label_for(src, rel), "", None, (modality,), name=stem(path)))
    return cases


def dicom_tree(src: SourceConfig) -> list[Case]:
    """Every DICOM image series below the folder, by SeriesInstanceUID; other DICOM objects come as refused
    cases."""
    from data_pipeline.readers.dicom_series import series_in

    found, bad = series_in(_files(src))
    cases = []
    for series in found:
        # Radiographs of one series (frontal, lateral) are images of their own.
        images = [(path,) for path in series.files] if series.modality == "XR" else [series.files]
        for files in images:
            single = len(files) == 1
            top = files[0] if single else Path(os.path.commonpath([p.parent for p in files]))
            cases.append(
                Case(
                    source=src.name,
                    images=(top,),
                    label=None,
                    subject=series.patient or series.study or top.name,
                    split=None,
                    modality=(series.modality,) if series.modality else (),
                    series=series.uid,
                    files=files,
                    name=stem(top),
                    refused=Quarantined(series.code, path=top) if series.code else None,
                )
            )
    for path, error in bad:
        cases.append(
            Case(src.name, (path,), None, path.parent.name, None, (), name=stem(path), refused=error)
        )
    return cases


def parse_labels(
    labels: Mapping[str, Any], where: Path
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
    except (TypeError, ValueError) as error:
        raise UserError(f"{where}: labels must map values to names or names to values") from error
    ignore = frozenset(named.pop("ignore", ()))
    named = {n: tuple(v for v in values) for n, values in named.items() if set(values) != {0}}
    every = [v for values in named.values() for v in values]
    if len(every) == len(set(every)):
        return {v: n for n, values in named.items() for v in values}, named, ignore
    return None, named, ignore


def _described(
    src: SourceConfig,
    images: tuple[Path, ...],
    label: Path | None,
    split: str | None,
    name: str,
    names: tuple[str, ...],
    modality: tuple[str, ...],
    values: dict[int, str] | None,
    regions: dict[str, tuple[int, ...]] | None,
    ignore: frozenset[int],
) -> Case:
    return Case(
        source=src.name,
        images=images,
        label=label,
        subject="",
        split=split,
        modality=modality,
        channel_names=names,
        label_values=values,
        label_regions=regions,
        ignore=ignore,
        name=name,
    )


def _channels(described: Any, where: Path) -> tuple[str, ...]:
    if isinstance(described, dict) and described:
        try:
            return tuple(str(described[k]) for k in sorted(described, key=int))
        except ValueError as error:
            raise UserError(f"{where}: channels must be numbered from 0") from error
    if isinstance(described, list) and described:
        return tuple(str(d) for d in described)
    raise UserError(f"{where}: names no channels (modality or channel_names)")


def _modalities(names: tuple[str, ...], src: SourceConfig) -> tuple[str, ...]:
    found = [_word(n) or (src.modality if isinstance(src.modality, str) else None) for n in names]
    if None in found and (len(names) > 1 or not isinstance(src.modality, dict)):  # a glob names a whole case
        unclear = names[found.index(None)]
        raise UserError(
            f"{src.path}: channel {unclear!r} does not name a modality; state modality: CT, MR, XR or PT"
        )
    return tuple(f for f in found if f is not None)


def _word(name: str) -> str | None:
    words = set(re.split(r"[^a-z0-9]+", name.lower().replace("x-ray", "xray"))) - {""}
    for modality, known in MODALITY_WORDS.items():
        if words & known:
            return modality
    return None


def _rows(path: Path) -> list[dict[str, str]]:
    try:
        if path.suffix.lower() == ".parquet":
            import pyarrow.parquet as pq

            rows = pq.read_table(path).to_pylist()
        else:
            with path.open(newline="", encoding="utf-8-sig") as file:
                rows = list(csv.DictReader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ","))
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"{path}: the table cannot be read ({type(error).__name__})") from error
    return [{k: "" if v is None else str(v).strip() for k, v in row.items() if k is not None} for row in rows]


def _json(path: Path) -> dict[str, Any]:
    try:
        described = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({type(error).__name__})") from error
    if not isinstance(described, dict):
        raise UserError(f"{path}: is not a JSON object")
    return described


def _files(src: SourceConfig) -> list[Path]:
    if src.path.is_file():
        return [src.path]
    found = (p for p in src.path.rglob("*") if p.is_file() and not p.name.startswith("."))
    return sorted(p for p in found if _selected(src, relative(p, src.path)))


def _selected(src: SourceConfig, rel: str) -> bool:
    included = not src.include or any(matches(g, rel) is not None for g in src.include)
    return included and not any(matches(g, rel) is not None for g in src.exclude)


def _is_image(path: Path) -> bool:
    name = path.name.lower()
    return name.endswith(SUFFIXES) and not name.endswith(PAIRED)


def _has_magic(path: Path) -> bool:
    if _is_image(path) or path.suffix.lower() in (".json", ".csv", ".txt", ".md"):
        return False
    with path.open("rb") as file:
        return file.read(132)[128:] == b"DICM"
