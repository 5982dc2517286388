"""One case of a source to staged samples: read, place the label, quantise, reduce, encode. Runs in a worker
process.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np

from data_pipeline.content_hash import content_hash
from data_pipeline.content_voxels import CONTENT, content_voxels
from data_pipeline.errors import Quarantined, UserError
from data_pipeline.geometry import geometry_of, level_factors
from data_pipeline.intensity import statistics
from data_pipeline.journal import Journal, Outcome, Refusal
from data_pipeline.labels import Label, foreground, label_of
from data_pipeline.layouts import Case, read_case
from data_pipeline.manifest import FORMAT_VERSION
from data_pipeline.privacy import allowed
from data_pipeline.shard_writer import Staged
from data_pipeline.sources import SourceConfig
from data_pipeline.storage import INVALID, block_means, chunk_shape, encode, level_shape, quantise
from data_pipeline.volume import Volume

#: What was done to an input that a person should hear of: entries of a volume's provenance or a label's
#: notes, and things done here; with the sentence that the report counts.
SENTENCES = {
    "qform_differs": "sform taken where qform differs by more than a voxel",
    "no_form": "position unknown, spacing alone taken",
    "inverted": "MONOCHROME1 inverted",
    "shear": "sheared or tilted, resampled to right angles",
    "acquisitions_refused": "series of which some acquisitions were refused",
    "frames_refused": "multi-frame images of which some frames were refused",
    "objects_refused": "series of which some objects were refused",
    "units_unknown": "NIfTI without units of length, millimetres taken",
    "exif_orientation": "pictures turned as their EXIF orientation says",
    "modality_lut": "modality LUT applied",
    "voi_lut": "radiographs with the VOI LUT or window asked for",
    "pet_arbitrary": "PET without SUV, percentiles taken",
    "label_resampled": "labels resampled to the grid of the image",
    "label_image": "labels placed by the image's geometry",
    "label_contours": "labels drawn from contours",
    "contours_skipped": "contours that enclose no area (points, open ones), skipped",
    "contours_repeated": "contours that were there twice, drawn once",
    "contours_between_slices": "contours between the slices of their series, left out",
    "slices_without_contour": "slices inside a structure without a contour, left empty",
    "structures_without_contour": "structures without any contour",
    "structures_without_voxel": "structures smaller than a voxel",
    "label_files_refused": "RTSTRUCT and SEG files refused for an image",
    "text_masked": "radiographs with burned-in text masked",
    "defaced": "heads whose face was hidden or removed",
    "no_face_found": "volumes in which no face was found, though deface was asked for",
}
MAX_VOXELS = 2**31 - 1  # of one channel: foreground indices are int32


@dataclass(frozen=True)
class Settings:
    """What every case of a build shares. `ids` maps label names to the dataset's label ids, 1 to 254."""

    journal: Journal
    ids: Mapping[str, int]
    exact: bool
    seed: int
    level_min_voxels: int


@dataclass(frozen=True)
class Job:
    """One case to read: what was found, what is stated of its source, and what it is called in the dataset
    (`key`, `input` and `subject` are keyed hashes). `size` is the bytes of its files.
    """

    number: int
    case: Case
    source: SourceConfig
    key: str
    input: str
    subject: str
    fingerprint: str
    size: int = 0

    def outcome(self, **found: Any) -> Outcome:
        """The `Outcome` of this job: `samples`, `refusals`, `notes`."""
        case = self.case
        return Outcome(
            number=self.number,
            key=self.key,
            fingerprint=self.fingerprint,
            input=self.input,
            subject_hash=self.subject,
            source=self.source.name,
            subject=case.subject,
            split=case.split,
            paths=tuple(str(p) for p in case.images),
            label=None if case.label is None else str(case.label),
            **found,
        )


def prepare(job: Job, settings: Settings) -> list[str]:
    """Read one case, stage its samples and record the outcome in the journal; returns the codes of refusals.

    A refused input is an outcome; `UserError` is a mistake in the recipe.
    """
    samples: list[Staged] = []
    refusals: list[Refusal] = []
    notes: Counter[str] = Counter()
    try:
        for n, volume in enumerate(_volumes(job, settings.seed)):
            _check_burned_in(volume, job.source)
            hidden = None
            if job.source.deface is not None or job.source.burned_in == "mask":
                volume, hidden = _without_identity(volume, job.source, notes)
            label, faults = _label(job, volume, n, settings)
            refusals += [Refusal(fault.code, fault.detail, str(fault), "label") for fault in faults]
            notes.update(_noteworthy(volume, label))
            samples.append(_stage(job, n, volume, label, hidden, settings))
    except Quarantined as error:
        refusals.append(Refusal(error.code, error.detail, str(error.at(job.case.images[0])), "image"))
    except (UserError, OSError, MemoryError):
        raise  # a mistake in the recipe or trouble of this machine (a full disk), not of the file
    except Exception as error:  # one strange file of thousands is refused by name, never the end of the build
        message = f"{job.case.images[0]}: {type(error).__name__}: {error}"
        refusals.append(Refusal("unforeseen", type(error).__name__, message, "image"))
    if any(refusal.what == "image" for refusal in refusals):
        samples, notes = [], Counter()  # where one volume of a file is refused, none of it is kept
    settings.journal.finish(job.outcome(samples=tuple(samples), refusals=tuple(refusals), notes=dict(notes)))
    return [refusal.code for refusal in refusals]


def _noteworthy(volume: Volume, label: Label | None) -> Counter[str]:
    """What was done to an input, by names of `SENTENCES`: images once, parts of labels by number."""
    found = Counter(name for name in SENTENCES if name in volume.provenance)
    found["pet_arbitrary"] += any(c.modality == "PT" and c.units == "arbitrary" for c in volume.channels)
    if label is not None:
        found.update({name: int(count) for name, count in label.notes.items() if name in SENTENCES})
        found[f"label_{label.placed}"] += label.placed != "grid"
    return +found


def _volumes(job: Job, seed: int) -> list[Volume]:
    try:
        return read_case(job.case, job.source, seed)
    except FileNotFoundError as error:
        raise Quarantined("missing") from error
    except OSError as error:  # the right to read it, or a disk or network that fails
        raise Quarantined("unreadable", type(error).__name__) from error


def _label(
    job: Job, volume: Volume, number: int, settings: Settings
) -> tuple[Label | None, list[Quarantined]]:
    try:
        return label_of(job.case, job.source, volume, number, settings.ids)
    except OSError as error:
        return None, [Quarantined("label_unreadable", type(error).__name__)]


def _check_burned_in(volume: Volume, source: SourceConfig) -> None:
    if volume.channels[0].modality != "XR" or source.burned_in in ("accept", "mask"):
        return
    if volume.provenance.get("BurnedInAnnotation") != "NO":
        raise Quarantined("burned_in", "" if source.burned_in else "undecided")


def _without_identity(
    volume: Volume, source: SourceConfig, notes: Counter[str]
) -> tuple[Volume, np.ndarray | None]:
    """The volume with burned-in text or the face overwritten, and the voxels (z, y, x) to hide."""
    from data_pipeline.burned_in import text_mask  # scipy takes long to import, and few sources need these
    from data_pipeline.deface import face_mask

    if volume.channels[0].modality == "XR":
        if source.burned_in != "mask" or volume.provenance.get("BurnedInAnnotation") == "NO":
            return volume, None
        text = text_mask(volume)
        notes["text_masked"] += int(text.any())
        return _overwritten(volume, text), None
    face = face_mask(volume) if source.deface is not None else None
    if face is None or not face.any():
        notes["no_face_found"] += int(source.deface is not None)
        return volume, None
    notes["defaced"] += 1
    return (_overwritten(volume, face), None) if source.deface == "remove" else (volume, face)


def _overwritten(volume: Volume, mask: np.ndarray) -> Volume:
    """The voxels of `mask` (z, y, x) become invalid in every channel, and their values are gone."""
    if not mask.any():
        return volume
    invalid = np.zeros(volume.voxels.shape, bool) if volume.invalid is None else volume.invalid.copy()
    voxels = volume.voxels.copy()
    for channel, bad in zip(voxels, invalid):
        bad |= mask
        if bad.all():
            raise Quarantined("no_valid_voxels")
        channel[mask] = channel[~bad].min()
    return replace(volume, voxels=voxels, invalid=invalid)


def _stage(
    job: Job, frame: int, volume: Volume, label: Label | None, hidden: np.ndarray | None, settings: Settings
) -> Staged:
    if math.prod(volume.shape) > MAX_VOXELS:
        raise Quarantined(
            "unsupported_layout", f"{math.prod(volume.shape)} voxels a channel, at most {MAX_VOXELS}"
        )
    key = job.key if frame == 0 else f"{job.key}f{frame}"
    kind, axes = _geometry(volume, job.source.geometry)
    stored = quantise(volume.voxels, volume.slope, volume.intercept, volume.invalid, exact=settings.exact)
    norms = statistics(volume, stored)
    if not np.isfinite(norms).all():
        raise Quarantined("value_range", "a statistic is not finite")
    arrays = {"image": stored.voxels}
    visible = stored.voxels if hidden is None else _hide(stored.voxels, hidden)
    factors = level_factors(kind, axes)
    reduced = [  # a level is worth its bytes where the one before it is still large
        factor
        for before, factor in pairwise(factors)
        if math.prod(level_shape(volume.shape, before)) > settings.level_min_voxels
    ]
    arrays |= dict(zip(("l1", "l2"), block_means(visible, reduced)))
    if label is not None:
        arrays["seg"] = label.layers
    if hidden is not None:
        arrays["hide"] = hidden[None].astype(np.uint8)
    frames = {
        name: settings.journal.stage(
            job.key, job.fingerprint, frame, name, encode(array, chunk_shape(array.shape, kind, axes))
        )
        for name, array in arrays.items()
    }
    levels = [list(factors[n]) for n in range(sum(m in arrays for m in ("image", "l1", "l2")))]
    norm = [[slope, intercept, *n[2:]] for n, slope, intercept in zip(norms, stored.slope, stored.intercept)]
    names = {i: name for name, i in settings.ids.items()}
    origin = "" if label is None else label.origin or job.source.label_origin
    values_hash, grid_hash = content_hash(volume)
    content = content_voxels(stored, volume.channels, volume.spacing, key, hidden)
    labelled = label_columns(
        None if label is None else label.layers, origin, () if label is None else label.annotated, names
    )
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
        "content_hash": grid_hash,
        "valid_fraction": 1.0 if volume.invalid is None else float(1.0 - volume.invalid.mean()),
        **labelled,
        "foreground": [
            {"class": CONTENT, "layer": 0, "voxels": content.tolist()},
            *labelled["foreground"],
        ],
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
            "notes": dict(label.notes),
            "lost": {names[i]: share for i, share in label.lost.items()},
            "volume_change": {names[i]: share for i, share in label.volume_change.items()},
        }
    return Staged(row, description, frames, values_hash)


def _hide(stored: np.ndarray, hidden: np.ndarray) -> np.ndarray:
    """Stored voxels (c, z, y, x) without the hidden ones (z, y, x), for the reduced levels."""
    visible = stored.copy()
    visible[:, hidden] = INVALID if stored.dtype == np.int16 else np.nan
    return visible


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
