"""PET values to standardised uptake values. Sources: QIBA's vendor-neutral pseudo-code; DICOM PS3.3 C.8.9."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pydicom import Dataset

PHILIPS_SUV = (0x7053, 0x1000)
#: What a patient weighs and is given: MBq for Bq, or grams for kilograms, lie outside.
WEIGHT_G, DOSE_BQ, HALF_LIFE_S = (200.0, 500_000.0), (1e6, 1e11), (60.0, 1e7)


def suv_factor(datasets: Sequence[Dataset], notes: dict[str, str]) -> float | None:
    """Factor from real PET values to SUVbw (g/ml), or None (noted) where the tags do not allow it or state
    what no patient weighs or is given.

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
        stated = ((weight, WEIGHT_G), (dose, DOSE_BQ), (half_life, HALF_LIFE_S))
        if not all(low <= value <= high for value, (low, high) in stated):
            notes["suv"] = "tags implausible"
            return None
        correction = str(ds.DecayCorrection).upper()
        if correction == "START":
            dose *= 2.0 ** (-_seconds_since_injection(datasets, isotope) / half_life)
        elif correction != "ADMIN":
            raise ValueError("not decay corrected")
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
