"""Channels, labels, frames and recipes through a build, on small folders made for each case."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from scan_files import phantom, write_nifti

from data_pipeline.build import BuildReport, build, build_from_recipe
from data_pipeline.build_checks import label_ids
from data_pipeline.errors import UserError
from data_pipeline.layouts import Case
from data_pipeline.manifest import Manifest
from data_pipeline.sources import SourceConfig
from data_pipeline.storage import ShardReader
from data_pipeline.verify import verify
from data_pipeline.volume import Volume


def index_of(report: BuildReport) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (report.private / "index.jsonl").read_text().splitlines()]


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


@pytest.fixture
def nnunet(tmp_path: Path) -> Path:
    root = tmp_path / "Dataset001_Brats"
    description = {
        "channel_names": {"0": "T1", "1": "FLAIR"},
        "labels": {"background": 0, "whole": [1, 2], "core": [2], "ignore": 3},
        "regions_class_order": [1, 2],
        "numTraining": 5,
        "file_ending": ".nii.gz",
    }
    for n in range(5):
        for channel in range(2):
            array = np.random.default_rng(10 * n + channel).integers(0, 900 + 60000 * channel, (12, 14, 10))
            write_nifti(
                root / "imagesTr" / f"case_{n}_000{channel}.nii.gz", array.astype(np.uint16), ras=n % 2 == 0
            )
        label = np.random.default_rng(n).integers(0, 4, (12, 14, 10)).astype(np.uint8)
        write_nifti(root / "labelsTr" / f"case_{n}.nii.gz", label, ras=n % 2 == 0)
    (root / "dataset.json").write_text(json.dumps(description))
    return root


def test_a_two_channel_nnunet_folder(nnunet: Path, tmp_path: Path) -> None:
    report = build([SourceConfig(path=nnunet, name="brats")], tmp_path / "o", progress=False)
    manifest = Manifest.open(report.out)
    reader = ShardReader(report.out, manifest)
    assert manifest.info["labels"] == {"1": "whole", "2": "core"}
    rows = {key: i for i, key in enumerate(manifest.column("key"))}
    for entry in index_of(report):
        row = rows[entry["keys"][0]]
        values = manifest.row(row)
        assert values["channels"] == ["T1", "FLAIR"]
        assert values["modalities"] == ["MR", "MR"]
        assert values["shape"][0] == 2
        description = json.loads(member(report.out, values, "json"))
        for channel, path in enumerate(entry["paths"]):
            stored = reader.read_box(row, "image", channel, (0, 0, 0), values["shape"][1:])
            real = stored * values["norm"][channel][0] + values["norm"][channel][1]
            np.testing.assert_array_equal(restored(description, real), np.asarray(nib.load(path).dataobj).T)
        seg = restored(description, reader.read_box(row, "seg", None, (0, 0, 0), values["shape"][1:]))
        truth = np.asarray(nib.load(entry["label"]).dataobj).T
        layer_of = {f["class"]: f["layer"] for f in values["foreground"]}
        assert len(seg) == 2  # whole and core overlap, so each has its own layer
        for label, meant in ((1, (1, 2)), (2, (2,))):
            np.testing.assert_array_equal(seg[layer_of[label]] == label, np.isin(truth, meant))
        assert (seg[:, truth == 3] == 255).all()


def test_labels_of_duplicates_are_kept(tmp_path: Path) -> None:
    """An image and its labelled copies: one sample, every label. Same name, other voxels: a conflict."""
    array = phantom(1)
    write_nifti(tmp_path / "a" / "img.nii.gz", array)
    for name, shift in (("b", 0), ("c", 1), ("d", 0)):
        write_nifti(tmp_path / name / "img.nii.gz", array.astype(np.int32))
        write_nifti(tmp_path / name / "lab.nii.gz", np.roll((array > 60).astype(np.uint8), shift, 0))
    described = [SourceConfig(path=tmp_path / "a", name="a", modality="CT")]
    for name, label in (("b", {1: "liver"}), ("c", {1: "liver"}), ("d", {1: "spleen"})):
        described.append(
            SourceConfig(
                path=tmp_path / name,
                name=name,
                modality="CT",
                include=("img.nii.gz",),
                label_glob="lab.nii.gz",
                labels=label,
            )
        )
    report = build(described, tmp_path / "o", progress=False)
    manifest = Manifest.open(report.out)
    row = manifest.row(0)
    assert len(manifest) == 1
    assert report.notes["duplicates left out"] == 3
    assert report.notes["label conflicts between duplicates"] == 1
    assert report.notes["labels added from duplicates"] == 1
    assert row["annotated"] == ["liver", "spleen"]
    seg = ShardReader(report.out, manifest).read_box(0, "seg", None, (0, 0, 0), row["shape"][1:])
    assert seg.shape[0] == 2
    np.testing.assert_array_equal(seg[0] == 1, seg[1] == 2)
    assert verify(report.out) == []


def test_a_label_that_cannot_be_placed_is_refused_and_the_image_kept(tmp_path: Path) -> None:
    write_nifti(tmp_path / "in" / "a_img.nii.gz", phantom(0))
    write_nifti(tmp_path / "in" / "a_lab.nii.gz", np.full((22, 18, 14), 7, np.uint8))
    source = SourceConfig(
        path=tmp_path / "in",
        name="a",
        modality="CT",
        include=("*_img.nii.gz",),
        label_glob="*_lab.nii.gz",
        labels={1: "liver"},
    )
    report = build([source], tmp_path / "o", progress=False)
    assert report.quarantined == {"label_values": 1}
    assert report.samples == 1
    assert report.notes["labelled"] == 0
    [line] = (report.out / "quarantine.jsonl").read_text().splitlines()
    assert json.loads(line)["what"] == "label"
    assert json.loads(line)["detail"] == "7"


def test_frames_of_a_4d_file_are_one_subject(tmp_path: Path) -> None:
    series = np.stack([phantom(n) for n in range(6)], axis=-1)
    write_nifti(tmp_path / "in" / "bold.nii.gz", series)
    write_nifti(tmp_path / "in" / "other.nii.gz", phantom(9))
    source = SourceConfig(path=tmp_path / "in", name="a", modality="MR", more_frames=2)
    report = build([source], tmp_path / "o", split={"train": 0.5, "val": 0.5}, progress=False)
    manifest = Manifest.open(report.out)
    assert len(manifest) == 4
    counts = np.unique(manifest.column("subject"), return_counts=True)[1]
    assert sorted(counts) == [1, 3]
    assert len(set(manifest.column("key"))) == 4


def test_stated_splits_win_and_take_the_subject_along(tmp_path: Path) -> None:
    for n in range(6):
        for visit in ("v1", "v2"):
            write_nifti(tmp_path / "in" / f"p{n}_{visit}.nii.gz", phantom(10 * n + int(visit[1])))
    source = SourceConfig(
        path=tmp_path / "in",
        name="a",
        modality="CT",
        subject_pattern="^(p[0-9])_",
        splits={"p3_v1*": "test", "p4_v2*": "train", "p4_v1*": "test"},
    )
    with pytest.raises(
        UserError, match=r"1 subjects are stated in two splits, first 'p4'.*on_leak: strictest"
    ):
        build([source], tmp_path / "o", split={"train": 1.0}, progress=False)
    report = build([source], tmp_path / "p", split={"train": 1.0}, on_leak="strictest", progress=False)
    splits = dict(zip(Manifest.open(report.out).column("key"), Manifest.open(report.out).column("split")))
    for entry in index_of(report):
        want = "test" if entry["subject"] in ("p3", "p4") else "train"
        assert splits[entry["keys"][0]] == want
    assert report.notes["subjects stated in several splits"] == 1


def test_a_copy_in_another_source_does_not_change_the_fractions(tmp_path: Path) -> None:
    for n in range(5):
        write_nifti(tmp_path / "a" / f"p{n}.nii.gz", phantom(n))
    write_nifti(tmp_path / "b" / "copy.nii.gz", phantom(0))
    sources = [
        SourceConfig(path=tmp_path / "a", name="a", modality="CT", split={"test": 1.0}),
        SourceConfig(path=tmp_path / "b", name="b", modality="CT"),
    ]
    report = build(sources, tmp_path / "o", split={"train": 1.0}, progress=False)
    assert report.notes["duplicates left out"] == 1
    assert set(Manifest.open(report.out).column("split")) == {"test"}


def test_what_was_done_to_an_input_is_counted(tmp_path: Path) -> None:
    image = nib.Nifti1Image(phantom(0), np.eye(4))
    image.set_sform(np.eye(4), 1)
    image.set_qform(np.diag([1.0, 1.0, 1.0, 1.0]) + np.eye(4, k=3) * 5, 1)
    (tmp_path / "ct").mkdir()
    nib.save(image, tmp_path / "ct" / "a_img.nii.gz")
    write_nifti(tmp_path / "ct" / "a_lab.nii.gz", (phantom(0) > 0).astype(np.uint8)[1:])
    write_nifti(tmp_path / "pt" / "b.nii.gz", phantom(1).clip(0) + phantom(2).clip(0))
    ct = {"include": ("*_img.nii.gz",), "label_glob": "*_lab.nii.gz", "labels": {1: "body"}}
    sources = [
        SourceConfig(path=tmp_path / "ct", name="ct", modality="CT", **ct),  # type: ignore[arg-type]
        SourceConfig(path=tmp_path / "pt", name="pt", modality="PT"),
    ]
    report = build(sources, tmp_path / "o", split={"train": 1.0}, progress=False)
    assert report.quarantined == {}
    assert report.notes["sform taken where qform differs by more than a voxel"] == 1
    assert report.notes["PET without SUV, percentiles taken"] == 1
    assert report.notes["labels resampled to the grid of the image"] == 1
    assert "PET without SUV" in (report.out / "report.html").read_text()


def test_one_strange_file_does_not_end_a_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from data_pipeline import sample

    for n in range(3):
        write_nifti(tmp_path / "in" / f"p{n}.nii.gz", phantom(n))
    read_case = sample.read_case

    def strange(case: Case, *rest: Any) -> list[Volume]:
        if case.name == "p1":
            raise RuntimeError(f"a decoder's own words on {case.images[0]}")
        return read_case(case, *rest)

    monkeypatch.setattr(sample, "read_case", strange)
    report = build(
        [SourceConfig(path=tmp_path / "in", name="a", modality="CT")], tmp_path / "o", progress=False
    )
    assert (report.samples, report.quarantined) == (2, {"unforeseen": 1})
    [line] = (report.out / "quarantine.jsonl").read_text().splitlines()
    assert json.loads(line)["detail"] == "RuntimeError"
    assert "own words" not in line
    assert "own words" in (report.private / "index.jsonl").read_text()


def test_a_radiograph_with_a_header_needs_an_answer_too(tmp_path: Path) -> None:
    write_nifti(tmp_path / "in" / "chest.nii.gz", phantom(0)[:, :, 5:6])
    source = SourceConfig(path=tmp_path / "in", name="a", modality="XR")
    with pytest.raises(UserError, match="1 radiographs"):
        build([source], tmp_path / "o", progress=False)
    assert not any(
        p.name.startswith("o") and "private" not in p.name for p in tmp_path.iterdir()
    )  # nothing left


def test_names_that_look_alike_are_a_conflict() -> None:
    def case(source: str, *names: str) -> Case:
        regions = {name: (n,) for n, name in enumerate(names, 1)}
        return Case(source, (), None, "", None, (), label_regions=regions)

    assert label_ids([case("a", "liver", "spleen"), case("b", "spleen", "kidney")]) == {
        "liver": 1,
        "spleen": 2,
        "kidney": 3,
    }
    with pytest.raises(UserError, match=r"'left kidney' \(source 'a'\) and 'Left_Kidney' \('b'\)"):
        label_ids([case("a", "left kidney"), case("b", "Left_Kidney")])
    with pytest.raises(UserError, match="at most 254"):
        label_ids([case("a", *(f"n{i}" for i in range(255)))])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sources: [{path: mr, modalty: MR}]", "unknown field 'sources.0.modalty'; did you mean 'modality'?"),
        ("sauces: []", "sources must be a list"),
        ("sources: [{path: mr}]\nsede: 1", "unknown field 'sede'; did you mean 'seed'?"),
        ("sources: [{path: mr, burned_in: perhaps}]", "sources.0.burned_in"),
        ("a: [", "not valid YAML (line 1)"),
        ("just words", "a recipe is a mapping"),
    ],
)
def test_a_wrong_recipe_is_said_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        build_from_recipe(tmp_path / "r.yaml", tmp_path / "o", progress=False)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="cannot be read"):
        build_from_recipe(tmp_path / "no.yaml", tmp_path / "o", progress=False)
