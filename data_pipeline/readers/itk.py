"""NRRD and MetaImage (MHA, MHD), read with SimpleITK. Sources: teem NRRD format page; MetaIO
documentation."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from data_pipeline.errors import Quarantined
from data_pipeline.readers.raw import Raw

HEADER_LIMIT = 1 << 16


def decode(path: Path) -> Raw:
    """Voxels as stored. Where the header states no spacing, SimpleITK's 1 mm is not taken for one."""
    import SimpleITK as sitk

    fields = header_fields(path)
    try:
        image = sitk.ReadImage(str(path))
        array = sitk.GetArrayFromImage(image)
    except Exception as error:  # SimpleITK raises RuntimeError for everything
        text = str(error).lower()
        short = any(
            word in text for word in ("truncated", "could not read", "not enough", "file is too short", "eof")
        )
        raise Quarantined("truncated" if short else "unreadable", type(error).__name__) from error
    if array.dtype.kind not in "iuf":
        raise Quarantined("unsupported_layout", f"voxels of type {array.dtype}")
    if image.GetNumberOfComponentsPerPixel() > 1:
        grey = (
            array[..., :3] if array.shape[-1] == 4 and array[..., 3].min() == array[..., 3].max() else array
        )
        if not (array[..., :1] == grey).all():  # of four components, an even last one is opacity
            raise Quarantined("colour", f"{array.shape[-1]} components per voxel")
        array = array[..., 0]
    n = image.GetDimension()
    if n not in (2, 3, 4):
        raise Quarantined("unsupported_layout", f"{n} axes")
    affine = np.eye(4)
    k = min(n, 3)
    direction = np.array(image.GetDirection()).reshape(n, n)[:k, :k]
    affine[:k, :k] = direction * np.array(image.GetSpacing())[:k]
    affine[:k, 3] = np.array(image.GetOrigin())[:k]
    if n == 2:
        affine[2, 2] = affine[0, 0] or 1.0
        array = array[np.newaxis]
    frames = array if n == 4 else array[np.newaxis]
    known = {"space directions", "spacings", "elementspacing", "elementsize"} & fields.keys()
    spacing_known = bool(known) and "nan" not in fields.get("spacings", "").lower()
    return Raw(frames=frames, affine=affine, spacing_known=spacing_known)


def header_fields(path: Path) -> dict[str, str]:
    """Field names (lower case) and values of a NRRD or MetaImage header."""
    with path.open("rb") as file:
        head = file.read(HEADER_LIMIT)
    fields = {}
    for line in head.split(b"\n"):
        text = line.strip().decode("latin-1")
        if not text:  # NRRD: the voxels follow an empty line
            break
        key, separator, value = (
            text.partition("=") if "=" in text and ":" not in text.split("=")[0] else text.partition(":")
        )
        if separator:
            fields[key.strip().lower()] = value.lstrip("=").strip()
        if key.strip().lower() == "elementdatafile":
            break
    return fields
