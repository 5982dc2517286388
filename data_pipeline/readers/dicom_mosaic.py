"""Siemens mosaics: the slices of one volume as tiles of one image.

Sources: the CSA header as read by nibabel.nicom; the position of a mosaic is that of the top left tile as if
the tile had the size of the whole image, so that it moves by half the difference (nibabel's MosaicWrapper,
SPM, dcm2niix agree).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from data_pipeline.errors import Quarantined
from data_pipeline.readers.dicom_kinds import words

if TYPE_CHECKING:
    from pydicom import Dataset

CSA_IMAGE = (0x0029, "SIEMENS CSA HEADER", 0x10)
TILES = (0x0019, "SIEMENS MR HEADER", 0x0A)


def is_mosaic(ds: Dataset) -> bool:
    """Whether ImageType says so."""
    return "MOSAIC" in words(ds.get("ImageType"))


def tiles(
    ds: Dataset, orientation: np.ndarray, pixel: tuple[float, float]
) -> list[tuple[tuple[slice, slice], np.ndarray]]:
    """Rows and columns of each tile, in slice order, and the LPS mm from the mosaic's position to the tile's.

    Raises `Quarantined` ``mosaic`` where the number of tiles, the slice direction or the slice distance is
    not stated.
    """
    csa = csa_header(ds)
    count = int(next(iter(_values(csa, "NumberOfImagesInMosaic")), 0)) or _count(private(ds, *TILES))
    normal = _values(csa, "SliceNormalVector")
    distance = ds.get("SpacingBetweenSlices") or ds.get("SliceThickness")
    if not count or len(normal) != 3 or not distance:
        raise Quarantined("mosaic", "no number of tiles, slice direction or slice distance")
    across = math.ceil(math.sqrt(count))
    rows, columns = int(ds.Rows), int(ds.Columns)
    if rows % across or columns % across:
        raise Quarantined("mosaic", f"{rows} x {columns} pixels are not {across} x {across} tiles")
    cross = np.cross(*orientation)
    turned = float(np.dot(normal, cross))
    if abs(abs(turned) - 1) > 1e-2:
        raise Quarantined("mosaic", "the slice direction is not normal to the slices")
    high, wide = rows // across, columns // across
    start = orientation[0] * pixel[1] * (columns - wide) / 2 + orientation[1] * pixel[0] * (rows - high) / 2
    step = cross * math.copysign(abs(float(distance)), turned)
    boxes = [
        (slice(y, y + high), slice(x, x + wide))
        for y in range(0, rows, high)
        for x in range(0, columns, wide)
    ]
    return [(box, start + n * step) for n, box in enumerate(boxes[:count])]


def csa_header(ds: Dataset) -> dict[str, Any]:
    """The tags of the CSA image header by name, each a dict with ``items``; empty where there is none."""
    raw = private(ds, *CSA_IMAGE)
    if not isinstance(raw, bytes) or not raw:
        return {}
    from nibabel.nicom import csareader

    try:
        tags = csareader.read(raw)["tags"]
    except Exception:  # its checks raise a type of their own, and struct.error where the header ends early
        return {}
    return dict(tags)


def private(ds: Dataset, group: int, creator: str, offset: int) -> Any:
    """The value of a private element by the creator that reserved its block, or None."""
    try:
        return ds.private_block(group, creator)[offset].value
    except KeyError:
        return None


def _values(csa: dict[str, Any], name: str) -> list[float]:
    return [float(v) for v in csa.get(name, {}).get("items", ())]


def _count(value: Any) -> int:
    """An unsigned short, which may be stored as bytes of unknown meaning."""
    return int.from_bytes(value[:2], "little") if isinstance(value, bytes) else int(value or 0)
