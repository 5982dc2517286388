"""The held-out images that the quickstart segments: which, where to click, and how the mask looks."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from launch.quickstart import Labelled


@dataclass
class HeldOutCase:
    """One image of the test split, an object in it, and clicks inside the object.

    Arrays are on the builder's grid, (z, y, x) nearest L, P, S; clicks are LPS mm (x, y, z). `dice` is set by
    `save_picture`, once the command has written its mask.
    """

    name: str
    images: tuple[Path, ...]
    modality: str | None
    label: str
    volume: Any
    truth: np.ndarray
    voxels: list[tuple[int, int, int]]
    clicks: list[tuple[float, float, float]] = field(default_factory=list)
    dice: float | None = None


def choose_cases(dataset: Path, private: Path, labelled: Labelled, at_most: int = 2) -> list[HeldOutCase]:
    """The first labelled test image of each modality but X-ray (unless there is nothing else), its
    largest object.
    """
    from data_pipeline.manifest import Manifest
    from data_pipeline.readers import read, read_channels
    from data_pipeline.shard_reader import ShardReader

    manifest = Manifest.open(dataset)
    paths = _index(private)
    rows = [
        row for row in manifest.select(split=labelled.test_split, labelled=True).tolist()
        if str(manifest.column("source")[row]) in labelled.sources
        and str(manifest.column("key")[row]) in paths
    ]  # fmt: skip
    first: dict[str, int] = {}
    for row in rows:
        first.setdefault(str(manifest.column("modality")[row]), row)
    if len(first) > 1:
        first.pop("XR", None)
    reader = ShardReader(manifest.root, manifest)
    cases = []
    for modality, row in list(first.items())[:at_most]:
        size = tuple(int(n) for n in manifest.column("shape")[row][1:])
        seg = reader.read_box(row, "seg", None, (0, 0, 0), size)
        counts = {int(v): int((seg == v).sum()) for v in np.unique(seg) if v not in (0, 255)}
        if not counts:
            continue
        label = max(counts, key=lambda v: counts[v])
        truth = (seg == label).any(0)
        images = tuple(map(Path, paths[str(manifest.column("key")[row])]))
        if len(images) > 1:
            volume = read_channels(images, modality=modality).to_lps()
        else:
            volume = read(images[0], modality=modality, spacing=_spacing(manifest, row)).to_lps()
        if volume.shape != truth.shape:
            continue
        voxels = inner_points(truth, volume.spacing)
        clicks = [tuple(float(v) for v in volume.lps_mm_of_index((x, y, z))) for z, y, x in voxels]
        name = manifest.info.get("labels", {}).get(str(label), str(label))
        cases.append(HeldOutCase(f"{modality}-{name}", images, modality, name, volume, truth, voxels, clicks))  # type: ignore[arg-type]
    return cases


def _index(private: Path) -> dict[str, list[str]]:
    """Sample key -> the files it was built from, where those make one sample."""
    found = {}
    for line in (private / "index.jsonl").read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        if len(entry["keys"]) == 1:
            found[entry["keys"][0]] = entry["paths"]
    return found


def _spacing(manifest: Any, row: int) -> tuple[float, float, float] | None:
    """Spacing to declare where the file states none."""
    if str(manifest.column("spacing_source")[row]) == "header":
        return None
    z, y, x = (float(v) for v in manifest.column("spacing")[row])
    return z, y, x


def inner_points(
    truth: np.ndarray, spacing: tuple[float, float, float], count: int = 3
) -> list[tuple[int, int, int]]:
    """Voxels deep in an object and far from each other: the deepest, then by depth times distance to
    those before.
    """
    from scipy import ndimage

    depth = ndimage.distance_transform_edt(np.pad(truth, 1), sampling=spacing)[1:-1, 1:-1, 1:-1]
    where = np.argwhere(truth)
    worth = depth[truth].astype(float)
    points = [where[int(np.argmax(worth))]]
    while len(points) < min(count, len(where)):
        near = np.min([np.linalg.norm((where - p) * np.asarray(spacing), axis=1) for p in points], axis=0)
        points.append(where[int(np.argmax(worth * near))])
    return [(int(z), int(y), int(x)) for z, y, x in points]


def save_picture(case: HeldOutCase, mask_file: Path, picture: Path) -> None:
    """Three slices through the first click: the image, the label's outline (green), the mask's (red),
    the clicks.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import nibabel

    read = np.asarray(nibabel.load(mask_file).dataobj)  # type: ignore[attr-defined]
    mask = case.volume.from_source(np.atleast_3d(read).transpose(2, 1, 0)).astype(bool)
    total = int(mask.sum()) + int(case.truth.sum())
    case.dice = 2.0 * int((mask & case.truth).sum()) / total if total else None
    image = case.volume.real(0)
    low, high = (-160.0, 260.0) if case.modality == "CT" else np.percentile(image, (1, 99.5))
    centre = case.voxels[0]
    spacing = case.volume.spacing
    axes = (0,) if image.shape[0] == 1 else (0, 1, 2)
    figure, panels = plt.subplots(
        1, len(axes), figsize=(4.2 * len(axes), 4.2), facecolor="black", squeeze=False
    )
    for panel, axis in zip(panels[0], axes, strict=True):
        rows, columns = (a for a in range(3) if a != axis)
        at = [slice(None)] * 3
        at[axis] = centre[axis]  # type: ignore[call-overload]
        plane = tuple(at)
        panel.imshow(image[plane], cmap="gray", vmin=low, vmax=high, aspect=spacing[rows] / spacing[columns])
        for region, colour in ((case.truth[plane], "#3ddc84"), (mask[plane], "#ff4d4d")):
            if region.any() and not region.all():
                panel.contour(region, [0.5], colors=colour, linewidths=1.2)
        for voxel in case.voxels:
            deep = abs(voxel[axis] - centre[axis]) * spacing[axis]
            panel.plot(
                voxel[columns],
                voxel[rows],
                "+",
                color="#ffd23f",
                ms=11,
                mew=2,
                alpha=1.0 if deep < 4 else 0.35,
            )
        if rows == 0:
            panel.invert_yaxis()
        panel.axis("off")
    figure.tight_layout(pad=0.3)
    figure.savefig(picture, dpi=80, facecolor="black")
    plt.close(figure)
