"""NumPy ``.npz``: an image, its label and its spacing by key.

Axes are (z, y, x), or (y, x) for one slice, running to the head, the back and the left of the patient as far
as anyone knows (noted as ``no_form``). ``spacing`` lists mm in the order of those axes; in files with
``imgs``, which MedSAM's scripts write from SimpleITK's ``GetSpacing``, in the order x, y, z.
"""

from __future__ import annotations

import math
import zipfile
import zlib
from pathlib import Path

import numpy as np

from data_pipeline.errors import Quarantined
from data_pipeline.readers.raw import Raw, check_size

IMAGES = ("image", "imgs", "img", "data", "vol", "volume", "arr_0")
LABELS = ("label", "gts", "seg", "mask", "labels", "segmentation")
XYZ = "imgs"
#: No scan shrinks so far: an image that does, and would take this many bytes, is not read.
BOMB_RATIO, BOMB_BYTES = 500, 1 << 28


def decode(path: Path, *, label: bool = False) -> Raw:
    """The image of a file, or with ``label`` its label. Nothing pickled is ever loaded."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = {name.removesuffix(".npy"): name for name in archive.namelist()}
            wanted = LABELS if label else IMAGES
            found = [key for key in wanted if key in members]
            if not found:
                what = "label" if label else "image"
                raise Quarantined("no_pixel_data", f"no array called {' or '.join(wanted)} for the {what}")
            if len(found) > 1:
                raise Quarantined("unsupported_layout", f"arrays {' and '.join(found)} in one file")
            array = _array(archive, members[found[0]], path.stat().st_size, label)
            spacing = (
                _array(archive, members["spacing"], path.stat().st_size) if "spacing" in members else None
            )
    except (zipfile.BadZipFile, EOFError, zlib.error) as error:
        raise Quarantined(_damage(path), type(error).__name__) from error
    except (ValueError, OSError, NotImplementedError, RuntimeError, SyntaxError) as error:
        raise Quarantined("unreadable", type(error).__name__) from error
    if array.dtype.kind == "b":
        array = array.astype(np.uint8)
    if array.dtype.kind not in "iuf" or array.dtype.itemsize > 8:
        raise Quarantined("unsupported_layout", f"voxels of type {array.dtype.kind}{array.dtype.itemsize}")
    if 0 in array.shape:
        raise Quarantined("no_pixel_data", "an axis of length 0")
    if array.ndim in (3, 4) and array.shape[-1] in (3, 4):  # red, green, blue; no volume is so narrow
        if (array != array[..., :1]).any():
            raise Quarantined("colour", f"{array.shape[-1]} components per voxel")
        array = array[..., 0]
    if array.ndim not in (2, 3):
        raise Quarantined("unsupported_layout", f"{array.ndim} axes")
    array = np.ascontiguousarray(array, array.dtype.newbyteorder("="))
    affine = np.eye(4)
    if spacing is not None:
        affine[:3, :3] = np.diag(_xyz(spacing, array.ndim, XYZ in members))
    return Raw(
        frames=array.reshape((1,) * (4 - array.ndim) + array.shape),
        affine=affine,
        spacing_known=spacing is not None,
        has_position=False,
        provenance={"no_form": "true"},
    )


def _array(archive: zipfile.ZipFile, member: str, size: int, label: bool = False) -> np.ndarray:
    """One array, its header checked before its voxels take any memory."""
    with archive.open(member) as file:
        version = np.lib.format.read_magic(file)
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        if version not in read:
            raise Quarantined("unsupported_layout", f"npy format {version[0]}.{version[1]}")
        shape, fortran, dtype = read[version](file)
        if dtype.hasobject:
            raise Quarantined("unsupported_layout", "an array of Python objects")
        voxels = math.prod(shape)
        check_size(voxels, voxels * dtype.itemsize, size)
        stored = archive.getinfo(member).compress_size
        if not label and voxels * dtype.itemsize > max(BOMB_BYTES, BOMB_RATIO * stored):
            raise Quarantined("unsupported_layout", f"{stored} bytes that grow to {voxels * dtype.itemsize}")
        data = file.read(voxels * dtype.itemsize)
        if len(data) < voxels * dtype.itemsize:
            raise Quarantined("truncated", f"{len(data)} of {voxels * dtype.itemsize} bytes")
    return np.frombuffer(data, dtype).reshape(shape, order="F" if fortran else "C")


def _xyz(spacing: np.ndarray, axes: int, sitk_order: bool) -> list[float]:
    if spacing.dtype.kind not in "iuf" or spacing.size not in (axes, 3) or not np.isfinite(spacing).all():
        raise Quarantined("bad_geometry", f"a spacing of {spacing.size} numbers for {axes} axes")
    mm = [float(v) for v in spacing.ravel()]
    mm = mm if sitk_order else mm[::-1]
    if len(mm) == 2:
        mm.append(mm[0])
    return mm


def _damage(path: Path) -> str:
    with path.open("rb") as file:
        return "truncated" if file.read(2) == b"PK" else "unreadable"
