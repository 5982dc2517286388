"""What a build overwrites is gone: text and faces are in no stored level, and not in the report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont
from planted import everything

from data_pipeline import burned_in, deface
from data_pipeline.build import build
from data_pipeline.manifest import Manifest
from data_pipeline.readers import read
from data_pipeline.sources import SourceConfig
from data_pipeline.storage import decode, invalid_of

NAME = "ZYXQUORTH VELMIRA 31.12.1947"


def radiograph(path: Path) -> tuple[Path, np.ndarray]:
    """A smooth picture with a name in its corner, and where the ink is."""
    y, x = np.mgrid[:320, :400] / 400.0
    plane = 60 + 80 * np.exp(-((x - 0.5) ** 2 + (y - 0.4) ** 2) * 6)
    plane += np.random.default_rng(0).normal(0, 1, plane.shape)
    clean = Image.fromarray(plane.astype(np.uint8))
    picture = clean.copy()
    ImageDraw.Draw(picture).text((12, 12), NAME, fill=250, font=ImageFont.load_default(18))
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)
    return path, np.asarray(picture) != np.asarray(clean)


def frames(root: Path) -> list[np.ndarray]:
    return [
        decode(data) for place, data in everything(root) if place.endswith(".b2nd") and ".hide" not in place
    ]


def stated(path: Path, **more: Any) -> SourceConfig:
    return SourceConfig(path=path.parent, name="x", modality="XR", field_mm=300.0, **more)


def test_masked_text_is_in_no_stored_voxel(tmp_path: Path) -> None:
    path, ink = radiograph(tmp_path / "in" / "a.png")
    text = burned_in.text_mask(read(path, modality="XR", field_mm=300.0))[0]
    assert (text & ink).sum() > 0.95 * ink.sum()  # on this plain one it finds the line
    build([stated(path, burned_in="accept")], tmp_path / "kept", progress=False, level_min_voxels=1000)
    build([stated(path, burned_in="mask")], tmp_path / "masked", progress=False, level_min_voxels=1000)
    kept, masked = frames(tmp_path / "kept")[0][0, 0], frames(tmp_path / "masked")[0][0, 0]
    assert (kept[ink] > 200).sum() > 300  # without the mask it is there
    assert invalid_of(masked)[text].all()
    np.testing.assert_array_equal(masked[~text], kept[~text])
    levels = frames(tmp_path / "masked")
    assert len(levels) > 1
    for level in levels:
        assert level.max() < 200, level.shape
    assert max(level.max() for level in frames(tmp_path / "kept")) > 200
    assert Manifest.open(tmp_path / "masked").info["sources"][0]["burned_in"] == "mask"


@pytest.mark.parametrize("how", ["remove", "mask"])
def test_a_removed_face_is_in_no_stored_voxel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """Whatever the finder marks is overwritten under `remove`; under `mask` it is hidden, and still there."""
    import nibabel as nib

    array = np.random.default_rng(1).integers(100, 200, (40, 40, 40)).astype(np.int16)
    array[10:20, 30:38, 10:20] = 3000  # the "face"
    path = tmp_path / "in" / "a.nii"
    path.parent.mkdir()
    nib.save(nib.Nifti1Image(array, np.eye(4)), path)
    monkeypatch.setattr(deface, "face_mask", lambda volume: volume.voxels[0] == 3000)
    source = SourceConfig(path=path.parent, name="m", modality="MR", deface=how)  # type: ignore[arg-type]
    build([source], tmp_path / "out", progress=False, level_min_voxels=1000)
    levels = frames(tmp_path / "out")
    assert len(levels) == 3
    assert (levels[0].max() == 3000) == (how == "mask")
    assert all(level.max() < 3000 for level in levels[1:])
    assert any(place.endswith(".hide.b2nd") for place, _ in everything(tmp_path / "out")) == (how == "mask")
    pictures = [data for place, data in everything(tmp_path / "out") if place.endswith("pixels")]
    assert pictures
    assert Manifest.open(tmp_path / "out").info["sources"][0]["deface"] == how
