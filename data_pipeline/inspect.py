"""Show one sample of a dataset: its row as a table, and three planes with its label laid over them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.content_voxels import CONTENT
from data_pipeline.errors import UserError
from data_pipeline.manifest import Manifest
from data_pipeline.pictures import grey, overlay, png, resized, side_by_side
from data_pipeline.storage import ShardReader

AXES = ("z, slices from foot to head", "y, front to back", "x, right to left")


@dataclass(frozen=True)
class Inspection:
    """One sample: `table` of (name, value) lines for people, `png` bytes of its picture."""

    key: str
    table: list[tuple[str, str]]
    png: bytes

    def text(self) -> str:
        """The table as aligned lines."""
        width = max(len(name) for name, _ in self.table)
        return "\n".join(f"{name:<{width}}  {value}" for name, value in self.table)


def inspect(root: str | Path, key: str | None = None, *, side: int = 320) -> Inspection:
    """Describe the sample whose key starts with `key` (None: the first labelled one, else the first).

    The planes pass through the middle of the first class's sampled voxels, else of those of the content.
    Raises `UserError` for an unknown key, `DamagedSample` where bytes are not as written.
    """
    manifest = Manifest.open(root)
    row = _find(manifest, key)
    values = manifest.row(row)
    reader = ShardReader(manifest.root, manifest)
    shape = values["shape"][1:]
    centre = [n // 2 for n in shape]
    listed = [entry for entry in values["foreground"] if entry["voxels"]]
    if listed:
        first = next((entry for entry in listed if entry["class"] != CONTENT), listed[0])
        centre = [int(np.median(p)) for p in np.unravel_index(np.array(first["voxels"]), shape)]
    pictures = []
    for axis in range(3):
        if shape[axis] > 1 and min(n for a, n in enumerate(shape) if a != axis) == 1:
            continue  # a line through a radiograph
        pictures.append(plane_picture(reader, values, row, axis, centre[axis], side, hidden=True))
    table = _table(manifest, values)
    if reader.hides(row):
        share = float((reader.read_box(row, "hide", 0, (0, 0, 0), shape) != 0).mean())
        table.append(("hidden from training", f"{share:.1%} of the voxels, shown here"))
    reader.close()
    return Inspection(values["key"], table, png(side_by_side(pictures, len(pictures))))


def plane_picture(
    reader: ShardReader,
    values: dict[str, Any],
    row: int,
    axis: int,
    index: int,
    side: int,
    channel: int = 0,
    hidden: bool = False,
) -> Any:
    """The plane `index` across stored `axis` of a sample as a PIL picture, upright (head or front up).

    `hidden`: show the voxels that are hidden from training, too.
    """
    shape = values["shape"][1:]
    origin, extent = [0, 0, 0], list(shape)
    origin[axis], extent[axis] = index, 1
    plane = np.squeeze(reader.read_box(row, "image", channel, origin, extent, hidden=hidden), axis)
    picture = grey(plane, values["norm"][channel])
    if values["seg_size"] > 0:
        picture = overlay(picture, np.squeeze(reader.read_box(row, "seg", None, origin, extent), axis + 1))
    vertical, horizontal = (a for a in range(3) if a != axis)
    if vertical == 0:
        picture = picture[::-1]  # z grows to the head
    return resized(
        np.ascontiguousarray(picture), (values["spacing"][vertical], values["spacing"][horizontal]), side
    )


def _find(manifest: Manifest, key: str | None) -> int:
    if not len(manifest):
        raise UserError(f"{manifest.root} holds no samples")
    if key is None:
        labelled = manifest.select(labelled=True)
        return int(labelled[0]) if len(labelled) else 0
    matching = [i for i, k in enumerate(manifest.column("key")) if k.startswith(key)]
    exact = [i for i in matching if manifest.column("key")[i] == key]
    if len(exact or matching) != 1:
        found = f"{len(matching)} samples whose key starts with" if matching else "no sample with key"
        raise UserError(f"{manifest.root}: {found} {key!r}; keys are in manifest.parquet")
    return (exact or matching)[0]


def _table(manifest: Manifest, values: dict[str, Any]) -> list[tuple[str, str]]:
    shape, spacing = values["shape"], values["spacing"]
    stem = ", ".join("zyx"[a] for a in values["axes"])
    lines = [
        ("key", values["key"]),
        ("shard", f"{values['shard']} at byte {values['image_offset']}"),
        ("split, source, subject", f"{values['split']}, {values['source']}, {values['subject']}"),
        ("channels", ", ".join(f"{n} ({m})" for n, m in zip(values["channels"], values["modalities"]))),
        ("geometry", f"{values['geometry']}, stem reads axes {stem}"),
        ("size (z, y, x)", " × ".join(map(str, shape[1:]))),
        ("spacing mm (z, y, x)", " × ".join(f"{s:g}" for s in spacing) + f", {values['spacing_source']}"),
        ("extent mm (z, y, x)", " × ".join(f"{s * n:.0f}" for s, n in zip(spacing, shape[1:]))),
        ("levels", ", ".join("×".join(map(str, level)) for level in values["levels"])),
        ("stored as", f"{values['dtype']}, largest error {values['max_error']:g}"),
        (
            "bytes",
            ", ".join(
                f"{m} {values[f'{m}_size']}"
                for m in ("image", "l1", "l2", "seg", "hide")
                if (values[f"{m}_size"] or -1) > 0
            ),
        ),
        ("valid voxels", f"{values['valid_fraction']:.1%}"),
    ]
    for name, norm in zip(values["channels"], values["norm"]):
        lines.append(
            (f"norm of {name}", f"clip {norm[2]:g} to {norm[3]:g}, center {norm[4]:g}, scale {norm[5]:g}")
        )
    if values["seg_size"] > 0:
        lines.append(
            ("label", f"origin {values['label_origin']}, looked for {', '.join(values['annotated'])}")
        )
        lines.append(("classes present", ", ".join(values["classes"]) or "none"))
    return lines
