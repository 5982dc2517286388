"""NumPy archives: keys, spacing, what is refused before it takes memory."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.errors import Quarantined
from data_pipeline.labels import read_label
from data_pipeline.layouts import discover, read_case
from data_pipeline.readers import read
from data_pipeline.sources import SourceConfig

IMAGE = np.random.default_rng(0).integers(0, 255, (4, 5, 6)).astype(np.uint8)
LABEL = (IMAGE > 200).astype(np.uint8)


def save(path: Path, **arrays: np.ndarray) -> Path:
    np.savez_compressed(path, **arrays)
    return path


def code_of(path: Path, **options) -> str:
    with pytest.raises(Quarantined) as refused:
        read(path, modality="CT", **{"spacing": (1, 1, 1), **options})
    assert str(path.parent) not in refused.value.detail
    return refused.value.code


def test_spacing_is_in_the_order_of_the_axes_but_for_medsams_files(tmp_path: Path) -> None:
    own = read(save(tmp_path / "a.npz", image=IMAGE, spacing=np.array([3.0, 2.0, 1.0])), modality="CT")
    assert (own.spacing, own.spacing_source) == ((3.0, 2.0, 1.0), "header")
    medsam = save(tmp_path / "b.npz", imgs=IMAGE, gts=LABEL, spacing=(1.0, 2.0, 3.0))
    assert read(medsam, modality="CT").spacing == (3.0, 2.0, 1.0)
    np.testing.assert_array_equal(own.voxels[0], IMAGE)
    declared = read(save(tmp_path / "c.npz", data=IMAGE), modality="CT", spacing=(5, 4, 3))
    assert (declared.spacing, declared.spacing_source) == ((5.0, 4.0, 3.0), "declared")
    assert declared.provenance["no_form"] == "true"
    assert code_of(tmp_path / "c.npz", spacing=None) == "no_spacing"


@pytest.mark.parametrize("bad", [[1.0, 1.0], [0.0, 1, 1], [np.nan, 1, 1], [-1.0, 1, 1], ["a", "b", "c"]])
def test_a_spacing_that_no_scan_has(tmp_path: Path, bad: list) -> None:
    assert code_of(save(tmp_path / "a.npz", image=IMAGE, spacing=np.array(bad))) == "bad_geometry"


@pytest.mark.parametrize("kind", ["<i2", ">i2", "<f4", ">f8", "?", "<u2"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_types_and_orders_of_arrays(tmp_path: Path, kind: str, order: str) -> None:
    array = np.array(IMAGE % 2 if kind == "?" else IMAGE, np.dtype(kind), order=order)  # type: ignore[call-overload]
    volume = read(save(tmp_path / "a.npz", image=array), modality="CT", spacing=(1, 1, 1), units="arbitrary")
    np.testing.assert_array_equal(volume.voxels[0], array)
    assert volume.voxels.dtype.isnative


def test_a_slice_and_colour(tmp_path: Path) -> None:
    flat = read(save(tmp_path / "a.npz", img=IMAGE[0]), modality="XR", spacing=(1, 0.5, 0.5))
    assert flat.shape == (1, 5, 6)
    np.testing.assert_array_equal(flat.voxels[0, 0], IMAGE[0])
    grey = np.stack([IMAGE[0]] * 3, -1)
    np.testing.assert_array_equal(
        read(save(tmp_path / "b.npz", imgs=grey), modality="XR", spacing=(1, 1, 1)).voxels[0, 0], IMAGE[0]
    )
    grey[0, 0, 0] += 1
    assert code_of(save(tmp_path / "c.npz", imgs=grey)) == "colour"


def test_a_label_in_the_same_file(tmp_path: Path) -> None:
    save(tmp_path / "case1.npz", imgs=IMAGE, gts=LABEL, spacing=(1.0, 2.0, 3.0))
    src = SourceConfig(
        path=tmp_path, modality="CT", include=("*.npz",), label_glob="*.npz", labels={1: "liver"}
    )
    (case,) = discover(src)
    assert case.label == case.images[0]
    volume = read_case(case, src)[0]
    label = read_label(tmp_path / "case1.npz", volume, regions={"liver": (1,)})
    np.testing.assert_array_equal(label.layers[0], LABEL)
    save(tmp_path / "case1.npz", imgs=IMAGE)
    with pytest.raises(Quarantined, match="label_unreadable"):
        read_label(tmp_path / "case1.npz", volume, regions={"liver": (1,)})


class Trap:
    """Pickled, it would make a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_nothing_pickled_is_ever_loaded(tmp_path: Path) -> None:
    save(tmp_path / "a.npz", image=np.array([Trap(tmp_path / "sprung")], object))
    assert code_of(tmp_path / "a.npz") == "unsupported_layout"
    save(tmp_path / "b.npz", image=IMAGE, spacing=np.array([Trap(tmp_path / "sprung")], object))
    assert code_of(tmp_path / "b.npz") == "unsupported_layout"
    assert not (tmp_path / "sprung").exists()


def npy(shape: tuple[int, ...], kind: str, body: bytes) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": kind, "fortran_order": False, "shape": shape})
    return file.getvalue() + body


def test_bombs_cut_files_and_wrong_shapes(tmp_path: Path) -> None:
    def archive(content: bytes) -> Path:
        with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED) as file:
            file.writestr("image.npy", content)
        return tmp_path / "a.npz"

    assert code_of(archive(npy((40000, 40000, 40), "|u1", b"\0" * 100))) == "unsupported_layout"  # 64 GB
    assert (
        code_of(archive(npy((2000, 2000, 2000), "|u1", b"\0" * 100))) == "truncated"
    )  # too few bytes for it
    assert code_of(archive(npy((1024, 1024, 300), "|u1", b"\0" * (300 << 20)))) == "unsupported_layout"
    assert code_of(archive(npy((10, 10, 10), "<i2", b"\0" * 100))) == "truncated"
    whole = save(tmp_path / "b.npz", image=IMAGE).read_bytes()
    for share in (0.2, 0.6, 0.95):
        (tmp_path / "b.npz").write_bytes(whole[: int(len(whole) * share)])
        assert code_of(tmp_path / "b.npz") == "truncated"
    (tmp_path / "c.npz").write_bytes(b"not a zip file at all")
    assert code_of(tmp_path / "c.npz") == "unreadable"
    flipped = bytearray(whole)
    flipped[len(whole) // 3] ^= 0xFF
    (tmp_path / "d.npz").write_bytes(flipped)
    assert code_of(tmp_path / "d.npz") in ("truncated", "unreadable")


def test_what_a_file_must_hold(tmp_path: Path) -> None:
    assert code_of(save(tmp_path / "a.npz", other=IMAGE)) == "no_pixel_data"
    assert code_of(save(tmp_path / "b.npz", image=IMAGE, data=IMAGE)) == "unsupported_layout"
    assert code_of(save(tmp_path / "c.npz", image=IMAGE.astype(complex))) == "unsupported_layout"
    assert code_of(save(tmp_path / "d.npz", image=IMAGE[None, None])) == "unsupported_layout"
    assert code_of(save(tmp_path / "e.npz", image=IMAGE[:0])) == "no_pixel_data"
    assert code_of(save(tmp_path / "f.npz", image=np.array(["text"]))) == "unsupported_layout"
