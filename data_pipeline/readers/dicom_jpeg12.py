"""JPEG extended of 12 bits through GDCM, as a plugin of pydicom, whose own plugins read 8 bits only."""

from __future__ import annotations

from typing import Any

#: What pydicom reads of a plugin's module: the decoders it serves, and what they need.
DECODER_DEPENDENCIES = {"1.2.840.10008.1.2.4.51": ("gdcm>=3.0.10",)}


def is_available(uid: str) -> bool:
    """Whether this module decodes a transfer syntax; part of pydicom's plugin interface."""
    return uid in DECODER_DEPENDENCIES


def decode_frame(src: bytes, runner: Any) -> bytes:
    """One encoded frame of one sample per pixel to the bytes of its pixels, 16 bits each."""
    import gdcm

    fragment = gdcm.Fragment()
    fragment.SetByteStringValue(src)
    fragments = gdcm.SequenceOfFragments.New()
    fragments.AddFragment(fragment)
    element = gdcm.DataElement(gdcm.Tag(0x7FE0, 0x0010))
    element.SetValue(fragments.__ref__())
    image = gdcm.Image()
    image.SetNumberOfDimensions(2)
    image.SetDimensions((runner.columns, runner.rows, 1))
    image.SetDataElement(element)
    kind = gdcm.PhotometricInterpretation.GetPIType(str(runner.photometric_interpretation))
    image.SetPhotometricInterpretation(gdcm.PhotometricInterpretation(kind))
    image.SetTransferSyntax(gdcm.TransferSyntax(gdcm.TransferSyntax.JPEGExtendedProcess2_4))
    stored = int(runner.bits_stored)
    image.SetPixelFormat(gdcm.PixelFormat(1, 16, stored, stored - 1, runner.pixel_representation))
    runner.set_option("bits_allocated", 16)
    frame = image.GetBuffer().encode("utf-8", "surrogateescape")  # GDCM gives its char* as text
    if len(frame) != 2 * runner.columns * runner.rows:
        raise ValueError("the decoded frame is truncated")
    return frame


def register() -> None:
    """Make it known to pydicom, once a process."""
    from pydicom.pixels import get_decoder
    from pydicom.uid import JPEGExtended12Bit

    decoder = get_decoder(JPEGExtended12Bit)
    if "medfm" not in decoder.available_plugins:
        decoder.add_plugin("medfm", (__name__, "decode_frame"))
