"""The content hash: two files that hold the same voxels are one scan, whatever their dtype, scaling, format
or axis order.
"""

from __future__ import annotations

import math

import numpy as np
import xxhash

from data_pipeline.volume import Volume

GRID_DECIMALS = 2  # of a millimetre: headers of one scan differ by rounding
EXACT = 1 << 24  # whole numbers up to here are float32 numbers


def content_hash(volume: Volume) -> tuple[str, str]:
    """(hash of values and shape, hash of values, shape and grid) of a volume in canonical order, each 32 hex
    digits.

    A value counts as float32 of ``voxels * slope + intercept`` (computed in float64); an invalid voxel as
    one that is equal to no value. The grid is the affine to the hundredth of a millimetre. The digest is
    xxh3-128: accidental collisions are out of reach (2^-64 among 2^32 scans); it is no signature.
    """
    digest = xxhash.xxh3_128(repr(volume.voxels.shape).encode())
    for n, channel in enumerate(volume.voxels):
        slope, intercept = float(volume.slope[n]), float(volume.intercept[n])
        whole = _whole(channel.dtype, slope, intercept)
        for z, plane in enumerate(channel):  # a plane at a time stays in the cache
            if whole:
                real = plane.astype("<f4")
                if intercept:
                    real += np.float32(intercept)
            elif slope == 1.0 and intercept == 0.0 and plane.dtype == np.float32:
                real = plane.astype("<f4") + np.float32(0)  # + 0 turns -0.0 into 0.0
            else:
                with np.errstate(over="ignore"):  # beyond float32: infinite, one value like another
                    real = (plane * np.float64(slope) + intercept).astype("<f4") + np.float32(0)
            if volume.invalid is not None:
                real[volume.invalid[n, z]] = np.nan
            digest.update(np.ascontiguousarray(real).data)
    values = digest.hexdigest()
    grid = np.round(volume.affine, GRID_DECIMALS) + 0.0
    digest.update(grid.astype("<f8").tobytes())
    return values, digest.hexdigest()


def _whole(dtype: np.dtype, slope: float, intercept: float) -> bool:
    """Whether float32 arithmetic is exact: integers of up to 16 bits, slope 1, a whole intercept."""
    if dtype.kind not in "iu" or dtype.itemsize > 2 or slope != 1.0:
        return False
    return math.isfinite(intercept) and intercept.is_integer() and abs(intercept) + (1 << 16) <= EXACT
