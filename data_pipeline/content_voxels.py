"""Where in a volume there is something to look at: voxels of content, for crops without labels."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import numpy as np

from data_pipeline.intensity import content_level
from data_pipeline.quantise import INVALID, Stored
from data_pipeline.volume import Channel

CONTENT = 0  # the class of content in the manifest's column `foreground`; labels have classes from 1
COUNT = 64
DRAWN, ROUNDS = 1 << 12, 8
#: A CT voxel is of the body where this share of a cube of so many mm around it is tissue: the shell of a
#: table and a blanket are thinner, and lung is not listed.
CUBE_MM, CUBE_POINTS, BODY_SHARE = 20.0, 5, 1 / 3


def content_voxels(
    stored: Stored,
    channels: Sequence[Channel],
    spacing: Sequence[float],
    key: str,
    hidden: np.ndarray | None = None,
) -> np.ndarray:
    """At most 64 voxels of content, as ascending linear indices (int32, C order) into (z, y, x).

    Content is what `intensity.content_level` says of any channel (of CT: tissue inside the body), valid in
    every channel and not `hidden` (z, y, x). The draw is uniform over it, without replacement, and depends on
    `key` and the voxels alone. Voxels are drawn from the whole volume and kept if they fit, so that its size
    costs nothing; only where content is rare is all of it looked at.
    """
    seed = hashlib.blake2b(key.encode(), digest_size=16).digest()
    random = np.random.Generator(np.random.Philox(int.from_bytes(seed, "little")))
    shape = stored.voxels.shape[1:]
    size = math.prod(shape)
    drawn = random.integers(size, size=DRAWN)
    look = _Look(stored, channels, hidden, drawn)
    found: dict[int, None] = {}
    for _ in range(ROUNDS):
        fits = look.is_content(np.unravel_index(drawn, shape))
        found |= dict.fromkeys(drawn[fits][: 8 * COUNT].tolist())
        if len(found) >= 4 * COUNT:
            break
        drawn = random.integers(size, size=DRAWN)
    else:
        every = np.concatenate([look.of_plane(z) for z in range(shape[0])])
        found = dict.fromkeys(random.permutation(every)[: 4 * COUNT].tolist())
    places = np.array(list(found)[: 4 * COUNT], np.int64)
    if any(channel.units == "HU" for channel in channels):
        inside = look.is_body(np.unravel_index(places, shape), spacing)
        places = places[inside] if inside.any() else places
    return np.sort(places[:COUNT]).astype(np.int32)


class _Look:
    """Tests of single voxels of a volume; ``sample`` are the linear indices of voxels drawn at random."""

    def __init__(
        self, stored: Stored, channels: Sequence[Channel], hidden: np.ndarray | None, sample: np.ndarray
    ) -> None:
        self.stored, self.channels, self.hidden = stored, channels, hidden
        self.scale = np.array(stored.slope)[:, None], np.array(stored.intercept)[:, None]
        real = self._real(np.unravel_index(sample, stored.voxels.shape[1:]))
        self.level = np.array([[content_level(c, r[~np.isnan(r)])] for c, r in zip(channels, real)])

    def is_content(self, at: tuple[np.ndarray, ...]) -> np.ndarray:
        real = self._real(at)
        fits = (real >= self.level).any(axis=0) & ~np.isnan(real).any(axis=0)
        return fits if self.hidden is None else fits & ~self.hidden[at]

    def of_plane(self, z: int) -> np.ndarray:
        """Linear indices of the content of one plane."""
        _, height, width = self.stored.voxels.shape[1:]
        y, x = np.indices((height, width)).reshape(2, -1)
        return np.flatnonzero(self.is_content((np.full_like(y, z), y, x))) + z * height * width

    def is_body(self, at: tuple[np.ndarray, ...], spacing: Sequence[float]) -> np.ndarray:
        steps = [np.linspace(-CUBE_MM / 2, CUBE_MM / 2, CUBE_POINTS) / mm for mm in spacing]
        offsets = np.rint(np.stack(np.meshgrid(*steps, indexing="ij"))).astype(np.int64).reshape(3, -1)
        shape = self.stored.voxels.shape[1:]
        around = [np.clip(a[:, None] + o, 0, n - 1).ravel() for a, o, n in zip(at, offsets, shape)]
        tissue = (self._real(tuple(around)) >= self.level).any(axis=0)
        return np.asarray(tissue.reshape(len(at[0]), -1).mean(axis=1) >= BODY_SHARE)

    def _real(self, at: tuple[np.ndarray, ...]) -> np.ndarray:
        """Real values (c, n) in float64, NaN where there is none."""
        voxels = self.stored.voxels[:, at[0], at[1], at[2]]
        real = voxels * self.scale[0] + self.scale[1]
        if voxels.dtype == np.int16:
            real[voxels == INVALID] = np.nan
        return np.asarray(real)
