"""DICOM pixel values: decompression, stored bits, modality LUT, rescale, VOI LUT, MONOCHROME1, padding.

Sources: DICOM PS3.3 C.7.6.3 (image pixel), C.11.1 (modality LUT), C.11.2 (VOI LUT), C.11.6 (presentation
LUT shape). The order is: bits above BitsStored dropped; padding marked; modality LUT or rescale; VOI LUT or
window of a radiograph where the recipe asks for it (never of CT, MR, PT); a radiograph in MONOCHROME1 or of
shape INVERSE mirrored, once.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from data_pipeline.errors import Quarantined
from data_pipeline.readers import dicom_jpeg12
from data_pipeline.readers.dicom_frames import Frame
from data_pipeline.readers.dicom_kinds import listed
from data_pipeline.readers.dicom_suv import suv_factor
from data_pipeline.readers.raw import check_size

if TYPE_CHECKING:
    from pydicom import Dataset

# fmt: off
#: Transfer syntaxes by the name that a refusal may state.
STANDARD_SYNTAXES = {
    "1.2.840.10008.1.2.4.50": "JPEG baseline", "1.2.840.10008.1.2.4.51": "JPEG extended, 12 bit",
    "1.2.840.10008.1.2.4.57": "JPEG lossless", "1.2.840.10008.1.2.4.70": "JPEG lossless, first order",
    "1.2.840.10008.1.2.4.80": "JPEG-LS lossless", "1.2.840.10008.1.2.4.81": "JPEG-LS near-lossless",
    "1.2.840.10008.1.2.4.90": "JPEG 2000 lossless", "1.2.840.10008.1.2.4.91": "JPEG 2000",
    "1.2.840.10008.1.2.4.92": "JPEG 2000 multi-component lossless",
    "1.2.840.10008.1.2.4.93": "JPEG 2000 multi-component", "1.2.840.10008.1.2.4.110": "JPEG XL lossless",
    "1.2.840.10008.1.2.4.111": "JPEG XL recompression", "1.2.840.10008.1.2.4.112": "JPEG XL",
    "1.2.840.10008.1.2.4.201": "HTJ2K lossless", "1.2.840.10008.1.2.4.202": "HTJ2K lossless RPCL",
    "1.2.840.10008.1.2.4.203": "HTJ2K", "1.2.840.10008.1.2.4.94": "JPIP referenced",
    "1.2.840.10008.1.2.4.95": "JPIP referenced deflate", "1.2.840.10008.1.2.4.100": "MPEG-2",
    "1.2.840.10008.1.2.4.101": "MPEG-2", "1.2.840.10008.1.2.4.102": "MPEG-4",
    "1.2.840.10008.1.2.4.103": "MPEG-4", "1.2.840.10008.1.2.4.104": "MPEG-4",
    "1.2.840.10008.1.2.4.105": "MPEG-4", "1.2.840.10008.1.2.4.106": "MPEG-4",
    "1.2.840.10008.1.2.4.107": "HEVC", "1.2.840.10008.1.2.4.108": "HEVC", "1.2.840.10008.1.2.5": "RLE",
    "1.2.840.10008.1.2.8.1": "deflated image frames",
}
# fmt: on
MOST_COMPRESSED = 1 << 16  # times; a constant image in JPEG 2000 comes near it
VALUES = "PixelValueTransformationSequence"
PIXELS = ("PixelData", "FloatPixelData", "DoubleFloatPixelData")
RESCALE_LIMIT = 1e6
Pair = tuple[float, float]


@dataclass
class Pixels:
    """``array`` (n, y, x); real = array*slope + intercept; ``padding`` (n, y, x) bool or None; ``notes``
    technical."""

    array: np.ndarray
    slope: float
    intercept: float
    units: str
    padding: np.ndarray | None = None
    notes: dict[str, str] = field(default_factory=dict)


def decode_all(
    volumes: Sequence[Sequence[Frame]], modality: str, voi_lut: bool = False
) -> list[Pixels | Quarantined]:
    """The pixels of each list of frames, in order, or why they cannot be had.

    Frames of one rescale keep their stored integers. Where the rescale varies from frame to frame (PET,
    Philips MR), and after a LUT, the real values are float32 with slope 1. Each object is decoded once, and
    its encoded bytes are dropped then, so that no more than the bytes and the voxels are held.
    """
    results: list[Pixels | Quarantined] = []
    pairs: list[list[Pair]] = []
    wanted: dict[int, list[tuple[int, int, Frame]]] = defaultdict(list)  # object: volume, place, frame
    objects: dict[int, Dataset] = {}
    for v, frames in enumerate(volumes):
        try:
            made, scales = _prepare(frames, modality, voi_lut)
        except Quarantined as error:
            results.append(error)
            pairs.append([])
            continue
        results.append(made)
        pairs.append(scales)
        for n, frame in enumerate(frames):
            objects[id(frame.dataset)] = frame.dataset
            wanted[id(frame.dataset)].append((v, n, frame))
    for key, ds in objects.items():
        by_number: dict[int, list[tuple[int, int, Frame]]] = defaultdict(list)
        for v, n, frame in wanted[key]:
            by_number[frame.number or 0].append((v, n, frame))
        try:
            for number, plane in enumerate(_stored(ds)):
                for v, n, frame in by_number.pop(number, ()):
                    target = results[v]
                    if isinstance(target, Pixels):
                        _put(target, n, frame, plane, pairs[v][n], modality)
            if by_number:
                raise Quarantined("truncated", f"{len(by_number)} frames are not there")
        except Quarantined as error:
            for v, _, _ in wanted[key]:
                results[v] = error
        for name in PIXELS:
            ds.pop(name, None)
    return results


def _prepare(frames: Sequence[Frame], modality: str, voi_lut: bool) -> tuple[Pixels, list[Pair]]:
    """Room for the pixels of one volume, and the rescale of each frame, from the headers."""
    notes: dict[str, str] = {}
    scales = [_rescale(frame) for frame in frames]
    units = _units(frames[0], modality, None not in scales)
    pairs = [scale or (1.0, 0.0) for scale in scales]
    datasets = list({id(frame.dataset): frame.dataset for frame in frames}.values())
    if modality == "PT" and (factor := suv_factor(datasets, notes)) is not None:
        pairs = [(slope * factor, intercept * factor) for slope, intercept in pairs]
        units = "SUV"
    luts = any(_modality_lut(frame) is not None for frame in frames)
    if modality == "XR" and voi_lut:
        shown = any(name in frames[0].dataset for name in ("VOILUTSequence", "WindowCenter"))
        notes["voi_lut"] = "applied" if shown else "none"
    if [ds for ds in datasets if _assume_syntax(ds)]:
        notes["transfer_syntax"] = "assumed"
    for ds in datasets:
        _check_syntax(ds.file_meta.TransferSyntaxUID)
        _check_size(ds)
    real = luts or len(set(pairs)) > 1 or notes.get("voi_lut") == "applied"
    if len(set(pairs)) > 1:
        notes["rescale"] = "per slice"
    if luts:
        notes["modality_lut"] = "applied"
    shape = (len(frames), *frames[0].shape)
    array = np.empty(shape, np.float32 if real else np.result_type(*{_dtype(ds) for ds in datasets}))
    slope, intercept = (1.0, 0.0) if real else pairs[0]
    return Pixels(array, slope, intercept, units, None, notes), pairs


def _put(target: Pixels, n: int, frame: Frame, plane: np.ndarray, pair: Pair, modality: str) -> None:
    """Place one decoded plane, with its padding, in a volume."""
    ds = frame.dataset
    if frame.tile is not None:
        plane = plane[frame.tile]
    if plane.shape != target.array.shape[1:]:
        raise Quarantined("unreadable", "a decoded plane has another size than the header says")
    padding = _padding(ds, plane) if modality in ("CT", "XR") else None
    lut = _modality_lut(frame)
    stored = target.array.dtype.kind != "f" or plane.dtype.kind == "f"
    if lut is not None:
        plane = through_lut(lut, ds, plane)
    elif not stored:
        plane = plane * np.float64(pair[0]) + pair[1]
    if padding is not None and modality == "CT":  # padding inside the range of air cannot be told from air
        padding &= plane * target.slope + target.intercept < -1024
    if modality == "XR":
        ends = _ends(frame, lut, pair if not stored else (1.0, 0.0))
        if target.notes.get("voi_lut") == "applied":
            plane, ends = voi(plane, ds)
        if inverse(ds):
            plane = (ends[0] + ends[1] - plane.astype(np.float64)).astype(plane.dtype)
            target.notes["inverted"] = "true"
    if target.array.dtype.kind != "f" and not np.can_cast(plane.dtype, target.array.dtype):
        raise Quarantined("unreadable", "a decoded plane has more bits than the header says")
    target.array[n] = plane
    if padding is not None and padding.any():
        if target.padding is None:
            target.padding = np.zeros(target.array.shape, bool)
        target.padding[n] = padding


def _stored(ds: Dataset) -> Iterator[np.ndarray]:
    """Stored values (y, x) of each frame, with bits above BitsStored dropped, the sign extended."""
    if int(ds.get("SamplesPerPixel", 1) or 1) != 1 or "PALETTE" in str(
        ds.get("PhotometricInterpretation", "")
    ):
        raise Quarantined("colour", "more than one sample per pixel, or a palette")
    if ds.file_meta.TransferSyntaxUID in dicom_jpeg12.DECODER_DEPENDENCIES:
        dicom_jpeg12.register()
    from pydicom.pixels import iter_pixels

    whole = "PixelData" in ds
    stored, high = (int(ds.BitsStored), int(ds.get("HighBit", ds.BitsStored - 1))) if whole else (0, 0)
    planes = iter(iter_pixels(ds))
    while True:
        try:
            plane = next(planes)
        except StopIteration:
            return
        except MemoryError:
            raise
        except Exception as error:  # each decoder plugin raises its own
            text = str(error).lower()
            short = any(
                w in text for w in ("less than expected", "truncated", "end of", "too short", "not enough")
            )
            code = "truncated" if short else "unreadable"
            raise Quarantined(code, f"pixels: {type(error).__name__}") from error
        if plane.ndim != 2:
            raise Quarantined("colour", "more than one sample per pixel")
        yield significant_bits(plane, stored, high, bool(ds.PixelRepresentation)) if whole else plane


def _assume_syntax(ds: Dataset) -> bool:
    """Whether the transfer syntax is not stated and was set to the plain one that the header is written in.

    The number of bytes must be that of plain pixels, else `Quarantined`: they could be compressed.
    """
    meta = getattr(ds, "file_meta", None)
    if meta is not None and "TransferSyntaxUID" in meta:
        return False
    from pydicom.dataset import FileMetaDataset
    from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

    implicit, little = ds.original_encoding
    plain = _voxels(ds) * _dtype(ds).itemsize
    if _stored_size(ds) not in (plain, plain + plain % 2):
        raise Quarantined("unreadable", "no transfer syntax: the bytes of the pixels have no known meaning")
    ds.file_meta = FileMetaDataset() if meta is None else meta
    explicit = ExplicitVRLittleEndian if little else ExplicitVRBigEndian
    ds.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if implicit else explicit
    return True


def _check_size(ds: Dataset) -> None:
    """Refuse, before any memory is taken, an object that states more than its bytes can hold."""
    stored = _stored_size(ds)
    if not stored:
        raise Quarantined("no_pixel_data")
    shrink = MOST_COMPRESSED if ds.file_meta.TransferSyntaxUID.is_encapsulated else 1
    check_size(_voxels(ds), _voxels(ds) * _dtype(ds).itemsize, stored, shrink)


def _voxels(ds: Dataset) -> int:
    return int(ds.Rows) * int(ds.Columns) * int(ds.get("NumberOfFrames", 1) or 1)


def _stored_size(ds: Dataset) -> int:
    return next((len(ds.get(name) or b"") for name in PIXELS if name in ds), 0)


def _check_syntax(uid: Any) -> None:
    from pydicom.pixels import get_decoder

    standard = uid in STANDARD_SYNTAXES
    try:
        if get_decoder(uid).is_available:
            return
    except NotImplementedError:
        pass
    raise Quarantined(
        "unsupported_syntax", STANDARD_SYNTAXES[uid] if standard else "none of the standard ones"
    )


def significant_bits(array: np.ndarray, stored: int, high: int, signed: bool) -> np.ndarray:
    """Keep ``stored`` bits ending at bit ``high``; the rest (overlays, garbage) is dropped, the sign
    extended."""
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    width = array.dtype.itemsize * 8
    if stored < 1 or high >= width or stored > high + 1:
        raise Quarantined("unreadable", f"BitsStored {stored}, HighBit {high} in {width} bits")
    if stored == width:
        return array
    kind = np.dtype(f"{'i' if signed else 'u'}{array.dtype.itemsize}")
    up = (array.view(kind) << kind.type(width - 1 - high)).astype(kind, copy=False)
    return up >> kind.type(width - stored)  # arithmetic where signed


def _dtype(ds: Dataset) -> np.dtype:
    if "PixelData" not in ds:
        return np.dtype(np.float64 if "DoubleFloatPixelData" in ds else np.float32)
    bits = int(ds.get("BitsAllocated", 16))
    if bits not in (8, 16, 32, 64):
        raise Quarantined("unreadable", f"BitsAllocated {bits}")
    return np.dtype(f"{'i' if ds.get('PixelRepresentation') else 'u'}{bits // 8}")


def _padding(ds: Dataset, plane: np.ndarray) -> np.ndarray | None:
    if plane.dtype.kind == "f":
        value, limit = ds.get("FloatPixelPaddingValue"), ds.get("FloatPixelPaddingRangeLimit")
        return (
            None if value is None else _between(plane, float(value), float(value if limit is None else limit))
        )
    value = ds.get("PixelPaddingValue")
    if value is None:
        return None
    limit = ds.get("PixelPaddingRangeLimit")
    ends = [int(value), int(value if limit is None else limit)]
    # The tags are often written with the other sign than the pixels.
    if ds.PixelRepresentation == 1:
        ends = [e - 65536 if e > 32767 else e for e in ends]
    else:
        ends = [e + 65536 if e < 0 else e for e in ends]
    return _between(plane, *ends)


def _between(plane: np.ndarray, a: float, b: float) -> np.ndarray:
    return (plane >= min(a, b)) & (plane <= max(a, b))


def _rescale(frame: Frame) -> Pair | None:
    slope, intercept = frame.get("RescaleSlope", VALUES), frame.get("RescaleIntercept", VALUES)
    if (slope is None and intercept is None) or _modality_lut(frame) is not None:
        return None
    pair = (1.0 if slope is None else float(slope), 0.0 if intercept is None else float(intercept))
    if pair[0] == 0.0 or not np.abs(pair).max() <= RESCALE_LIMIT:  # NaN is not below either
        raise Quarantined("unreadable", "a rescale that no scanner writes: zero, not finite or beyond 1e6")
    return pair


def _modality_lut(frame: Frame) -> Dataset | None:
    """The modality LUT of a frame, which stands in place of a rescale, or None."""
    items = frame.dataset.get("ModalityLUTSequence")
    return items[0] if items else None


def through_lut(item: Dataset, ds: Dataset, values: np.ndarray) -> np.ndarray:
    """Values through a LUT item (DICOM PS3.3 C.11.1.1): below its first mapped value its first entry holds,
    past its end its last."""
    table, first = _table(item, ds)
    index = np.rint(values).astype(np.int64) if values.dtype.kind == "f" else values.astype(np.int64)
    return table[np.clip(index - first, 0, len(table) - 1)]


def _table(item: Dataset, ds: Dataset) -> tuple[np.ndarray, int]:
    try:
        entries, first, bits = (int(v) for v in item.LUTDescriptor)
        data = item.LUTData
        if isinstance(data, bytes):
            order = "<" if ds.file_meta.TransferSyntaxUID.is_little_endian else ">"
            packed = bits == 8 and len(data) < 2 * (entries or 65536)  # two entries a word, the lower first
            data = np.frombuffer(data, f"{order}u2").astype("<u2")
            data = data.view("u1") if packed else data
        table = np.asarray(data).astype(np.uint16)[: entries or 65536]
    except (AttributeError, TypeError, ValueError) as error:
        raise Quarantined("unreadable", "a damaged lookup table") from error
    if not 1 <= bits <= 16 or len(table) < (entries or 65536):
        raise Quarantined("unreadable", f"a lookup table of {len(table)} entries with {bits} bits")
    return table, first - 65536 if ds.PixelRepresentation == 1 and first > 32767 else first


def _ends(frame: Frame, lut: Dataset | None, pair: Pair) -> Pair:
    """The ends of the range that the values of a radiograph can take after the modality LUT or rescale."""
    ds = frame.dataset
    if lut is not None:
        return 0.0, float((1 << int(lut.LUTDescriptor[2])) - 1)
    bits = int(ds.get("BitsStored", 16))
    low, high = (
        (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if ds.PixelRepresentation else (0, (1 << bits) - 1)
    )
    return low * pair[0] + pair[1], high * pair[0] + pair[1]


def voi(values: np.ndarray, ds: Dataset) -> tuple[np.ndarray, Pair]:
    """Values through the first VOI LUT, else the first window, and the ends of their range: 0 and what
    BitsStored, or the LUT's own bits, hold."""
    items = ds.get("VOILUTSequence")
    if items:
        return through_lut(items[0], ds, values), (0.0, float((1 << int(items[0].LUTDescriptor[2])) - 1))
    try:
        center, width = (float(listed(_plain(ds.get(name)))[0]) for name in ("WindowCenter", "WindowWidth"))
    except (TypeError, ValueError, IndexError) as error:
        raise Quarantined("unreadable", "a damaged display window") from error
    top = float((1 << int(ds.get("BitsStored", 16))) - 1)
    x, shape = values.astype(np.float64), str(ds.get("VOILUTFunction") or "LINEAR").upper()
    if shape == "SIGMOID" and width > 0:
        return top / (1 + np.exp(-4 * (x - center) / width)), (0.0, top)
    if shape == "LINEAR" and width >= 1:
        center, width = center - 0.5, width - 1
    elif shape != "LINEAR_EXACT" or width <= 0:
        raise Quarantined("unreadable", "a damaged display window")
    if width == 0:
        return np.where(x <= center, 0.0, top), (0.0, top)
    return np.clip((x - center) / width + 0.5, 0, 1) * top, (0.0, top)


def _plain(value: Any) -> Any:
    """A number as a list of one."""
    return value if value is None or hasattr(value, "__iter__") else [value]


def inverse(ds: Dataset) -> bool:
    """Whether low values are bright. MONOCHROME1 and the shape INVERSE say the same, not one after the
    other."""
    return (
        str(ds.get("PhotometricInterpretation", "")) == "MONOCHROME1"
        or str(ds.get("PresentationLUTShape", "")) == "INVERSE"
    )


def _units(frame: Frame, modality: str, rescaled: bool) -> str:
    if modality != "CT":
        return "arbitrary"
    lut = _modality_lut(frame)
    kind = frame.get("RescaleType", VALUES) if lut is None else lut.get("ModalityLUTType")
    named = str(kind or ("HU" if lut is None else "")).upper()
    return "HU" if (rescaled or lut is not None) and named in ("HU", "US", "HOUNSFIELD") else "arbitrary"
