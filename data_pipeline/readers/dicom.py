"""DICOM files of one series to images, with pydicom. Source: DICOM PS3.3 (image plane, enhanced multi-frame).

Slices are sorted by their position along the normal of the image plane, so k grows along that normal (row
direction × column direction), as in SimpleITK. Nothing is interpolated here: slices that do not lie on evenly
spaced grids are refused with a code. What makes an image of its own is stated in `dicom_split`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

import numpy as np

from data_pipeline.errors import Quarantined
from data_pipeline.locations import Location
from data_pipeline.privacy import allowed, technical_fields
from data_pipeline.readers import dicom_pixels
from data_pipeline.readers.dicom_acquisition import ECHO, MODIFIER, TIMING, number
from data_pipeline.readers.dicom_frames import Frame, frames_of
from data_pipeline.readers.dicom_grid import tilt_degrees
from data_pipeline.readers.dicom_kinds import MODALITIES, listed, refusal
from data_pipeline.readers.dicom_pixels import PIXELS, Pixels
from data_pipeline.readers.dicom_sequence import sequence
from data_pipeline.readers.dicom_series import files_of_series, read_header
from data_pipeline.readers.dicom_split import Acquisition, acquisitions
from data_pipeline.readers.raw import Raw

if TYPE_CHECKING:
    from pydicom import Dataset

Shear = Literal["resample", "quarantine"]
DIFFUSION_B = 10.0  # s/mm²: a series with a b-value above it is one of diffusion, its b = 0 images too


def decode_all(
    path: Path,
    *,
    series: str | Sequence[Location] | None = None,
    accept_secondary: bool = False,
    shear: Shear = "resample",
    voi_lut: bool = False,
) -> list[Raw]:
    """The images of one DICOM file, or of the one image series in a folder: an image an acquisition.

    ``series`` chooses among several by SeriesInstanceUID, or gives the files so that no folder is searched.
    Each `Raw` has frames (t, z, y, x), t > 1 for repeats in time or among gradient directions only; its
    affine leans where the gantry was tilted, or such a series is refused if ``shear`` is "quarantine".
    ``voi_lut`` applies the VOI LUT or window of radiographs. Raises `Quarantined` where no image is whole; of
    several, the whole ones are returned and ``provenance`` counts the rest (``acquisitions_refused``,
    ``frames_refused``, ``objects_refused``).
    """
    if series is not None and not isinstance(series, str):
        files = [cast("Path", file) for file in series]  # remote files are fetched by the caller
    elif path.is_file():
        files = [path]
    else:
        files = list(files_of_series(path, series))
    try:
        return _decode(
            [read_header(file, with_pixels=True) for file in files], accept_secondary, shear, voi_lut
        )
    except (Quarantined, MemoryError):
        raise
    except Exception as error:  # pydicom converts a value when it is first used: a damaged one fails anywhere
        raise Quarantined("unreadable", f"a header value: {type(error).__name__}") from error


def _decode(found: list[Dataset], accept_secondary: bool, shear: Shear, voi_lut: bool) -> list[Raw]:
    codes = [refusal(ds, accept_secondary) for ds in found]
    datasets = _distinct([ds for ds, code in zip(found, codes) if code is None])
    if not datasets:
        raise Quarantined(next(code for code in codes if code is not None))
    if not any(name in ds for ds in datasets for name in PIXELS):
        raise Quarantined("no_pixel_data")
    kinds = {MODALITIES[str(ds.Modality)] for ds in datasets}
    if len(kinds) > 1:
        raise Quarantined("several_series", f"{len(kinds)} modalities in one series")
    modality = kinds.pop()
    left_out = Counter(code for code in codes if code is not None)
    if modality == "XR":
        raws, refused = _radiographs(datasets, voi_lut)
    else:
        frames: list[Frame] = []
        for ds in datasets:
            made, bad = frames_of(ds, modality)
            frames += made
            left_out.update(bad)
        if not frames:
            raise Quarantined(next(iter(left_out)))
        raws, refused = _volumes(frames, modality, shear)
    if not raws:
        raise refused[0]
    notes = {}
    if len(raws) + len(refused) > 1:
        notes["acquisitions_refused"] = str(len(refused))
    if left_out:
        notes["objects_refused"] = str(left_out.total())
    notes = {name: value for name, value in notes.items() if value != "0"}
    several = len(raws) > 1
    return [
        replace(
            raw,
            provenance={
                **raw.provenance,
                **notes,
                **({"acquisition": f"{n} of {len(raws)}"} if several else {}),
            },
        )
        for n, raw in enumerate(raws)
    ]


def _distinct(found: list[Dataset]) -> list[Dataset]:
    """A file stored twice is one slice, not two; one UID given to several slices is still several."""
    seen: dict[tuple, Dataset] = {}
    for ds in found:
        uid = str(ds.get("SOPInstanceUID", "") or id(ds))
        place = tuple(str(v) for v in listed(ds.get("ImagePositionPatient")))
        seen.setdefault((uid, str(ds.get("InstanceNumber", "")), place), ds)
    return list(seen.values())


def _volumes(frames: list[Frame], modality: str, shear: Shear) -> tuple[list[Raw], list[Quarantined]]:
    found, refused = acquisitions(frames, modality)
    if shear == "quarantine":
        upright = []
        for acquisition in found:
            angle = tilt_degrees(acquisition.step, acquisition.frames[0][0].normal)
            if angle < 1e-6:
                upright.append(acquisition)
            else:
                refused.append(Quarantined("gantry_tilt", f"slices lean by {angle:.1f} degrees"))
        found = upright
    pixels = dicom_pixels.decode_all([[f for time in a.frames for f in time] for a in found], modality)
    diffusion = any((a.b_value or 0.0) >= DIFFUSION_B for a in found)
    raws = []
    for acquisition, decoded in zip(found, pixels):
        if isinstance(decoded, Quarantined):
            refused.append(decoded)
        else:
            raws.append(_raw(acquisition, decoded, modality, diffusion))
    return raws, refused


def _raw(acquisition: Acquisition, pixels: Pixels, modality: str, diffusion: bool) -> Raw:
    first = acquisition.frames[0][0]
    affine = np.eye(4)
    affine[:3, 0] = first.orientation[0] * first.pixel[1]
    affine[:3, 1] = first.orientation[1] * first.pixel[0]
    affine[:3, 2] = acquisition.step
    affine[:3, 3] = first.position
    notes = dict(pixels.notes)
    if len(acquisition.frames[0]) == 1 and first.thickness is None:
        notes["slice_thickness"] = "assumed"
    if acquisition.left_out:
        notes["frames_refused"] = str(acquisition.left_out)
    if modality == "MR":
        b_value = acquisition.b_value if diffusion else None
        if b_value is not None:
            notes["b_value"] = f"{b_value:.0f}"
        notes["sequence"] = sequence(first, b_value, len(acquisition.frames))
    shape = (len(acquisition.frames), len(acquisition.frames[0]), *first.shape)
    frames = [frame for time in acquisition.frames for frame in time]
    return Raw(
        frames=pixels.array.reshape(shape),
        affine=affine,
        slope=pixels.slope,
        intercept=pixels.intercept,
        modality=modality,
        units=pixels.units,
        padding=None if pixels.padding is None else pixels.padding.reshape(shape),
        provenance={**technical_fields(first.dataset, notes), **allowed(_timing(first))},
        instances=_instances(frame.dataset for frame in frames),
    )


def _timing(frame: Frame) -> dict[str, str]:
    """Timing that an enhanced object states in its functional groups."""
    found = {
        "EchoTime": frame.get("EffectiveEchoTime", ECHO),
        "RepetitionTime": frame.get("RepetitionTime", TIMING),
        "FlipAngle": frame.get("FlipAngle", TIMING),
        "InversionTime": frame.get("InversionTimes", MODIFIER),
    }
    return {name: str(value) for name, v in found.items() if (value := number(v)) is not None}


def _radiographs(datasets: list[Dataset], voi_lut: bool) -> tuple[list[Raw], list[Quarantined]]:
    """Each radiograph is an image of its own: depth 1, no place in the patient."""
    raws: list[Raw] = []
    refused: list[Quarantined] = []
    for ds in sorted(datasets, key=lambda ds: number(ds.get("InstanceNumber")) or 0.0):
        if int(ds.get("NumberOfFrames", 1) or 1) > 1:
            refused.append(Quarantined("unsupported_layout", "a radiograph of several frames"))
            continue
        spacing, how = radiograph_spacing(ds)
        nowhere = np.zeros((2, 3)), np.zeros(3), (1.0, 1.0), None
        frame = Frame(ds, (int(ds.Rows), int(ds.Columns)), *nowhere)
        (pixels,) = dicom_pixels.decode_all([[frame]], "XR", voi_lut)
        if isinstance(pixels, Quarantined):
            refused.append(pixels)
            continue
        affine = np.eye(4)
        if spacing is not None:
            affine = np.diag([spacing[1], spacing[0], spacing[1], 1.0])
            pixels.notes["pixel_spacing"] = how
        raws.append(
            Raw(
                frames=pixels.array[np.newaxis],
                affine=affine,
                slope=pixels.slope,
                intercept=pixels.intercept,
                spacing_known=spacing is not None,
                has_position=False,
                modality="XR",
                units="arbitrary",
                padding=None if pixels.padding is None else pixels.padding[np.newaxis],
                provenance=technical_fields(ds, pixels.notes),
                instances=_instances([ds]),
            )
        )
    return raws, refused


def radiograph_spacing(ds: Dataset) -> tuple[tuple[float, float] | None, str]:
    """(y, x) mm in the patient, and how it is known: ``calibrated``, ``magnification`` (detector spacing
    divided by it) or ``detector``. DICOM PS3.3 10.7.1.3: PixelSpacing that repeats ImagerPixelSpacing with no
    type of calibration is that of the detector."""
    stated, detector = _pair(ds.get("PixelSpacing")), _pair(ds.get("ImagerPixelSpacing"))
    detector = detector or _pair(ds.get("NominalScannedPixelSpacing"))
    calibrated = bool(ds.get("PixelSpacingCalibrationType")) or detector is None
    if stated is not None and (calibrated or not np.allclose(stated, detector or stated, rtol=1e-4)):
        return stated, "calibrated"
    if detector is None:
        return None, ""
    magnification = number(ds.get("EstimatedRadiographicMagnificationFactor"))
    if magnification is None or not 1.0 <= magnification <= 10.0:
        return detector, "detector"
    return (detector[0] / magnification, detector[1] / magnification), "magnification"


def _pair(value: object) -> tuple[float, float] | None:
    values = [number(v) for v in listed(value)]
    if len(values) != 2 or None in values or min(v for v in values if v is not None) <= 0:
        return None
    return float(values[0] or 0), float(values[1] or 0)


def _instances(datasets: Iterable[Dataset]) -> frozenset[str]:
    return frozenset(str(ds.SOPInstanceUID) for ds in datasets if ds.get("SOPInstanceUID"))
