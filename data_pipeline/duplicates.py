"""One image twice is one sample: keep one copy and every label, and make the owners one subject."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from data_pipeline.content_voxels import CONTENT
from data_pipeline.frame_index import checksum
from data_pipeline.journal import Outcome, write_whole
from data_pipeline.sample import label_columns
from data_pipeline.shard_writer import Piece, Staged
from data_pipeline.storage import chunk_shape, decode, encode

Owned = tuple[Outcome, Staged]


@dataclass(frozen=True)
class Merged:
    """`samples` to write, each with the case it is of, and `left_out`: one entry for every copy that is not
    written, by keyed hashes, saying what became of its label (none, same, added, conflict).
    """

    samples: list[Owned]
    left_out: list[dict[str, str]]


def merge_duplicates(staged: Sequence[Owned], ids: Mapping[str, int], scratch: Path) -> Merged:
    """Join samples of equal content hash: the first labelled one stays, else the first.

    A further label is added as layers where it annotates other names, dropped where it is the same, and
    listed as a conflict (the first stays) where the same names have other voxels. Joined labels are put into
    `scratch`; nothing staged is changed, so that the same call gives the same result again.
    """
    by_hash: dict[str, list[Owned]] = defaultdict(list)
    for owned in staged:
        by_hash[owned[1].row["content_hash"]].append(owned)
    samples: list[Owned] = []
    left_out = []
    for copies in by_hash.values():
        first = next((n for n, (_, s) in enumerate(copies) if "seg" in s.frames), 0)
        owner, kept = copies.pop(first)
        for other_owner, other in copies:
            label = "none"
            if "seg" in other.frames:
                kept, label = _join_label(kept, other, ids, scratch)
            left_out.append(
                {"kept": owner.input, "left_out": other_owner.input, "key": kept.row["key"], "label": label}
            )
        samples.append((owner, kept))
    return Merged(samples, left_out)


def _join_label(kept: Staged, other: Staged, ids: Mapping[str, int], scratch: Path) -> tuple[Staged, str]:
    mine, theirs = kept.frames["seg"].read(), other.frames["seg"].read()
    if mine == theirs and kept.row["annotated"] == other.row["annotated"]:
        return kept, "same"
    if set(kept.row["annotated"]) & set(other.row["annotated"]):
        return kept, "conflict"
    layers = np.concatenate([decode(mine), decode(theirs)])
    origin = kept.row["label_origin"] if kept.row["label_origin"] == other.row["label_origin"] else "unknown"
    annotated = [*kept.row["annotated"], *other.row["annotated"]]
    columns = label_columns(layers, origin, annotated, {i: name for name, i in ids.items()})
    content = [entry for entry in kept.row["foreground"] if entry["class"] == CONTENT]
    columns["foreground"] = content + columns["foreground"]
    data = encode(layers, chunk_shape(layers.shape, kept.row["geometry"], kept.row["axes"]))
    name = f"{kept.row['key']}.seg"
    write_whole(scratch / name, data)
    label = {
        **kept.description["label"],
        "origin": origin,
        "annotated": annotated,
        "classes": columns["classes"],
    }
    joined = replace(
        kept,
        row={**kept.row, **columns},
        description={**kept.description, "label": label},
        frames={**kept.frames, "seg": Piece(str(scratch), name, len(data), check=checksum(data))},
    )
    return joined, "added"
