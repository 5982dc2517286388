"""Writes safetensors files as a stream, hashed on the way to the disk.

The library writes a file in one call and hashes nothing, so that every byte would have to be read back. The
format is small: the header's length as 8 bytes, little-endian; the header, JSON; the tensors' bytes, without
gaps, in the order of their offsets (https://github.com/huggingface/safetensors, "Format").
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

HASH = "xxh3_128"
BLOCK = 1 << 23  # bytes written or read at once
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def write_tensors(
    file: Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    moved: Callable[[int], None] = lambda _: None,
) -> dict[str, Any]:
    """Write tensors on the CPU to a safetensors file and flush it to the disk.

    Args:
        file: replaced where it exists.
        tensors: contiguous, on the CPU.
        metadata: strings kept in the header.
        moved: called with the bytes written so far; what it raises ends the writing.

    Returns:
        The file's size and hash, as `entry_of` would read them.

    Raises:
        OSError: the disk did not take it.
        TypeError: a tensor of a type that safetensors does not know.
    """
    # Wide types first, so that every tensor lies at a multiple of its own width.
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name in order:
        tensor = tensors[name]
        if tensor.dtype not in DTYPES:
            raise TypeError(f"{name}: safetensors cannot hold {tensor.dtype}")
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    digest, written = xxhash.xxh3_128(), 0
    with open(file, "wb") as out:
        parts = [memoryview(len(text).to_bytes(8, "little") + text), *(_bytes(tensors[n]) for n in order)]
        for part in parts:
            for start in range(0, len(part), BLOCK):
                block = part[start : start + BLOCK]
                out.write(block)
                digest.update(block)
                written += len(block)
                moved(written)
        out.flush()
        os.fsync(out.fileno())
    return {"size": written, HASH: digest.hexdigest()}


def entry_of(file: Path) -> dict[str, Any]:
    """Size and hash of a file, read from the disk."""
    digest, size = xxhash.xxh3_128(), 0
    with open(file, "rb") as opened:
        while block := opened.read(BLOCK):
            digest.update(block)
            size += len(block)
    return {"size": size, HASH: digest.hexdigest()}


def flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().view(-1).view(torch.uint8).numpy().data
