"""Text drawn into pictures at known places, so that what a text detector misses can be counted."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

FONTS = ("DejaVuSans.ttf", "DejaVuSansMono.ttf", "DejaVuSerif.ttf", "DejaVuSans-Bold.ttf")
WORDS = (
    "DOE JANE", "1964-03-17", "L", "R", "AP PORTABLE",
    "ID 4418273", "SMITH, A.", "17.03.64", "12:45", "ST. MARY",
)  # fmt: skip
LEAST_CONTRAST = 0.15  # of a picture in 0..1: fainter text is not planted
TRIES = 50


@dataclass(frozen=True)
class Planted:
    """One line: its box in the picture, the ink of each character in that box, (n, h, w) bool, and its mean
    distance from what was there before, of a picture in 0..1.
    """

    text: str
    box: tuple[slice, slice]
    characters: np.ndarray
    contrast: float
    bright: bool


def drawn(text: str, font: str, size: int) -> np.ndarray:
    """Coverage 0..1 of each character of a line that is no space, (n, h, w), cut to the ink."""
    import matplotlib
    from PIL import Image, ImageDraw, ImageFont

    face = ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / font), size)
    height = sum(face.getmetrics()) + 2
    width = int(face.getlength(text)) + 6
    characters, at = [], 2.0
    for character in text:
        if character != " ":
            image = Image.new("L", (width, height))
            ImageDraw.Draw(image).text((at, 1), character, fill=255, font=face)
            characters.append(np.asarray(image) / 255.0)
        at += face.getlength(character)
    stack = np.stack(characters)
    rows, columns = np.flatnonzero(stack.max((0, 2))), np.flatnonzero(stack.max((0, 1)))
    return stack[:, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def plant(
    picture: np.ndarray, generator: np.random.Generator, sizes: tuple[int, int], taken: np.ndarray
) -> tuple[np.ndarray, Planted | None]:
    """A copy of a picture (rows, columns) in 0..1 with one more line of text, and where it stands.

    Font, words, size in pixels (`sizes`, inclusive), polarity (3 in 4 bright), strength (1, 0.6 or 0.35 of
    the way to white or black), direction (1 in 10 upwards) and place (7 in 10 near the border) are drawn.
    `taken` marks places that hold text and is added to. None where no place was found.
    """
    height, width = picture.shape
    for _ in range(TRIES):
        text, font = WORDS[generator.integers(len(WORDS))], FONTS[generator.integers(len(FONTS))]
        ink = drawn(text, font, int(generator.integers(sizes[0], sizes[1] + 1)))
        if generator.random() < 0.1:
            ink = np.rot90(ink, axes=(1, 2))
        h, w = ink.shape[1:]
        if h > height - 4 or w > width - 4:
            continue
        if generator.random() < 0.7:
            y, x = (_near_an_end(generator, whole, own) for whole, own in ((height, h), (width, w)))
        else:
            y, x = int(generator.integers(1, height - h)), int(generator.integers(1, width - w))
        bright, strength = bool(generator.random() < 0.75), float(generator.choice([1.0, 0.6, 0.35]))
        box = slice(y, y + h), slice(x, x + w)
        away = h // 2 + 12
        if taken[max(0, y - away) : y + h + away, max(0, x - away) : x + w + away].any():
            continue
        before = picture[box]
        after = before + strength * ink.max(0) * (float(bright) - before)
        contrast = float(np.abs(after - before)[ink.max(0) > 0.5].mean())
        if contrast < LEAST_CONTRAST:
            continue
        result = picture.copy()
        result[box] = after
        taken[box] = True
        return result, Planted(text, box, ink > 0.5, contrast, bright)
    return picture, None


def _near_an_end(generator: np.random.Generator, whole: int, own: int) -> int:
    """A start within 8 % of either end of an axis."""
    reach = max(2, int(0.08 * whole))
    start = int(generator.integers(1, reach))
    return min(start, whole - own - 1) if generator.random() < 0.5 else max(whole - own - start, 1)
