"""Siemens mosaics made in the test, with a CSA header; geometry compared with nibabel's MosaicWrapper."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from dicom_files import NORMAL, dataset
from nibabel.nicom import csareader
from nibabel.nicom.dicomwrappers import wrapper_from_file
from pydicom.dataset import Dataset

from data_pipeline.errors import Quarantined
from data_pipeline.readers import read, read_all
from data_pipeline.readers.dicom import decode_all

CORNER = np.array([-100.0, -90.0, 30.0])  # the mosaic's own position
TILES, HIGH, WIDE = 7, 6, 8  # 7 of 3 x 3 tiles are filled


def csa(**tags: list[str]) -> bytes:
    """A CSA2 header, as Siemens writes it."""
    out = b"SV10\4\3\2\1" + struct.pack("<2I", len(tags), 77)
    for name, items in tags.items():
        head = name.encode().ljust(64, b"\0")
        kind = b"SH" if "Text" in name else b"US" if "Number" in name else b"FD"
        out += head + struct.pack("<i4s3i", len(items), kind, 4, len(items), 77)
        for item in items:
            text = item.encode() + b"\0"
            out += struct.pack("<4i", len(text), len(text), 77, len(text)) + text.ljust(
                -(-len(text) // 4) * 4, b"\0"
            )
    return out


def volume(seed: int = 0) -> np.ndarray:
    return (
        np.random.default_rng(seed)
        .permutation(TILES * HIGH * WIDE)
        .reshape(TILES, HIGH, WIDE)
        .astype(np.uint16)
    )


def mosaic(array: np.ndarray, turn: int = 1, header: bytes | None = None, **tags) -> Dataset:
    across = int(np.ceil(np.sqrt(len(array))))
    image = np.zeros((across * HIGH, across * WIDE), np.uint16)
    for n, tile in enumerate(array):
        y, x = divmod(n, across)
        image[y * HIGH : (y + 1) * HIGH, x * WIDE : (x + 1) * WIDE] = tile
    ds = dataset(image, CORNER, "1.2.3", Modality="MR", RescaleSlope=None, RescaleIntercept=None,
                 ImageType=["ORIGINAL", "PRIMARY", "M", "ND", "MOSAIC"], SpacingBetweenSlices=2.5,
                 Manufacturer="SIEMENS", **tags)  # fmt: skip
    made = csa(
        AcquisitionMatrixText=[f"{HIGH}p*{WIDE}"],
        NumberOfImagesInMosaic=[str(len(array))],
        SliceNormalVector=[f"{turn * v:.8f}" for v in NORMAL],
        B_value=[str(tags.get("InstanceNumber", 0) // 2 * 1000)],
    )
    block = ds.private_block(0x0029, "SIEMENS CSA HEADER", create=True)
    block.add_new(0x10, "OB", made if header is None else header)
    return ds


def saved(ds: Dataset, path: Path) -> Path:
    ds.save_as(path, enforce_file_format=True)
    return path


def test_the_header_made_here_is_one_that_nibabel_reads() -> None:
    header = csareader.read(csa(NumberOfImagesInMosaic=["7"], SliceNormalVector=["0", "0.6", "0.8"]))
    assert csareader.get_n_mosaic(header) == 7
    np.testing.assert_allclose(csareader.get_slice_normal(header), [0, 0.6, 0.8])


@pytest.mark.parametrize("turn", [1, -1])
def test_a_mosaic_is_a_volume_where_nibabel_says(tmp_path: Path, turn: int) -> None:
    array = volume()
    path = saved(mosaic(array, turn), tmp_path / "a.dcm")
    ours = read(path)
    assert ours.source_shape == array.shape
    # Slices ascend along row x column, whichever way they were stored.
    np.testing.assert_array_equal(ours.to_source(ours.voxels[0]), array[::turn])
    wrapper = wrapper_from_file(path)
    data = wrapper.get_data()
    for value in (0, 100, len(array.ravel()) - 1):
        theirs = wrapper.affine @ [*np.argwhere(data == value)[0], 1.0]
        k, j, i = np.argwhere(ours.voxels[0] == value)[0]
        np.testing.assert_allclose(ours.lps_mm_of_index((i, j, k)), theirs[:3], atol=1e-4)


def test_the_first_tile_keeps_its_place(tmp_path: Path) -> None:
    ours = read(saved(mosaic(volume()), tmp_path / "a.dcm"))
    row, column = np.array([0.8, 0.6, 0.0]), np.array([-0.48, 0.64, 0.6])
    first = CORNER + row * 0.75 * (3 * WIDE - WIDE) / 2 + column * 0.5 * (3 * HIGH - HIGH) / 2
    np.testing.assert_allclose(ours.source_affine[:3, 3], first, atol=1e-6)
    np.testing.assert_allclose(ours.source_affine[:3, 2], 2.5 * NORMAL, atol=1e-6)


def test_mosaics_of_a_series_are_frames_and_split_by_their_private_b_value(tmp_path: Path) -> None:
    arrays = [volume(n) for n in range(4)]
    for n, array in enumerate(arrays):
        ds = mosaic(array, InstanceNumber=n)
        ds.AcquisitionNumber = n + 1
        saved(ds, tmp_path / f"{9 - n}.dcm")
    raws = decode_all(tmp_path)
    assert [raw.provenance["b_value"] for raw in raws] == ["0", "1000"]
    np.testing.assert_array_equal(raws[0].frames, np.stack(arrays[:2]))
    np.testing.assert_array_equal(raws[1].frames, np.stack(arrays[2:]))
    assert len(read_all(tmp_path)) == 4
    assert len(raws[0].instances) == 2


def test_the_number_of_tiles_may_stand_in_a_private_element(tmp_path: Path) -> None:
    ds = mosaic(volume(), header=csa(SliceNormalVector=[f"{v:.8f}" for v in NORMAL]))
    ds.private_block(0x0019, "SIEMENS MR HEADER", create=True).add_new(0x0A, "US", TILES)
    assert read(saved(ds, tmp_path / "a.dcm")).source_shape == (TILES, HIGH, WIDE)


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"SV10 and no more",
        csa(NumberOfImagesInMosaic=["7"]),
        csa(SliceNormalVector=["0", "0", "1"]),
        csa(NumberOfImagesInMosaic=["7"], SliceNormalVector=["1", "0", "0"]),
        csa(NumberOfImagesInMosaic=["40"], SliceNormalVector=[f"{v:.8f}" for v in NORMAL]),
    ],
    ids=["empty", "damaged", "no direction", "no number", "direction within the slice", "wrong number"],
)
def test_a_mosaic_that_cannot_be_placed_is_refused(tmp_path: Path, header: bytes) -> None:
    with pytest.raises(Quarantined) as refused:
        decode_all(saved(mosaic(volume(), header=header), tmp_path / "a.dcm"))
    assert refused.value.code == "mosaic"
