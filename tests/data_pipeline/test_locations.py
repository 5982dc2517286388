"""Inputs at fsspec addresses: every layout is read from memory:// and from an S3 server as from a disk."""

from __future__ import annotations

import json
import os
import pickle
import socket
from collections.abc import Iterator
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from dicom_files import series_of
from upath import UPath

from data_pipeline.build_recipe import read_recipe
from data_pipeline.errors import Quarantined, UserError
from data_pipeline.labels import read_label
from data_pipeline.layouts import discover, local_case, read_case, stem
from data_pipeline.locations import Location, fetched, files_below, joined, location, relative
from data_pipeline.privacy import KeyedHash
from data_pipeline.sources import SourceConfig

SECRET = "WatermelonSecret"
SHAPE = (4, 5, 6)


def image(path: Path, seed: int = 0, mask: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = np.random.default_rng(seed).integers(0, 2 if mask else 99, SHAPE).astype(np.int16)
    form = nibabel.Nifti1Pair if path.suffix == ".hdr" else nibabel.Nifti1Image
    nibabel.save(form(data, np.eye(4)), path)


def write_layouts(root: Path) -> None:
    """One small dataset of each layout below a folder."""
    for layout in ("msd", "nnunet"):
        for part in ("imagesTr", "labelsTr"):
            tail = "_0000" if (layout, part) == ("nnunet", "imagesTr") else ""
            for n in range(2):
                image(root / layout / part / f"c{n}{tail}.nii.gz", n, part == "labelsTr")
    labels = {"background": 0, "liver": 1}
    training = [{"image": f"./imagesTr/c{n}.nii.gz", "label": f"./labelsTr/c{n}.nii.gz"} for n in range(2)]
    msd = {"modality": {"0": "MRI"}, "labels": labels, "training": training}
    nnunet = {"channel_names": {"0": "T1"}, "labels": labels, "file_ending": ".nii.gz", "numTraining": 2}
    (root / "msd/dataset.json").write_text(json.dumps(msd))
    (root / "nnunet/dataset.json").write_text(json.dumps(nnunet))
    image(root / "bids/sub-1/anat/sub-1_T1w.nii.gz", 1)
    image(root / "bids/derivatives/x/sub-1/anat/sub-1_desc-liver_mask.nii.gz", 2, mask=True)
    (root / "bids/dataset_description.json").write_text("{}")
    image(root / "table/a.nii.gz", 3)
    image(root / "table/pair.hdr", 4)
    (root / "table/t.csv").write_text("path,modality\na.nii.gz,MR\npair.hdr,MR\n")
    image(root / "folder/deep/a.nii.gz", 5)
    image(root / "folder/deep/a_mask.nii.gz", 6, mask=True)
    (root / "folder/readme.txt").write_text("nothing")
    (root / "folder/.hidden.nii.gz").write_text("nothing")


SOURCES = {
    "msd": {},
    "nnunet": {},
    "bids": {},
    "table/t.csv": {},
    "folder": {
        "modality": "MR",
        "include": ("**/a.nii.gz",),
        "label_glob": "**/a_mask.nii.gz",
        "labels": {1: "liver"},
    },
}


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tree")
    write_layouts(root)
    return root


def copy(tree: Path, place: Location) -> None:
    for path in tree.rglob("*"):
        if path.is_file():
            target = place / path.relative_to(tree).as_posix()
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    pytest.importorskip("s3fs", reason="s3fs is not installed")
    moto = pytest.importorskip("moto.server", reason="moto is not installed")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    running = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=port, verbose=False)
    running.start()
    yield f"http://127.0.0.1:{port}"
    running.stop()


@pytest.fixture
def bucket(server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[UPath]:
    import s3fs

    monkeypatch.setenv("AWS_ENDPOINT_URL", server)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "someone")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    s3fs.S3FileSystem.clear_instance_cache()
    if not s3fs.S3FileSystem().exists("scans"):
        s3fs.S3FileSystem().mkdir("scans")
    yield UPath("s3://scans")
    s3fs.S3FileSystem.clear_instance_cache()


def assert_same_cases(tree: Path, place: str) -> None:
    for name, options in SOURCES.items():
        near = SourceConfig(path=tree / name, **options)
        far = SourceConfig(path=f"{place}/{name}", **options)
        cases = list(zip(discover(near), discover(far), strict=True))
        assert cases
        for a, b in cases:
            assert (a.name, a.subject, a.split, a.modality) == (b.name, b.subject, b.split, b.modality)
            assert (a.label_regions, a.annotated, a.sequence) == (b.label_regions, b.annotated, b.sequence)
            assert str(b.images[0]).startswith(place)
            for c, d in zip(read_case(a, near), read_case(b, far), strict=True):
                np.testing.assert_array_equal(c.voxels, d.voxels)
                np.testing.assert_array_equal(c.affine, d.affine)
            assert (a.label is None) == (b.label is None)
            if a.label is not None and b.label is not None:
                regions = a.label_regions or {}
                one = read_label(a.label, read_case(a, near)[0], regions=regions)
                other = read_label(b.label, read_case(b, far)[0], regions=regions)
                np.testing.assert_array_equal(one.layers, other.layers)
            assert pickle.loads(pickle.dumps(b)) == b


def test_every_layout_from_memory(tree: Path) -> None:
    copy(tree, UPath("memory://tree"))
    assert_same_cases(tree, "memory://tree")


def test_every_layout_from_s3(tree: Path, bucket: UPath) -> None:
    copy(tree, bucket / "tree")
    assert_same_cases(tree, "s3://scans/tree")


def test_a_dicom_tree_from_s3(tmp_path: Path, bucket: UPath) -> None:
    array = np.random.default_rng(0).integers(0, 2000, (4, 6, 5)).astype(np.uint16)
    series_of(tmp_path / "d/one", array)
    series_of(tmp_path / "d/two/deep", array[::-1].copy())
    copy(tmp_path / "d", bucket / "tree-of-dicom")
    near, far = SourceConfig(path=tmp_path / "d"), SourceConfig(path="s3://scans/tree-of-dicom")
    cases = list(zip(discover(near), discover(far), strict=True))
    assert len(cases) == 2
    for a, b in cases:
        assert (a.subject, a.modality, len(a.files or ())) == (b.subject, b.modality, len(b.files or ()))
        one, other = read_case(a, near)[0], read_case(b, far)[0]
        np.testing.assert_array_equal(one.voxels, other.voxels)
        np.testing.assert_array_equal(one.affine, other.affine)
    table = tmp_path / "t.csv"
    table.write_text("path\ns3://scans/tree-of-dicom/one\n")
    src = SourceConfig(path=table)
    assert read_case(discover(src)[0], src)[0].shape == (4, 6, 5)


def test_a_detached_header_from_s3(tmp_path: Path, bucket: UPath) -> None:
    (tmp_path / "d").mkdir()
    scan = sitk.GetImageFromArray(np.arange(60, dtype=np.int16).reshape(3, 4, 5))
    sitk.WriteImage(scan, str(tmp_path / "d/a.mhd"))
    copy(tmp_path / "d", bucket / "raw")
    src = SourceConfig(path="s3://scans/raw", modality="MR")
    (case,) = discover(src)
    np.testing.assert_array_equal(
        np.sort(read_case(case, src)[0].voxels.ravel()), np.arange(60, dtype=np.int16)
    )
    (bucket / "raw/a.raw").unlink()
    with pytest.raises(Quarantined, match=r"s3://scans/raw/a\.mhd: .*missing"):
        read_case(case, src)


def test_a_missing_file_is_quarantined_and_a_missing_place_an_error(bucket: UPath) -> None:
    (bucket / "lost/t.csv").write_text("image,modality\nnone.nii.gz,MR\n")
    src = SourceConfig(path="s3://scans/lost/t.csv")
    with pytest.raises(Quarantined, match="missing"):
        read_case(discover(src)[0], src)
    with pytest.raises(UserError, match="no such file"):
        discover(SourceConfig(path="s3://scans/nowhere", modality="MR"))


def test_no_credential_in_any_error(bucket: UPath, monkeypatch: pytest.MonkeyPatch) -> None:
    for address in (f"s3://key:{SECRET}@scans/x", f"https://host/x.nii?sig={SECRET}"):
        with pytest.raises(ValueError, match="must not carry credentials") as refused:
            SourceConfig(path=address)
        assert SECRET not in str(refused.value)
        with pytest.raises(UserError, match="must not carry credentials") as named:
            read_recipe([address])
        assert SECRET not in str(named.value)
    import s3fs

    def fail(*_: object, **__: object) -> None:
        raise PermissionError(f"refused: {SECRET}")

    monkeypatch.setattr(s3fs.S3FileSystem, "find", fail)
    monkeypatch.setattr(s3fs.S3FileSystem, "info", fail)
    with pytest.raises(UserError, match="check the address") as unreachable:
        discover(SourceConfig(path="s3://scans/tree", layout="folder", modality="MR"))
    assert SECRET not in str(unreachable.value)
    assert SECRET not in repr(unreachable.value.__context__ and unreachable.value.__cause__)


def test_copies_go_when_the_case_is_done(tree: Path) -> None:
    copy(tree, UPath("memory://tree"))
    src = SourceConfig(path="memory://tree/nnunet")
    case = discover(src)[0]
    with local_case(case) as near:
        assert all(isinstance(path, Path) and path.is_file() for path in (*near.images, near.label) if path)
        folder = near.images[0].parent
        assert near.images[0].name == case.images[0].name
    assert not folder.exists()
    with local_case(near) as again:
        assert again is near
    twins = [UPath("memory://tree/msd/imagesTr/c0.nii.gz"), UPath("memory://tree/msd/labelsTr/c0.nii.gz")]
    with fetched(twins) as local:
        assert len(set(local.values())) == 2


def test_places(tmp_path: Path) -> None:
    far = location("s3://bucket/folder")
    assert isinstance(far, UPath)
    assert isinstance(location(str(tmp_path)), Path)
    assert location(f"file://{tmp_path}") == tmp_path
    assert relative(far / "a/b.nii", far) == "a/b.nii"
    assert relative(far / "a", location("s3://other")) == "s3://bucket/folder/a"
    assert relative(far / "a/b.nii", far / "t.parquet") == "a/b.nii"
    assert relative(tmp_path / "a/b.nii", tmp_path) == "a/b.nii"
    assert relative(tmp_path / "a/b.nii", tmp_path / "t.csv") == "a/b.nii"
    assert relative(tmp_path / "b.nii", tmp_path / "b.nii") == "b.nii"
    assert relative(Path("/x/b.nii"), tmp_path / "t.csv") == "x/b.nii"
    assert str(joined(far, "./x/y.nii")) == "s3://bucket/folder/x/y.nii"
    assert joined(far, "/local/x.nii") == Path("/local/x.nii")
    assert str(joined(tmp_path, "s3://b/x.nii")) == "s3://b/x.nii"
    assert stem(far / "a.b.nii.gz") == "a.b"
    hashes = KeyedHash(bytes(32))
    assert hashes.path(far) == hashes.path(location("s3://bucket/folder")) != hashes.path(far / "a")
    with pytest.raises(ValueError, match="no file system"):
        location("nothing://x")
    source = SourceConfig(path="s3://bucket/folder")
    assert source.model_dump(mode="json")["path"] == "s3://bucket/folder"
    assert source.name == "source"
    assert SourceConfig.model_validate(source.model_dump()) == source


def test_recipes_hold_addresses(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("sources:\n  - path: s3://bucket/scans\n  - path: local\n    name: b\n")
    recipe = read_recipe(tmp_path / "r.yaml")
    assert str(recipe.sources[0].path) == "s3://bucket/scans"
    assert recipe.sources[1].path == tmp_path / "local"
    assert str(read_recipe(["s3://bucket/scans"]).sources[0].path) == "s3://bucket/scans"


def test_links_in_circles_odd_names_and_closed_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "a/b/back").symlink_to(tmp_path / "a")
    (tmp_path / "self").symlink_to(tmp_path / "self")
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    odd = [os.fsdecode(b"a/\xff\xfe.nii.gz"), "a/two\nlines.nii.gz", "a/b/plain.nii.gz"]
    for name in odd:
        image(tmp_path / "x.nii.gz")
        (tmp_path / "x.nii.gz").rename(tmp_path / name)
    assert {relative(p, tmp_path) for p in files_below(tmp_path)} == set(odd)
    src = SourceConfig(path=tmp_path, modality={"**": "MR"}, include=("**/*.nii.gz",))
    for case in discover(src):
        assert read_case(case, src)[0].shape == SHAPE[::-1]
    with pytest.raises(UserError) as refused:
        discover(SourceConfig(path=tmp_path))
    assert str(refused.value).isprintable()
    (tmp_path / "closed").mkdir()
    image(tmp_path / "closed/c.nii.gz")
    whole = os.scandir

    def guarded(path: str):
        if str(path).endswith("closed"):
            raise PermissionError("closed")
        return whole(path)

    monkeypatch.setattr(os, "scandir", guarded)
    count: list[int] = []
    assert len(files_below(tmp_path, lambda: count.append(1))) == 3
    assert count == [1]
