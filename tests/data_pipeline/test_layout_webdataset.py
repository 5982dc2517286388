"""WebDatasets of others as input: voxels as other readers give them, and every hard archive in a table."""

from __future__ import annotations

import gzip
import io
import json
import shutil
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import fsspec
import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import webdataset as wds
from dicom_files import dataset
from PIL import Image
from scan_files import phantom, write_nifti
from test_build_remote import s3  # noqa: F401

from data_pipeline.build import build
from data_pipeline.errors import UserError
from data_pipeline.layouts import discover
from data_pipeline.manifest import Manifest
from data_pipeline.merge import merge
from data_pipeline.sources import SourceConfig
from data_pipeline.storage import ShardReader
from data_pipeline.tar_members import TarMember, members
from data_pipeline.verify import verify

JSON = {"modality": "CT", "patient_id": "Okafor", "report": "Mr Okafor, 71, fell", "Name": "Ada Okafor"}


def nifti(seed: int, folder: Path) -> bytes:
    return write_nifti(folder / f"{seed}.nii.gz", phantom(seed), (1.0, 1.5, 2.0)).read_bytes()


def mask(seed: int, folder: Path) -> bytes:
    values = (phantom(seed) > 50).astype(np.uint8)
    return write_nifti(folder / f"{seed}m.nii.gz", values, (1.0, 1.5, 2.0)).read_bytes()


def picture(seed: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (40, 50), np.uint8)).save(file, "PNG")
    return file.getvalue()


def tar(path: Path, *entries: tuple[str, bytes] | tarfile.TarInfo, mode: str = "w") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for entry in entries:
            if isinstance(entry, tarfile.TarInfo):
                archive.addfile(entry)
                continue
            info = tarfile.TarInfo(entry[0])
            info.size = len(entry[1])
            archive.addfile(info, io.BytesIO(entry[1]))
    return path


def about(**fields: Any) -> bytes:
    return json.dumps({**JSON, **fields}).encode()


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Labelled CT and radiographs, as the webdataset library writes them."""
    root = tmp_path_factory.mktemp("wds")
    for n in range(2):
        with wds.TarWriter(str(root / f"ct-{n:06d}.tar")) as sink:
            for k in range(3):
                seed = 3 * n + k
                sample = {"__key__": f"scans/case{seed}", "nii.gz": nifti(seed, root / "raw")}
                sample["json"] = about(patient_id=f"Okafor{seed}", split="test" if seed == 5 else "train")
                if seed != 4:
                    sample["seg.nii.gz"] = mask(seed, root / "raw")
                sink.write(sample)
    with wds.TarWriter(str(root / "xr-000000.tar")) as sink:
        for k in range(2):
            spacing = {"modality": "CXR", "spacing": [0.2, 0.3]}
            sink.write({"__key__": f"film{k}", "png": picture(k), "json": json.dumps(spacing).encode()})
    shutil.move(str(root / "raw"), str(root.parent / f"{root.name}-raw"))
    return root


def source(path: Path | str, **more: Any) -> SourceConfig:
    return SourceConfig(path=path, name="wds", burned_in="accept", labels={1: "bone"}, **more)


def voxels(out: Path | str) -> dict[str, tuple[np.ndarray, np.ndarray | None, dict[str, Any]]]:
    """{key: real voxels, labels, row} through the verified reader."""
    manifest = Manifest.open(out)
    reader = ShardReader(out, manifest)
    found = {}
    for i in range(len(manifest)):
        row = manifest.row(i)
        shape = row["shape"][1:]
        real = reader.read_box(i, "image", 0, (0, 0, 0), shape) * row["norm"][0][0] + row["norm"][0][1]
        seg = reader.read_box(i, "seg", None, (0, 0, 0), shape) if row["seg_size"] > 0 else None
        found[row["key"]] = real, seg, row
    return found


def test_voxels_and_labels_are_those_of_the_files(shards: Path, tmp_path: Path) -> None:
    report = build([source(shards)], tmp_path / "o", tmp_path / "p", shard_samples=2, progress=False)
    assert report.samples == 8
    assert report.notes["labelled"] == 5
    assert report.notes["kinds of fields in KEY.json not used"] == 2
    assert report.notes["spacings taken from KEY.json"] == 2
    assert verify(tmp_path / "o") == []
    found = voxels(tmp_path / "o")
    raw = shards.parent / f"{shards.name}-raw"
    for line in (tmp_path / "p" / "index.jsonl").read_text().splitlines():
        entry = json.loads(line)
        [key], name = entry["keys"], Path(entry["paths"][0]).name
        real, seg, row = found[key]
        if name.startswith("film"):
            want = np.asarray(Image.open(io.BytesIO(picture(int(name[4])))))[None]
            np.testing.assert_array_equal(real, want)
            assert row["spacing"][1:] == pytest.approx([0.2, 0.3])
            assert (row["modality"], row["spacing_source"]) == ("XR", "declared")
            continue
        seed = int(name[4])
        by_itk = sitk.DICOMOrient(sitk.ReadImage(raw / f"{seed}.nii.gz"), "LPS")
        np.testing.assert_array_equal(real, sitk.GetArrayFromImage(by_itk))
        by_nibabel = nib.as_closest_canonical(nib.load(raw / f"{seed}.nii.gz"))
        np.testing.assert_array_equal(real, np.asarray(by_nibabel.dataobj)[::-1, ::-1].T)
        assert row["spacing"] == pytest.approx([2.0, 1.5, 1.0])
        assert entry["subject"] == f"Okafor{seed}"
        assert row["split"] == ("test" if seed == 5 else "train")
        assert (seg is None) == (seed == 4)
        if seg is not None:
            truth = sitk.DICOMOrient(sitk.ReadImage(raw / f"{seed}m.nii.gz"), "LPS")
            np.testing.assert_array_equal(seg[0], sitk.GetArrayFromImage(truth))
    for path in (tmp_path / "o").iterdir():
        data = path.read_bytes()
        assert not [w for w in (b"Okafor", b"fell", b"case0", b"ct-000", b"film", b'report"') if w in data]


def test_from_a_store_in_parts_with_workers_the_same_bytes(shards: Path, tmp_path: Path) -> None:
    fs = fsspec.filesystem("memory")
    for path in shards.iterdir():
        fs.pipe_file(f"/wds-in/{path.name}", path.read_bytes())
    build([source(shards)], tmp_path / "a", progress=False, workers=2)
    for name, key in (("b", "pb"), ("c", "pc")):
        (tmp_path / key).mkdir()
        shutil.copy(tmp_path / "a-private" / "hash.key", tmp_path / key)
        if name == "b":
            for part in (1, 2):
                build([source(shards)], tmp_path / name, tmp_path / key, part=(part, 2), progress=False)
            merge(tmp_path / name, private=tmp_path / key, progress=False)
    build([source("memory://wds-in")], tmp_path / "c", tmp_path / "pc", progress=False)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name
    inside = [sorted(str(v[0].tobytes()) for v in voxels(tmp_path / n).values()) for n in "ac"]
    assert inside[0] == inside[1]


def test_from_s3(
    s3: Any,  # noqa: F811
    shards: Path,
    tmp_path: Path,
) -> None:
    """Listed by headers and fetched by ranges; asked again, nothing is read."""
    for path in shards.glob("ct-*.tar"):
        s3.put(str(path), f"scans/wds/{path.name}")
    there = source("s3://scans/wds")
    assert build([there], tmp_path / "o", progress=False).samples == 6
    assert build([source(shards, include=("ct-*.tar/**",))], tmp_path / "l", progress=False).samples == 6
    hashes = [set(Manifest.open(tmp_path / n).column("content_hash")) for n in "ol"]
    assert hashes[0] == hashes[1]
    assert build([there], tmp_path / "o", progress=False).read == 0
    s3.rm_file("scans/wds/ct-000001.tar")
    with pytest.raises(UserError, match=r"3 inputs .* no longer found"):
        build([there], tmp_path / "o", progress=False)


def test_only_what_changed_is_read_again(shards: Path, tmp_path: Path) -> None:
    work = tmp_path / "in"
    shutil.copytree(shards, work)
    assert build([source(work)], tmp_path / "o", progress=False).read == 8
    assert build([source(work)], tmp_path / "o", progress=False).read == 0
    tar(work / "new.tar", ("x/later.nii.gz", nifti(9, tmp_path)), ("x/later.json", about(patient_id="n")))
    assert build([source(work)], tmp_path / "o", progress=False).read == 1
    with tarfile.open(work / "ct-000000.tar") as archive:
        entries = [(info.name, archive.extractfile(info).read()) for info in archive]  # type: ignore[union-attr]
    entries = [(n, nifti(77, tmp_path) if n == "scans/case1.nii.gz" else data) for n, data in entries]
    before = {key: found[0].tobytes() for key, found in voxels(tmp_path / "o").items()}
    tar(work / "ct-000000.tar", *entries)
    assert build([source(work)], tmp_path / "o", progress=False).read == 3
    after = {key: found[0].tobytes() for key, found in voxels(tmp_path / "o").items()}
    assert sum(before[key] != after[key] for key in before) == 1
    assert verify(tmp_path / "o") == []


def link(name: str, kind: bytes, target: str = "/etc/passwd") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


@pytest.mark.parametrize(
    ("entry", "code"),
    [
        (("../escaped.nii.gz", b"x" * 600), "unsafe_member"),
        (("/abs.nii.gz", b"x" * 600), "unsafe_member"),
        (("a/../../escaped.nii.gz", b"x"), "unsafe_member"),
        ((f"{'n' * 300}.nii.gz", b"x"), "unsafe_member"),
        (link("bad.nii.gz", tarfile.SYMTYPE), "unsafe_member"),
        (link("bad.nii.gz", tarfile.LNKTYPE, "good.nii.gz"), "unsafe_member"),
        (link("bad.nii.gz", tarfile.CHRTYPE), "unsafe_member"),
        (link("bad.nii.gz", tarfile.FIFOTYPE), "unsafe_member"),
        (link("good.json", tarfile.SYMTYPE), "unsafe_member"),
        (("good.nii.gz", b"again"), "duplicate_member"),
        (("good.nii", b"the same image in another form"), "duplicate_member"),
        (("good.json", b"{"), "sidecar_unreadable"),
        (("good.json", b"[1]"), "sidecar_unreadable"),
        (("good.json", b"\xff\xfe\xff"), "sidecar_unreadable"),
        (("good.json", b" " * (2 << 20)), "sidecar_unreadable"),
        (("good.json", b'{"modality": "ultrasound"}'), "unsupported_modality"),
        (("good_seg.nii.gz", b"x"), "left_out"),
        (("bad.nii.gz", b"no image"), "unreadable"),
        (("bad.nii.gz", gzip.compress(b"no image", mtime=0)), "unreadable"),
    ],
)
def test_hard_members(entry: Any, code: str, tmp_path: Path) -> None:
    """One strange member costs its own sample, under a reason code, and no other."""
    others = [(f"o{n}.nii.gz", nifti(n, tmp_path)) for n in (1, 2)]
    tar(tmp_path / "in/s.tar", ("good.nii.gz", nifti(0, tmp_path)), entry, *others)
    report = build([source(tmp_path / "in", modality="CT")], tmp_path / "o", progress=False)
    assert report.quarantined == {code: 1}
    name = entry.name if isinstance(entry, tarfile.TarInfo) else entry[0]
    spoilt = name.startswith("good") and code != "left_out"
    assert report.samples == (2 if spoilt else 3)
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == ["in", "o", "o-private"]
    assert not list(tmp_path.parent.glob("escaped*"))


def test_huge_members_are_not_fetched(tmp_path: Path) -> None:
    path = tar(tmp_path / "in/s.tar", ("a.nii.gz", nifti(0, tmp_path)), ("b.nii.gz", b""))
    data = bytearray(path.read_bytes())
    at = data.rindex(b"b.nii.gz")
    info = tarfile.TarInfo("b.nii.gz")
    info.size = 1 << 40
    data[at : at + 512] = info.tobuf(tarfile.GNU_FORMAT)
    path.write_bytes(data)
    [a, b] = members(path).members
    assert (a.fault, b.fault) == (None, "too_large")


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz"])
@pytest.mark.parametrize("where", ["data", "header", "before_end", "inside_last"])
def test_an_archive_cut_short_or_damaged(where: str, suffix: str, tmp_path: Path) -> None:
    """Whole samples before the damage stay; the last, which may lack members, and the archive are named."""
    entries = [(f"k{n}.{what}", data) for n in range(4) for what, data in
               (("nii.gz", nifti(n, tmp_path)), ("json", about(patient_id=str(n))))]  # fmt: skip
    plain = tar(tmp_path / "plain.tar", *entries)
    places = {m.member: m.place for m in members(plain).members}
    data = bytearray(plain.read_bytes())
    if where == "data":
        data = data[: places["k2.nii.gz"] + 100]
    elif where == "header":
        data[places["k2.json"] - 400] ^= 0xFF
    elif where == "before_end":
        data = data[: places["k3.json"] + 512]
    else:
        data = data[: places["k3.json"] + 3]
    path = tmp_path / "in" / f"s{suffix}"
    path.parent.mkdir()
    path.write_bytes(bytes(data) if suffix == ".tar" else gzip.compress(bytes(data)))
    report = build([source(tmp_path / "in")], tmp_path / "o", progress=False)
    kept = {"data": 2, "header": 2, "before_end": 3, "inside_last": 3}[where]
    assert report.samples == kept
    assert sum(report.quarantined.values()) == 2
    assert set(report.quarantined) <= {"truncated", "damaged_archive"}
    again = build([source(tmp_path / "in")], tmp_path / "o", progress=False)
    assert again.read == 0


def test_a_compressed_archive_cut_in_its_stream(tmp_path: Path) -> None:
    entries = [(f"k{n}.nii.gz", nifti(n, tmp_path)) for n in range(4)]
    data = gzip.compress(tar(tmp_path / "plain.tar", *entries).read_bytes())
    (tmp_path / "in").mkdir()
    (tmp_path / "in/s.tgz").write_bytes(data[: len(data) * 3 // 4])
    report = build([source(tmp_path / "in", modality="CT")], tmp_path / "o", progress=False)
    assert 1 <= report.samples < 4
    assert set(report.quarantined) <= {"truncated", "damaged_archive"}


def test_an_empty_file_and_noise_are_no_archives(tmp_path: Path) -> None:
    tar(tmp_path / "in/a.tar", ("k.nii.gz", nifti(0, tmp_path)))
    (tmp_path / "in/b.tar").write_bytes(b"")
    (tmp_path / "in/c.tar").write_bytes(np.random.default_rng(0).bytes(9000))
    report = build([source(tmp_path / "in", modality="CT")], tmp_path / "o", progress=False)
    assert report.samples == 1
    assert report.quarantined == {"damaged_archive": 2}


def test_every_flipped_byte_of_a_header_is_harmless(tmp_path: Path) -> None:
    """No damaged header may hang the listing, take memory, or name a member beyond the file."""
    path = tar(tmp_path / "s.tar", ("a.json", b"{}"), (f"{'l' * 120}.json", b"{}"), ("c.json", b"{}"))
    good = path.read_bytes()
    generator = np.random.default_rng(0)
    for _ in range(300):
        data = bytearray(good)
        for at in generator.integers(0, len(good) - 1024, generator.integers(1, 4)):
            data[at] = generator.integers(256)
        path.write_bytes(data)
        for member in members(path).members:
            assert member.fault is not None or member.place + member.size <= len(good)


def test_a_size_below_zero_ends_the_listing(tmp_path: Path) -> None:
    info = tarfile.TarInfo("a.nii.gz")
    block = bytearray(info.tobuf())
    block[124:136] = b"\xff" * 11 + b"\x00"
    block[148:156] = b"%06o\0 " % (sum(block[:148]) + sum(block[156:]) + 8 * 32)
    (tmp_path / "s.tar").write_bytes(bytes(block) + bytes(1024))
    listing = members(tmp_path / "s.tar")
    assert listing.members == []
    assert listing.damage is not None


def test_a_member_that_changes_while_it_is_read_is_refused(tmp_path: Path) -> None:
    path = tar(tmp_path / "s.tar", ("a.nii.gz", b"1" * 700), ("b.nii.gz", b"2" * 700))
    [a, b] = members(path).members
    tar(path, ("b.nii.gz", b"2" * 700))
    with pytest.raises(UserError, match="damaged_archive"), b.open():
        pass
    with pytest.raises(UserError, match="damaged_archive"), a.open():
        pass


def test_names_of_members(tmp_path: Path) -> None:
    """Which members are images, which their labels, and what is left alone."""
    zero = b"0"
    tar(
        tmp_path / "in/val-0.tar",
        ("d.1/p.ct.nii.gz", zero), ("d.1/p.pet.nii.gz", zero), ("d.1/p.ct.seg.nii.gz", zero),
        ("d.1/p.label.nii.gz", zero), ("d.1/p.liver_mask.nii.gz", zero), ("d.1/p.lesion.nii.gz", zero),
        ("d.1/p.json", b'{"PatientID": 17, "modality": "MR"}'), ("d.1/._p.nii.gz", zero),
        ("__skip__.png", zero), ("q.nii.gz", zero), ("q.txt", b"a finding"), ("q.mhd", zero),
        ("README", zero),
    )  # fmt: skip
    notes: Counter[str] = Counter()
    cases = discover(source(tmp_path / "in", modality={"q.*": "MR", "*.ct.*": "CT"}), notes=notes)
    names = [(c.images[0].name, c.modality, c.label and c.label.name, c.subject, c.split) for c in cases]
    assert names == [
        ("p.ct.nii.gz", ("CT",), "p.ct.seg.nii.gz", "17", "val"),
        ("p.pet.nii.gz", ("PT",), "p.label.nii.gz", "17", "val"),
        ("q.nii.gz", ("MR",), None, "val/q", "val"),
    ]
    assert notes["files that are no image: .txt"] == 1
    assert notes["labels in archives whose name fits no image"] == 1
    unclear = "members of archives whose name says neither image nor label (name them in include)"
    assert notes[unclear] == 1
    every = source(tmp_path / "in", modality="MR", include=("**/*.lesion.nii.gz",))
    assert [c.images[0].name for c in discover(every)] == ["p.lesion.nii.gz"]


@pytest.mark.parametrize(
    ("entries", "more", "message"),
    [
        ([("k.nii.gz", b"0")], {}, "says what kind of image"),
        ([("T/imagesTr/a.nii.gz", b"0"), ("T/dataset.json", b"{}")], {}, "archive of a dataset folder"),
        ([("k.b2nd", b"0")], {}, "a shard that medfm built"),
        ([("k.txt", b"0")], {}, "no images found in layout webdataset"),
        ([("k.nii.gz", b"0")], {"label_glob": "seg"}, "leave out label_glob"),
    ],
)
def test_mistakes_are_one_line(entries: Any, more: dict[str, Any], message: str, tmp_path: Path) -> None:
    tar(tmp_path / "s.tar", *entries)
    with pytest.raises(UserError, match=message) as caught:
        build([source(tmp_path / "s.tar", **more)], tmp_path / "o", progress=False)
    assert "\n" not in str(caught.value)


def test_every_single_file_format_by_its_own_reader(tmp_path: Path) -> None:
    """Each is what the file alone gives; DICOM members are of one patient by their header."""
    files = tmp_path / "files"
    files.mkdir()
    image = sitk.GetImageFromArray(phantom(0))
    image.SetSpacing((0.7, 0.8, 2.0))
    for name in ("a.nrrd", "b.mha", "c.nii"):
        sitk.WriteImage(image + ord(name[0]), files / name)
    np.savez(files / "d.npz", image=phantom(4))
    grey = np.random.default_rng(3).integers(0, 255, (40, 50), np.uint8)
    for name in ("e.jpg", "f.tif"):
        Image.fromarray(grey + ord(name[0])).save(files / name)
    for number, name in enumerate(("g.dcm", "h.DCM"), 1):
        pixels = np.random.default_rng(number).integers(0, 2000, (32, 32)).astype(np.int16)
        dicom = dataset(pixels, (0, 0, 0), f"1.2.{number}")
        dicom.save_as(files / name, enforce_file_format=True)
    npz = json.dumps({"modality": "CT", "spacing": [2.0, 1.0, 0.5]}).encode()
    entries = [(path.name, path.read_bytes()) for path in sorted(files.iterdir())]
    tar(tmp_path / "in/s.tar", *entries, ("d.json", npz))
    kinds: dict[str, Any] = {"[abc].*": "CT", "[ef].*": "XR", "[gh].*": "CT"}
    mm = {"field_mm": 100.0}
    build([source(tmp_path / "in", modality=kinds, **mm)], tmp_path / "o", tmp_path / "p", progress=False)
    alone = source(files, layout="folder", modality=kinds, exclude=("d.npz",), **mm)
    build([alone], tmp_path / "f", tmp_path / "pf", progress=False)
    packed, plain = (Manifest.open(tmp_path / n) for n in "of")
    hashes = set(packed.column("content_hash"))
    assert (len(hashes), len(hashes - set(plain.column("content_hash")))) == (8, 1)
    index = [json.loads(line) for line in (tmp_path / "p" / "index.jsonl").read_text().splitlines()]
    assert Counter(entry["subject"] for entry in index)["MRN-4711"] == 2
    [row] = [packed.row(i) for i in range(8) if packed.row(i)["spacing"] == [2.0, 1.0, 0.5]]
    assert row["shape"] == [1, *phantom(4).shape]


def test_a_label_without_names_asks_for_them(tmp_path: Path) -> None:
    tar(tmp_path / "s.tar", ("k.nii.gz", b"0"), ("k.seg.nii.gz", b"0"))
    with pytest.raises(UserError, match="state labels"):
        discover(SourceConfig(path=tmp_path / "s.tar", modality="CT"))


@pytest.mark.parametrize("encoder", [True, False])
def test_what_the_webdataset_library_gzips_again(encoder: bool, tmp_path: Path) -> None:
    data = nifti(0, tmp_path)
    with wds.TarWriter(str(tmp_path / "s.tar"), encoder=encoder) as sink:
        sink.write({"__key__": "k", "nii.gz": data})
    [member] = members(tmp_path / "s.tar").members
    assert (member.size == len(data)) is not encoder
    with member.open() as file:
        assert file.read() == data
    if encoder:
        whole = (tmp_path / "s.tar").read_bytes()
        spoilt = bytearray(whole)
        spoilt[member.place + member.size - 6] ^= 1  # in the outer checksum
        (tmp_path / "s.tar").write_bytes(spoilt)
        with pytest.raises(UserError, match="damaged_archive"), member.open() as file:
            file.read()


def test_members_are_places(tmp_path: Path) -> None:
    path = tar(tmp_path / "s.tar", ("a/b.c.nii.gz", b"12345"))
    [member] = members(path).members
    assert isinstance(member, TarMember)
    assert (member.name, member.suffix, member.parent.name) == ("b.c.nii.gz", ".gz", "a")
    assert (member.exists(), member.is_file(), member.is_dir(), member.stat().st_size) == (
        True,
        True,
        False,
        5,
    )
    with member.open() as file:
        assert file.read() == b"12345"
