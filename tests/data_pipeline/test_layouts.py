"""Which files are images, labels and subjects: every layout, and the errors that say what to state."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

import nibabel
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError

from data_pipeline.errors import Quarantined, UserError
from data_pipeline.labels import read_label
from data_pipeline.layout_described import parse_labels
from data_pipeline.layout_folder import detect
from data_pipeline.layouts import discover, read_case, stem
from data_pipeline.sources import SourceConfig, matches, substitute

WHERE = Path("dataset.json")


def nifti(path: Path, channels: int = 1, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (4, 5, 6) if channels == 1 else (4, 5, 6, channels)
    data = np.random.default_rng(seed).integers(1, 99, shape).astype(np.int16)
    nibabel.save(nibabel.Nifti1Image(data, np.eye(4)), path)
    return path


def mask(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = np.zeros((4, 5, 6), np.uint8)
    data[1:3, 1:3, 1:3] = 1
    nibabel.save(nibabel.Nifti1Image(data, np.eye(4)), path)
    return path


def describe(folder: Path, **content) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "dataset.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    "labels",
    [
        {"0": "background", "1": "Anterior", "2": "Posterior"},
        {"background": 0, "Anterior": 1, "Posterior": 2},
    ],
)
def test_msd_with_labels_either_way_round(tmp_path: Path, labels: dict) -> None:
    for name in ("a", "b"):
        nifti(tmp_path / f"imagesTr/{name}.nii.gz")
        mask(tmp_path / f"labelsTr/{name}.nii.gz")
    nifti(tmp_path / "imagesTs/c.nii.gz")
    training = [{"image": f"./imagesTr/{n}.nii.gz", "label": f"./labelsTr/{n}.nii.gz"} for n in "ab"]
    describe(tmp_path, modality={"0": "MRI"}, labels=labels, training=training, test=["./imagesTs/c.nii.gz"])
    src = SourceConfig(path=tmp_path)
    cases = discover(src)
    assert [c.name for c in cases] == ["a", "b", "c"]
    assert [c.split for c in cases] == [None, None, "test"]
    assert cases[0].label_values == {1: "Anterior", 2: "Posterior"}
    assert cases[0].label_regions == {"Anterior": (1,), "Posterior": (2,)}
    assert cases[0].annotated == ("Anterior", "Posterior")
    assert cases[2].label is None
    assert cases[2].annotated == ()
    volume = read_case(cases[0], src)[0]
    assert volume.channels[0].modality == "MR"
    assert cases[0].label is not None
    assert read_label(cases[0].label, volume, regions=cases[0].label_regions or {}).classes == (1,)


def test_msd_channels_lie_on_the_fourth_axis(tmp_path: Path) -> None:
    nifti(tmp_path / "imagesTr/a.nii.gz", channels=3)
    describe(
        tmp_path,
        modality={"1": "T1w", "0": "FLAIR", "2": "PET"},
        labels={},
        training=[{"image": "imagesTr/a.nii.gz"}],
    )
    src = SourceConfig(path=tmp_path)
    volumes = read_case(discover(src)[0], src)
    assert len(volumes) == 1
    assert [(c.name, c.modality) for c in volumes[0].channels] == [
        ("FLAIR", "MR"),
        ("T1w", "MR"),
        ("PET", "PT"),
    ]


def test_nnunet_stacks_one_file_a_channel(tmp_path: Path) -> None:
    for name in ("x", "y"):
        for n in range(2):
            nifti(tmp_path / f"imagesTr/{name}_{n:04d}.nii.gz", seed=n)
        mask(tmp_path / f"labelsTr/{name}.nii.gz")
    nifti(tmp_path / "imagesTs/z_0000.nii.gz")
    nifti(tmp_path / "imagesTs/z_0001.nii.gz")
    labels = {"background": 0, "whole": [1, 2], "core": [2], "ignore": 3}
    describe(
        tmp_path, channel_names={"0": "T1", "1": "CT"}, labels=labels, file_ending=".nii.gz", numTraining=2
    )
    src = SourceConfig(path=tmp_path)
    cases = discover(src)
    assert [(c.name, len(c.images), c.split) for c in cases] == [
        ("x", 2, None),
        ("y", 2, None),
        ("z", 2, "test"),
    ]
    assert cases[0].label_values is None
    assert cases[0].label_regions == {"whole": (1, 2), "core": (2,)}
    assert cases[0].ignore == frozenset({3})
    volume = read_case(cases[0], src)[0]
    assert [(c.name, c.modality, c.units) for c in volume.channels] == [
        ("T1", "MR", "arbitrary"),
        ("CT", "CT", "HU"),
    ]
    assert volume.voxels.shape == (2, 6, 5, 4)
    (tmp_path / "imagesTr/x_0001.nii.gz").unlink()
    with pytest.raises(Quarantined, match="missing"):
        read_case(discover(src)[0], src)
    (tmp_path / "labelsTr/x.nii.gz").unlink()
    assert [case.label is not None for case in discover(src)] == [False, True, False]


def test_channel_names_that_name_no_modality_need_one(tmp_path: Path) -> None:
    nifti(tmp_path / "imagesTr/a.nii.gz")
    describe(tmp_path, channel_names={"0": "noNorm"}, labels={}, training=[{"image": "imagesTr/a.nii.gz"}])
    with pytest.raises(UserError, match="state modality"):
        discover(SourceConfig(path=tmp_path, layout="msd"))
    assert discover(SourceConfig(path=tmp_path, layout="msd", modality="CT"))[0].modality == ("CT",)


def test_tables(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        nifti(tmp_path / f"{name}.nii.gz")
    mask(tmp_path / "m.nii.gz")
    (tmp_path / "t.csv").write_text(
        "image,label,modality,subject,split\na.nii.gz,m.nii.gz,MR,p1,train\nb.nii.gz;c.nii.gz,,T1;CT,p2,test\n"
    )
    src = SourceConfig(path=tmp_path / "t.csv", labels={1: "liver"})
    cases = discover(src)
    assert [(c.subject, c.split, c.modality, len(c.images)) for c in cases] == [
        ("p1", "train", ("MR",), 1),
        ("p2", "test", ("MR", "CT"), 2),
    ]
    assert read_case(cases[1], src)[0].voxels.shape[0] == 2
    pq.write_table(
        pa.table({"image_t1": ["a.nii.gz"], "image_t2": ["b.nii.gz"], "subject": [7]}), tmp_path / "t.parquet"
    )
    case = discover(SourceConfig(path=tmp_path / "t.parquet", modality="MR"))[0]
    assert (case.channel_names, case.subject, case.modality) == (("t1", "t2"), "7", ("MR", "MR"))
    (tmp_path / "bad.csv").write_text("imgae,label\na.nii.gz,\n")
    with pytest.raises(UserError, match="'imgae': did you mean 'image'"):
        discover(SourceConfig(path=tmp_path / "bad.csv"))
    (tmp_path / "near.csv").write_text("image,subjct,modality\na.nii.gz,p,MR\n")
    with pytest.raises(UserError, match="did you mean 'subject'"):
        discover(SourceConfig(path=tmp_path / "near.csv"))
    (tmp_path / "none.csv").write_text("image\na.nii.gz\n")
    with pytest.raises(UserError, match="state modality"):
        discover(SourceConfig(path=tmp_path / "none.csv"))


def test_units_go_to_the_channels_that_can_have_them(tmp_path: Path) -> None:
    describe(tmp_path, channel_names={"0": "CT", "1": "PET"}, labels={"background": 0, "tumour": 1})
    for channel in range(2):
        nifti(tmp_path / f"imagesTr/a_000{channel}.nii.gz", seed=channel)
    mask(tmp_path / "labelsTr/a.nii.gz")
    for units in ("SUV", {"*_0001*": "SUV"}):
        src = SourceConfig(path=tmp_path, units=units)
        volume = read_case(discover(src)[0], src)[0]
        assert [(c.modality, c.units) for c in volume.channels] == [("CT", "HU"), ("PT", "SUV")]
    with pytest.raises(UserError, match="states units HU and SUV"):
        discover(SourceConfig(path=tmp_path, units={"*_0000*": "HU", "*": "SUV"}))
    with pytest.raises(UserError, match="units SUV, which are those of PT"):
        discover(SourceConfig(path=tmp_path / "imagesTr", modality="MR", units="SUV"))


def test_channels_are_never_given_the_modality_of_another(tmp_path: Path) -> None:
    describe(tmp_path, channel_names={"0": "CT", "1": "tracer"}, labels={"background": 0, "tumour": 1})
    for channel in range(2):
        nifti(tmp_path / f"imagesTr/a_000{channel}.nii.gz", seed=channel)
    mask(tmp_path / "labelsTr/a.nii.gz")
    with pytest.raises(UserError, match="'tracer' does not name a modality"):
        discover(SourceConfig(path=tmp_path, modality={"*_0001*": "PT"}))
    (tmp_path / "t.csv").write_text("image,modality\na;b;c,MR;CT\n")
    with pytest.raises(UserError, match="2 modalities for the 3 files"):
        discover(SourceConfig(path=tmp_path / "t.csv"))


@pytest.mark.parametrize("split", ["../elsewhere", "fold/1", "a b"])
def test_a_split_is_a_plain_name(tmp_path: Path, split: str) -> None:
    nifti(tmp_path / "a.nii.gz")
    with pytest.raises(UserError, match="named by letters and digits"):
        discover(SourceConfig(path=tmp_path, modality="MR", splits={"*": split}))


def sarcoma(root: Path) -> Path:
    for patient in ("STS_1", "STS_2"):
        for kind in ("CT", "MR_T1", "PET"):
            nifti(root / patient / f"{kind}_image.nii.gz")
            mask(root / patient / f"{kind}_mask.nii.gz")
    return root


def test_a_plain_folder_with_labels_by_glob(tmp_path: Path) -> None:
    src = SourceConfig(
        path=sarcoma(tmp_path),
        include=("STS_*/*_image.nii.gz",),
        label_glob="STS_*/*_mask.nii.gz",
        labels={1: "tumour"},
        modality={"*CT_image*": "CT", "*MR_T1_image*": "MR", "*PET_image*": "PT"},
        units={"*PET*": "SUV"},
    )
    cases = discover(src)
    assert [(c.subject, c.modality, c.units) for c in cases[:3]] == [
        ("STS_1", ("CT",), None),
        ("STS_1", ("MR",), None),
        ("STS_1", ("PT",), "SUV"),
    ]
    for case in cases:
        assert case.label is not None
        assert case.label.parent == case.images[0].parent
        assert case.label.name == case.images[0].name.replace("image", "mask")
    assert read_case(cases[2], src)[0].channels[0].units == "SUV"
    assert {c.subject for c in cases} == {"STS_1", "STS_2"}


def test_a_folder_that_does_not_say_what_it_holds_is_asked(tmp_path: Path) -> None:
    sarcoma(tmp_path)
    with pytest.raises(UserError, match=r"state modality: CT, MR, XR or PT"):
        discover(SourceConfig(path=tmp_path))
    with pytest.raises(UserError, match=r"labels: \{1: name"):
        discover(
            SourceConfig(
                path=tmp_path, modality="MR", include=("*/CT_image*",), label_glob="STS_1/CT_mask.nii.gz"
            )
        )
    with pytest.raises(UserError, match="wildcards"):
        discover(
            SourceConfig(
                path=tmp_path, modality="MR", include=("*/CT_image*",), label_glob="*/CT_mask.nii.gz"
            )
        )
    with pytest.raises(UserError, match="no images found"):
        discover(SourceConfig(path=tmp_path, modality="MR", include=("nothing",)))
    with pytest.raises(UserError, match="no such file"):
        discover(SourceConfig(path=tmp_path / "none"))


def test_radiographs_with_masks_splits_and_subject_pattern(tmp_path: Path) -> None:
    for part, names in {"train": ("IM-01-0001", "IM-01-0002"), "test": ("IM-02-0001",)}.items():
        for name in names:
            for kind in ("images", "mask")[: 2 if part == "train" else 1]:
                (tmp_path / part / kind).mkdir(parents=True, exist_ok=True)
                Image.fromarray(np.eye(8, dtype=np.uint8) * 200).save(tmp_path / part / kind / f"{name}.png")
    src = SourceConfig(
        path=tmp_path,
        modality="XR",
        include=("*/images/*.png",),
        label_glob="*/mask/*.png",
        labels={1: "lungs"},
        label_threshold=128,
        field_mm=300,
        subject_pattern=r"(IM-\d+)-",
        splits={"test/**": "test"},
    )
    cases = discover(src)
    assert [(c.subject, c.split, c.label is not None) for c in cases] == [
        ("IM-02", "test", False),
        ("IM-01", None, True),
        ("IM-01", None, True),
    ]
    with pytest.raises(UserError, match="does not match"):
        discover(src.model_copy(update={"subject_pattern": r"(\d{5})"}))


def test_subjects_by_table(tmp_path: Path) -> None:
    for name in ("h1", "h2", "h3"):
        nifti(tmp_path / f"d/{name}.nii.gz")
    table = tmp_path / "s.csv"
    table.write_text("case,group\nh1,9\nh2,9\nh3,4\n")
    assert [
        c.subject for c in discover(SourceConfig(path=tmp_path / "d", modality="MR", subjects=table))
    ] == ["9", "9", "4"]
    table.write_text("case,group\nh1,9\n")
    with pytest.raises(UserError, match="2 of 3 cases"):
        discover(SourceConfig(path=tmp_path / "d", modality="MR", subjects=table))
    table.write_text("name\n")
    with pytest.raises(UserError, match="case,group"):
        discover(SourceConfig(path=tmp_path / "d", modality="MR", subjects=table))
    plain = discover(SourceConfig(path=tmp_path / "d", modality="MR"))
    assert [c.subject for c in plain] == ["h1", "h2", "h3"]


def test_masks_beside_images_are_not_images(tmp_path: Path) -> None:
    nifti(tmp_path / "a.nii.gz")
    mask(tmp_path / "a_seg.nii.gz")
    src = SourceConfig(
        path=tmp_path, modality="MR", include=("a.nii.gz",), label_glob="a_seg.nii.gz", labels={1: "liver"}
    )
    assert [c.images[0].name for c in discover(src)] == ["a.nii.gz"]


def test_a_mixed_folder_gives_its_dicom_series_and_its_other_images(tmp_path: Path) -> None:
    nifti(tmp_path / "a.nii.gz")
    (tmp_path / "b.dcm").write_bytes(b"\0" * 128 + b"DICM")
    (tmp_path / "c").write_bytes(b"\0" * 128 + b"DICM")
    for name in ("notes.txt", "more.txt", "x.smithjohn", "._a.nii.gz", "alone.img"):
        (tmp_path / name).write_text("Smith, John")
    notes: Counter[str] = Counter()
    cases = discover(SourceConfig(path=tmp_path, modality="MR"), notes=notes)
    assert [c.images[0].name for c in cases] == ["a.nii.gz", "b.dcm", "c"]
    assert [c.refused.code if c.refused else None for c in cases] == [None, "unreadable", "unreadable"]
    assert notes == {
        "files that are no image: .txt": 2,
        "files that are no image: .img": 1,
        "files that are no image: other": 1,
    }
    with pytest.raises(UserError, match="state modality"):
        discover(SourceConfig(path=tmp_path))
    refused = discover(SourceConfig(path=tmp_path, layout="dicom"))
    assert [c.refused.code for c in refused if c.refused] == ["unreadable", "unreadable"]


def test_parse_labels() -> None:
    assert parse_labels({"background": 0, "a": 1}, WHERE) == ({1: "a"}, {"a": (1,)}, frozenset())
    assert parse_labels({"0": "background", "1": "a", "2": "a"}, WHERE)[1] == {"a": (1, 2)}
    assert parse_labels({"a": 1, "ignore": 255}, WHERE)[2] == frozenset({255})
    with pytest.raises(UserError, match="labels must map"):
        parse_labels({"a": "one"}, WHERE)


@given(st.lists(st.text("ab1_", min_size=1, max_size=4), min_size=2, max_size=2))
def test_wildcards_are_put_back_where_they_were(words: list[str]) -> None:
    path = f"{words[0]}/x_{words[1]}.png"
    found = matches("*/x_*.png", path)
    assert found == (words[0], words[1])
    assert substitute("*/x_*.png", found) == path
    assert substitute("m/*.png", found) is None
    assert substitute("m/[ab]?.png", matches("[ab]?", "b7") or ()) == "m/b7.png"


@pytest.mark.parametrize(
    ("glob", "path", "expected"),
    [
        ("*.png", "a/b.png", False),
        ("**/*.png", "a/c/b.png", True),
        ("**/*.png", "b.png", True),
        ("**", "a/b", True),
        ("a/?.png", "a/b.png", True),
        ("a/[bc].png", "a/c.png", True),
        ("a/[!b].png", "a/b.png", False),
        ("a.png", "aXpng", False),
    ],
)
def test_globs(glob: str, path: str, expected: bool) -> None:
    assert (matches(glob, path) is not None) == expected


def test_source_config_refuses_what_cannot_hold(tmp_path: Path) -> None:
    assert SourceConfig(path=tmp_path / "my data.v2").name == "source"  # a folder's name may identify
    for wrong in (
        {"spacing": (0, 1, 1)},
        {"subject_pattern": "no group"},
        {"modalty": "CT"},
        {"modality": "US"},
        {"field_mm": -1},
        {"labels": {1: "a", 2: "b"}, "label_threshold": 3},
        {"label_glob": "*_mask.png"},
    ):
        with pytest.raises(ValidationError):
            SourceConfig(path=tmp_path, **wrong)  # type: ignore[arg-type]


def test_stem_takes_both_parts_of_nii_gz() -> None:
    assert [stem(Path(p)) for p in ("a.b.nii.gz", "a.NII.GZ", "a.nrrd", "a")] == ["a.b", "a", "a", "a"]


@pytest.mark.real_data
def test_real_sources(real_data: Path) -> None:
    src = SourceConfig(path=real_data / "mr_hippocampus", subjects=real_data / "hippocampus_subjects.csv")
    cases = discover(src)
    assert (detect(src), len(cases), len({c.subject for c in cases})) == ("msd", 200, 133)
    series = discover(SourceConfig(path=real_data / "dicom_sarcoma"))
    assert sorted((c.modality, c.refused.code if c.refused else None) for c in series) == [
        (("CT",), None),
        (("MR",), None),
    ]
    assert [len(c.dicom_labels) for c in series] == [1, 1]
    assert len({c.subject for c in series}) == 1
    removed = discover(SourceConfig(path=real_data / "ct_mr_body/example_ct_dicom"))
    assert [len(c.files or ()) for c in removed] == [20]
    for src in (
        SourceConfig(path=real_data / "dicom_sarcoma"),
        SourceConfig(path=real_data / "hard", layout="dicom"),
    ):
        for case in discover(src):
            try:
                outcome = "" if read_case(case, src) else "no volumes"
            except Quarantined as error:
                outcome = error.detail
            assert os.sep not in outcome
            assert outcome != "no volumes"
