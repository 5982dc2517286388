"""What crops cost to read: chunks touched, bytes and requests, voxels decompressed; from boxes alone.

The size of a single chunk is in the sample's index, not in the manifest, so each is taken for the mean of its
member. The image is counted, at the level a crop is cut from; labels and hidden voxels are not.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass, fields

from data_pipeline.geometry import level_factors
from data_pipeline.levels import level_shape
from data_pipeline.manifest import MEMBERS, Manifest
from data_pipeline.order import Draw
from data_pipeline.remote_files import RemoteFiles
from data_pipeline.storage import chunk_shape


@dataclass(frozen=True)
class CropCost:
    """Means over crops.

    used, decompressed: voxels of the box, and of the chunks that it touches (whole ones, as Blosc2 stores
    them). used_bytes: compressed, the box's part of its member. touched_bytes: compressed, of those chunks.
    read_bytes, requests: of reads chunk by chunk from a store, with the sample's index and what lies between
    neighbouring chunks.
    """

    used: float
    decompressed: float
    used_bytes: float
    touched_bytes: float
    read_bytes: float
    requests: float


def crop_cost(manifest: Manifest, draws: Iterable[Draw]) -> CropCost:
    """Mean cost of these crops, read in this order."""
    costs = [_cost(manifest, draw) for draw in draws]
    return CropCost(*(sum(getattr(c, f.name) for c in costs) / len(costs) for f in fields(CropCost)))


def _cost(manifest: Manifest, draw: Draw) -> CropCost:
    row, member = draw.row, MEMBERS[draw.level]
    channels, *native = manifest.column("shape")[row].tolist()
    kind = manifest.value(row, "geometry")
    factors = level_factors(kind, draw.axes)[draw.level]
    shape = level_shape(native, factors)
    chunk = chunk_shape((channels, *shape), kind, draw.axes)[1:]
    grid = [-(-n // c) for n, c in zip(shape, chunk)]
    touched = [range(o // c, -(-(o + e) // c)) for o, e, c in zip(draw.origin, draw.extent, chunk)]
    count = math.prod(map(len, touched))
    size = int(manifest.column(f"{member}_size")[row])
    one = size / (channels * math.prod(grid))
    runs, gaps = _runs(touched, grid, RemoteFiles.gap / one)
    used = math.prod(draw.extent)
    return CropCost(
        used=used,
        decompressed=count * math.prod(chunk),
        used_bytes=size * used / (channels * math.prod(shape)),
        touched_bytes=count * one,
        read_bytes=(count + gaps) * one + int(manifest.column("idx_size")[row]),
        requests=runs + 1,
    )


def _runs(touched: list[range], grid: list[int], bridge: float) -> tuple[int, int]:
    """Requests for these chunks when gaps of up to `bridge` chunks are read too, and the chunks in gaps."""
    numbers = [(z * grid[1] + y) * grid[2] + x for z, y, x in itertools.product(*touched)]
    between = [b - a - 1 for a, b in itertools.pairwise(numbers)]
    bridged = [gap for gap in between if gap <= bridge]
    return 1 + len(between) - len(bridged), sum(bridged)
