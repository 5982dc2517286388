"""Structures that may overlap, packed into as few layers of class ids as their overlaps allow."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

#: Slices of one structure along the stacking axis: number of the slice -> mask of the plane.
Slices = dict[int, np.ndarray]


class Layers:
    """Layers of a grid (z, y, x). ``axis`` is the array axis along which slices are stacked; the planes of
    `Slices` keep the order of the two others."""

    def __init__(self, shape: tuple[int, int, int], axis: int = 0) -> None:
        self.shape, self.axis = shape, axis
        self._layers: list[np.ndarray] = []

    def add(self, label: int, slices: Mapping[int, np.ndarray]) -> None:
        """Write a structure into the first layer in which it meets no other class."""
        slices = {k: mask for k, mask in slices.items() if mask.any()}
        for layer in self._layers:
            planes = np.moveaxis(layer, self.axis, 0)
            if not any(((planes[k] != 0) & (planes[k] != label) & mask).any() for k, mask in slices.items()):
                break
        else:
            layer = np.zeros(self.shape, np.uint8)
            self._layers.append(layer)
        planes = np.moveaxis(layer, self.axis, 0)
        for k, mask in slices.items():
            planes[k][mask] = label

    def stacked(self) -> np.ndarray:
        """(layer, z, y, x) uint8, at least one layer."""
        return np.stack(self._layers) if self._layers else np.zeros((1, *self.shape), np.uint8)


def merge(into: Slices, more: Mapping[int, np.ndarray]) -> None:
    """Add the voxels of ``more`` to a structure."""
    for k, mask in more.items():
        into[k] = into[k] | mask if k in into else mask
