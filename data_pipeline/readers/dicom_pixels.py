"""DICOM pixel values: decompression, stored bits, MONOCHROME1, rescale, padding, PET SUV.

Sources: DICOM PS3.3 C.7.6.3 (image pixel), C.11.1 (modality LUT), C.8.9 (PET); QIBA SUV vendor-neutral
pseudo-code. VOI LUTs are never applied: they are for display.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

import numpy as np

from data_pipeline.errors import Quarantined

if TYPE_CHECKING:
    from pydicom import Dataset

Source = tuple["Dataset", "int | None", "tuple[Dataset, ...]"]
PHILIPS_SUV = (0x7053, 0x1000)


@dataclass(frozen=True)
class Pixels:
    """``array`` (n, y, x); real = array*slope + intercept; ``padding`` (n, y, x) bool or None; ``notes``
    technical."""

    array: np.ndarray
    slope: float
    intercept: float
    units: str
    padding: np.ndarray | None
    notes: dict[str, str]


def decode(sources: Sequence[Source], modality: str) -> Pixels:
    """Decode (dataset, frame number or None, functional groups) in order.

    Slices of one rescale keep their stored integers. Where the rescale varies from slice to slice (PET,
    Philips MR) the real values are returned as float32 with slope 1.
    """
    whole: dict[int, np.ndarray] = {}  # multi-frame objects are decoded once
    planes, scales, paddings = [], [], []
    notes: dict[str, str] = {}
    for ds, frame, groups in sources:
        if id(ds) not in whole:
            if frame is None:
                whole.clear()
            whole[id(ds)] = _stored(ds)
            for name in ("PixelData", "FloatPixelData", "DoubleFloatPixelData"):
                ds.pop(name, None)
        plane = whole[id(ds)] if frame is None else whole[id(ds)][frame]
        if plane.ndim != 2:
            raise Quarantined("unsupported_layout", "several frames without a place for each")
        paddings.append(_padding(ds, plane))
        if str(ds.get("PhotometricInterpretation", "")) == "MONOCHROME1":
            plane = _invert(ds, plane)
            notes["inverted"] = "true"
        planes.append(plane)
        scales.append(_rescale(ds, groups))
    ds = sources[0][0]
    units = _units(ds, modality, all(s is not None for s in scales))
    pairs = [s or (1.0, 0.0) for s in scales]
    if modality == "PT" and (factor := suv_factor([s[0] for s in sources], notes)) is not None:
        pairs = [(slope * factor, intercept * factor) for slope, intercept in pairs]
        units = "SUV"
    array = np.stack(planes)
    padded = modality in ("CT", "XR") and any(p.any() for p in paddings)
    padding = np.stack(paddings) if padded else None
    if len(set(pairs)) == 1:
        slope, intercept = pairs[0]
        if (
            padding is not None and modality == "CT"
        ):  # padding inside the range of air cannot be told from air
            padding &= array * slope + intercept < -1024
        return Pixels(
            array, slope, intercept, units, padding if padding is not None and padding.any() else None, notes
        )
    notes["rescale"] = "per slice"
    real = np.empty(array.shape, np.float32)
    for n, (slope, intercept) in enumerate(pairs):
        real[n] = array[n] * np.float64(slope) + intercept
    if padding is not None and modality == "CT":
        padding &= real < -1024
    return Pixels(real, 1.0, 0.0, units, padding, notes)


def _stored(ds: Dataset) -> np.ndarray:
    """Stored values, (y, x) or (frames, y, x), with bits above BitsStored masked or sign-extended."""
    if int(ds.get("SamplesPerPixel", 1)) != 1 or "PALETTE" in str(ds.get("PhotometricInterpretation", "")):
        raise Quarantined("colour", "more than one sample per pixel, or a palette")
    if "PixelData" not in ds and "FloatPixelData" not in ds and "DoubleFloatPixelData" not in ds:
        raise Quarantined("no_pixel_data")
    if not getattr(ds, "file_meta", None) or "TransferSyntaxUID" not in ds.file_meta:
        raise Quarantined("unreadable", "no transfer syntax: the bytes of the pixels have no known meaning")
    try:
        from pydicom.pixels import pixel_array

        array = pixel_array(ds)  # unlike ds.pixel_array, keeps no second copy in the dataset
    except Exception as error:  # each decoder plugin raises its own
        text = str(error).lower()
        short = any(
            word in text for word in ("less than expected", "truncated", "end of", "too short", "not enough")
        )
        raise Quarantined(
            "truncated" if short else "unreadable", f"pixels: {type(error).__name__}"
        ) from error
    if array.dtype.kind not in "iu":
        return array
    return significant_bits(
        array, int(ds.BitsStored), int(ds.get("HighBit", ds.BitsStored - 1)), bool(ds.PixelRepresentation)
    )


def significant_bits(array: np.ndarray, stored: int, high: int, signed: bool) -> np.ndarray:
    """Keep ``stored`` bits ending at bit ``high``; the rest (overlays, garbage) is dropped, the sign
    extended."""
    width = array.dtype.itemsize * 8
    if stored < 1 or high >= width or stored > high + 1:
        raise Quarantined("unreadable", f"BitsStored {stored}, HighBit {high} in {width} bits")
    if stored == width:
        return array
    kind = np.dtype(f"{'i' if signed else 'u'}{array.dtype.itemsize}")
    up = (array.view(kind) << kind.type(width - 1 - high)).astype(kind, copy=False)
    return up >> kind.type(width - stored)  # arithmetic where signed


def _invert(ds: Dataset, plane: np.ndarray) -> np.ndarray:
    """MONOCHROME1: the lowest stored value is the brightest; the full stored range is mirrored."""
    if plane.dtype.kind == "f":
        return plane.max() + plane.min() - plane
    bits = int(ds.BitsStored)
    top = -1 if ds.PixelRepresentation else (1 << bits) - 1
    return (top - plane.astype(np.int64)).astype(plane.dtype)


def _padding(ds: Dataset, plane: np.ndarray) -> np.ndarray:
    value = ds.get("PixelPaddingValue")
    if value is None:
        return np.zeros(plane.shape, bool)
    limit = ds.get("PixelPaddingRangeLimit")
    ends = sorted([int(value), int(value if limit is None else limit)])
    if ds.PixelRepresentation == 1:  # the tag is often written as unsigned for signed pixels
        ends = sorted(e - 65536 if e > 32767 else e for e in ends)
    return (plane >= ends[0]) & (plane <= ends[1])


def _rescale(ds: Dataset, groups: tuple[Dataset, ...]) -> tuple[float, float] | None:
    for group in groups:
        items = group.get("PixelValueTransformationSequence")
        if items:
            return float(items[0].RescaleSlope), float(items[0].RescaleIntercept)
    if ds.get("ModalityLUTSequence"):
        raise Quarantined("unsupported_layout", "a Modality LUT in place of a rescale")
    slope, intercept = ds.get("RescaleSlope"), ds.get("RescaleIntercept")
    if slope in (None, "") and intercept in (None, ""):
        return None
    pair = (
        float(slope if slope not in (None, "") else 1.0),
        float(intercept if intercept not in (None, "") else 0.0),
    )
    if pair[0] == 0.0 or not np.isfinite(pair).all():
        raise Quarantined("unreadable", "a rescale slope of zero")
    return pair


def _units(ds: Dataset, modality: str, rescaled: bool) -> str:
    if modality != "CT":
        return "arbitrary"
    kind = str(ds.get("RescaleType", "") or "HU").upper()
    return "HU" if rescaled and kind in ("HU", "US", "HOUNSFIELD") else "arbitrary"


def suv_factor(datasets: Sequence[Dataset], notes: dict[str, str]) -> float | None:
    """Factor from real PET values to SUVbw (g/ml), or None (noted) where the tags do not allow it.

    SUVbw = activity concentration [Bq/ml] * weight [g] / dose [Bq], the dose decayed to the time that the
    image is corrected to. Units CNTS need Philips' private factor; GML is SUV already.
    """
    ds = datasets[0]
    units = str(ds.get("Units", "")).upper()
    if units == "GML" and str(ds.get("SUVType", "") or "BW").upper() == "BW":
        return 1.0
    if units == "CNTS" and PHILIPS_SUV in ds and float(ds[PHILIPS_SUV].value or 0) > 0:
        return float(ds[PHILIPS_SUV].value)
    try:
        if units != "BQML":
            raise ValueError("units")
        isotope = ds.RadiopharmaceuticalInformationSequence[0]
        weight = float(ds.PatientWeight) * 1000.0
        dose, half_life = float(isotope.RadionuclideTotalDose), float(isotope.RadionuclideHalfLife)
        correction = str(ds.DecayCorrection).upper()
        if correction == "START":
            dose *= 2.0 ** (-_seconds_since_injection(datasets, isotope) / half_life)
        elif correction != "ADMIN":
            raise ValueError("not decay corrected")
        if min(weight, dose, half_life) <= 0 or not np.isfinite(weight / dose):
            raise ValueError("dose or weight")
        return weight / dose
    except (AttributeError, KeyError, IndexError, TypeError, ValueError):
        notes["suv"] = "tags missing"
        return None


def _seconds_since_injection(datasets: Sequence[Dataset], isotope: Dataset) -> float:
    ds = datasets[0]
    start = min(_time(d.SeriesDate, d.SeriesTime) for d in datasets)
    acquired = min(_time(d.AcquisitionDate, d.AcquisitionTime) for d in datasets if d.get("AcquisitionTime"))
    start = (
        acquired if acquired < start else start
    )  # the series time is that of later processing on some scanners
    if isotope.get("RadiopharmaceuticalStartDateTime"):
        text = str(isotope.RadiopharmaceuticalStartDateTime)
        injected = _time(text[:8], text[8:])
    else:
        injected = _time(ds.SeriesDate, isotope.RadiopharmaceuticalStartTime)
    elapsed = (start - injected).total_seconds()
    if not 0 <= elapsed < 86400:
        raise ValueError("injection after the scan")
    return elapsed


def _time(date: Any, time: Any) -> datetime:
    return datetime.strptime(f"{str(date)[:8]} {str(time).split('.')[0]:0<6.6}", "%Y%m%d %H%M%S")
