"""Label files onto the grid of their image: which voxel is which class, with nothing guessed and every loss
counted."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from data_pipeline.errors import Quarantined, UserError, shown
from data_pipeline.locations import Location, fetched
from data_pipeline.quiet import quiet_libraries
from data_pipeline.readers import decode
from data_pipeline.readers.raw import Raw, check_affine
from data_pipeline.volume import Channel, Volume, corner_distance

if TYPE_CHECKING:
    from data_pipeline.layouts import Case
    from data_pipeline.sources import SourceConfig

IGNORE = 255
SAME_GRID = 0.1  # voxels
MAX_LOST = 0.05
Placement = Literal["grid", "image", "contours", "resampled"]
Origin = Literal["human", "model", "unknown"]
_PLACEMENTS = ("grid", "image", "contours", "resampled")  # from the most to the least direct


@dataclass(frozen=True)
class DicomLabel:
    """One RTSTRUCT or SEG file that refers to the images of a case.

    ``regions`` maps each name in the dataset to the ROI or segment numbers that mean it. ``annotator`` counts
    the files of one case: what two people drew is never merged. ``instances`` are the SOPInstanceUIDs of the
    case's images that the file names (they identify: memory only); none: it names the series alone.
    """

    kind: Literal["rtstruct", "seg"]
    path: Location
    regions: Mapping[str, tuple[int, ...]]
    annotator: int
    instances: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Label:
    """``layers`` (layer, z, y, x) uint8 on the image's canonical grid: 0 background, 255 ignore, else class
    ids.

    ``classes`` are the ids present. ``placed``: on the same ``grid``, by the ``image``'s geometry as
    declared, from ``contours``, or ``resampled`` (nearest neighbour). ``lost`` is the share of each class's
    voxels whose centres lie outside the image, ``volume_change`` the relative change of its volume in mm³;
    both empty where nothing was lost or resampled. ``annotated`` are the names that were looked for,
    ``notes`` counts of what was left out (names and forms as in `data_pipeline.privacy`), ``origin`` who made
    it: the recipe's word, else ``model`` where the file says that an algorithm did.
    """

    layers: np.ndarray
    classes: tuple[int, ...]
    placed: Placement
    lost: Mapping[int, float]
    volume_change: Mapping[int, float]
    annotated: tuple[str, ...] = ()
    notes: Mapping[str, str] = field(default_factory=dict)
    origin: Origin = "unknown"


@dataclass(frozen=True)
class Foreground:
    """Sampled voxels of one class: linear indices (int32, C order) into a (z, y, x) layer."""

    label: int
    layer: int
    voxels: np.ndarray


@quiet_libraries()
def label_of(
    case: Case, source: SourceConfig, volume: Volume, number: int, ids: Mapping[str, int]
) -> tuple[Label | None, list[Quarantined]]:
    """The label of the ``number``-th volume read from a case, and the refusals of labels that do not fit it.

    A label file belongs to volume 0, an RTSTRUCT or SEG to the volumes made of the images that it names (of
    a series in time, to the first frame), or to all of its series where it names none. Each file is an
    annotator of its own: its structures lie in layers of their own. ``ids`` maps the dataset's label names to
    ids 1 to 254.
    """
    found: list[Label] = []
    refused: list[Quarantined] = []
    if number == 0 and case.label is not None:
        try:
            found.append(_of_file(case, source, volume, ids))
        except Quarantined as error:
            refused.append(error)
    own = [label for label in case.dicom_labels if _belongs(label, volume, number)]
    with fetched([label.path for label in own]) as near:
        for label in own:
            try:
                if label.path not in near:  # a remote file that has gone
                    raise Quarantined("label_unreadable", "missing")
                found.append(_of_dicom(label, near[label.path], source, volume, ids))
            except Quarantined as error:
                refused.append(error.at(label.path))
    return (_together(found, len(refused), source.label_origin) if found else None), refused


def _of_file(case: Case, source: SourceConfig, volume: Volume, ids: Mapping[str, int]) -> Label:
    if case.label is None or case.label_regions is None:
        raise UserError(
            f"{shown(case.label)}: source {source.name!r} has labels but no names; state labels: {{1: name}}"
        )
    label = read_label(
        case.label,
        volume,
        regions=case.label_regions,
        ids=ids,
        ignore=case.ignore,
        threshold=source.label_threshold,
        geometry=source.label_geometry,
        accept_no_form=source.accept_no_form,
    )
    return replace(label, annotated=case.annotated)


def _belongs(label: DicomLabel, volume: Volume, number: int) -> bool:
    if int(volume.provenance.get("frame", "0").split()[0]) > 0:
        return False
    if not volume.instances:
        return number == 0
    return not label.instances or bool(label.instances & volume.instances)


def _of_dicom(
    label: DicomLabel, path: Path, source: SourceConfig, volume: Volume, ids: Mapping[str, int]
) -> Label:
    from data_pipeline import dicom_seg, rtstruct

    _check_ids(label.regions, ids)
    try:
        if label.kind == "rtstruct":
            return rtstruct.place(path, volume, label.regions, ids)
        return dicom_seg.place(path, volume, label.regions, ids, source.label_threshold)
    except Quarantined as error:
        if error.code.startswith("label_"):
            raise
        raise Quarantined("label_unreadable", f"{error.code} {error.detail}".strip()) from error


def _together(found: list[Label], refused: int, stated: Origin) -> Label:
    """Labels of several annotators, one beside the other."""
    notes: Counter[str] = Counter()
    for label in found:
        notes.update({name: int(count) for name, count in label.notes.items()})
    if len(found) + refused > 1:
        notes.update({"label_files": len(found), "label_files_refused": refused})
    model = any(label.origin == "model" for label in found)
    return Label(
        np.concatenate([label.layers for label in found]),
        tuple(sorted({c for label in found for c in label.classes})),
        max((label.placed for label in found), key=_PLACEMENTS.index),
        _worst(label.lost for label in found),
        _worst(label.volume_change for label in found),
        tuple(dict.fromkeys(name for label in found for name in label.annotated)),
        {name: str(count) for name, count in notes.items() if count},
        stated if stated != "unknown" or not model else "model",
    )


def _worst(shares: Iterable[Mapping[int, float]]) -> dict[int, float]:
    worst: dict[int, float] = {}
    for share in shares:
        for label, value in share.items():
            worst[label] = max(worst.get(label, 0.0), value, key=abs)
    return worst


def _check_ids(regions: Mapping[str, tuple[int, ...]], ids: Mapping[str, int]) -> None:
    if missing := set(regions) - set(ids):
        raise UserError(f"no id for the label names {sorted(missing)}")
    if any(not 0 < ids[name] < IGNORE for name in regions):
        raise UserError(
            f"label ids must be 1 to {IGNORE - 1}: {len(ids)} names are more than a layer of 8 bits can hold"
        )


def layers_of(regions: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """The layer of each name: the first in which it shares no value with a name before it."""
    taken: list[set[int]] = []
    layers = {}
    for name, values in regions.items():
        layer = next((n for n, used in enumerate(taken) if not used & set(values)), len(taken))
        if layer == len(taken):
            taken.append(set())
        taken[layer] |= set(values)
        layers[name] = layer
    return layers


@quiet_libraries()
def read_label(
    path: Location,
    volume: Volume,
    *,
    regions: Mapping[str, tuple[int, ...]],
    ids: Mapping[str, int] | None = None,
    ignore: frozenset[int] = frozenset(),
    threshold: float | None = None,
    geometry: Literal["image", "header"] | None = None,
    accept_no_form: bool = False,
) -> Label:
    """The label of ``volume`` (in canonical order), as class ids.

    ``regions`` maps each name to the values in the file that mean it; ``ids`` maps names to ids 1..254
    (default: in order). ``threshold``: real values at or above it are the one class. ``geometry``: for a
    label of the image's size in another place, ``image`` takes the label's voxels as the image's, ``header``
    trusts the label's own header. Raises `Quarantined` with a ``label_*`` code, `UserError` for a
    declaration that cannot hold.
    """
    ids = dict(ids) if ids is not None else {name: n for n, name in enumerate(regions, 1)}
    _check_ids(regions, ids)
    if threshold is not None and len(regions) != 1:
        raise UserError(f"label_threshold makes one class, but {len(regions)} names are declared")
    try:
        raw = decode(path, accept_no_form=accept_no_form or geometry == "image", label=True)
        if len(raw.frames) != 1:
            raise Quarantined("label_shape", f"{len(raw.frames)} frames")
        values = _values(raw, threshold)
        coded = _coded(values, regions if threshold is None else dict.fromkeys(regions, (1,)), ids, ignore)
        return _place(coded, raw, volume, geometry)
    except Quarantined as error:
        if error.code.startswith("label_"):
            raise error.at(path) from error.__cause__
        raise Quarantined("label_unreadable", f"{error.code} {error.detail}".strip(), path) from error


def foreground(layers: np.ndarray, per_class: int = 64) -> list[Foreground]:
    """At most ``per_class`` voxels of each class, drawn without replacement.

    The draw depends on the label alone, so that equal content gives equal samples in any build.
    """
    found = []
    for layer, grid in enumerate(layers):
        flat = grid.ravel()
        where = np.flatnonzero((flat != 0) & (flat != IGNORE)).astype(np.int32)
        values = flat[where]
        order = np.argsort(values, kind="stable")
        present, starts = np.unique(values[order], return_index=True)
        for label, voxels in zip(present, np.split(where[order], starts[1:]) if len(starts) else []):
            seed = hashlib.blake2b(voxels.astype("<i4").tobytes(), digest_size=16).digest()
            random = np.random.Generator(np.random.Philox(int.from_bytes(seed, "little")))
            chosen = voxels if len(voxels) <= per_class else random.choice(voxels, per_class, replace=False)
            found.append(Foreground(int(label), layer, np.sort(chosen).astype(np.int32)))
    return found


def _values(raw: Raw, threshold: float | None) -> np.ndarray:
    """Whole-number values (z, y, x)."""
    frame = raw.frames[0]
    scaled = raw.slope != 1.0 or raw.intercept != 0.0
    real = frame * np.float64(raw.slope) + raw.intercept if scaled else frame
    if threshold is not None:
        return (np.nan_to_num(real, nan=-np.inf) >= threshold).astype(np.uint8)
    if real.dtype.kind != "f":
        return real
    whole = np.rint(real)
    if not np.isfinite(real).all() or np.abs(real - whole).max(initial=0.0) > 1e-4:
        raise Quarantined("label_grey", "values between whole numbers; state label_threshold")
    if np.abs(whole).max(initial=0.0) > 1 << 30:
        raise Quarantined("label_values", "values beyond 2^30")
    return whole.astype(np.int32)


def _coded(
    values: np.ndarray, regions: Mapping[str, tuple[int, ...]], ids: Mapping[str, int], ignore: frozenset[int]
) -> np.ndarray:
    """Values of the file to (layer, z, y, x) uint8 class ids; refuses values nobody declared."""
    present = _unique(values)
    declared = {0} | set(ignore) | {v for named in regions.values() for v in named}
    if unknown := [v for v in present if v not in declared]:
        shown = ", ".join(map(str, unknown[:8]))
        if len(unknown) > 16 and len(regions) <= 2 and max(unknown) <= 65535:
            raise Quarantined("label_grey", f"{len(unknown)} undeclared grey values; state label_threshold")
        raise Quarantined("label_values", f"{shown}{', ...' if len(unknown) > 8 else ''}")
    layer_of = layers_of(regions)
    table = np.zeros((max(layer_of.values(), default=0) + 1, len(present)), np.uint8)
    for column, value in enumerate(present):
        if value in ignore:
            table[:, column] = IGNORE
        for name, named in regions.items():
            if value in named and value not in ignore:
                table[layer_of[name], column] = ids[name]
    if present[0] >= 0 and present[-1] < 1 << 16:
        dense = np.zeros((len(table), present[-1] + 1), np.uint8)
        dense[:, present] = table
        coded = np.empty((len(table), *values.shape), np.uint8)
        coded[...] = dense[:, 0].reshape(-1, 1, 1, 1)
        for z, plane in enumerate(values):  # most voxels of most labels are 0
            where = np.flatnonzero(plane)
            coded[:, z].reshape(len(table), -1)[:, where] = dense[:, plane.ravel()[where]]
        return coded
    return table[:, np.searchsorted(present, values)]


def _unique(values: np.ndarray) -> list[int]:
    low, high = int(values.min()), int(values.max())
    if low >= 0 and high < 1 << 16:
        seen = np.zeros(high + 1, bool)
        for plane in values:
            rest = plane[plane != 0]
            seen[rest] = True
            seen[0] |= rest.size < plane.size
        return [int(v) for v in np.flatnonzero(seen)]
    return [int(v) for v in np.unique(values)]


def _place(coded: np.ndarray, raw: Raw, volume: Volume, geometry: str | None) -> Label:
    shape = tuple(coded.shape[1:])
    placeless = not raw.has_position or not raw.spacing_known or volume.spacing_source != "header"
    if geometry == "image" or placeless:
        if shape != volume.source_shape:
            raise Quarantined("label_shape", f"label {shape}, image {volume.source_shape} voxels (z, y, x)")
        layers = np.ascontiguousarray(volume.from_source(coded))
        return Label(layers, classes_of(layers), "image" if geometry == "image" else "grid", {}, {})

    check_affine(raw.affine, sheared=True)  # that of a straightened image leans
    layer = Channel("label", "MR", "arbitrary")
    own = Volume.on_grid(coded, (layer,) * len(coded), raw.affine).to_lps()
    if own.shape == volume.shape:
        apart = corner_distance(volume.affine, own.affine, volume.shape)
        if apart <= SAME_GRID:
            return Label(own.voxels, classes_of(own.voxels), "grid", {}, {})
    else:
        apart = np.inf
    if geometry is None and (own.shape == volume.shape or shape == volume.source_shape):
        detail = f"up to {apart:.1f} voxels away" if np.isfinite(apart) else "other axes"
        raise Quarantined("label_geometry", f"{detail}; state label_geometry: image or header")
    return resample(own, volume)


def resample(own: Volume, volume: Volume) -> Label:
    """Nearest neighbour in physical space, slice by slice; background outside the label's field."""
    to_label = np.linalg.inv(own.affine) @ volume.affine
    z, y, x = volume.shape
    jj, ii = np.meshgrid(np.arange(y, dtype=np.float64), np.arange(x, dtype=np.float64), indexing="ij")
    plane = [to_label[n, 0] * ii + to_label[n, 1] * jj + to_label[n, 3] for n in range(3)]
    size = own.shape[::-1]
    layers = np.zeros((len(own.voxels), z, y, x), np.uint8)
    for k in range(z):
        index = [np.floor(plane[n] + to_label[n, 2] * k + 0.5) for n in range(3)]
        inside = np.logical_and.reduce([(index[n] >= 0) & (index[n] < size[n]) for n in range(3)])
        i, j, kk = (index[n][inside].astype(np.intp) for n in range(3))
        layers[:, k, inside] = own.voxels[:, kk, j, i]

    lost, change = {}, {}
    ratio = float(np.prod(volume.spacing) / np.prod(own.spacing))
    to_image = np.linalg.inv(volume.affine) @ own.affine
    outside = kept = 0
    for label in classes_of(own.voxels):
        _, kz, jy, ix = np.nonzero(own.voxels == label)
        centres = np.stack([ix, jy, kz, np.ones_like(ix)], axis=1) @ to_image.T
        beyond = ((centres[:, :3] < -0.5) | (centres[:, :3] > np.array([x, y, z]) - 0.5)).any(axis=1)
        lost[label] = float(beyond.mean())
        outside, kept = outside + int(beyond.sum()), kept + int((~beyond).sum())
        change[label] = float((layers == label).sum() * ratio / len(ix) - 1.0)
    if lost and kept == 0:
        raise Quarantined("label_outside", "no overlap")
    if lost and outside / (outside + kept) > MAX_LOST:
        raise Quarantined("label_outside", f"{outside / (outside + kept):.1%} of the labelled voxels")
    return Label(layers, classes_of(layers), "resampled", lost, change)


def classes_of(layers: np.ndarray) -> tuple[int, ...]:
    present = _unique(layers.reshape(-1, *layers.shape[-2:])) if layers.size else []
    return tuple(v for v in present if v not in (0, IGNORE))
