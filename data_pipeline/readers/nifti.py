"""NIfTI-1/2 and Analyze pairs with a NIfTI header, read with nibabel. Source: NIfTI-1 standard, nifti1.h."""

from __future__ import annotations

import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.errors import Quarantined
from data_pipeline.readers.gunzip import read_array
from data_pipeline.readers.raw import DEFLATE, Raw, check_extent, check_size
from data_pipeline.volume import corner_distance

RAS_TO_LPS = np.array([[-1.0], [-1.0], [1.0], [1.0]])  # of the rows of an affine
MILLIMETRES = {0: 1.0, 1: 1000.0, 2: 1.0, 3: 0.001}  # unknown, metre, millimetre, micrometre
SPACE_UNITS = 7  # the bits of xyzt_units that hold the unit of length


VECTORS = {1004, 1005, 1006, 1007, 1010}  # intents: matrices, displacements, vectors, quaternions


def decode(path: Path, *, accept_no_form: bool = False) -> Raw:
    """Unscaled voxels with slope and intercept (a slope of 0 or not finite means none).

    The sform is used if its code is above 0, else the qform; with neither the file is quarantined as
    ``no_geometry`` unless ``accept_no_form``: then the spacing alone is taken, on RAS axes as NIfTI's method
    1 says. ``provenance["qform_differs"]`` is set where both exist and lie more than a voxel apart, and
    ``units_unknown`` where the header names no unit of length (millimetres then). A fifth axis, or an intent
    that says vectors, makes ``components`` of the frames.
    """
    import nibabel

    try:
        image: Any = nibabel.load(path)
        header = image.header
        if not hasattr(header, "get_sform"):
            raise Quarantined("unsupported_format", "an Analyze header without NIfTI geometry")
        dtype = header.get_data_dtype()
        _check_size(path, header, dtype)
        voxels = image.dataobj
        if path.name.lower().endswith(".nii.gz"):
            data = read_array(path, voxels.offset, voxels.shape, voxels.dtype)
        else:
            data = np.asanyarray(voxels.get_unscaled())
        slope, intercept = float(voxels.slope), float(voxels.inter)
        unit = int(header["xyzt_units"]) & SPACE_UNITS
        zooms = header.get_zooms()
        intent = int(header["intent_code"])
    except Quarantined:
        raise
    except FileNotFoundError as error:  # the other file of a pair
        raise Quarantined("missing", "the .img of the .hdr, or the .hdr of the .img") from error
    except (EOFError, zlib.error) as error:
        raise Quarantined("truncated", "the compressed data end early") from error
    except MemoryError:
        raise
    except Exception as error:  # nibabel raises what it meets in a damaged header
        code = "truncated" if "Expected" in str(error) and "bytes" in str(error) else "unreadable"
        raise Quarantined(code, _misnamed(path) or type(error).__name__) from error
    if unit not in MILLIMETRES:
        raise Quarantined("bad_geometry", "a unit of length that is none of m, mm and micrometre")
    if data.dtype.names is not None:
        raise Quarantined("colour", "an RGB NIfTI")
    if data.dtype.kind not in "iuf" or data.dtype.itemsize > 8:
        raise Quarantined("unsupported_layout", f"voxels of type {data.dtype}")
    if not np.isfinite([slope, intercept]).all() or slope == 0.0:
        slope, intercept = 1.0, 0.0

    components = data.ndim >= 5 and data.shape[4] > 1
    frames = _frames_zyx(data)
    affine, provenance = _affine(header, frames.shape[1:], zooms, accept_no_form)
    affine = RAS_TO_LPS * np.asarray(affine, dtype=np.float64) + 0.0  # which leaves no -0.0
    affine[:3] *= MILLIMETRES[unit]
    if MILLIMETRES[unit] == 1.0:
        check_extent(affine, frames.shape[1:])
    if unit == 0:
        provenance["units_unknown"] = "true"
    return Raw(
        frames=frames,
        affine=affine,
        slope=slope,
        intercept=intercept,
        provenance=provenance,
        components=len(frames) > 1 and (components or intent in VECTORS),
    )


def _misnamed(path: Path) -> str:
    """How the first bytes of a file disagree with its name, or ""."""
    try:
        with path.open("rb") as file:
            start = file.read(2)
    except OSError:
        return ""
    compressed = start == b"\x1f\x8b"
    if not start:
        return "an empty file"
    if compressed == path.name.lower().endswith(".gz"):
        return ""
    return "gzip under a name without .gz" if compressed else "a name with .gz and no gzip"


def _affine(
    header: Any, shape: tuple[int, ...], zooms: tuple[float, ...], accept_no_form: bool
) -> tuple[np.ndarray, dict[str, str]]:
    """Voxel index to RAS, in the header's unit, and what there is to note of it."""
    sform, sform_code = header.get_sform(coded=True)
    try:
        qform, qform_code = header.get_qform(coded=True)
    except ValueError:  # a quaternion longer than 1: nibabel loads the file only where there is a sform
        return sform, {"qform_differs": "true"}
    if sform_code:
        grid = (shape[0], shape[1], shape[2])
        solid = np.isfinite(sform).all() and abs(np.linalg.det(sform[:3, :3])) > 0
        differs = qform_code and solid and not corner_distance(sform, qform, grid) <= 1.0
        return sform, {"qform_differs": "true"} if differs else {}
    if qform_code:
        return qform, {}
    if accept_no_form:
        return np.diag([*(float(z) for z in zooms[:3]), *[1.0] * (4 - len(zooms[:3]))]), {"no_form": "true"}
    raise Quarantined(
        "no_geometry", "sform_code and qform_code are 0; accept_no_form takes the spacing alone"
    )


def _check_size(path: Path, header: Any, dtype: np.dtype) -> None:
    shape = header.get_data_shape()
    voxels = math.prod(int(n) for n in shape)
    compressed = path.name.lower().endswith(".gz")
    pair = path.name.lower().endswith((".hdr", ".img"))
    if not pair:
        check_size(voxels, voxels * dtype.itemsize, path.stat().st_size, DEFLATE if compressed else 1)


def _frames_zyx(data: np.ndarray) -> np.ndarray:
    """(x, y[, z[, t[, 1...]]]) to (t, z, y, x) in native byte order, without a copy where none is needed."""
    while data.ndim > 3 and data.shape[-1] == 1:
        data = data[..., 0]
    if data.ndim == 5 and data.shape[3] == 1:  # components lie on the fifth axis
        data = data[:, :, :, 0]
    if data.ndim not in (2, 3, 4):
        raise Quarantined("unsupported_layout", f"{data.ndim} axes")
    if 0 in data.shape:
        raise Quarantined("no_pixel_data", "an axis of length 0")
    data = data.reshape(*data.shape, *(1,) * (4 - data.ndim)) if data.ndim < 4 else data
    return data.T.astype(data.dtype.newbyteorder("="), copy=False)
