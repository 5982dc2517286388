"""Anything a person may call an image, as a `Volume` and as the network's input."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.intensity import statistics
from data_pipeline.volume import Channel, Volume
from engine.errors import UserError
from model.config import EncoderConfig
from model.plan import AdaptationPlan, norm_for, normalise_for

UNITS = {"CT": "HU", "PT": "SUV"}


def normalised_volume(volume: Volume, plan: AdaptationPlan | None) -> np.ndarray:
    """(c, z, y, x) float32 in the network's range: the plan's fixed rule, else the statistics of this whole
    volume."""
    channels = []
    measured = statistics(volume)
    for number, channel in enumerate(volume.channels):
        # The measured norm maps stored values; ours are real ones already.
        norm = (1.0, 0.0, *(float(v) for v in tuple(measured[number])[2:]))
        if plan is None:
            plan = AdaptationPlan(architecture=EncoderConfig())
        fixed = norm_for(plan, channel.modality) if channel.units != "arbitrary" else None
        channels.append(normalise_for(plan, channel.modality, volume.real(number), fixed or norm))
    return np.stack(channels)


def volume_of(image: Any, spacing: Sequence[float] | None, modality: str | None) -> Volume:
    """A path, several paths (one a channel), a SimpleITK image or an array (z, y, x) or (c, z, y, x), on
    its own grid.

    spacing: mm (z, y, x). Raises UserError, or what the readers raise for a file they refuse.
    """
    if isinstance(image, np.ndarray):
        return _volume_of_array(image, spacing, modality)
    if isinstance(image, str | Path):
        from data_pipeline.readers import read

        return read(Path(image), modality=modality, spacing=_three(spacing))
    if isinstance(image, Sequence):
        from data_pipeline.readers import read_channels

        return read_channels([Path(p) for p in image], modality=modality, spacing=_three(spacing))
    if hasattr(image, "GetDirection"):
        return _volume_of_itk(image, modality)
    raise UserError(f"an image is a path, a SimpleITK image or an array, not {type(image).__name__}")


def _three(spacing: Sequence[float] | None) -> tuple[float, float, float] | None:
    if spacing is None:
        return None
    if len(spacing) != 3 or min(spacing) <= 0:
        raise UserError(f"spacing is three positive numbers of mm (z, y, x), not {tuple(spacing)}")
    z, y, x = (float(s) for s in spacing)
    return z, y, x


def _channels(count: int, modality: str | None) -> tuple[Channel, ...]:
    if modality not in ("CT", "MR", "XR", "PT"):
        raise UserError(f"modality {modality!r} is not one of CT, MR, XR, PT; pass modality= to set_image")
    units: Any = UNITS.get(modality, "arbitrary")
    return tuple(Channel(f"channel_{i}", modality, units) for i in range(count))  # type: ignore[arg-type]


def _volume_of_array(array: np.ndarray, spacing: Sequence[float] | None, modality: str | None) -> Volume:
    voxels = array[None] if array.ndim == 3 else array
    if voxels.ndim != 4 or 0 in voxels.shape:
        raise UserError(f"an array is (z, y, x) or (c, z, y, x), not of shape {array.shape}")
    three = _three(spacing)
    if three is None:
        raise UserError("an array has no spacing; pass spacing=(z, y, x) in mm to set_image")
    affine = np.diag([three[2], three[1], three[0], 1.0])
    return _finite(voxels, _channels(len(voxels), modality), affine, "declared")


def _volume_of_itk(image: Any, modality: str | None) -> Volume:
    import SimpleITK

    dimension = image.GetDimension()
    if dimension not in (2, 3):
        raise UserError(
            f"a SimpleITK image of {dimension} dimensions cannot be segmented; give one 3-D frame"
        )
    voxels = SimpleITK.GetArrayFromImage(image)
    if image.GetNumberOfComponentsPerPixel() > 1:
        voxels = np.moveaxis(voxels, -1, 0)
    else:
        voxels = voxels[None]
    if dimension == 2:
        voxels = voxels[:, None]
    affine = np.eye(4)
    direction = np.eye(3)
    direction[:dimension, :dimension] = np.array(image.GetDirection()).reshape(dimension, dimension)
    scale = np.ones(3)
    scale[:dimension] = image.GetSpacing()
    affine[:3, :3] = direction * scale
    affine[:dimension, 3] = image.GetOrigin()
    return _finite(voxels, _channels(len(voxels), modality), affine, "header")


def _finite(voxels: np.ndarray, channels: tuple[Channel, ...], affine: np.ndarray, source: Any) -> Volume:
    invalid = None
    if np.issubdtype(voxels.dtype, np.floating) and not np.isfinite(voxels).all():
        invalid = ~np.isfinite(voxels)
        lowest = float(voxels[~invalid].min()) if not invalid.all() else 0.0
        voxels = np.where(invalid, lowest, voxels)
    return Volume.on_grid(voxels, channels, affine, spacing_source=source, invalid=invalid)
