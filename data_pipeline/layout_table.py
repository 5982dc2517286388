"""A table of images: CSV, TSV or Parquet with a row an image."""

from __future__ import annotations

import csv
import io
import re
from difflib import get_close_matches
from typing import Any

from data_pipeline.channel_words import channel_name, modality_of, sequence_of
from data_pipeline.errors import UserError, shown
from data_pipeline.layouts import Case, Discovery, stem
from data_pipeline.locations import Location, joined, store_errors
from data_pipeline.readers import DICOM, SUFFIXES

COLUMNS = ("image", "label", "modality", "subject", "split", "sequence")
ALIASES = {
    "path": "image", "file": "image", "filename": "image", "filepath": "image", "image_path": "image",
    "mask": "label", "segmentation": "label", "label_path": "label", "mask_path": "label",
    "patient": "subject", "patient_id": "subject", "subject_id": "subject", "participant_id": "subject",
}  # fmt: skip
DELIMITERS = (",", "\t", ";")


def table(find: Discovery) -> list[Case]:
    """CSV, TSV or Parquet with the columns image (or path; several columns image_NAME, or ``;`` between
    files, for channels) and optionally label, modality, subject, split and sequence.

    Paths are relative to the table, absolute, or addresses. A row that says the same as one before it is
    counted and left out; one that says something else of the same image is a `UserError`.
    """
    where = find.src.path
    header, rows = text_table(where)
    images = _image_columns(where, header)
    known = set(COLUMNS) | set(images)
    find.count("columns of a table not used", len(set(header) - known))
    cases = []
    listed: dict[tuple[str, ...], dict[str, str]] = {}
    for row in rows:
        files = tuple(part.strip() for c in images for part in row[c].split(";") if part.strip())
        if not files:
            find.count("rows of a table without an image")
            continue
        if not find.src.selects(files[0]):
            continue
        stated = {c: row.get(c, "") for c in COLUMNS if c != "image"}
        if (before := listed.setdefault(files, stated)) is not stated:
            if before != stated:
                differing = next(c for c in stated if before[c] != stated[c])
                raise UserError(
                    f"{shown(where)}: {shown(files[0])} is listed twice with different {differing}; "
                    "keep one row"
                )
            find.count("rows of a table listed twice")
            continue
        cases.append(_case(find, images, files, row))
    return cases


def _case(find: Discovery, columns: list[str], files: tuple[str, ...], row: dict[str, str]) -> Case:
    src, where = find.src, find.src.path
    many = len(files) > 1
    names = (
        [c[len("image_") :] for c in columns] if len(columns) == len(files) else map(str, range(len(files)))
    )
    stated = [m.strip() for m in row.get("modality", "").split(";") if m.strip()]
    unknown = next((m for m in stated if not modality_of(m)), None)
    if unknown is not None:
        raise UserError(f"{shown(where)}: modality {shown(unknown)!r} is not known; use CT, MR, XR or PT")
    modality = tuple(str(modality_of(m)) for m in stated)
    if not modality and (declared := src.modality_of(files[0])):
        modality = (declared,)
    if not modality and many and all(found := [modality_of(c) for c in columns]) and len(found) == len(files):
        modality = tuple(str(m) for m in found)
    if len(modality) not in (0, 1, len(files)):
        raise UserError(
            f"{shown(where)}: {len(modality)} modalities for the {len(files)} files of {shown(files[0])}; "
            "state one, or one for each"
        )
    try:
        images = tuple(joined(where.parent, file) for file in files)
        label = joined(where.parent, text) if (text := row.get("label", "")) else None
    except ValueError as error:
        raise UserError(f"{shown(where)}: {error}") from error
    if not modality and _has_no_header(images[0]):
        raise UserError(
            f"{shown(where)}: no modality for {shown(files[0])}; add a column modality, or state modality: CT"
        )
    return Case(
        source=src.name,
        images=images,
        label=label,
        subject=row.get("subject", ""),
        split=row.get("split") or None,
        modality=modality * len(files) if len(modality) == 1 else modality,
        channel_names=tuple(channel_name(name, n) for n, name in enumerate(names)) if many else None,
        name=stem(images[0]),
        sequence=_sequence(row.get("sequence", ""), where),
    )


def _has_no_header(image: Location) -> bool:
    name = image.name.lower()
    return name.endswith(SUFFIXES) and not name.endswith(DICOM)


def _sequence(stated: str, where: Location) -> str:
    from data_pipeline.sequences import SEQUENCES

    if not stated or stated in SEQUENCES:
        return stated
    if found := sequence_of(stated):
        return found
    raise UserError(f"{shown(where)}: sequence {stated!r} is none of {' '.join(SEQUENCES)}")


def _image_columns(where: Location, header: list[str]) -> list[str]:
    absent = [c for c in (*COLUMNS, "path") if c not in header and not (c == "path" and "image" in header)]
    for column in header:
        if not column.startswith("image_") and (near := get_close_matches(column, absent, 1, 0.8)):
            raise UserError(f"{shown(where)}: column {column!r}: did you mean {near[0]!r}?")
    columns = [c for c in header if c == "image" or re.fullmatch(r"image_\w+", c)]
    if not columns:
        raise UserError(f"{shown(where)}: no column image or path; columns: {', '.join(header)}")
    return columns


def text_table(path: Location) -> tuple[list[str], list[dict[str, str]]]:
    """Column names (lower case, aliases replaced) and rows of text; empty lines are left out. Raises
    `UserError`."""
    try:
        with store_errors(path):
            raw = path.read_bytes()
        header, body = _parquet(raw) if path.suffix.lower() == ".parquet" else _text(raw, path)
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"{shown(path)}: the table cannot be read ({type(error).__name__})") from error
    names = [name.strip().lower() for name in header]
    names = [n if n in COLUMNS else ALIASES.get(n, n) for n in names]
    twice = sorted({n for n in names if n and names.count(n) > 1})
    if twice:
        raise UserError(f"{shown(path)}: two columns mean {twice[0]!r}; leave one")
    rows = []
    for number, cells in enumerate(body, 1):
        if not any(cells):
            continue
        if len(cells) > len(names):
            raise UserError(
                f'{shown(path)}: row {number} has {len(cells)} cells for {len(names)} columns; put " around '
                "cells that hold the separator"
            )
        rows.append(dict(zip(names, [*cells, *[""] * (len(names) - len(cells))])))
    return [n for n in names if n], rows


def _parquet(raw: bytes) -> tuple[list[str], list[list[str]]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    found = pq.read_table(pa.BufferReader(raw))
    return found.column_names, [[_cell(v) for v in row.values()] for row in found.to_pylist()]


def _cell(value: Any) -> str:
    if value is None or value != value:  # null, or a float column's NaN
        return ""
    whole = isinstance(value, float) and value.is_integer()  # numbers of a column that pandas made float
    return str(int(value) if whole else value).strip()


def _text(raw: bytes, path: Location) -> tuple[list[str], list[list[str]]]:
    """Text in UTF-8 (with or without a mark) or UTF-16; the separator is the one that the header holds."""
    wide = raw[:2] in (b"\xff\xfe", b"\xfe\xff")
    text = raw.decode("utf-16") if wide else raw.decode("utf-8-sig", "surrogateescape")
    lines = iter(io.StringIO(text, newline=""))
    first = next((line for line in lines if line.strip()), "")
    outside = re.sub(r'"[^"]*"', "", first)
    preferred = "\t" if path.suffix.lower() == ".tsv" else ","
    order = sorted(DELIMITERS, key=lambda d: (-outside.count(d), d != preferred))
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=order[0], strict=True)
    cleaned = [[cell.strip() for cell in row] for row in rows]
    cleaned = [row for row in cleaned if any(row)]
    return (cleaned[0], cleaned[1:]) if cleaned else ([], [])
