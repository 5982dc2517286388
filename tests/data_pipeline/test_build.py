"""Raw scans to shards: what is stored is what was read, for everyone who opens it, and nobody is named."""

from __future__ import annotations

import hashlib
import io
import json
import re
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from scan_files import phantom, write_nifti

from data_pipeline.build import BuildReport, build, build_from_recipe
from data_pipeline.errors import UserError
from data_pipeline.frame_index import read_index
from data_pipeline.manifest import MEMBERS, SUFFIX, Manifest
from data_pipeline.sources import SourceConfig
from data_pipeline.storage import ShardReader, invalid_of
from data_pipeline.verify import verify
from data_pipeline.volume import Volume

SUBJECTS = (
    "SmithJohn",
    "MuellerEva",
    "OkaforAda",
    "TanakaKen",
    "SilvaRui",
    "NovakIva",
    "BergLars",
    "KhanSana",
)
FORBIDDEN = (*SUBJECTS, "ZurichClinic", "StAnna", "thorax", "_T1w", "knochen_mask", "radiograph", "1947")


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CT with labels, MR with float values, X-ray PNG, a broken file and a copy of a CT in another dtype."""
    root = tmp_path_factory.mktemp("in") / "ZurichClinic"
    for n, subject in enumerate(SUBJECTS):
        ct = phantom(n)
        write_nifti(root / "ct" / f"{subject}_1947" / "thorax.nii.gz", ct, (0.8, 0.9, 1.5))
        mask = (ct > 0).astype(np.uint8)
        mask[:9] *= 2
        write_nifti(root / "ct" / f"{subject}_1947" / "knochen_mask.nii.gz", mask, (0.8, 0.9, 1.5))
        mr = np.random.default_rng(50 + n).gamma(2.0, 100.0, (20, 16, 6)).astype(np.float32)
        mr[0, 0, 0] = np.nan
        write_nifti(root / "mr" / f"{subject}_T1w.nii.gz", mr, (1.0, 1.0, 6.0))
        (root / "xr").mkdir(exist_ok=True)
        grey = np.random.default_rng(90 + n).integers(0, 255, (40, 30), dtype=np.uint8)
        Image.fromarray(grey).save(root / "xr" / f"{subject}-radiograph.png")
    (root / "mr" / "StAnna_T1w.nii.gz").write_bytes(b"not a nifti")
    copy = phantom(2).astype(np.float32)  # OkaforAda's CT, as another centre keeps it
    write_nifti(root / "copies" / "StAnna-0001.nii.gz", copy, (0.8, 0.9, 1.5))
    return root


def sources(root: Path, **xr: Any) -> list[SourceConfig]:
    xr = {"burned_in": "accept", "field_mm": 300.0} | xr
    return [
        SourceConfig(
            path=root / "ct",
            name="ct-a",
            include=("*/thorax.nii.gz",),
            modality="CT",
            label_glob="*/knochen_mask.nii.gz",
            labels={1: "bone", 2: "marrow"},
            label_origin="human",
            licence="CC0",
        ),
        SourceConfig(path=root / "mr", name="mr-b", modality="MR", subject_pattern="^([A-Za-z]+)_"),
        SourceConfig(path=root / "xr", name="xr-c", modality="XR", **xr),
        SourceConfig(path=root / "copies", name="ct-d", modality="CT"),
    ]


@pytest.fixture(scope="module")
def built(scans: Path, tmp_path_factory: pytest.TempPathFactory) -> BuildReport:
    out = tmp_path_factory.mktemp("out") / "shards"
    return build(sources(scans), out, shard_samples=3, level_min_voxels=2000, progress=False)


def index_of(report: BuildReport) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (report.private / "index.jsonl").read_text().splitlines()]


def test_counts_and_notes(built: BuildReport) -> None:
    assert built.samples == 24
    assert built.quarantined == {"unreadable": 1}
    assert built.notes["duplicates left out"] == 1
    assert built.notes["spacing assumed from a field width"] == 8
    assert built.notes["stored with an error (max_error in the manifest)"] == 8
    assert built.notes["labelled"] == 8
    text = built.text()
    assert "unreadable: 1" in text
    assert "duplicates left out: 1" in text


def test_every_voxel_comes_back(built: BuildReport, scans: Path) -> None:
    """Read each sample through the verified reader and compare with the file, in its own axis order."""
    manifest = Manifest.open(built.out)
    reader = ShardReader(built.out, manifest)
    rows = {key: i for i, key in enumerate(manifest.column("key"))}
    checked = 0
    for entry in index_of(built):
        for key in entry["keys"]:
            path = Path(entry["paths"][0])
            row = manifest.row(rows[key])
            stored = reader.read_box(rows[key], "image", None, (0, 0, 0), row["shape"][1:])
            slope, intercept = row["norm"][0][:2]
            real = np.where(invalid_of(stored), np.nan, stored * slope + intercept)
            description = json.loads(member(built.out, row, "json"))
            back = restored(description, real)
            if path.suffix == ".png":
                want = np.asarray(Image.open(path))[None].astype(float)
            else:
                want = np.asarray(nib.load(path).dataobj).astype(float).T
            assert np.array_equal(np.isnan(back[0]), np.isnan(want))
            assert np.nanmax(np.abs(back[0] - want)) <= row["max_error"] * (1 + 1e-9) + 1e-9
            assert row["max_error"] <= 1e-4 * np.nanmax(want)
            if entry["label"]:
                seg = reader.read_box(rows[key], "seg", None, (0, 0, 0), row["shape"][1:])
                truth = np.asarray(nib.load(entry["label"]).dataobj).T
                np.testing.assert_array_equal(restored(description, seg)[0], truth)
                for found in row["foreground"][1:]:
                    assert (seg[found["layer"]].ravel()[found["voxels"]] == found["class"]).all()
                assert row["classes"] == ["bone", "marrow"]
            [content] = [found["voxels"] for found in row["foreground"] if found["class"] == 0]
            assert row["foreground"][0]["voxels"] is content
            assert 0 < len(content) <= 64
            assert not invalid_of(stored[0]).ravel()[content].any()
            if row["modality"] == "CT":
                assert (real[0].ravel()[content] >= -500).all()
            checked += 1
    assert checked == 24


def restored(description: dict[str, Any], array: np.ndarray) -> np.ndarray:
    """An array (..., z, y, x) of a sample on its source grid, from what `KEY.json` says alone."""
    way = description["to_source"]
    affine = np.array(way["affine_lps"])
    grid = Volume.on_grid(np.zeros((1, *way["shape"]), np.uint8), (None,), affine).to_lps()  # type: ignore[arg-type]
    assert (list(grid.axes), list(grid.flips)) == (way["axes"], way["flips"])
    np.testing.assert_allclose(grid.affine, description["affine_lps"])
    return grid.to_source(array)


def member(root: Path, row: dict[str, Any], name: str) -> bytes:
    with (root / row["shard"]).open("rb") as file:
        file.seek(row[f"{name}_offset"])
        return file.read(row[f"{name}_size"])


def test_plain_webdataset_reads_it(built: BuildReport) -> None:
    """Every member of every sample by the lines that docs/data.md gives, without medfm."""
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    [lines] = re.findall(r"```python\n(import blosc2.*?)    print\([^\n]*\n```", page, re.DOTALL)
    shards = sorted(str(p) for p in built.out.glob("*.tar"))
    code = lines.replace('"DATASET/train-ct-volume-000000.tar"', "shards") + "    seen.append(sample)"
    seen: list[dict[str, Any]] = []
    exec(code, {"shards": shards, "seen": seen})
    samples = {sample["__key__"]: sample for sample in seen}
    manifest = Manifest.open(built.out)
    assert len(seen) == len(samples) == len(manifest)
    assert set(samples) == set(manifest.column("key"))
    reader = ShardReader(built.out, manifest)
    checked = set()
    for i in range(len(manifest)):
        row = manifest.row(i)
        sample = {name: value for name, value in samples[row["key"]].items() if name[0] != "_"}
        stored = {SUFFIX[name] for name in MEMBERS if row[f"{name}_size"] > 0}
        assert set(sample) == stored
        assert {SUFFIX[name] for name in read_index(sample["idx"], row["key"])} == stored - {"idx"}
        assert (sample["json"]["key"], sample["json"]["shape"]) == (row["key"], row["shape"])
        for name in ("image", "l1", "l2", "seg"):
            if SUFFIX[name] not in stored:
                continue
            array = sample[SUFFIX[name]]
            np.testing.assert_array_equal(array, reader.read_box(i, name, None, (0, 0, 0), array.shape[1:]))
            checked.add((row["geometry"], name))
        assert list(sample["b2nd"].shape) == row["shape"]
    assert checked >= {(g, "image") for g in ("volume", "slab", "planar")}
    assert checked >= {("volume", name) for name in ("l1", "seg")}


def test_a_shard_holds_one_split_modality_and_geometry(built: BuildReport) -> None:
    manifest = Manifest.open(built.out)
    for i in range(len(manifest)):
        row = manifest.row(i)
        assert re.fullmatch(
            rf"{row['split']}-{row['modality'].lower()}-{row['geometry']}-\d{{6}}\.tar", row["shard"]
        )
    names, counts = np.unique(manifest.column("shard"), return_counts=True)
    assert counts.max() <= 3
    assert [s["name"] for s in manifest.info["shards"]] == sorted(names)
    assert set(manifest.column("geometry")) == {"volume", "slab", "planar"}
    order = list(zip(manifest.column("shard"), manifest.column("image_offset")))
    assert order == sorted(order)


def test_tar_headers_carry_no_time_and_no_owner(built: BuildReport) -> None:
    for path in built.out.glob("*.tar"):
        with tarfile.open(path) as tar:
            for info in tar:
                assert (info.mtime, info.uid, info.gid, info.uname, info.gname) == (0, 0, 0, "", "")


def test_no_identifier_in_any_byte(built: BuildReport) -> None:
    texts: dict[str, bytes] = {}
    for path in built.out.rglob("*"):
        if path.is_file():
            texts[path.name] = path.read_bytes()
    texts["rows"] = repr(pq.read_table(built.out / "manifest.parquet").to_pylist()).encode()
    texts["schema"] = repr(pq.read_schema(built.out / "manifest.parquet").metadata).encode()
    for name, data in texts.items():
        for word in (*FORBIDDEN, str(built.out.parent)):
            assert word.lower().encode() not in data.lower(), (word, name)
            assert word.lower() not in name.lower()
    refused = [json.loads(line) for line in (built.out / "quarantine.jsonl").read_text().splitlines()]
    assert [(r["source"], r["code"], r["what"]) for r in refused] == [("mr-b", "unreadable", "image")]
    private = index_of(built)
    by_input = {entry["input"]: entry for entry in private}
    assert "StAnna" in by_input[refused[0]["input"]]["paths"][0]  # the way back is there, outside
    assert {p.name for p in built.private.iterdir()} == {"hash.key", "index.jsonl"}
    assert (built.private / "index.jsonl").stat().st_mode & 0o077 == 0


def test_duplicates_share_a_subject_and_a_split(built: BuildReport) -> None:
    manifest = Manifest.open(built.out)
    hashes = manifest.column("content_hash")
    assert len(set(hashes)) == len(hashes)
    entries = index_of(built)
    twin = next(e for e in entries if e["source"] == "ct-d")
    kept = next(e for e in entries if e["source"] == "ct-a" and e["subject"] == "OkaforAda_1947")
    assert twin["keys"] == []
    assert len(kept["keys"]) == 1


def test_subjects_are_never_divided(built: BuildReport) -> None:
    manifest = Manifest.open(built.out)
    splits: dict[str, set[str]] = {}
    for subject, split in zip(manifest.column("subject"), manifest.column("split")):
        splits.setdefault(subject, set()).add(split)
    assert all(len(s) == 1 for s in splits.values())
    for source in ("ct-a", "mr-b", "xr-c"):
        found = set(manifest.column("split")[manifest.select(source=source)])
        assert found == {"train", "val", "test"}  # 8 subjects suffice for every split


def test_it_verifies_and_says_so_in_html(built: BuildReport) -> None:
    assert verify(built.out) == []
    page = (built.out / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 3
    assert "unreadable" in page
    for forbidden in ("http://", "https://", "<script", "url("):
        assert forbidden not in page


def tree_hash(root: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(root.iterdir())}


def test_the_same_bytes_from_another_process(
    scans: Path, built: BuildReport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By two, one of which is killed: `test_a_worker_killed_once_costs_nothing`."""
    monkeypatch.setattr("data_pipeline.complete.POOL_BYTES", 0)  # workers write these small shards too
    again = build(
        sources(scans),
        tmp_path / "again",
        built.private,
        workers=1,
        shard_samples=3,
        level_min_voxels=2000,
        progress=False,
    )
    assert tree_hash(again.out) == tree_hash(built.out)


def test_another_key_hides_behind_other_hashes(scans: Path, built: BuildReport, tmp_path: Path) -> None:
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "hash.key").write_bytes(b"another key" * 3)
    other = build(sources(scans)[:1], tmp_path / "o", tmp_path / "p", progress=False)
    mine, theirs = Manifest.open(built.out), Manifest.open(other.out)
    assert not set(mine.column("key")) & set(theirs.column("key"))
    assert not set(mine.column("subject")) & set(theirs.column("subject"))


def test_splits_do_not_depend_on_the_key(scans: Path, built: BuildReport, tmp_path: Path) -> None:
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "hash.key").write_bytes(b"another key" * 3)
    other = build(sources(scans)[1:2], tmp_path / "o", tmp_path / "p", progress=False)
    mine, theirs = Manifest.open(built.out), Manifest.open(other.out)

    def by_hash(manifest: Manifest) -> dict[str, str]:
        rows = manifest.select(source="mr-b")
        return dict(zip(manifest.column("content_hash")[rows], manifest.column("split")[rows]))

    assert by_hash(mine) == by_hash(theirs)


def test_exact_keeps_float32(scans: Path, tmp_path: Path) -> None:
    report = build(sources(scans)[1:2], tmp_path / "o", exact=True, progress=False)
    manifest = Manifest.open(report.out)
    assert set(manifest.column("dtype")) == {"float32"}
    assert manifest.column("max_error").max() == 0
    assert report.notes["stored as float32"] == 8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"burned_in": None}, r"8 radiographs \(8 in source 'xr-c'\).*burned_in: accept, quarantine or mask"),
    ],
)
def test_burned_in_text_needs_an_answer(
    scans: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        build(sources(scans, **change), tmp_path / "o", progress=False)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "o").exists()


def test_burned_in_quarantine(scans: Path, tmp_path: Path) -> None:
    report = build(sources(scans, burned_in="quarantine")[1:3], tmp_path / "o", progress=False)
    assert report.quarantined["burned_in"] == 8
    assert report.samples == 8
    assert Manifest.open(report.out).info["sources"][1]["burned_in"] == "quarantine"


def mistake(kind: str) -> Callable[[Path, Path], Any]:
    def twice(scans: Path, out: Path) -> Any:
        return build([*sources(scans), sources(scans)[0]], out, progress=False)

    def full(scans: Path, out: Path) -> Any:
        out.mkdir()
        (out / "something").write_text("mine")
        return build(sources(scans), out, progress=False)

    def inside(scans: Path, out: Path) -> Any:
        return build(sources(scans), out, out / "private", progress=False)

    def none(scans: Path, out: Path) -> Any:
        return build([], out, progress=False)

    def fractions(scans: Path, out: Path) -> Any:
        return build(sources(scans), out, split={"train": 0.9, "val": 0.2}, progress=False)

    def unusable(scans: Path, out: Path) -> Any:
        bad = SourceConfig(path=scans / "mr", include=("StAnna_T1w.nii.gz",), name="bad", modality="MR")
        return build([bad], out, progress=False)

    return locals()[kind]  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("twice", "two sources are called 'ct-a'"),
        ("full", "holds other files (something)"),
        ("inside", "must lie outside the dataset"),
        ("none", "no sources"),
        ("fractions", "must sum to 1"),
        ("unusable", "no input could be used: {'unreadable': 1}"),
    ],
)
def test_mistakes_are_said_in_one_line(scans: Path, tmp_path: Path, kind: str, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        mistake(kind)(scans, tmp_path / "o")
    assert "\n" not in str(caught.value)


def test_from_a_recipe(scans: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        """
        seed: 3
        sources:
          - {path: mr, modality: MR}
          - {name: ct, path: ct, modality: CT, include: ["*/thorax.nii.gz"]}
        """
    )
    report = build_from_recipe(
        recipe, tmp_path / "o", root=scans, progress=False, split={"train": 0.5, "test": 0.5}
    )
    manifest = Manifest.open(report.out)
    assert {s["name"] for s in manifest.info["sources"]} == {"source-1", "ct"}  # a folder's name is not used
    assert manifest.info["built_with"]["seed"] == 3
    assert set(manifest.column("split")) == {"train", "test"}
    plain = build_from_recipe([scans / "mr"], tmp_path / "p", modality="MR", progress=False)
    assert plain.samples == 8


def test_pictures_decode(built: BuildReport) -> None:
    import base64

    page = (built.out / "report.html").read_text()
    for data in re.findall(r"base64,([^']+)'", page):
        picture = Image.open(io.BytesIO(base64.b64decode(data)))
        assert np.asarray(picture).std() > 5  # not blank


@pytest.mark.real_data
@pytest.mark.slow
def test_the_real_scans(real_data: Path, tmp_path: Path) -> None:
    recipe = Path(__file__).parents[2] / "recipes" / "shards-shared.yaml"
    report = build_from_recipe(recipe, tmp_path / "o", root=real_data, progress=False)
    assert verify(report.out) == []
    manifest = Manifest.open(report.out)
    assert report.quarantined == {}
    assert report.notes["duplicates left out"] == 2  # STS_019 as DICOM is STS_019 as NIfTI
    assert report.notes["labels drawn from contours"] == 2  # whose two RTSTRUCT come along
    assert report.notes["label conflicts between duplicates"] == 1  # that of MR is its mask to the voxel
    assert list(manifest.info["labels"].values()) == ["Anterior", "Posterior", "gross tumour volume", "lungs"]
    assert len(manifest.select(source="hippocampus")) == 200
    assert len(manifest.select(source="sarcoma", labelled=True)) == 24
    assert set(manifest.column("modality")) == {"CT", "MR", "PT", "XR"}
    span = np.array([n[0][3] - n[0][2] for n in manifest.column("norm")])
    assert (manifest.column("max_error") / span).max() < 2e-5
