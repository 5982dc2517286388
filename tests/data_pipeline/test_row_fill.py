"""How much of its row slots a small scan fills: a slot without a token costs as much as one with."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline.geometry import PATCH, TokenConfig, geometry_of, row_class, token_count
from data_pipeline.order import Order
from data_pipeline.schedule import MixtureConfig

#: Shape (z, y, x) and spacing of small public scans: hippocampus, PET of a limb, chest X-ray.
SMALL = [
    ((35, 51, 35), (1.0, 1.0, 1.0), "MR"),
    ((24, 53, 34), (1.0, 1.0, 1.0), "MR"),
    ((51, 29, 30), (3.3, 5.5, 5.5), "PT"),
    ((55, 29, 28), (3.3, 5.5, 5.5), "PT"),
    ((37, 49, 30), (3.3, 5.5, 5.5), "PT"),
    ((1, 256, 256), (1.0, 1.0, 1.0), "XR"),
]


def filled(shape: tuple[int, ...], spacing: tuple[float, ...], tokens: TokenConfig) -> float:
    """Share of its slots that a scan fills at its own resolution."""
    kind, axes = geometry_of(shape, spacing)
    needed = token_count([shape[a] for a in axes], PATCH[kind])
    capacity = tokens.slots // row_class(needed, tokens.slots, tokens.classes)
    return min(needed, capacity) / capacity


class Columns:
    """A manifest of scans of given shapes, `copies` of each."""

    hash = "small"

    def __init__(self, scans: list[tuple[Any, Any, str]], copies: int) -> None:
        scans = sorted((scan for scan in scans for _ in range(copies)), key=lambda scan: scan[2])
        kinds = [geometry_of(shape, spacing) for shape, spacing, _ in scans]
        self.columns = {
            "shape": np.array([(1, *shape) for shape, _, _ in scans], np.int32),
            "spacing": np.array([spacing for _, spacing, _ in scans], np.float32),
            "modality": np.array([modality for _, _, modality in scans], object),
            "geometry": np.array([kind for kind, _ in kinds], object),
            "axes": np.array([axes for _, axes in kinds], np.int8),
            "shard": np.array([f"{m}-{i // 8:06d}" for i, (_, _, m) in enumerate(scans)], object),
            "l1_offset": np.full(len(scans), -1),
            "l2_offset": np.full(len(scans), -1),
        }

    def __len__(self) -> int:
        return len(self.columns["shape"])

    def column(self, name: str) -> np.ndarray:
        return self.columns[name]

    def value(self, i: int, name: str) -> Any:
        raise AssertionError("no crop of this mixture is placed over a listed voxel")


@pytest.mark.parametrize("slots", [512, 4096])
def test_the_smallest_scans_fill_their_slots_at_their_own_resolution(slots: int) -> None:
    for shape, spacing, _ in SMALL:
        assert filled(shape, spacing, TokenConfig(slots=slots)) >= 0.6, shape


@pytest.mark.parametrize("slots", [512, 4096])
def test_crops_of_the_smallest_scans_fill_their_slots(slots: int) -> None:
    order = Order(Columns(SMALL, 40), np.arange(240), TokenConfig(slots=slots), MixtureConfig(groups=2), 0)
    fill: dict[tuple[int, ...], list[float]] = {}
    for i in range(3 * order.batch_size):
        draw = order.draw(i)
        shape = tuple(order.manifest.column("shape")[draw.row])
        fill.setdefault(shape, []).append(math.prod(draw.grid) / order.composition[draw.spec].capacity)
    assert len(fill) == len(SMALL)
    assert all(np.mean(shares) >= 0.6 for shares in fill.values()), fill


def test_any_scan_below_half_a_row_fills_two_thirds() -> None:
    """Capacities follow each other by at most 1.5, down to the smallest."""
    tokens = TokenConfig()
    smallest = tokens.slots // max(tokens.classes)
    for needed in range(smallest * 2 // 3 + 1, tokens.slots // 2 + 1):
        capacity = tokens.slots // row_class(needed, tokens.slots, tokens.classes)
        assert needed / capacity > 0.66, needed


@pytest.mark.real_data
def test_the_smallest_real_scans_fill_their_slots(real_data: Path) -> None:
    """Of the scans for training (not those that break readers), the fifty smallest."""
    scans = []
    with open(real_data / "MANIFEST.csv", encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            size = [int(n) for n in row["size_vox"].split("x") if n.isdigit()]
            if row["path"].startswith("hard/") or len(size) not in (2, 3):
                continue
            mm = [float(s) for s in row["spacing_mm"].split("x")] if row["spacing_mm"][:1].isdigit() else []
            shape = tuple([*size, 1][:3][::-1])
            spacing = tuple(mm[::-1]) if len(mm) == 3 else (1.0, 1.0, 1.0)
            scans.append((shape, spacing))
    smallest = sorted(scans, key=lambda scan: math.prod(scan[0]))[:50]
    assert len(smallest) == 50
    for slots in (512, 4096):
        short = [s for s in smallest if filled(*s, TokenConfig(slots=slots)) < 0.6]
        assert not short
