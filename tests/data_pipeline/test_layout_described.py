"""dataset.json of the Decathlon and of nnU-Net as met in the wild; channel names that may identify."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import nibabel
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.channel_words import channel_name, modality_of, sequence_of
from data_pipeline.errors import Quarantined, UserError
from data_pipeline.layouts import Case, discover, read_case
from data_pipeline.sources import SourceConfig


def image(path: Path, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = np.random.default_rng(seed).integers(0, 2, (4, 5, 6)).astype(np.uint8)
    nibabel.save(nibabel.Nifti1Image(data, np.eye(4)), path)
    return path


def describe(folder: Path, **content: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "dataset.json").write_text(json.dumps(content))
    return folder


LABELS = {"background": 0, "liver": 1}


def msd(folder: Path, **content: object) -> list[Case]:
    return discover(
        SourceConfig(path=describe(folder, **{"modality": {"0": "CT"}, "labels": LABELS, **content}))
    )


def test_entries_of_a_decathlon_file(tmp_path: Path) -> None:
    for name in ("a", "b", "c", "d"):
        image(tmp_path / f"imagesTr/{name}.nii.gz")
    image(tmp_path / "labelsTr/a.nii.gz")
    (tmp_path / "imagesTr/._a.nii.gz").write_bytes(b"macOS")
    cases = msd(
        tmp_path,
        training=[{"image": "./imagesTr/a.nii.gz", "label": "labelsTr/a.nii.gz"}, "imagesTr/b.nii.gz"],
        validation=[{"image": str(tmp_path / "imagesTr/c.nii.gz")}],
        test=[{"image": "./imagesTr/d.nii.gz"}],
    )
    assert [(c.name, c.split, c.label is not None) for c in cases] == [
        ("a", None, True),
        ("b", None, False),
        ("c", "val", False),
        ("d", "test", False),
    ]
    gone = msd(tmp_path, training=["imagesTr/gone.nii.gz"])
    with pytest.raises(Quarantined, match="missing"):
        read_case(gone[0], SourceConfig(path=tmp_path))


def test_entries_listed_twice_and_names_of_windows(tmp_path: Path) -> None:
    for name in ("imagesTr/a", "labelsTr/a", "labelsTr/b"):
        image(tmp_path / f"{name}.nii.gz")
    entry = {"image": "./imagesTr/a.nii.gz", "label": "./labelsTr/a.nii.gz"}
    windows = {key: text.replace("/", "\\") for key, text in entry.items()}
    notes: Counter[str] = Counter()
    content = {"modality": {"0": "CT"}, "labels": LABELS, "test": ["imagesTr/a.nii.gz"]}
    src = SourceConfig(path=describe(tmp_path, **content, training=[windows, entry]))
    (case,) = discover(src, notes=notes)
    assert (case.images, case.label) == (
        (tmp_path / "imagesTr/a.nii.gz",),
        tmp_path / "labelsTr/a.nii.gz",
    )
    assert notes == {"entries of a dataset file listed twice": 2}
    with pytest.raises(UserError, match="listed twice with different labels"):
        msd(tmp_path, training=[entry, {**entry, "label": "labelsTr/b.nii.gz"}])


@pytest.mark.parametrize(
    ("content", "error"),
    [
        ({"training": [{"label": "l.nii.gz"}]}, "entry 0 of training names no image"),
        ({"training": [{"image": "a.nii.gz", "label": ["x"]}]}, "does not name one label file"),
        ({"training": {"image": "a"}}, "training is not a list"),
        ({"training": ["a.nii.gz"], "labels": {"a": "b"}}, "labels must map"),
        ({"training": ["a.nii.gz"], "modality": {"x": "CT"}}, "numbered from 0"),
        ({"training": ["a.nii.gz"], "modality": None}, "names no channels"),
    ],
)
def test_mistakes_of_a_decathlon_file(tmp_path: Path, content: dict, error: str) -> None:
    with pytest.raises(UserError, match=error):
        msd(tmp_path, **content)


def test_a_file_without_modality_needs_the_recipes(tmp_path: Path) -> None:
    image(tmp_path / "a.nii.gz")
    describe(tmp_path, training=["a.nii.gz"])
    assert discover(SourceConfig(path=tmp_path, modality="MR"))[0].modality == ("MR",)


@pytest.mark.parametrize("content", ["[1, 2]", "{", "\xff\xfe", "[" * 100_000])
def test_a_dataset_file_that_is_none(tmp_path: Path, content: str) -> None:
    (tmp_path / "dataset.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match=r"dataset\.json"):
        discover(SourceConfig(path=tmp_path))


def nnunet(folder: Path, **content: object) -> SourceConfig:
    stated = {"channel_names": {"0": "T1", "1": "T2 FLAIR"}, "labels": LABELS, "file_ending": ".nii.gz"}
    return SourceConfig(path=describe(folder, **{**stated, **content}))


def test_nnunet_reads_its_file_ending_and_no_macos_twins(tmp_path: Path) -> None:
    for n in range(2):
        image(tmp_path / f"imagesTr/x_{n:04d}.nii.gz")
        image(tmp_path / f"imagesTr/old_{n:04d}.nii")
    (tmp_path / "imagesTr/._x_0000.nii.gz").write_bytes(b"macOS")
    image(tmp_path / "labelsTr/x.nii.gz")
    src = nnunet(tmp_path, overwrite_image_reader_writer="SimpleITKIO", numTraining=1)
    (case,) = discover(src)
    assert (case.name, case.channel_names, case.sequence) == ("x", ("T1", "T2 FLAIR"), "")
    image(tmp_path / "imagesTr/x_0002.nii.gz")
    with pytest.raises(Quarantined, match="3 files for 2 channels"):
        read_case(discover(src)[0], src)


def test_nnunet_counts_what_it_leaves_out(tmp_path: Path) -> None:
    for name in ("x_0000", "x_0001", "y_0000", "y_0001", "z_0001", "plain"):
        image(tmp_path / f"imagesTr/{name}.nii.gz")
    src, notes = nnunet(tmp_path), Counter()
    with pytest.raises(UserError, match="there is none at all"):
        discover(src)
    image(tmp_path / "labelsTr/x.nii.gz")
    image(tmp_path / "labelsTr/other.nii.gz")
    cases = discover(src, notes=notes)
    assert [(case.name, case.label is not None) for case in cases] == [("x", True), ("y", False)]
    assert notes == {
        "files that are no numbered channel of the dataset's file ending": 1,
        "cases without a first channel": 1,
        "labels that fit no image": 1,
        "training images without a label": 1,
    }


def test_nnunet_version_1_and_regions(tmp_path: Path) -> None:
    image(tmp_path / "imagesTr/x_0000.nii.gz")
    image(tmp_path / "labelsTr/x.nii.gz")
    describe(
        tmp_path,
        modality={"0": "CT"},
        labels={"0": "background", "1": "liver", "2": "tumor"},
        training=[{"image": "./imagesTr/x.nii.gz", "label": "./labelsTr/x.nii.gz"}],
    )
    (case,) = discover(SourceConfig(path=tmp_path))
    assert (case.name, case.images[0].name, case.label_regions) == (
        "x",
        "x_0000.nii.gz",
        {"liver": (1,), "tumor": (2,)},
    )
    labels = {"background": 0, "whole liver": [1, 2], "tumor": [2], "ignore": 3}
    describe(tmp_path, channel_names={"0": "CT"}, labels=labels, regions_class_order=[1, 2])
    (case,) = discover(SourceConfig(path=tmp_path))
    assert (case.label_regions, case.ignore) == ({"whole liver": (1, 2), "tumor": (2,)}, frozenset({3}))


def test_nnunet_lists_its_files(tmp_path: Path) -> None:
    a, b, mask = (image(tmp_path / f"raw/{name}.nii.gz") for name in ("a", "b", "m"))
    listed = {"case_1": {"images": [str(a), "raw/b.nii.gz"], "label": "raw/m.nii.gz"}}
    (case,) = discover(nnunet(tmp_path, dataset=listed))
    assert (case.name, case.images, case.label) == ("case_1", (a, b), mask)
    assert len(read_case(case, SourceConfig(path=tmp_path))[0].channels) == 2
    with pytest.raises(UserError, match="entry 0 of dataset"):
        discover(nnunet(tmp_path, dataset={"x": "y"}))


def test_channels_say_their_sequence(tmp_path: Path) -> None:
    image(tmp_path / "imagesTr/x_0000.nii.gz")
    image(tmp_path / "labelsTr/x.nii.gz")
    src = nnunet(tmp_path, channel_names={"0": "T1ce"})
    (volume,) = read_case(discover(src)[0], src)
    assert volume.provenance["sequence"] == "T1w-ce"
    src = SourceConfig(path=tmp_path, sequence="STIR")
    assert read_case(discover(src)[0], src)[0].provenance["sequence"] == "STIR"
    with pytest.raises(ValueError, match="is none of"):
        SourceConfig(path=tmp_path, sequence="sagittal")


def test_words_of_channels() -> None:
    known = {
        "T1": ("MR", "T1w"), "T2 FLAIR": ("MR", "FLAIR"), "t1-gd": ("MR", "T1w-ce"), "b1000": ("MR", "DWI"),
        "CT arterial": ("CT", None), "PET": ("PT", None), "ADC": ("MR", "other"), "X-ray": ("XR", None),
        "CBF": (None, None), "noNorm": (None, None), "0": (None, None), "CT_portal_venous": ("CT", None),
    }  # fmt: skip
    for name, (modality, sequence) in known.items():
        assert (modality_of(name), sequence_of(name), channel_name(name, 4)) == (modality, sequence, name), (
            name
        )
    for name in ("T1 Smith", "19470312", "Dr. Müller CT", "PAT-0042", "T1\nSmith", "", "CT " * 30):
        assert channel_name(name, 4) == "channel_4", name


@given(st.text(max_size=30))
def test_any_other_text_is_numbered(name: str) -> None:
    found = channel_name(name, 2)
    assert found in (name, "channel_2")
    assert found.isascii()
    assert found.isprintable()
