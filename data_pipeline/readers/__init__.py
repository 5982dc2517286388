"""Raw scans to `Volume`: NIfTI, NRRD, MHA/MHD, NumPy `.npz`, DICOM, and PNG/JPEG/TIFF radiographs.

A reader returns the true voxels in their true place, or raises `Quarantined` with a code. Formats are
imported when first needed.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, cast, get_args

import numpy as np

from data_pipeline.errors import Quarantined, UserError
from data_pipeline.locations import Location, fetched, is_remote
from data_pipeline.readers.raw import Raw, check_affine
from data_pipeline.readers.shear import is_sheared, straighten
from data_pipeline.volume import Channel, Modality, SpacingSource, Triple, Units, Volume, corner_distance

NIFTI = (".nii", ".nii.gz", ".hdr", ".img")
ITK = (".nrrd", ".nhdr", ".mha", ".mhd")
PICTURES = (".png", ".jpg", ".jpeg", ".tif", ".tiff")
NUMPY = (".npz",)
DICOM = (".dcm", ".dicom", ".ima")
SUFFIXES = NIFTI + ITK + PICTURES + NUMPY + DICOM
PAIRED = (".img",)  # read through its .hdr
#: What a channel has to be for real units to be its own.
MEASURED_BY = {"HU": "CT", "SUV": "PT"}
#: Real values of a scan are no larger, and not all closer together; statistics of others overflow.
LARGEST, CLOSEST = 1e15, 1e-30
#: Real values of a CT below this are fill outside the field of view (-2000, -2048, -3024, ...), never tissue
#: or air.
CT_PADDING_BELOW = -1500.0
Shear = Literal["resample", "quarantine"]


def is_image(path: Location) -> bool:
    """Whether a file is one of the kinds read here by its suffix (the second file of a pair is not)."""
    name = path.name.lower()
    return name.endswith(SUFFIXES) and not name.endswith(PAIRED)


def companions(path: Location) -> list[Location]:
    """Files without which one cannot be read: the other of a NIfTI pair, the voxels of a detached header.

    Of those that the header names, only files beside or below it: it comes from elsewhere.
    """
    name = path.name
    if name.lower().endswith((".hdr", ".img")):
        other = {".hdr": ".img", ".img": ".hdr", ".HDR": ".IMG", ".IMG": ".HDR"}.get(name[-4:], ".img")
        return [path.with_name(name[:-4] + other)]
    if name.lower().endswith((".nhdr", ".mhd")):
        from data_pipeline.readers.itk import data_files

        return [path.parent / part for part in data_files(path)]
    return []


def read(
    path: Location,
    *,
    modality: str | Sequence[str] | None = None,
    spacing: Triple | None = None,
    field_mm: float | None = None,
    accept_no_form: bool = False,
    units: str | None = None,
    channel_names: Sequence[str] | None = None,
    series: str | Sequence[Location] | None = None,
    accept_secondary: bool = False,
    shear: Shear = "resample",
    voi_lut: bool = False,
) -> Volume:
    """One file, or one DICOM series (a folder of any nesting), as a `Volume` in nearest L, P, S order.

    ``modality`` (CT, MR, XR or PT; one per channel or one for all) must be stated for formats that do not
    carry it; for DICOM it must agree with the header. ``channel_names`` says that the fourth axis is
    channels; otherwise frames of a 4D file are a series in time and the first is read (`read_all` gives
    more). ``units`` HU are taken for CT channels and SUV for PT channels alone. ``spacing`` (z, y, x) mm is
    used where the file states none; ``field_mm`` is the width of a picture's field where neither does.
    ``accept_no_form`` accepts a NIfTI that has spacing but no position.
    ``series`` is the SeriesInstanceUID to take from a folder that holds several, or the very files of the
    series; one of several acquisitions is refused (`read_all` gives them). ``shear`` says whether axes that
    are not at right angles (gantry tilt) are resampled (`shear.straighten`) or refused. ``voi_lut`` applies
    the VOI LUT or window of DICOM radiographs. Raises `Quarantined` for an input that cannot be trusted,
    `UserError` for a missing declaration.
    """
    options = _Options(
        modality, spacing, field_mm, accept_no_form, units, series, accept_secondary, shear, voi_lut
    )
    raws = options.decode(path, components=channel_names is not None)
    raw = _only(raws, path)
    try:
        if channel_names is not None and len(raw.frames) != len(channel_names) and len(channel_names) > 1:
            raise Quarantined("channel_count", f"{len(raw.frames)} frames for {len(channel_names)} channels")
        count = len(channel_names) if channel_names else 1
        return options.volume(raw, range(count), channel_names)
    except Quarantined as error:
        raise error.at(path) from error.__cause__


def read_all(
    path: Location,
    *,
    more_frames: int = 3,
    seed: int = 0,
    modality: str | None = None,
    spacing: Triple | None = None,
    field_mm: float | None = None,
    accept_no_form: bool = False,
    units: str | None = None,
    series: str | Sequence[Location] | None = None,
    accept_secondary: bool = False,
    shear: Shear = "resample",
    voi_lut: bool = False,
) -> list[Volume]:
    """Like `read` for a file whose fourth axis is time, or a DICOM series of several acquisitions.

    Of each acquisition, the first frame in time and at most ``more_frames`` others are drawn without
    replacement by ``seed`` and returned in time order; ``provenance["frame"]`` says which each is, and
    ``provenance["acquisition"]`` of which acquisition. A 3D file gives one volume.
    """
    options = _Options(
        modality, spacing, field_mm, accept_no_form, units, series, accept_secondary, shear, voi_lut
    )
    volumes = []
    try:
        for raw in options.decode(path):
            n = len(raw.frames)
            others = random.Random(f"frames {seed} {n}").sample(range(1, n), min(more_frames, n - 1))
            volumes += [options.volume(raw, [frame], None) for frame in [0, *sorted(others)]]
        return volumes
    except Quarantined as error:
        raise error.at(path) from error.__cause__


def read_channels(
    paths: Sequence[Location],
    *,
    modality: str | Sequence[str] | None = None,
    channel_names: Sequence[str] | None = None,
    spacing: Triple | None = None,
    field_mm: float | None = None,
    accept_no_form: bool = False,
    units: str | None = None,
    series: str | Sequence[Location] | None = None,
    accept_secondary: bool = False,
    shear: Shear = "resample",
    voi_lut: bool = False,
) -> Volume:
    """Files on one grid, stacked as channels (one file with channels on its fourth axis is read as such).

    Grids must agree within 0.1 voxel at every corner, else `Quarantined` ``channel_grid``. Channels of
    different dtype are stacked in the smallest dtype that holds all exactly.
    """
    if not paths:
        raise UserError("read_channels was given no file")
    names = list(channel_names) if channel_names else None
    if len(paths) == 1:
        return read(
            paths[0],
            modality=modality,
            channel_names=names,
            spacing=spacing,
            field_mm=field_mm,
            units=units,
            accept_no_form=accept_no_form,
            series=series,
            accept_secondary=accept_secondary,
            shear=shear,
            voi_lut=voi_lut,
        )
    if names is not None and len(names) != len(paths):
        raise Quarantined("channel_count", f"{len(paths)} files for {len(names)} channels", paths[0])
    volumes = [
        read(
            p,
            modality=_modality_of(modality, n),
            channel_names=[names[n]] if names else [str(n)],
            spacing=spacing,
            field_mm=field_mm,
            accept_no_form=accept_no_form,
            units=units,
            series=series,
            accept_secondary=accept_secondary,
            shear=shear,
            voi_lut=voi_lut,
        )
        for n, p in enumerate(paths)
    ]
    first = volumes[0]
    for n, other in enumerate(volumes[1:], 1):
        if other.source_shape != first.source_shape:
            raise Quarantined("channel_grid", f"channel {n} has another size than channel 0", paths[n])
        apart = corner_distance(first.source_affine, other.source_affine, first.source_shape)
        if apart > 0.1:
            raise Quarantined("channel_grid", f"channel {n} lies {apart:.2f} voxels from channel 0", paths[n])
    invalid = None
    if any(v.invalid is not None for v in volumes):
        invalid = np.concatenate(
            [np.zeros(v.voxels.shape, bool) if v.invalid is None else v.invalid for v in volumes]
        )
    return replace(
        first,
        voxels=np.concatenate(
            [v.voxels.astype(np.result_type(*(u.voxels for u in volumes)), copy=False) for v in volumes]
        ),
        channels=tuple(c for v in volumes for c in v.channels),
        slope=tuple(s for v in volumes for s in v.slope),
        intercept=tuple(s for v in volumes for s in v.intercept),
        invalid=invalid,
    )


class _Options:
    """The declarations of one read, applied to what a decoder found."""

    def __init__(
        self,
        modality: str | Sequence[str] | None,
        spacing: Triple | None,
        field_mm: float | None,
        accept_no_form: bool,
        units: str | None,
        series: str | Sequence[Location] | None,
        accept_secondary: bool,
        shear: Shear,
        voi_lut: bool,
    ) -> None:
        self.shear, self.voi_lut = shear, voi_lut
        self.modality, self.spacing, self.field_mm, self.units = modality, spacing, field_mm, units
        self.accept_no_form, self.series, self.accept_secondary = accept_no_form, series, accept_secondary

    def decode(self, path: Location, components: bool = False) -> list[Raw]:
        self.path = path
        raws = decode_all(
            path,
            accept_no_form=self.accept_no_form,
            series=self.series,
            accept_secondary=self.accept_secondary,
            shear=self.shear,
            voi_lut=self.voi_lut,
        )
        if raws[0].components and not components:
            raise Quarantined("unsupported_layout", f"{len(raws[0].frames)} components per voxel", path)
        return raws

    def volume(self, raw: Raw, frames: Sequence[int] | range, names: Sequence[str] | None) -> Volume:
        modalities = [self._modality(raw, n) for n in range(len(frames))]
        units = [self._units(raw, m) for m in modalities]
        affine, source = self._spacing(raw)
        leading = list(frames) == list(range(len(frames)))  # a view then, no copy
        voxels = raw.frames[: len(frames)] if leading else raw.frames[list(frames)]
        padding = None if raw.padding is None else raw.padding[list(frames)]
        voxels, invalid = _separate_invalid(voxels, padding, modalities, raw.slope, raw.intercept, units)
        provenance = dict(raw.provenance)
        if len(raw.frames) > 1 and len(frames) == 1:
            provenance["frame"] = f"{frames[0]} of {len(raw.frames)}"
        channels = tuple(
            Channel(names[n] if names else m, cast("Modality", m), cast("Units", units[n]))
            for n, m in enumerate(modalities)
        )
        c = len(channels)
        volume = Volume.on_grid(
            voxels,
            channels,
            affine,
            slope=(raw.slope,) * c,
            intercept=(raw.intercept,) * c,
            spacing_source=source,
            invalid=invalid,
            provenance=provenance,
            instances=raw.instances,
        )
        return (straighten(volume) if is_sheared(affine) else volume).to_lps()

    def _modality(self, raw: Raw, channel: int) -> str:
        declared = _modality_of(self.modality, channel)
        if declared is not None and declared not in get_args(Modality):
            raise UserError(f"{self.path}: modality {declared!r} is not known; use CT, MR, XR or PT")
        if declared is None and raw.modality is None:
            raise UserError(
                f"{self.path}: the file does not say its modality; state modality: CT, MR, XR or PT"
            )
        if declared is not None and raw.modality is not None and declared != raw.modality:
            raise Quarantined("modality_mismatch", f"the header says {raw.modality}, declared is {declared}")
        return cast("str", declared or raw.modality)

    def _units(self, raw: Raw, modality: str) -> str:
        if self.units is not None and MEASURED_BY.get(self.units, modality) == modality:
            return self.units
        if modality == "CT" and raw.units == "arbitrary":
            raise Quarantined(
                "not_hounsfield", "the header gives no rescale to HU; or declare units: arbitrary"
            )
        return raw.units or ("HU" if modality == "CT" else "arbitrary")

    def _spacing(self, raw: Raw) -> tuple[np.ndarray, SpacingSource]:
        if raw.spacing_known:
            return check_affine(raw.affine, sheared=self.shear == "resample"), "header"
        if self.spacing is not None:
            mm, source = self.spacing, "declared"
        elif self.field_mm is not None:
            pixel = self.field_mm / raw.frames.shape[-1]
            mm, source = (pixel, pixel, pixel), "assumed"
        else:
            raise Quarantined(
                "no_spacing", "state spacing: [z, y, x] in mm, or field_mm: the width of the picture"
            )
        scaled = raw.affine.copy()
        scaled[:3, :3] = raw.affine[:3, :3] * np.array(mm[::-1], dtype=np.float64)
        return check_affine(scaled, sheared=self.shear == "resample"), cast("SpacingSource", source)


def decode(
    path: Location,
    *,
    accept_no_form: bool = False,
    series: str | Sequence[Location] | None = None,
    accept_secondary: bool = False,
    label: bool = False,
) -> Raw:
    """The frames of a file or series as they are stored, without any declaration. Raises `Quarantined`.

    A remote file is fetched for the time of the call. ``label`` takes the label of a file that holds both.
    """
    raws = decode_all(
        path, accept_no_form=accept_no_form, series=series, accept_secondary=accept_secondary, label=label
    )
    return _only(raws, path)


def decode_all(
    path: Location,
    *,
    accept_no_form: bool = False,
    series: str | Sequence[Location] | None = None,
    accept_secondary: bool = False,
    shear: Shear = "resample",
    voi_lut: bool = False,
    label: bool = False,
) -> list[Raw]:
    """Like `decode`, every acquisition of a DICOM series (any other file is one)."""
    try:
        if is_remote(path):
            with fetched([path, *companions(path)]) as local:
                if path not in local:
                    raise Quarantined("missing")
                near = local[path]
                if _is_dicom(near):
                    return _decode_dicom(near, series, accept_secondary, shear, voi_lut)
                return [_decode(near, accept_no_form, label)]
        here = Path(path)  # type: ignore[arg-type]
        if not here.exists():
            raise Quarantined("missing")
        if _is_dicom(here):
            return _decode_dicom(here, series, accept_secondary, shear, voi_lut)
        return [_decode(here, accept_no_form, label)]
    except Quarantined as error:
        raise type(error)(error.code, error.detail, path) from error.__cause__


def _decode_dicom(
    path: Path, series: str | Sequence[Location] | None, accept_secondary: bool, shear: Shear, voi_lut: bool
) -> list[Raw]:
    from data_pipeline.readers import dicom

    return dicom.decode_all(
        path, series=series, accept_secondary=accept_secondary, shear=shear, voi_lut=voi_lut
    )


def _decode(path: Path, accept_no_form: bool, label: bool) -> Raw:
    name = path.name.lower()
    if name.endswith(NIFTI):
        from data_pipeline.readers import nifti

        return nifti.decode(path, accept_no_form=accept_no_form)
    if name.endswith(ITK):
        from data_pipeline.readers import itk

        return itk.decode(path, accept_no_form=accept_no_form, label=label)
    if name.endswith(PICTURES):
        from data_pipeline.readers import radiograph

        return radiograph.decode(path)
    if name.endswith(NUMPY):
        from data_pipeline.readers import npz

        return npz.decode(path, label=label)
    raise Quarantined("unsupported_format", f"readable: {' '.join(SUFFIXES)} and DICOM")


def _only(raws: list[Raw], path: Location) -> Raw:
    if len(raws) > 1:
        raise Quarantined("several_acquisitions", f"{len(raws)} of them", path)
    return raws[0]


def _is_dicom(path: Path) -> bool:
    name = path.name.lower()
    if path.is_dir():
        return True
    if name.endswith(DICOM):
        return True
    if name.endswith(SUFFIXES):
        return False
    from data_pipeline.readers.dicom_series import claims_dicom

    return claims_dicom(path)


def _modality_of(modality: str | Sequence[str] | None, channel: int) -> str | None:
    if modality is None or isinstance(modality, str):
        return modality
    return modality[channel] if len(modality) > 1 else modality[0]


def _separate_invalid(
    voxels: np.ndarray,
    padding: np.ndarray | None,
    modalities: Sequence[str],
    slope: float,
    intercept: float,
    units: Sequence[str],
) -> tuple[np.ndarray, np.ndarray | None]:
    """Mark what is no measurement, and put the channel's lowest valid value there."""
    limits = [
        _padding_limit(voxels.dtype, slope, intercept) if (modality, unit) == ("CT", "HU") else None
        for modality, unit in zip(modalities, units)
    ]
    if padding is None and all(_all_measured(c, limit, slope, intercept) for c, limit in zip(voxels, limits)):
        return voxels, None
    invalid = np.zeros(voxels.shape, bool) if padding is None else padding.copy()
    if voxels.dtype.kind == "f":
        invalid |= ~np.isfinite(voxels)
    for n, limit in enumerate(limits):
        if limit is not None:
            with np.errstate(invalid="ignore"):
                invalid[n] |= voxels[n] < limit if slope > 0 else voxels[n] > limit
    if not invalid.any():
        return voxels, None
    voxels = voxels.copy()
    for n in range(len(voxels)):
        valid = ~invalid[n]
        if not valid.any():
            raise Quarantined("no_valid_voxels")
        lowest = (
            voxels[n].min(where=valid, initial=_highest(voxels.dtype))
            if slope > 0
            else voxels[n][valid].max()
        )
        np.copyto(voxels[n], lowest, where=invalid[n])
        _check_range(lowest, voxels[n].max() if slope > 0 else voxels[n].min(), slope, intercept)
    return voxels, invalid


def _padding_limit(dtype: np.dtype, slope: float, intercept: float) -> float:
    """The stored value of `CT_PADDING_BELOW`; of integers a whole number in range, which keeps the comparison
    in their own dtype."""
    limit = (CT_PADDING_BELOW - intercept) / slope
    if dtype.kind == "f":
        return limit
    info = np.iinfo(dtype)
    return int(np.clip(np.ceil(limit) if slope > 0 else np.floor(limit), info.min, info.max))


def _all_measured(channel: np.ndarray, limit: float | None, slope: float, intercept: float) -> bool:
    """Whether every voxel is finite and none is padding, without a mask. Raises `Quarantined`
    ``value_range``."""
    lowest, highest = channel.min(), channel.max()
    if not (np.isfinite(lowest) and np.isfinite(highest)):
        return False
    if limit is not None and not (lowest >= limit if slope > 0 else highest <= limit):
        return False
    _check_range(lowest, highest, slope, intercept)
    return True


def _check_range(one: float, other: float, slope: float, intercept: float) -> None:
    """Refuse real values, of which ``one`` and ``other`` are the ends as stored, that no scan has."""
    ends = float(one) * slope + intercept, float(other) * slope + intercept
    if max(map(abs, ends)) > LARGEST:
        raise Quarantined("value_range", "beyond 1e15")
    if one != other and abs(ends[1] - ends[0]) < CLOSEST:
        raise Quarantined("value_range", "all within 1e-30")


def _highest(dtype: np.dtype) -> float | int:
    return np.inf if dtype.kind == "f" else int(np.iinfo(dtype).max)
