"""Small scans for the tests of the build, written as a hospital's files would be."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np


def write_nifti(
    path: Path, array_xyz: np.ndarray, spacing: tuple[float, ...] = (1.0, 1.0, 1.0), ras: bool = True
) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    affine = np.diag([*spacing, 1.0]) @ np.diag([1 if ras else -1, 1 if ras else -1, 1, 1])
    image = nib.Nifti1Image(array_xyz, affine)
    image.set_sform(affine, 1)
    image.header["descrip"] = b"SmithJohn 1947"
    nib.save(image, path)
    return path


def phantom(seed: int, shape: tuple[int, ...] = (22, 18, 14)) -> np.ndarray:
    generator = np.random.default_rng(seed)
    body = np.full(shape, -1000.0)
    body[4:-4, 4:-4, 2:-2] = 40 + generator.normal(0, 20, tuple(n - m for n, m in zip(shape, (8, 8, 4))))
    return np.rint(body).astype(np.int16)
