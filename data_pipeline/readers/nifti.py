"""NIfTI-1/2 and Analyze pairs with a NIfTI header, read with nibabel. Source: NIfTI-1 standard, nifti1.h."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.errors import Quarantined
from data_pipeline.readers.raw import Raw, check_affine
from data_pipeline.volume import corner_distance

RAS_TO_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
MILLIMETRES = {"meter": 1000.0, "mm": 1.0, "micron": 0.001, "unknown": 1.0}


def decode(path: Path, *, accept_no_form: bool = False) -> Raw:
    """Unscaled voxels with slope and intercept.

    The sform is used if its code is above 0, else the qform; with neither the file is quarantined as
    ``no_geometry`` unless ``accept_no_form``: then the spacing alone is taken, on RAS axes as NIfTI's method
    1 says. ``provenance["qform_differs"]`` is set where both exist and lie more than a voxel apart.
    """
    import nibabel

    try:
        image: Any = nibabel.load(path)
        header = image.header
        if not hasattr(header, "get_sform"):
            raise Quarantined("unsupported_format", "an Analyze header without NIfTI geometry")
        data = np.asanyarray(image.dataobj.get_unscaled())
        slope, intercept = float(image.dataobj.slope), float(image.dataobj.inter)
        sform, sform_code = header.get_sform(coded=True)
        qform, qform_code = header.get_qform(coded=True)
        unit = header.get_xyzt_units()[0]
        zooms = header.get_zooms()
    except Quarantined:
        raise
    except (EOFError, zlib.error) as error:
        raise Quarantined("truncated", "the compressed data end early") from error
    except Exception as error:  # nibabel raises what it meets in a damaged header
        code = "truncated" if "Expected" in str(error) and "bytes" in str(error) else "unreadable"
        raise Quarantined(code, type(error).__name__) from error
    if data.dtype.names is not None:
        raise Quarantined("colour", "an RGB NIfTI")
    if data.dtype.kind not in "iuf" or data.dtype.itemsize > 8:
        raise Quarantined("unsupported_layout", f"voxels of type {data.dtype}")
    if not np.isfinite([slope, intercept]).all() or slope == 0.0:
        slope, intercept = 1.0, 0.0

    frames = _frames_zyx(data)
    shape = frames.shape[1:]
    provenance = {}
    if sform_code:
        affine = check_affine(sform)
        if qform_code and corner_distance(sform, qform, shape) > 1.0:
            provenance["qform_differs"] = "true"
    elif qform_code:
        affine = qform
    elif accept_no_form:
        affine = np.diag([*(float(z) for z in zooms[:3]), 1.0])
        provenance["no_form"] = "true"
    else:
        raise Quarantined(
            "no_geometry", "sform_code and qform_code are 0; accept_no_form takes the spacing alone"
        )
    affine = RAS_TO_LPS @ np.asarray(affine, dtype=np.float64)
    affine[:3] *= MILLIMETRES[unit]
    return Raw(frames=frames, affine=affine, slope=slope, intercept=intercept, provenance=provenance)


def _frames_zyx(data: np.ndarray) -> np.ndarray:
    """(x, y[, z[, t[, 1...]]]) to (t, z, y, x) in native byte order, without a copy where none is needed."""
    while data.ndim > 3 and data.shape[-1] == 1:
        data = data[..., 0]
    if data.ndim == 5 and data.shape[3] == 1:  # NIfTI's vector axis
        data = data[:, :, :, 0]
    if data.ndim not in (2, 3, 4):
        raise Quarantined("unsupported_layout", f"{data.ndim} axes")
    if 0 in data.shape:
        raise Quarantined("no_pixel_data", "an axis of length 0")
    data = data.reshape(*data.shape, *(1,) * (4 - data.ndim)) if data.ndim < 4 else data
    return data.T.astype(data.dtype.newbyteorder("="), copy=False)
