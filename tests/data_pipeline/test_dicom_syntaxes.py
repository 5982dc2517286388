"""Every transfer syntax that can be encoded here, decoded as GDCM (through SimpleITK) decodes it."""

from __future__ import annotations

import base64
from pathlib import Path

import gdcm
import numpy as np
import pytest
import SimpleITK as sitk
from dicom_files import ORIGIN, dataset, enhanced
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate, generate_frames
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    HTJ2KLossless,
    ImplicitVRLittleEndian,
    JPEGLSLossless,
    RLELossless,
)

from data_pipeline.errors import Quarantined
from data_pipeline.readers.dicom import decode_all
from data_pipeline.readers.dicom_pixels import STANDARD_SYNTAXES

KINDS = {  # dtype, BitsStored
    "uint8": (np.uint8, 8),
    "uint12": (np.uint16, 12),
    "uint16": (np.uint16, 16),
    "int16": (np.int16, 16),
    "int12": (np.int16, 12),
}
ENCODED = {
    "JPEG baseline": (gdcm.TransferSyntax.JPEGBaselineProcess1, ("uint8",)),
    "JPEG extended, 12 bit": (gdcm.TransferSyntax.JPEGExtendedProcess2_4, ("uint12",)),
    "JPEG lossless": (gdcm.TransferSyntax.JPEGLosslessProcess14, ("uint8", "uint12", "uint16", "int16")),
    "JPEG lossless, first order": (gdcm.TransferSyntax.JPEGLosslessProcess14_1, ("uint8", "uint16", "int16")),
    "JPEG-LS lossless": (gdcm.TransferSyntax.JPEGLSLossless, ("uint8", "uint12", "uint16", "int16")),
    "JPEG-LS near-lossless": (gdcm.TransferSyntax.JPEGLSNearLossless, ("uint8", "uint12")),
    "JPEG 2000 lossless": (
        gdcm.TransferSyntax.JPEG2000Lossless,
        ("uint8", "uint12", "uint16", "int16", "int12"),
    ),
    "JPEG 2000": (gdcm.TransferSyntax.JPEG2000, ("uint8", "uint12")),
    "RLE": (gdcm.TransferSyntax.RLELossless, ("uint8", "uint12", "uint16", "int16")),
}
#: `smooth("uint12", (16, 24))`, encoded by OpenJPH: nothing installed here writes HTJ2K.
HTJ2K = """
/0//UQApQAAAAAAYAAAAEAAAAAAAAAAAAAAAGAAAABAAAAAAAAAAAAABDwEB/1AACAACAAAACv9SAAwAAgABAAUEBEAB/1wAEyCI
kJCQkJCQkJCQkJCQiIiI/2QAFwABT3BlbkpQSCBWZXIgMC4yNi4zLv+QAAoAAAAAAaYAAf+TwAAmw+kFB3QAwAASgJ0CB3QAwAAT
QAATwAASgD79Awd0AClZ6AMBdAAhAwd0AMAAFdAABXQAAVrSFfImONXR/QCCAXi2AEZYCqLC18bAACIBv5YAeoLYcWM17ABiA362
AMAAF0UAAF0cAAFrAHpqNAQu/nBekfY8PWaTAfjD1+NyscPDV1oAA0QLBCACuQCCYEMoOZx5KASyEyAorcFFEMQdgBIRCPAABIER
QIhAIgK7ACYFEjM/paADNiBEDeAAz7kUDi2CuQDAAC9YgABeoQAAtwDSMUYADuMwAICMUnPGVxy2ToxiejpL0IJssySHGE+TfrvW
I26ANBx55ZVGzhBwwixbUlxRNaevkULqFUOQCPEw5gBKUlBVJSR8AA14IF5oARZZkUakMrcBAOCcG4GMEYzMEd/3GaCIoafAckkd
MtF5X69MGdQEXg4kD+YSwhMMSFD9YGtgFcAhkBEMEdwDEBTBGQD6EYgOce19htqxjAgykt1UUZJamwEABACm/g8akAAMo5fRy0P9
sKZX5HOybpFpy5QB/9k=
"""
LOSSY = ("JPEG baseline", "JPEG extended, 12 bit", "JPEG-LS near-lossless", "JPEG 2000")


def smooth(kind: str, shape: tuple[int, ...] = (24, 32)) -> np.ndarray:
    """Values over the whole range of a kind, smooth enough for a lossy codec."""
    dtype, bits = KINDS[kind]
    y, x = np.mgrid[: shape[-2], : shape[-1]]
    wave = (np.sin(x / 5) * np.cos(y / 7) + 1) / 2 * ((1 << bits) - 1)
    return (wave - (1 << (bits - 1)) * (np.dtype(dtype).kind == "i")).astype(dtype)


def plain(kind: str, array: np.ndarray | None = None) -> Dataset:
    array = smooth(kind) if array is None else array
    bits = KINDS[kind][1]
    return dataset(array, ORIGIN, "1.2.3", RescaleIntercept=0, BitsStored=bits, HighBit=bits - 1)


def transcoded(source: Path, target: Path, syntax: int) -> Path:
    """A file in another transfer syntax, written by GDCM."""
    reader = gdcm.ImageReader()
    reader.SetFileName(str(source))
    assert reader.Read()
    change = gdcm.ImageChangeTransferSyntax()
    change.SetTransferSyntax(gdcm.TransferSyntax(syntax))
    change.SetInput(reader.GetImage())
    if not change.Change():
        pytest.skip("GDCM cannot encode this")
    writer = gdcm.ImageWriter()
    writer.SetFileName(str(target))
    writer.SetFile(reader.GetFile())
    writer.SetImage(change.GetOutput())
    assert writer.Write()
    return target


def simpleitk(path: Path) -> np.ndarray:
    return sitk.GetArrayFromImage(sitk.ReadImage(str(path)))


@pytest.mark.parametrize(
    ("name", "kind"), [(name, kind) for name, (_, kinds) in ENCODED.items() for kind in kinds]
)
def test_compressed_pixels_equal_those_of_gdcm(tmp_path: Path, name: str, kind: str) -> None:
    plain(kind).save_as(tmp_path / "plain.dcm", enforce_file_format=True)
    path = transcoded(tmp_path / "plain.dcm", tmp_path / "a.dcm", ENCODED[name][0])
    assert STANDARD_SYNTAXES[dcmread(path).file_meta.TransferSyntaxUID] == name
    (raw,) = decode_all(path)
    np.testing.assert_array_equal(raw.frames[0], simpleitk(path))
    if name in LOSSY:
        spread = float(np.ptp(smooth(kind)))
        assert np.abs(raw.frames[0, 0].astype(float) - smooth(kind)).max() < 0.02 * spread
    else:
        np.testing.assert_array_equal(raw.frames[0, 0], smooth(kind))
    assert raw.frames.dtype == KINDS[kind][0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "syntax",
    [ImplicitVRLittleEndian, ExplicitVRLittleEndian, DeflatedExplicitVRLittleEndian, ExplicitVRBigEndian],
)
def test_plain_pixels_of_any_byte_order(tmp_path: Path, kind: str, syntax: str) -> None:
    ds = plain(kind)
    if syntax == ExplicitVRBigEndian:
        ds.PixelData = smooth(kind).astype(smooth(kind).dtype.newbyteorder(">")).tobytes()
    ds.file_meta.TransferSyntaxUID = syntax
    ds["PixelData"].VR = "OB" if smooth(kind).itemsize == 1 else "OW"
    ds.save_as(tmp_path / "a.dcm", enforce_file_format=True)
    (raw,) = decode_all(tmp_path / "a.dcm")
    np.testing.assert_array_equal(raw.frames[0, 0], smooth(kind))
    assert raw.frames.dtype.isnative
    if syntax != DeflatedExplicitVRLittleEndian:  # ITK's GDCM reads none
        np.testing.assert_array_equal(raw.frames[0], simpleitk(tmp_path / "a.dcm"))


def compressed(kind: str) -> tuple[Dataset, bytes]:
    """A JPEG-LS object and its one frame."""
    ds = plain(kind)
    ds.compress(JPEGLSLossless)
    return ds, next(generate_frames(ds.PixelData, number_of_frames=1))


@pytest.mark.parametrize("offsets", [True, False])
@pytest.mark.parametrize("fragments", [1, 3])
def test_fragments_with_and_without_an_offset_table(tmp_path: Path, fragments: int, offsets: bool) -> None:
    ds, frame = compressed("uint16")
    ds.PixelData = encapsulate([frame], fragments_per_frame=fragments, has_bot=offsets)
    ds.save_as(tmp_path / "a.dcm", enforce_file_format=True)
    (raw,) = decode_all(tmp_path / "a.dcm")
    np.testing.assert_array_equal(raw.frames[0, 0], smooth("uint16"))
    np.testing.assert_array_equal(raw.frames[0], simpleitk(tmp_path / "a.dcm"))


@pytest.mark.parametrize("offsets", [True, False])
def test_frames_of_an_enhanced_object_in_fragments(tmp_path: Path, offsets: bool) -> None:
    array = np.stack([smooth("uint16") + n for n in range(4)])
    ds = enhanced(array, [3, 1, 0, 2])
    encoded = []
    for plane in array:
        one = plain("uint16", plane)
        one.compress(JPEGLSLossless)
        encoded.append(next(generate_frames(one.PixelData, number_of_frames=1)))
    ds.file_meta.TransferSyntaxUID = JPEGLSLossless
    ds.PixelData = encapsulate(encoded, fragments_per_frame=2 if offsets else 1, has_bot=offsets)
    ds["PixelData"].is_undefined_length = True
    ds.save_as(tmp_path / "a.dcm", enforce_file_format=True)
    (raw,) = decode_all(tmp_path / "a.dcm")
    np.testing.assert_array_equal(raw.frames[0], array[[2, 1, 3, 0]])


def test_htj2k_is_read(tmp_path: Path) -> None:
    expected = smooth("uint12", (16, 24))
    ds = plain("uint12", expected)
    ds.file_meta.TransferSyntaxUID = HTJ2KLossless
    ds.PixelData = encapsulate([base64.b64decode(HTJ2K)])
    ds["PixelData"].is_undefined_length = True
    ds.save_as(tmp_path / "a.dcm", enforce_file_format=True)
    np.testing.assert_array_equal(decode_all(tmp_path / "a.dcm")[0].frames[0, 0], expected)


@pytest.mark.parametrize(
    ("uid", "name"),
    [
        ("1.2.840.10008.1.2.4.100", "MPEG-2"),
        ("1.2.840.10008.1.2.4.107", "HEVC"),
        ("1.3.6.1.4.1.5962.300.1", "none of the standard ones"),
    ],
)
def test_a_syntax_without_decoder_is_refused_by_name(tmp_path: Path, uid: str, name: str) -> None:
    ds, frame = compressed("uint8")
    ds.PixelData = encapsulate([frame])
    ds.file_meta.TransferSyntaxUID = uid
    ds["PixelData"].is_undefined_length = True
    ds.save_as(tmp_path / "a.dcm", implicit_vr=False, little_endian=True)
    with pytest.raises(Quarantined) as refused:
        decode_all(tmp_path / "a.dcm")
    assert (refused.value.code, refused.value.detail) == ("unsupported_syntax", name)


def test_a_codestream_cut_short_is_refused(tmp_path: Path) -> None:
    for kind, cut in (("uint16", 0.5), ("uint8", 0.05)):
        ds, frame = compressed(kind)
        ds.PixelData = encapsulate([frame[: int(cut * len(frame))]])
        ds.save_as(tmp_path / "a.dcm", enforce_file_format=True)
        with pytest.raises(Quarantined) as refused:
            decode_all(tmp_path / "a.dcm")
        assert refused.value.code in ("truncated", "unreadable")


@pytest.mark.parametrize("compress", [False, True])
def test_overlay_bits_above_the_stored_ones_are_dropped(tmp_path: Path, compress: bool) -> None:
    clean = smooth("uint12")
    ds = plain("uint12", clean | np.where(np.indices(clean.shape).sum(0) % 2, 0x8000, 0).astype(np.uint16))
    if compress:
        ds.compress(RLELossless)
    ds.save_as(tmp_path / "a.dcm", enforce_file_format=True)
    (raw,) = decode_all(tmp_path / "a.dcm")
    np.testing.assert_array_equal(raw.frames[0, 0], clean)


@pytest.mark.parametrize("implicit", [True, False])
def test_a_file_without_meta_information_is_taken_for_plain_where_its_length_says_so(
    tmp_path: Path, implicit: bool
) -> None:
    ds = plain("uint16")
    bare = Dataset()
    bare.update(ds)
    bare.save_as(tmp_path / "a.dcm", implicit_vr=implicit, little_endian=True)
    (raw,) = decode_all(tmp_path / "a.dcm")
    np.testing.assert_array_equal(raw.frames[0, 0], smooth("uint16"))
    assert raw.provenance["transfer_syntax"] == "assumed"
    bare.PixelData = bare.PixelData[:700]
    bare.save_as(tmp_path / "b.dcm", implicit_vr=implicit, little_endian=True)
    with pytest.raises(Quarantined, match="no transfer syntax"):
        decode_all(tmp_path / "b.dcm")
