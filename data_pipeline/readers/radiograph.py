"""PNG, JPEG and TIFF radiographs: depth 1, no spacing, colour refused unless all channels are equal."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from data_pipeline.errors import Quarantined
from data_pipeline.readers.raw import Raw


def decode(path: Path) -> Raw:
    """(1, 1, y, x) as stored: 8 or 16 bit integers or float32.

    Resolution tags are those of printing or a screen (72 dpi), not of the patient, and are not used. A
    palette is applied, an alpha channel must be opaque.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            if (pages := getattr(image, "n_frames", 1)) > 1:
                raise Quarantined("unsupported_layout", f"{pages} pages")
            image.load()
            if image.mode in ("CMYK", "YCbCr", "LAB", "HSV"):
                raise Quarantined("colour", f"mode {image.mode}")
            if image.mode == "1":
                array = np.asarray(image.convert("L"))
            elif image.mode in ("P", "PA"):
                array = np.asarray(image.convert("RGBA" if "transparency" in image.info else "RGB"))
            else:
                array = np.asarray(image)
    except Quarantined:
        raise
    except UnidentifiedImageError as error:
        raise Quarantined("unreadable", "no picture format recognised") from error
    except Image.DecompressionBombError as error:
        raise Quarantined("unsupported_layout", "more pixels than any radiograph") from error
    except Exception as error:  # Pillow's plugins raise what they like on damaged data
        truncated = "truncated" in str(error).lower() or isinstance(error, EOFError)
        raise Quarantined("truncated" if truncated else "unreadable", type(error).__name__) from error
    if array.dtype == np.int32 and array.min() >= 0 and array.max() <= np.iinfo(np.uint16).max:
        array = array.astype(np.uint16)  # Pillow's mode I holds 16-bit PNGs
    return Raw(
        frames=_grey(array)[np.newaxis, np.newaxis], affine=np.eye(4), spacing_known=False, has_position=False
    )


def _grey(array: np.ndarray) -> np.ndarray:
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    if array.ndim == 2:
        return array
    if array.shape[-1] in (2, 4):
        alpha, array = array[..., -1], array[..., :-1]
        if (alpha != np.iinfo(array.dtype).max).any():
            raise Quarantined("colour", "a transparent picture")
    if (array != array[..., :1]).any():
        raise Quarantined("colour", "red, green and blue differ")
    return np.ascontiguousarray(array[..., 0])
