"""Which samples of a dataset a recipe uses."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data_pipeline.manifest import Manifest
from engine.errors import UserError
from pretrain.recipe import DataConfig


def select_rows(manifest: Manifest, data: DataConfig, split: str, may_be_empty: bool = False) -> np.ndarray:
    """Row numbers of a split after the recipe's choice of sources and subjects.

    Raises UserError where nothing is left, a source's name is unknown, or both splits are the same one.
    """
    if data.split == data.held_out:
        raise UserError(f"data.held_out: {data.held_out!r} is the training split too; name another split")
    every = _texts(manifest, "source")
    for name in (*data.sources, *data.exclude_sources):
        if name not in every:
            raise UserError(f"data.sources: no source {name!r} in {data.root}; it holds {', '.join(every)}")
    rows = manifest.select(split=split)
    keep = ~_among(manifest, "source", data.exclude_sources)[rows]
    keep &= ~_among(manifest, "subject", data.exclude_subjects)[rows]
    if data.sources:
        keep &= _among(manifest, "source", data.sources)[rows]
    if not keep.any() and not may_be_empty:
        splits = ", ".join(_texts(manifest, "split"))
        raise UserError(
            f"{data.root}: no sample of split {split!r} is left to train on; it holds the splits {splits}"
        )
    return rows[keep]


def _texts(manifest: Manifest, column: str) -> list[str]:
    return sorted(str(text) for text in pc.unique(manifest.table.column(column)).to_pylist())


def _among(manifest: Manifest, column: str, texts: Sequence[str]) -> np.ndarray:
    """For each row of the manifest, whether its text is one of these (bool)."""
    wanted = pa.array(texts, pa.string())
    return np.asarray(pc.is_in(manifest.table.column(column), value_set=wanted).to_numpy())
