"""One image twice is one sample: keep one copy and every label, and make the owners one subject."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_pipeline.sample import Job, label_columns
from data_pipeline.shard_writer import Staged
from data_pipeline.storage import chunk_shape, decode, encode


@dataclass(frozen=True)
class Merged:
    """`samples` to write, the jobs that share a subject (`together`, each job somewhere), and counts to
    report.
    """

    samples: list[tuple[Job, Staged]]
    together: list[list[Job]]
    notes: dict[str, int]


def merge_duplicates(staged: Sequence[tuple[Job, Staged]], ids: Mapping[str, int]) -> Merged:
    """Join samples of equal content hash: the first labelled one stays, else the first.

    A further label is added as layers where it annotates other names, dropped where it is the same, and
    counted as a conflict (the first stays) where the same names have other voxels. Staged files of dropped
    samples are deleted.
    """
    by_hash: dict[str, list[tuple[Job, Staged]]] = defaultdict(list)
    for job, sample in staged:
        by_hash[sample.row["content_hash"]].append((job, sample))
    samples: list[tuple[Job, Staged]] = []
    notes = {
        "duplicates left out": 0,
        "labels added from duplicates": 0,
        "label conflicts between duplicates": 0,
    }
    for copies in by_hash.values():
        first = next((n for n, (_, s) in enumerate(copies) if "seg" in s.frames), 0)
        job, kept = copies.pop(first)
        for _, other in copies:
            notes["duplicates left out"] += 1
            if "seg" in other.frames:
                kept, what = _join_label(kept, other, ids)
                if what:
                    notes[what] += 1
            for path in other.frames.values():
                path.unlink()
        samples.append((job, kept))
        by_hash[kept.row["content_hash"]] = [(job, kept), *copies]
    together = [[job for job, _ in copies] for copies in by_hash.values()]
    return Merged(samples, together, notes)


def _join_label(kept: Staged, other: Staged, ids: Mapping[str, int]) -> tuple[Staged, str]:
    mine, theirs = kept.frames["seg"].read_bytes(), other.frames["seg"].read_bytes()
    if mine == theirs and kept.row["annotated"] == other.row["annotated"]:
        return kept, ""
    if set(kept.row["annotated"]) & set(other.row["annotated"]):
        return kept, "label conflicts between duplicates"
    layers = np.concatenate([decode(mine), decode(theirs)])
    origin = kept.row["label_origin"] if kept.row["label_origin"] == other.row["label_origin"] else "unknown"
    annotated = [*kept.row["annotated"], *other.row["annotated"]]
    columns = label_columns(layers, origin, annotated, {i: name for name, i in ids.items()})
    data = encode(layers, chunk_shape(layers.shape, kept.row["geometry"], kept.row["axes"]))
    path: Path = kept.frames["seg"]
    path.write_bytes(data)
    label = {
        **kept.description["label"],
        "origin": origin,
        "annotated": annotated,
        "classes": columns["classes"],
    }
    return (
        Staged(
            {**kept.row, **columns},
            {**kept.description, "label": label},
            kept.frames,
            kept.size - len(mine) + len(data),
        ),
        "labels added from duplicates",
    )
