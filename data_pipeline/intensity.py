"""How the voxels of each channel become numbers a network likes: constants from the whole volume, never a
crop.

``v = clip(real, low, high); if compress: v = asinh(v / compress); x = (v - center) / scale``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from data_pipeline.errors import Quarantined
from data_pipeline.quantise import INVALID, Stored, slab_depth
from data_pipeline.volume import Channel, Volume

CT_RANGE = (-1024.0, 3071.0)
CT_CENTER, CT_SCALE = -200.0, 500.0
SUV_RANGE = (0.0, 100.0)
SUV_COMPRESS, SUV_CENTER, SUV_SCALE = 1.0, 0.5, 1.0
PERCENTILES = (0.5, 99.5)
#: Voxels below this share of the way from the lowest to the 99th percentile are background (air) in MR and
#: PET.
BACKGROUND = 0.1
#: Share of the volume that must be foreground for the background rule to hold; else all valid voxels count.
LEAST_FOREGROUND = 0.02
AIR_SHARE = 0.02
TISSUE_HU = -500.0  # between lung and fat
TISSUE_HU = -500.0  # between lung and fat
#: Floats above this number are counted in bins instead of sorted.
MANY, BINS, OUTERMOST = 1 << 20, 1 << 18, 0.0005


class Norm(NamedTuple):
    """Seven constants of one channel, in the order of the manifest's ``norm`` column."""

    slope: float
    intercept: float
    low: float
    high: float
    center: float
    scale: float
    compress: float

    def apply(self, stored: np.ndarray) -> np.ndarray:
        """Normalised float64 values of stored ones (any shape)."""
        v = np.clip(np.asarray(stored, np.float64) * self.slope + self.intercept, self.low, self.high)
        if self.compress:
            v = np.arcsinh(v / self.compress)
        return (v - self.center) / self.scale


def statistics(volume: Volume, stored: Stored | None = None) -> list[Norm]:
    """One `Norm` per channel.

    CT in HU and PET in SUV have fixed constants. MR, X-ray and whatever is in arbitrary units are clipped at
    the 0.5 and 99.5 percentiles of the voxels that are not background and standardised over these voxels
    after clipping. With ``stored``, the 16-bit form of the volume, its values are counted and its slope and
    intercept given: exact and without a sort, whatever dtype the scan has. Raises `Quarantined`
    ``not_hounsfield`` for a CT declared or taken as HU that cannot be, ``constant``, ``no_valid_voxels``.
    """
    return [_channel(volume, n, channel, stored) for n, channel in enumerate(volume.channels)]


def _channel(volume: Volume, n: int, channel: Channel, stored: Stored | None) -> Norm:
    if stored is not None and stored.voxels.dtype == np.int16:
        voxels, slope, intercept = stored.voxels[n], stored.slope[n], stored.intercept[n]
        invalid = voxels == INVALID if voxels.min() == INVALID else None
    else:
        voxels, slope, intercept = volume.voxels[n], volume.slope[n], volume.intercept[n]
        invalid = None if volume.invalid is None else volume.invalid[n]
    lowest, highest = _extremes(voxels, invalid)
    first, last = sorted((lowest * slope + intercept, highest * slope + intercept))
    if first == last:
        raise Quarantined("constant", f"{first:g}")
    if channel.units == "SUV":
        return Norm(slope, intercept, *SUV_RANGE, SUV_CENTER, SUV_SCALE, SUV_COMPRESS)
    hounsfield = channel.modality == "CT" and channel.units == "HU"
    if hounsfield and first < 0:
        return Norm(slope, intercept, *CT_RANGE, CT_CENTER, CT_SCALE, 0.0)
    values, counts = _histogram(voxels, invalid, lowest, highest)
    real = values * np.float64(slope) + intercept
    if slope < 0:
        real, counts = real[::-1], None if counts is None else counts[::-1]
    if hounsfield:
        _check_hounsfield(real, counts)
        return Norm(slope, intercept, *CT_RANGE, CT_CENTER, CT_SCALE, 0.0)
    kept, weights = _without_background(real, counts, strong=channel.modality in ("MR", "PT"))
    low, high = _percentile(kept, weights, PERCENTILES)
    if high <= low:  # nearly all voxels equal: the full range
        low, high = float(real[0]), float(real[-1])
        kept, weights = real, counts
    clipped = np.clip(kept, low, high)
    center = float(np.average(clipped, weights=weights))
    scale = float(np.sqrt(np.average((clipped - center) ** 2, weights=weights)))
    return Norm(slope, intercept, low, high, center, max(scale, 1e-6 * (high - low)), 0.0)


def _valid(voxels: np.ndarray, invalid: np.ndarray | None) -> Iterator[np.ndarray]:
    """The valid voxels of a channel, a few planes at a time."""
    step = slab_depth(voxels.shape)
    for z in range(0, len(voxels), step):
        slab = voxels[z : z + step]
        if invalid is not None and invalid[z : z + step].any():
            slab = slab[~invalid[z : z + step]]
        if slab.size:
            yield slab.ravel()


def _extremes(voxels: np.ndarray, invalid: np.ndarray | None) -> tuple[float, float]:
    found = [(slab.min(), slab.max()) for slab in _valid(voxels, invalid)]
    if not found:
        raise Quarantined("no_valid_voxels")
    return float(min(low for low, _ in found)), float(max(high for _, high in found))


def _histogram(
    voxels: np.ndarray, invalid: np.ndarray | None, lowest: float, highest: float
) -> tuple[np.ndarray, np.ndarray | None]:
    """Sorted valid values (float64) and their counts; counts None means one each.

    Integers over a range of up to 20 bits are counted, which is exact and needs no sort.
    """
    if voxels.dtype.kind in "iu" and highest - lowest < 1 << 20:
        low = int(lowest)
        counts = np.zeros(int(highest) - low + 1, np.int64)
        for slab in _valid(voxels, invalid):
            counts += np.bincount(np.subtract(slab, low, dtype=np.int64), minlength=len(counts))
        present = np.flatnonzero(counts)
        return (present + low).astype(np.float64), counts[present]
    valid = voxels.ravel() if invalid is None else voxels[~invalid]
    if valid.size > MANY:
        return _binned(valid)
    return np.sort(valid).astype(np.float64), None


def _binned(valid: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sorted values and counts of many floats, without a sort: equal bins over the range that holds all but
    the outermost 0.05 % on each side, found by a first count over the whole range. The end bins stand for
    the true minimum and maximum; no value between moves by more than the width of a bin."""
    lowest, highest = float(valid.min()), float(valid.max())
    low, high = lowest, highest
    for _ in range(2):
        step = (high - low) / (BINS - 1)
        if not step > 0:
            break
        place = (valid - valid.dtype.type(low)) * valid.dtype.type(1 / step)
        np.clip(place, 0, BINS - 1, out=place)
        counts = np.bincount(np.rint(place, out=place).astype(np.int32), minlength=BINS)
        values = low + step * np.arange(BINS)
        share = np.cumsum(counts) / valid.size
        first, last = np.searchsorted(share, [OUTERMOST, 1 - OUTERMOST])
        low, high = float(values[max(0, first - 1)]), float(values[min(BINS - 1, last + 1)])
    else:
        values[0], values[-1] = lowest, highest
        present = np.flatnonzero(counts)
        return values[present], counts[present]
    return np.sort(valid).astype(np.float64), np.ones(valid.size, np.int64)


def _check_hounsfield(real: np.ndarray, counts: np.ndarray | None) -> None:
    """Air is near -1000 HU: where the lowest values are at or above 0 and fill a share of the image as air
    does, the values are not HU."""
    if real[0] < 0:
        return
    near = real <= real[0] + 0.02 * (real[-1] - real[0])
    share = float(near.mean() if counts is None else counts[near].sum() / counts.sum())
    if share >= AIR_SHARE:
        raise Quarantined(
            "not_hounsfield",
            f"minimum {real[0]:g} with {share:.0%} of the voxels near it; or declare units: arbitrary",
        )


def _without_background(
    real: np.ndarray, counts: np.ndarray | None, strong: bool
) -> tuple[np.ndarray, np.ndarray | None]:
    """Drop the plateau of the lowest value (padding, collimation) and, if ``strong``, air below a tenth of
    the range."""
    total = float(len(real) if counts is None else counts.sum())

    def share(start: int) -> float:
        return float((len(real) - start if counts is None else counts[start:].sum()) / total)

    start = 0
    plateau = int(np.searchsorted(real, real[0], side="right"))
    if share(plateau) < 0.98:
        start = plateau
    if strong:
        low, high = _percentile(real, counts, (0.1, 99.0))
        above = int(np.searchsorted(real, low + BACKGROUND * (high - low), side="right"))
        if share(above) >= LEAST_FOREGROUND:
            start = max(start, above)
    if share(start) < LEAST_FOREGROUND:
        start = 0
    return real[start:], None if counts is None else counts[start:]


def content_level(channel: Channel, values: np.ndarray) -> float:
    """The real value from which a voxel shows more than air, found from valid ``values`` of the channel (any
    sample of them, float64): of CT in HU a fixed one, of a radiograph none, else what `statistics` takes for
    background."""
    if channel.units == "HU":
        return TISSUE_HU
    if channel.modality == "XR" or not len(values):
        return -np.inf
    return float(_without_background(np.sort(values), None, strong=True)[0][0])


def _percentile(real: np.ndarray, counts: np.ndarray | None, percent: tuple[float, ...]) -> list[float]:
    """Percentiles (the lowest value that at least the given share does not exceed) of sorted values."""
    if counts is None:
        last = len(real) - 1
        return [float(real[min(last, max(0, int(np.ceil(p / 100 * len(real))) - 1))]) for p in percent]
    cumulative = np.cumsum(counts)
    places = np.searchsorted(cumulative, np.array(percent) / 100 * cumulative[-1], side="left")
    return [float(v) for v in real[np.minimum(places, len(real) - 1)]]
