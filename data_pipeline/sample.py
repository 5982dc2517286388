"""One case of a source to staged samples: read, place the label, quantise, reduce, encode. Runs in a worker
process.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.errors import Quarantined, UserError
from data_pipeline.geometry import geometry_of, level_factors
from data_pipeline.intensity import statistics
from data_pipeline.labels import Label, foreground, read_label
from data_pipeline.layouts import Case, read_case
from data_pipeline.manifest import FORMAT_VERSION
from data_pipeline.privacy import allowed
from data_pipeline.shard_writer import Staged
from data_pipeline.sources import SourceConfig
from data_pipeline.storage import block_mean, chunk_shape, encode, level_shape, quantise
from data_pipeline.volume import Volume

GRID_DECIMALS = 2  # of a millimetre, in the content hash: headers of one scan differ by rounding
MAX_VOXELS = 2**31 - 1  # of one channel: foreground indices are int32


@dataclass(frozen=True)
class Settings:
    """What every case of a build shares. `ids` maps label names to the dataset's label ids, 1 to 254."""

    staging: Path
    ids: Mapping[str, int]
    exact: bool
    seed: int
    level_min_voxels: int


@dataclass(frozen=True)
class Job:
    """One case to read. `keys` gives the sample key of frame n; `input` and `subject` are keyed hashes."""

    number: int
    case: Case
    source: SourceConfig
    key: str
    input: str
    subject: str


@dataclass(frozen=True)
class Refusal:
    """An input or label that was not taken. `detail` may stand in the dataset, `message` (with path) may
    not.
    """

    code: str
    detail: str
    message: str
    what: str  # "image" or "label"


@dataclass
class Outcome:
    """What became of one job: samples (several for a 4D file), and refusals."""

    number: int
    samples: list[Staged] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)


def prepare(job: Job, settings: Settings) -> Outcome:
    """Read one case and stage its samples. A refused input is an outcome; `UserError` is a mistake in the
    recipe.
    """
    outcome = Outcome(job.number)
    try:
        volumes = read_case(job.case, job.source, settings.seed)
        for n, volume in enumerate(volumes):
            _check_burned_in(volume, job.source)
            label = None
            if n == 0 and job.case.label is not None:
                try:
                    label = _label(job, volume, settings)
                except Quarantined as error:
                    outcome.refusals.append(Refusal(error.code, error.detail, str(error), "label"))
            outcome.samples.append(_stage(job, n, volume, label, settings))
    except Quarantined as error:
        message = str(error.at(job.case.images[0]))
        outcome.refusals.append(Refusal(error.code, error.detail, message, "image"))
    except (UserError, OSError, MemoryError):
        raise  # a mistake in the recipe or trouble of this machine, not of the file
    except (
        Exception
    ) as error:  # one strange file among thousands is refused by name, never the end of the build
        message = f"{job.case.images[0]}: {type(error).__name__}: {error}"
        outcome.refusals.append(Refusal("unreadable", type(error).__name__, message, "image"))
    if any(refusal.what == "image" for refusal in outcome.refusals):
        for sample in outcome.samples:  # an earlier frame of a file of which a later one is refused
            for path in sample.frames.values():
                path.unlink()
        outcome.samples.clear()
    return outcome


def _check_burned_in(volume: Volume, source: SourceConfig) -> None:
    if volume.channels[0].modality != "XR" or source.burned_in == "accept":
        return
    if volume.provenance.get("BurnedInAnnotation") != "NO":
        raise Quarantined("burned_in", "" if source.burned_in else "undecided")


def _label(job: Job, volume: Volume, settings: Settings) -> Label:
    case, source = job.case, job.source
    if case.label is None or case.label_regions is None:
        raise UserError(
            f"{case.label}: source {source.name!r} has labels but no names; state labels: {{1: name}}"
        )
    return read_label(
        case.label,
        volume,
        regions=case.label_regions,
        ids=settings.ids,
        ignore=case.ignore,
        threshold=source.label_threshold,
        geometry=source.label_geometry,
        accept_no_form=source.accept_no_form,
    )


def _stage(job: Job, frame: int, volume: Volume, label: Label | None, settings: Settings) -> Staged:
    if math.prod(volume.shape) > MAX_VOXELS:
        raise Quarantined(
            "unsupported_layout", f"{math.prod(volume.shape)} voxels a channel, at most {MAX_VOXELS}"
        )
    key = job.key if frame == 0 else f"{job.key}f{frame}"
    kind, axes = _geometry(volume, job.source.geometry)
    norms = statistics(volume)
    stored = quantise(volume.voxels, volume.slope, volume.intercept, volume.invalid, exact=settings.exact)
    arrays = {"image": stored.voxels}
    factors = level_factors(kind, axes)
    for name, factor in (("l1", factors[1]), ("l2", factors[2])):
        before = factors[1] if name == "l2" else factors[0]
        if math.prod(level_shape(volume.shape, before)) <= settings.level_min_voxels:
            break
        arrays[name] = block_mean(stored.voxels, factor)
    if label is not None:
        arrays["seg"] = label.layers
    frames, size = {}, 0
    for name, array in arrays.items():
        path = settings.staging / f"{job.number:08d}-{frame}.{name}"
        data = encode(array, chunk_shape(array.shape, kind, axes))
        path.write_bytes(data)
        frames[name], size = path, size + len(data)
    levels = [list(factors[n]) for n in range(sum(m in arrays for m in ("image", "l1", "l2")))]
    norm = [[slope, intercept, *n[2:]] for n, slope, intercept in zip(norms, stored.slope, stored.intercept)]
    names = {i: name for name, i in settings.ids.items()}
    row: dict[str, Any] = {
        "key": key,
        "source": job.source.name,
        "subject": job.subject,
        "modality": volume.channels[0].modality,
        "modalities": [c.modality for c in volume.channels],
        "channels": [c.name for c in volume.channels],
        "sequence": volume.provenance.get("sequence", ""),
        "geometry": kind,
        "axes": list(axes),
        "shape": list(volume.voxels.shape),
        "spacing": list(volume.spacing),
        "spacing_source": volume.spacing_source,
        "dtype": str(stored.voxels.dtype),
        "max_error": stored.max_error,
        "levels": levels,
        "norm": norm,
        "content_hash": content_hash(volume),
        "valid_fraction": 1.0 if volume.invalid is None else float(1.0 - volume.invalid.mean()),
        **label_columns(
            None if label is None else label.layers, job.source.label_origin, job.case.annotated, names
        ),
    }
    description: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        **{
            name: row[name]
            for name in ("key", "source", "geometry", "shape", "spacing", "spacing_source", "dtype")
        },
        **{name: row[name] for name in ("axes", "levels", "max_error", "content_hash", "valid_fraction")},
        "input": job.input,
        "channels": [
            {"name": c.name, "modality": c.modality, "units": c.units, "norm": n}
            for c, n in zip(volume.channels, norm)
        ],
        "affine_lps": volume.affine.tolist(),
        "to_source": {
            "axes": list(volume.axes),
            "flips": list(volume.flips),
            "shape": list(volume.source_shape),
            "affine_lps": volume.source_affine.tolist(),
        },
        "provenance": allowed(volume.provenance),
    }
    if label is not None:
        description["label"] = {
            "origin": row["label_origin"],
            "annotated": row["annotated"],
            "classes": row["classes"],
            "placed": label.placed,
            "lost": {names[i]: share for i, share in label.lost.items()},
            "volume_change": {names[i]: share for i, share in label.volume_change.items()},
        }
    return Staged(row, description, frames, size)


def label_columns(
    layers: np.ndarray | None, origin: str, annotated: tuple[str, ...] | list[str], names: Mapping[int, str]
) -> dict[str, Any]:
    """The manifest's label columns for `layers` (layer, z, y, x), or for a sample without a label."""
    if layers is None:
        return {"label_origin": "", "annotated": [], "classes": [], "foreground": []}
    sampled = foreground(layers)
    return {
        "label_origin": origin,
        "annotated": list(annotated),
        "classes": [names[i] for i in sorted({f.label for f in sampled})],
        "foreground": [{"class": f.label, "layer": f.layer, "voxels": f.voxels.tolist()} for f in sampled],
    }


def content_hash(volume: Volume) -> str:
    """Hash of real values (as float32) and grid, whatever dtype, file or axis order they came in; 32 hex
    digits.
    """
    digest = hashlib.blake2b(digest_size=16)
    digest.update(repr(volume.voxels.shape).encode())
    grid = np.round(volume.affine, GRID_DECIMALS) + 0.0  # + 0.0 turns -0.0 into 0.0
    digest.update(grid.astype("<f8").tobytes())
    for n in range(len(volume.voxels)):
        for plane, bad in zip(volume.voxels[n], _planes(volume, n)):
            real = (plane * np.float64(volume.slope[n]) + volume.intercept[n]).astype("<f4") + np.float32(0)
            if bad is not None:
                real[bad] = np.nan
            digest.update(real.tobytes())
    return digest.hexdigest()


def _planes(volume: Volume, channel: int) -> Any:
    return [None] * volume.shape[0] if volume.invalid is None else volume.invalid[channel]


def _geometry(volume: Volume, stated: str | None) -> tuple[str, tuple[int, int, int]]:
    """Geometry class and stem order of the axes: the header's, unless the recipe states another class."""
    kind, axes = geometry_of(volume.shape, volume.spacing)
    if stated is None or stated == kind:
        return kind, axes
    if stated == "volume":
        return stated, (0, 1, 2)
    if stated == "planar" and 1 not in volume.shape:
        raise Quarantined("bad_geometry", "geometry planar is stated for an image of several slices")
    first = volume.shape.index(1) if stated == "planar" else int(np.argmax(volume.spacing))
    rest = [a for a in range(3) if a != first]
    return stated, (first, rest[0], rest[1])
