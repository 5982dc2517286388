"""Pictures of stored samples: normalised slices with true proportions, labels laid over them."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

from data_pipeline.storage import invalid_of

HOUNSFIELD = (-1024.0, 3071.0)
SOFT_TISSUE = (-300.0, 400.0)  # HU shown; the whole range would make everything but bone one grey
#: Distinct colours for label ids, repeating (Okabe and Ito's palette, safe for most colour vision).
COLOURS = np.array(
    [
        (230, 159, 0),
        (86, 180, 233),
        (0, 158, 115),
        (240, 228, 66),
        (0, 114, 178),
        (213, 94, 0),
        (204, 121, 167),
    ],
    np.float32,
)


def grey(voxels: np.ndarray, norm: Sequence[float]) -> np.ndarray:
    """Stored voxels (any shape) to grey values 0..255 between the norm's clip limits; invalid ones are black.

    A CT in HU is shown in a soft-tissue window.
    """
    slope, intercept, low, high, _, _, compress = norm
    if (low, high) == HOUNSFIELD:
        low, high = SOFT_TISSUE
    real = np.clip(voxels.astype(np.float32) * slope + intercept, low, high)
    if compress:
        real, low, high = (
            np.arcsinh(real / compress),
            float(np.arcsinh(low / compress)),
            float(np.arcsinh(high / compress)),
        )
        high = min(high, max(float(np.nanmax(real)), low + 1e-6))  # hot spots rarely reach the fixed limit
    shade = (real - low) / max(high - low, 1e-6) * 255
    return np.where(invalid_of(voxels), 0, shade).astype(np.uint8)


def overlay(plane: np.ndarray, labels: np.ndarray, strength: float = 0.45) -> np.ndarray:
    """Grey plane (y, x) as RGB with `labels` (layer, y, x) in colour; 255 (ignore) in white."""
    picture = np.repeat(plane[..., None].astype(np.float32), 3, axis=-1)
    for layer in labels:
        colour = np.where((layer == 255)[..., None], 255.0, COLOURS[(layer.astype(int) - 1) % len(COLOURS)])
        picture = np.where((layer > 0)[..., None], picture * (1 - strength) + colour * strength, picture)
    return picture.astype(np.uint8)


def resized(picture: np.ndarray, spacing: tuple[float, float], side: int) -> Image.Image:
    """A plane with square millimetres, its longer side `side` pixels. `spacing` is (vertical, horizontal)
    mm.
    """
    height, width = picture.shape[0] * spacing[0], picture.shape[1] * spacing[1]
    scale = side / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return Image.fromarray(picture).resize(size, Image.Resampling.BILINEAR)


def side_by_side(pictures: Sequence[Image.Image], columns: int, gap: int = 4) -> Image.Image:
    """A sheet of pictures on black, `columns` a row."""
    width, height = max(p.width for p in pictures), max(p.height for p in pictures)
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap))
    for n, picture in enumerate(pictures):
        left, top = n % columns * (width + gap), n // columns * (height + gap)
        sheet.paste(picture, (left + (width - picture.width) // 2, top + (height - picture.height) // 2))
    return sheet


def png(picture: Image.Image) -> bytes:
    """PNG bytes, the same for the same picture."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", compress_level=3)
    return buffer.getvalue()
