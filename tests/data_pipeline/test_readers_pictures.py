"""PNG, JPEG and TIFF in the forms that scanners, viewers and annotation tools write."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from PIL import Image

from data_pipeline.errors import Quarantined
from data_pipeline.readers import read
from data_pipeline.volume import Volume

DEEP = np.random.default_rng(0).integers(0, 65535, (6, 8)).astype(np.uint16)
GREY = (DEEP >> 8).astype(np.uint8)


def picture(path: Path) -> Volume:
    return read(path, modality="XR", field_mm=100)


def code_of(path: Path) -> str:
    with pytest.raises(Quarantined) as refused:
        picture(path)
    return refused.value.code


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_grey_colour_of_16_bits_keeps_its_bits(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    for samples in (3, 4):
        planes = [DEEP] * 3 + [np.full_like(DEEP, 65535)] * (samples - 3)
        sitk.WriteImage(sitk.GetImageFromArray(np.stack(planes, -1), isVector=True), str(path))
        np.testing.assert_array_equal(picture(path).voxels[0, 0], DEEP)
    other = np.stack([DEEP, DEEP, DEEP ^ 1], -1)  # differs in the lowest bit alone
    sitk.WriteImage(sitk.GetImageFromArray(other, isVector=True), str(path))
    assert code_of(path) == "colour"


@pytest.mark.parametrize("array", [GREY, DEEP], ids=["8", "16"])
@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_values_are_simpleitks(tmp_path: Path, array: np.ndarray, suffix: str) -> None:
    Image.fromarray(array).save(tmp_path / f"a{suffix}")
    volume = picture(tmp_path / f"a{suffix}")
    np.testing.assert_array_equal(volume.voxels[0, 0], array)
    image = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / f"a{suffix}")))
    np.testing.assert_array_equal(volume.voxels[0, 0], image)


def test_white_is_zero_is_inverted(tmp_path: Path) -> None:
    Image.fromarray(DEEP).save(tmp_path / "a.tif", tiffinfo={262: 0})
    volume = picture(tmp_path / "a.tif")
    np.testing.assert_array_equal(volume.voxels[0, 0], 65535 - DEEP)
    assert volume.provenance["inverted"] == "true"


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_orientation_tags_are_applied_and_noted(tmp_path: Path, suffix: str, orientation: int) -> None:
    path = tmp_path / f"a{suffix}"
    exif = Image.Exif()
    exif[274] = orientation
    Image.fromarray(GREY).save(
        path, **({"tiffinfo": {274: orientation}} if suffix == ".tif" else {"exif": exif})
    )
    turns = {
        1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud, 5: lambda a: a.T,
        6: lambda a: np.rot90(a, -1), 7: lambda a: np.rot90(a, 2).T, 8: np.rot90,
    }  # fmt: skip
    if suffix == ".tif" and orientation > 4:
        assert code_of(path) == "unsupported_layout"
        return
    volume = picture(path)
    np.testing.assert_array_equal(volume.voxels[0, 0], turns[orientation](GREY))
    assert ("exif_orientation" in volume.provenance) == (orientation != 1)


def test_a_jpeg_with_an_orientation(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(np.kron(GREY, np.ones((16, 16), np.uint8))).save(
        tmp_path / "a.jpg", exif=exif, quality=95
    )
    assert picture(tmp_path / "a.jpg").shape == (1, 128, 96)


def test_one_bit_palettes_alpha_and_cmyk(tmp_path: Path) -> None:
    Image.fromarray(GREY > 99).save(tmp_path / "one.png")
    np.testing.assert_array_equal(picture(tmp_path / "one.png").voxels[0, 0], (GREY > 99) * 255)
    Image.fromarray(GREY > 99).save(tmp_path / "one.tif")
    np.testing.assert_array_equal(picture(tmp_path / "one.tif").voxels[0, 0], (GREY > 99) * 255)
    coloured = Image.fromarray(GREY).convert("P")
    coloured.putpalette([v for n in range(256) for v in (n, 0, 255 - n)])
    coloured.save(tmp_path / "palette.png")
    assert code_of(tmp_path / "palette.png") == "colour"
    alpha = Image.fromarray(np.stack([GREY, np.full_like(GREY, 255)], -1), "LA")
    alpha.save(tmp_path / "opaque.png")
    np.testing.assert_array_equal(picture(tmp_path / "opaque.png").voxels[0, 0], GREY)
    Image.fromarray(np.stack([GREY, GREY], -1), "LA").save(tmp_path / "glass.png")
    assert code_of(tmp_path / "glass.png") == "colour"
    Image.fromarray(GREY).save(tmp_path / "key.png", transparency=7)
    assert code_of(tmp_path / "key.png") == "colour"
    Image.fromarray(np.stack([GREY] * 4, -1), "CMYK").save(tmp_path / "ink.jpg")
    assert code_of(tmp_path / "ink.jpg") == "colour"
    Image.fromarray(np.stack([GREY] * 4, -1), "CMYK").save(tmp_path / "ink.tif")
    assert code_of(tmp_path / "ink.tif") == "colour"


def test_several_pages_and_other_formats_under_the_name(tmp_path: Path) -> None:
    pages = [Image.fromarray(GREY), Image.fromarray(GREY)]
    pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:])
    assert code_of(tmp_path / "a.tif") == "unsupported_layout"
    Image.fromarray(GREY).save(tmp_path / "b.gif")
    (tmp_path / "b.gif").rename(tmp_path / "b.png")
    assert code_of(tmp_path / "b.png") == "unreadable"
    Image.fromarray(GREY).save(tmp_path / "c.jpg")  # a JPEG called PNG is a picture all the same
    (tmp_path / "c.jpg").rename(tmp_path / "c.png")
    assert picture(tmp_path / "c.png").shape == (1, 6, 8)


@pytest.mark.parametrize("kind", [np.int16, np.uint32, np.float32])
def test_other_numbers_in_tiff(tmp_path: Path, kind: type) -> None:
    array = (DEEP.astype(np.float64) * (60000 if kind is np.uint32 else 0.4)).astype(kind)
    if kind is np.int16:
        array -= 9000
    if kind is np.uint32:
        sitk.WriteImage(sitk.GetImageFromArray(array), str(tmp_path / "a.tif"))
    else:
        Image.fromarray(array.astype(np.int32) if kind is np.int16 else array).save(tmp_path / "a.tif")
    np.testing.assert_array_equal(picture(tmp_path / "a.tif").voxels[0, 0], array)
