"""What the order reads of a manifest: texts of a column as numbers, and the share wanted of each of them.

Columns are read in parts of a million rows straight from the mapped Arrow file, so that ten million rows make
no Python object each and no copy of their texts.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data_pipeline.errors import UserError
from data_pipeline.schedule import MixtureConfig

_PART = 1 << 20
#: Most sources that a mixture weighs.
MOST_SOURCES = 1000


class Columns(Protocol):
    """A manifest as the order sees it; `value` only for crops placed over listed voxels."""

    hash: str

    def __len__(self) -> int: ...
    def column(self, name: str) -> np.ndarray: ...
    def value(self, i: int, name: str) -> Any: ...


def text_codes(
    manifest: Columns, name: str, rows: np.ndarray, most: int | None = None
) -> tuple[list[str], np.ndarray]:
    """Distinct texts of a column in these rows, sorted, and the number of each row's text among them (int32).

    Numbers count as their text, a list of texts as its entries joined by "+", nothing as "none". Raises
    KeyError for an unknown column, ValueError for one that holds other things or more than `most` texts.
    """
    number_of: dict[str, int] = {}
    codes = np.empty(len(rows), dtype=np.int32)
    for start in range(0, len(rows), _PART):
        chunk = _texts(manifest, name, rows[start : start + _PART])
        texts = [str(text) for text in chunk.dictionary.to_pylist()]
        numbers = np.array([number_of.setdefault(text, len(number_of)) for text in texts], dtype=np.int32)
        if most is not None and len(number_of) > most:
            raise ValueError(f"it holds more than {most} different values")
        codes[start : start + len(chunk)] = numbers[chunk.indices.to_numpy(zero_copy_only=False)]
    names = sorted(number_of)
    rank = np.empty(len(names), dtype=np.int32)
    rank[[number_of[text] for text in names]] = np.arange(len(names))
    return names, rank[codes]


def _texts(manifest: Columns, name: str, rows: np.ndarray) -> Any:
    table = getattr(manifest, "table", None)
    if table is None:
        values = pa.array(manifest.column(name)[rows].tolist())
    else:
        values = table.column(name).take(pa.array(rows)).combine_chunks()
        if isinstance(values, pa.ChunkedArray):
            values = values.chunk(0)
    kind = values.type
    if pa.types.is_dictionary(kind):
        return values
    if pa.types.is_list(kind) and pa.types.is_string(kind.value_type):
        values = pc.binary_join(values, "+")
    elif pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind):
        values = values.cast(pa.string())
    elif not (pa.types.is_string(kind) or pa.types.is_null(kind)):
        raise ValueError("it holds neither texts nor numbers")
    return values.cast(pa.string()).fill_null("none").dictionary_encode()


def source_codes(manifest: Columns, rows: np.ndarray, by: str) -> tuple[list[str], np.ndarray]:
    """Names of the sources that a mixture weighs, sorted, and the number of each row's source."""
    try:
        return text_codes(manifest, by, rows, MOST_SOURCES)
    except KeyError:
        raise UserError(
            f"mixture.by is {by!r}, which is no column of the manifest; modality, source or sequence are"
        ) from None
    except ValueError as error:
        raise UserError(f"mixture.by is {by!r}: {error}; weigh by another column, such as source") from None


def wanted_shares(sources: list[str], source: np.ndarray, mixture: MixtureConfig) -> np.ndarray:
    """Share of crops wanted of each source, summing to 1."""
    if mixture.weights is None:
        share = np.sqrt(np.bincount(source, minlength=len(sources)))
    else:
        named, there = set(mixture.weights), set(sources)
        if named != there:
            odd = sorted(there - named) or sorted(named - there)
            listed = ", ".join(sources[:20]) + (", …" if len(sources) > 20 else "")
            wrong = "has no weight (0 leaves it out)" if there - named else f"is not in the data ({listed})"
            raise UserError(f"mixture.weights: {mixture.by} {odd[0]!r} {wrong}")
        share = np.array([mixture.weights[name] for name in sources], dtype=np.float64)
    total = float(np.cumsum(share)[-1])
    if total == 0:
        raise UserError("mixture.weights: every source in the data has weight 0; give one of them more")
    return share / total
