"""NRRD and MetaImage headers as other programs write them: frames, kinds, encodings, what is missing."""

from __future__ import annotations

import bz2
import gzip
import os
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from data_pipeline.errors import Quarantined
from data_pipeline.labels import read_label
from data_pipeline.readers import read, read_all

DATA = np.arange(24, dtype="<i2").reshape(2, 3, 4)
#: Factor from the frame to LPS along its three axes.
SPACES = {
    "left-posterior-superior": (1, 1, 1),
    "right-anterior-superior": (-1, -1, 1),
    "left-anterior-superior": (1, -1, 1),
    "LPS": (1, 1, 1),
    "RAS": (-1, -1, 1),
    "LAS": (1, -1, 1),
}


def nrrd(
    path: Path, data: np.ndarray = DATA, body: bytes | None = None, keys: tuple = (), **changes: str | None
) -> Path:
    fields: dict[str, str | None] = {
        "type": "int16",
        "dimension": str(data.ndim),
        "space": "left-posterior-superior",
        "sizes": " ".join(map(str, data.shape[::-1])),
        "space directions": "(0.6,0.8,0) (-1.6,1.2,0) (0,0,3)",
        "kinds": "domain domain domain",
        "endian": "little",
        "encoding": "raw",
        "space origin": "(10,-20,30)",
    }
    fields |= {name.replace("_", " "): value for name, value in changes.items()}
    if "space dimension" in fields:  # comes before what it counts
        fields = {"type": None, "space dimension": None} | fields
    lines = ["NRRD0004", *(f"{name}: {value}" for name, value in fields.items() if value is not None), *keys]
    path.write_bytes("\n".join(lines).encode() + b"\n\n" + (data.tobytes() if body is None else body))
    return path


def code_of(path: Path, **options) -> str:
    with pytest.raises(Quarantined) as refused:
        read(path, modality="MR", **options)
    assert str(path.parent) not in refused.value.detail
    return refused.value.code


@pytest.mark.parametrize("space", SPACES)
def test_frames_of_the_patient(tmp_path: Path, space: str) -> None:
    path = nrrd(tmp_path / "a.nrrd", space=space)
    volume = read(path, modality="MR")
    frame = np.diag([*SPACES[space], 1.0])
    expected = frame @ np.array([[0.6, -1.6, 0, 10], [0.8, 1.2, 0, -20], [0, 0, 3, 30], [0, 0, 0, 1]])
    np.testing.assert_allclose(volume.source_affine, expected, atol=1e-9)
    np.testing.assert_array_equal(volume.to_source(volume.voxels[0]), DATA)
    image = sitk.ReadImage(str(path))
    point = image.TransformIndexToPhysicalPoint((3, 1, 1))
    np.testing.assert_allclose(volume.source_affine @ (3, 1, 1, 1), (*point, 1), atol=1e-6)


@pytest.mark.parametrize("space", [None, "scanner-xyz", "3D-right-handed", "3D-left-handed"])
def test_a_frame_that_is_not_the_patients_is_refused(tmp_path: Path, space: str | None) -> None:
    dimension = {"space_dimension": "3"} if space is None else {}
    path = nrrd(tmp_path / "a.nrrd", space=space, **dimension)
    assert code_of(path) == "no_geometry"
    volume = read(path, modality="MR", accept_no_form=True)
    assert volume.provenance["no_form"] == "true"
    np.testing.assert_allclose(volume.spacing, (3, 2, 1))


def test_spacings_alone_are_no_place_and_none_at_all_no_spacing(tmp_path: Path) -> None:
    bare = {"space": None, "space_directions": None, "space_origin": None}
    path = nrrd(tmp_path / "a.nrrd", **bare, spacings="1 2 3")
    assert code_of(path) == "no_geometry"
    assert read(path, modality="MR", accept_no_form=True).spacing == (3.0, 2.0, 1.0)
    assert code_of(nrrd(tmp_path / "b.nrrd", **bare)) == "no_spacing"
    assert code_of(nrrd(tmp_path / "c.nrrd", **bare, spacings="nan nan nan")) == "no_spacing"


@pytest.mark.parametrize(("unit", "scale"), [("mm", 1.0), ("microns", 1e-3), ("cm", 10.0)])
def test_units_of_length(tmp_path: Path, unit: str, scale: float) -> None:
    path = nrrd(tmp_path / "a.nrrd", space_units=f'"{unit}" "{unit}" "{unit}"')
    np.testing.assert_allclose(read(path, modality="MR").spacing, np.array([3, 1, 2]) * scale)
    assert code_of(nrrd(tmp_path / "b.nrrd", space_units='"furlong" "furlong" "furlong"')) == "bad_geometry"


@pytest.mark.parametrize(
    ("encoding", "pack"), [("raw", bytes), ("gzip", gzip.compress), ("bzip2", bz2.compress)]
)
@pytest.mark.parametrize("detached", [False, True])
def test_encodings_attached_and_detached(tmp_path: Path, encoding: str, pack, detached: bool) -> None:
    body = pack(DATA.tobytes())
    if detached:
        (tmp_path / "a.bin").write_bytes(body)
        path = nrrd(tmp_path / "a.nhdr", body=b"", encoding=encoding, data_file="a.bin")
    else:
        path = nrrd(tmp_path / "a.nrrd", body=body, encoding=encoding)
    volume = read(path, modality="MR")
    np.testing.assert_array_equal(volume.to_source(volume.voxels[0]), DATA)
    assert volume.source_affine[0, 3] == 10
    if detached:
        (tmp_path / "a.bin").unlink()
        assert code_of(path) == "missing"
    else:
        nrrd(path, body=body[: len(body) // 2], encoding=encoding)
        assert code_of(path) in ("truncated", "unreadable")


def test_kinds_of_a_fourth_axis(tmp_path: Path) -> None:
    data = np.arange(120, dtype="<i2").reshape(2, 3, 4, 5)
    directions = "none (0.6,0.8,0) (-1.6,1.2,0) (0,0,3)"
    for kind, code in (("vector", "unsupported_layout"), ("3D-symmetric-matrix", "unsupported_layout")):
        path = nrrd(
            tmp_path / "v.nrrd", data, kinds=f"{kind} domain domain domain", space_directions=directions
        )
        assert code_of(path) in (code, "unreadable")
    path = nrrd(tmp_path / "l.nrrd", data, kinds="list domain domain domain", space_directions=directions)
    frames = read_all(path, modality="MR")
    assert len(frames) == 4
    for frame in frames:
        number = int(frame.provenance["frame"].split()[0])
        np.testing.assert_array_equal(frame.to_source(frame.voxels[0]), data[..., number])


def test_a_segmentation_of_slicer_is_a_label(tmp_path: Path) -> None:
    image = read(nrrd(tmp_path / "image.nrrd"), modality="MR")
    mask = (DATA > 12).astype("u1")
    path = nrrd(tmp_path / "a.seg.nrrd", mask, type="uint8", keys=("Segment0_ID:=Segment_1",))
    assert code_of(path) == "not_an_image"
    label = read_label(path, image, regions={"liver": (1,)})
    assert (label.layers == 1).sum() == mask.sum()


META = """ObjectType = Image
NDims = 3
BinaryData = True
BinaryDataByteOrderMSB = False
{fields}
DimSize = 4 3 2
ElementType = MET_SHORT
ElementDataFile = LOCAL
"""


def meta(path: Path, **fields: str) -> Path:
    text = META.format(fields="\n".join(f"{name} = {value}" for name, value in fields.items()))
    path.write_bytes(text.encode() + DATA.tobytes())
    return path


def test_metaimage_needs_a_place(tmp_path: Path) -> None:
    path = tmp_path / "a.mha"
    placed = read(
        meta(path, ElementSpacing="1 2 3", TransformMatrix="0 1 0 -1 0 0 0 0 1", Offset="5 6 7"),
        modality="MR",
    )
    image = sitk.ReadImage(str(path))
    expected = np.array(image.GetDirection()).reshape(3, 3) * image.GetSpacing()
    np.testing.assert_allclose(placed.source_affine[:3, :3], expected)
    np.testing.assert_allclose(placed.source_affine[:3, 3], (5, 6, 7))
    assert code_of(meta(path, ElementSpacing="1 2 3")) == "no_geometry"
    assert code_of(meta(path, ElementSpacing="1 2 3", AnatomicalOrientation="???")) == "no_geometry"
    assert code_of(meta(path, TransformMatrix="1 0 0 0 1 0 0 0 1")) == "no_spacing"
    assert read(meta(path, ElementSpacing="1 2 3"), modality="MR", accept_no_form=True).spacing == (3, 2, 1)


@pytest.mark.parametrize("letters", ["RAI", "LPS", "RAS", "ASL"])
def test_metaimage_by_anatomical_orientation(tmp_path: Path, letters: str) -> None:
    volume = read(
        meta(tmp_path / "a.mha", ElementSpacing="1 2 3", AnatomicalOrientation=letters), modality="MR"
    )
    filt = sitk.DICOMOrientImageFilter()
    opposite = {"R": "L", "L": "R", "A": "P", "P": "A", "I": "S", "S": "I"}
    toward = "".join(opposite[letter] for letter in letters)  # SimpleITK names the side an axis runs to
    direction = np.array(filt.GetDirectionCosinesFromOrientation(toward)).reshape(3, 3)
    np.testing.assert_allclose(volume.source_affine[:3, :3], direction * (1, 2, 3))


def test_a_name_that_is_no_text_is_read(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9\nx.nrrd")
    path = nrrd(tmp_path / name)
    np.testing.assert_array_equal(np.sort(read(path, modality="MR").voxels.ravel()), np.arange(24))
    (tmp_path / "a.bin").write_bytes(DATA.tobytes())
    detached = nrrd(tmp_path / os.fsdecode(b"\xff.nhdr"), body=b"", data_file="a.bin")
    np.testing.assert_array_equal(np.sort(read(detached, modality="MR").voxels.ravel()), np.arange(24))
    with pytest.raises(Quarantined) as refused:
        read(tmp_path / os.fsdecode(b"none\xe9\n.nrrd"), modality="MR")
    assert str(refused.value).isprintable()


def test_a_header_may_not_name_a_file_elsewhere_or_more_than_there_is(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    path = nrrd(tmp_path / "in/a.nrrd", sizes="2000 2000 2000")
    assert code_of(path) == "truncated"
    assert code_of(nrrd(path, sizes="99999 99999 99999")) == "unsupported_layout"
    assert code_of(nrrd(path, encoding="raw", data_file=str(tmp_path / "x.raw"), body=b"")) == "missing"
    assert code_of(nrrd(path, encoding="raw", data_file="../x.raw", body=b"")) == "missing"


def test_the_cause_of_a_refusal_is_named(tmp_path: Path) -> None:
    cut, path = DATA.tobytes()[:-2], tmp_path / "a.nrrd"
    assert code_of(nrrd(path, body=cut)) == "truncated"
    assert code_of(nrrd(path, space_directions="(0,0,0) (-1.6,1.2,0) (0,0,3)")) == "bad_geometry"
    assert code_of(nrrd(path, space_directions="(nan,0,0) (-1.6,1.2,0) (0,0,3)")) == "bad_geometry"
    assert code_of(nrrd(path, space_directions="none (-1.6,1.2,0) (0,0,3)")) == "no_spacing"
    path = meta(tmp_path / "a.mha", ElementSpacing="1 2 3", TransformMatrix="1 0 0 0 1 0 0 0 1")
    path.write_bytes(path.read_bytes()[:-2])
    assert code_of(path) == "truncated"
    meta(path, ElementSpacing="1 2 3", TransformMatrix="1 0 0 1 0 0 0 0 1")
    assert code_of(path) == "bad_geometry"
    assert code_of(meta(path, ElementSpacing="0 2 3", TransformMatrix="1 0 0 0 1 0 0 0 1")) == "bad_geometry"
