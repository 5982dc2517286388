"""BIDS: what is an image, what its sequence is, which label is whose, and what never leaves the dataset."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import nibabel
import numpy as np
import pytest

from data_pipeline.channel_words import SEQUENCES as CHANNEL_SEQUENCES
from data_pipeline.errors import UserError
from data_pipeline.labels import read_label
from data_pipeline.layout_bids import SUFFIXES, name_of
from data_pipeline.layout_folder import detect
from data_pipeline.layouts import discover, read_case
from data_pipeline.privacy import KeyedHash
from data_pipeline.sequences import SEQUENCES
from data_pipeline.sources import SourceConfig


def image(path: Path, shift: float = 0.0, mask: bool = False, frames: int = 1) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (4, 5, 6) if frames == 1 else (4, 5, 6, frames)
    data = np.random.default_rng(0).integers(0, 3 if mask else 99, shape).astype(np.int16)
    affine = np.eye(4)
    affine[0, 3] = shift
    nibabel.save(nibabel.Nifti1Image(data, affine), path)
    return path


def describe(root: Path, **tables: object) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    (root / "dataset_description.json").write_text(
        json.dumps({"Name": "SecretStudy", "BIDSVersion": "1.9.0"})
    )
    (root / "participants.tsv").write_text("participant_id\tname\nsub-01\tSmith\n")
    for name, content in tables.items():
        (root / name).write_text(json.dumps(content))
    return root


def by_name(root: Path, **options) -> dict[str, object]:
    cases = discover(SourceConfig(path=root, **options))
    return {case.images[0].name.split(".")[0]: case for case in cases}


def test_images_by_suffix_and_what_is_left_out_by_name(tmp_path: Path) -> None:
    describe(tmp_path)
    for suffix, folder in {
        "T1w": "anat", "T2w": "anat", "FLAIR": "anat", "PDw": "anat", "T2starw": "anat", "inplaneT2": "anat",
        "dwi": "dwi", "task-rest_bold": "func", "pet": "pet", "ct": "ct", "angio": "anat",
        # left out:
        "part-phase_T2w": "anat", "task-rest_sbref": "func", "T1map": "anat", "mod-T1w_defacemask": "anat",
        "phasediff": "fmap", "magnitude1": "fmap", "dir-AP_epi": "fmap", "strange": "anat",
    }.items():  # fmt: skip
        image(tmp_path / f"sub-01/ses-A/{folder}/sub-01_ses-A_{suffix}.nii.gz")
    image(tmp_path / "sub-02/anat/sub-02_ce-gadolinium_T1w.nii")
    image(tmp_path / "sourcedata/sub-01/anat/sub-01_T1w.nii.gz")
    image(tmp_path / "sub-02/anat/not a bids name.nii.gz")
    (tmp_path / "sub-01/ses-A/dwi/sub-01_ses-A_dwi.bval").write_text("0 1000")
    assert detect(SourceConfig(path=tmp_path)) == "bids"
    cases = by_name(tmp_path)
    read = {n: (c.modality, c.sequence) for n, c in cases.items() if c.refused is None}  # type: ignore[attr-defined]
    assert read == {
        "sub-01_ses-A_T1w": (("MR",), "T1w"),
        "sub-01_ses-A_T2w": (("MR",), "T2w"),
        "sub-01_ses-A_FLAIR": (("MR",), "FLAIR"),
        "sub-01_ses-A_PDw": (("MR",), "PDw"),
        "sub-01_ses-A_T2starw": (("MR",), "T2star"),
        "sub-01_ses-A_inplaneT2": (("MR",), "T2w"),
        "sub-01_ses-A_dwi": (("MR",), "DWI"),
        "sub-01_ses-A_task-rest_bold": (("MR",), "BOLD"),
        "sub-01_ses-A_angio": (("MR",), "MRA"),
        "sub-01_ses-A_pet": (("PT",), ""),
        "sub-01_ses-A_ct": (("CT",), ""),
        "sub-02_ce-gadolinium_T1w": (("MR",), "T1w-ce"),
    }
    refused = Counter(c.refused.code for c in cases.values() if c.refused)  # type: ignore[attr-defined]
    assert refused == {"phase_image": 2, "derived_map": 1, "left_out": 5}
    assert {c.subject for c in cases.values()} == {"sub-01", "sub-02"}  # type: ignore[attr-defined]
    volume = read_case(cases["sub-01_ses-A_FLAIR"], SourceConfig(path=tmp_path))[0]  # type: ignore[arg-type]
    assert volume.provenance["sequence"] == "FLAIR"


def test_sequences_are_of_the_closed_list() -> None:
    assert {sequence for _, sequence in SUFFIXES.values()} - {""} <= set(SEQUENCES)
    assert set(CHANNEL_SEQUENCES) <= set(SEQUENCES)


def test_sidecars_are_inherited_and_in_seconds(tmp_path: Path) -> None:
    common = {"RepetitionTime": 9.0, "EchoTime": 0.1, "ScanningSequence": "SE"}
    describe(tmp_path, **{"GRE.json": common})
    image(tmp_path / "sub-01/anat/sub-01_GRE.nii.gz")
    image(tmp_path / "sub-01/anat/sub-01_run-2_GRE.nii.gz")
    image(tmp_path / "sub-02/anat/sub-02_GRE.nii.gz")
    image(tmp_path / "sub-02/anat/sub-02_T1w.nii.gz")
    (tmp_path / "sub-01/sub-01_GRE.json").write_text(json.dumps({"InversionTime": 2.5}))
    near = {"RepetitionTime": 0.5, "EchoTime": 0.01, "InversionTime": None}
    (tmp_path / "sub-01/anat/sub-01_run-2_GRE.json").write_text(json.dumps(near))
    (tmp_path / "sub-02/anat/sub-02_T1w.json").write_text('{"ContrastBolusIngredient": "GADOLINIUM"}')
    found = {n: c.sequence for n, c in by_name(tmp_path).items()}  # type: ignore[attr-defined]
    assert found == {
        "sub-01_GRE": "FLAIR",
        "sub-01_run-2_GRE": "T1w",
        "sub-02_GRE": "T2w",
        "sub-02_T1w": "T1w-ce",
    }


@pytest.mark.parametrize("content", ["{bad", "[1, 2]", "\ufffd"])
def test_one_damaged_sidecar_does_not_end_the_build(tmp_path: Path, content: str) -> None:
    describe(tmp_path)
    image(tmp_path / "sub-01/anat/sub-01_T1w.nii.gz")
    (tmp_path / "sub-01/anat/sub-01_T1w.json").write_text(content)
    notes: Counter[str] = Counter()
    (case,) = discover(SourceConfig(path=tmp_path), notes=notes)
    assert case.sequence == "T1w"
    assert notes == {"sidecars that cannot be read": 1}


def test_labels_of_derivatives_join_by_entities(tmp_path: Path) -> None:
    describe(tmp_path)
    for session in ("A", "B"):
        image(tmp_path / f"sub-01/ses-{session}/anat/sub-01_ses-{session}_T1w.nii.gz")
    image(tmp_path / "sub-01/ses-A/anat/sub-01_ses-A_T2w.nii.gz", shift=9)
    below = tmp_path / "derivatives/seg/sub-01"
    image(below / "ses-A/anat/sub-01_ses-A_dseg.nii.gz", mask=True)
    image(below / "ses-A/anat/sub-01_ses-A_space-MNI152_dseg.nii.gz", mask=True)
    image(below / "ses-B/anat/sub-01_ses-B_space-T1w_label-liver_mask.nii.gz", mask=True)
    image(below / "ses-B/anat/sub-01_ses-B_desc-preproc_T1w.nii.gz")
    image(tmp_path / "derivatives/seg/sub-09/anat/sub-09_dseg.nii.gz", mask=True)
    (tmp_path / "derivatives/seg/dseg.tsv").write_text("index\tname\n0\tBackground\n1\tliver\n2\tspleen\n")
    src = SourceConfig(path=tmp_path)
    notes: Counter[str] = Counter()
    cases = {c.images[0].name: c for c in discover(src, notes=notes)}
    first = cases["sub-01_ses-A_T1w.nii.gz"]
    assert first.label is not None
    assert first.label.name == "sub-01_ses-A_dseg.nii.gz"
    assert first.label_regions == {"liver": (1,), "spleen": (2,)}
    assert first.annotated == ("liver", "spleen")
    assert cases["sub-01_ses-A_T2w.nii.gz"].label is None  # another grid
    second = cases["sub-01_ses-B_T1w.nii.gz"]
    assert second.label_regions == {"liver": (1,)}
    label = read_label(first.label, read_case(first, src)[0], regions=first.label_regions)
    assert label.classes == (1, 2)
    assert notes == {
        "labels in another space than their image": 1,
        "labels that fit no image": 1,
        "files of derivatives that are no label": 1,
    }


def test_a_label_on_one_grid_with_several_images_is_that_of_all(tmp_path: Path) -> None:
    describe(tmp_path)
    for suffix, shift in (("T1w", 0), ("T2w", 0), ("FLAIR", 3)):
        image(tmp_path / f"sub-01/anat/sub-01_{suffix}.nii.gz", shift=shift)
    image(tmp_path / "derivatives/x/sub-01/anat/sub-01_dseg.nii.gz", mask=True)
    sidecar = tmp_path / "derivatives/x/sub-01/anat/sub-01_dseg.json"
    sidecar.write_text(json.dumps({"LabelMap": {"1": "liver", "2": "spleen"}}))
    cases = by_name(tmp_path)
    labelled = {name for name, case in cases.items() if case.label is not None}  # type: ignore[attr-defined]
    assert labelled == {"sub-01_T1w", "sub-01_T2w"}
    image(tmp_path / "derivatives/y/sub-01/anat/sub-01_desc-liver_mask.nii.gz", mask=True)
    with pytest.raises(UserError, match="two labels fit"):
        discover(SourceConfig(path=tmp_path))
    assert by_name(tmp_path, exclude=("derivatives/y/**",)).keys() == cases.keys()


def test_names_that_may_identify_are_hashed_or_asked_for(tmp_path: Path) -> None:
    describe(tmp_path)
    image(tmp_path / "sub-01/anat/sub-01_T1w.nii.gz")
    image(tmp_path / "derivatives/x/sub-01/anat/sub-01_dseg.nii.gz", mask=True)
    (tmp_path / "derivatives/x/dseg.tsv").write_text("index\tname\n1\tliver\n2\tMrs Watermelon\n")
    with pytest.raises(UserError, match="label_names"):
        discover(SourceConfig(path=tmp_path))
    (case,) = discover(SourceConfig(path=tmp_path), hashes=KeyedHash(bytes(32)))
    names = list(case.label_regions or ())
    assert names[0] == "liver"
    assert names[1].startswith("roi_")
    mapped = SourceConfig(path=tmp_path, label_names={"Mrs Watermelon": "spleen"})
    assert list(discover(mapped)[0].label_regions or ()) == ["liver", "spleen"]
    (tmp_path / "derivatives/x/dseg.tsv").unlink()
    with pytest.raises(UserError, match="no names"):
        discover(SourceConfig(path=tmp_path))


def test_file_names() -> None:
    name = name_of("sub-01_ses-1_acq-mprage_T1w.nii.gz")
    assert name is not None
    assert (name.entities, name.suffix, name.ending) == (
        {"sub": "01", "ses": "1", "acq": "mprage"},
        "T1w",
        ".nii.gz",
    )
    assert name_of("T1w.json") is not None
    assert name_of("sub-01_T1w copy.nii.gz") is None
    assert name_of("Smith_John.nii") is None
