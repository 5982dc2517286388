"""PNG, JPEG and TIFF radiographs: depth 1, no spacing, colour refused unless all channels are equal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.errors import Quarantined
from data_pipeline.readers.raw import Raw

FORMATS = ("PNG", "JPEG", "TIFF")
ORIENTATION, BITS, PHOTOMETRIC, SAMPLE_FORMAT = 274, 258, 262, 339  # TIFF 6.0
WHITE_IS_ZERO = 0


def decode(path: Path) -> Raw:
    """(1, 1, y, x) as stored: 8 or 16 bit integers, 32 bit integers or float32.

    Resolution tags are those of printing or a screen (72 dpi), not of the patient, and are not used. A
    palette is applied, an alpha channel must be opaque, an orientation tag is applied and noted
    (``exif_orientation``), TIFF that stores white as 0 is inverted and noted (``inverted``). Pillow takes 16
    bit colour for 8 bit, so those files are read with SimpleITK.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    provenance = {}
    try:
        with Image.open(path, formats=FORMATS) as image:
            if (pages := getattr(image, "n_frames", 1)) > 1:
                raise Quarantined("unsupported_layout", f"{pages} pages")
            if image.mode in ("CMYK", "YCbCr", "LAB", "HSV"):
                raise Quarantined("colour", f"mode {image.mode}")
            turned = _orientation(image)
            deep = image.mode not in ("I;16", "I;16B", "I", "F") and _bits(path, image) > 8
            image.load()
            if "transparency" in image.info and image.mode not in ("P", "PA"):
                raise Quarantined("colour", "a transparent picture")
            upright = ImageOps.exif_transpose(image)
            if deep:
                array = _deep(path, turned)
            elif image.mode == "1":
                array = np.asarray(upright.convert("L"))
            elif image.mode in ("P", "PA"):
                array = np.asarray(upright.convert("RGBA" if "transparency" in image.info else "RGB"))
            else:
                array = np.asarray(upright)
            tags: Any = getattr(image, "tag_v2", {})
            if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO and array.dtype == np.uint16:  # Pillow inverts 8 bit
                array = np.iinfo(np.uint16).max - array
                provenance["inverted"] = "true"
            if array.dtype == np.int32 and tags.get(BITS) == (32,) and tags.get(SAMPLE_FORMAT, (1,)) == (1,):
                array = array.view(np.uint32)  # Pillow's mode I is signed
    except Quarantined:
        raise
    except UnidentifiedImageError as error:
        raise Quarantined("unreadable", "no picture format recognised") from error
    except Image.DecompressionBombError as error:
        raise Quarantined("unsupported_layout", "more pixels than any radiograph") from error
    except MemoryError:
        raise
    except Exception as error:  # Pillow's plugins raise what they like on damaged data
        truncated = "truncated" in str(error).lower() or isinstance(error, EOFError)
        raise Quarantined("truncated" if truncated else "unreadable", type(error).__name__) from error
    if turned != 1:
        provenance["exif_orientation"] = "applied"
    if array.dtype == np.int32 and array.min() >= 0 and array.max() <= np.iinfo(np.uint16).max:
        array = array.astype(np.uint16)  # Pillow's mode I holds 16-bit PNGs
    return Raw(
        frames=_grey(array)[np.newaxis, np.newaxis],
        affine=np.eye(4),
        spacing_known=False,
        has_position=False,
        provenance=provenance,
    )


def _orientation(image: Any) -> int:
    """The orientation tag, 1 (upright) where there is none or it is none of 1 to 8."""
    stated = image.getexif().get(ORIENTATION, 1)
    if image.format == "TIFF":  # Pillow turns the picture when it is loaded and drops the tag
        stated = image.tag_v2.get(ORIENTATION, stated)
    return stated if stated in range(1, 9) else 1


def _bits(path: Path, image: Any) -> int:
    """Bits of one sample as the file states them."""
    if image.format == "TIFF":
        return max(image.tag_v2.get(BITS, (1,)))
    if image.format == "PNG":  # IHDR is the first chunk: its bit depth is byte 24
        with path.open("rb") as file:
            return file.read(25)[-1]
    return 8


def _deep(path: Path, turned: int) -> np.ndarray:
    """Samples of more than 8 bits of a picture with several a pixel, (y, x, samples)."""
    import SimpleITK as sitk

    if turned != 1:
        raise Quarantined("unsupported_layout", "an orientation tag on colour of more than 8 bits")
    array = sitk.GetArrayFromImage(sitk.ReadImage(str(path)))
    if array.dtype.itemsize < 2 or array.ndim != 3 or array.shape[-1] not in (2, 3, 4):
        raise Quarantined("unsupported_layout", "colour of more than 8 bits")
    return array


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
