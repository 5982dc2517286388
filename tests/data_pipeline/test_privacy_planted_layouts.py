"""Nothing planted in the descriptions, tables and names of a dataset's files is in any byte of a build of it.

MSD and nnU-Net `dataset.json`, BIDS participants, sidecars, folder names and label tables, CSV and Parquet
(as values, column names and file metadata), folders with subjects tables, npz, label and channel names.
One build with a worker, run as a user runs it.
"""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from planted import (
    ADDRESS,
    DATE,
    FAMILY,
    GIVEN,
    HOSPITAL,
    JAPANESE,
    LATIN,
    MAIL,
    NAME,
    NUMBER,
    PATIENT,
    REPOSITORY,
    SENTENCE,
    Built,
    finds,
    leaks,
    run_build,
)
from scan_files import phantom, write_nifti

from data_pipeline.errors import UserError
from data_pipeline.layouts import discover
from data_pipeline.sources import SourceConfig

PEOPLE = (f"{FAMILY}_{GIVEN}", f"{PATIENT}-{DATE}-{LATIN}".replace(" ", "_"), f"{GIVEN}{NUMBER}{JAPANESE}")
DESCRIBED = {
    "name": NAME, "description": SENTENCE, "reference": f"{HOSPITAL}, {ADDRESS}", "licence": f"ask {MAIL}",
    "license": SENTENCE, "release": DATE, "author": NAME, "tensorImageSize": "3D", "contact": MAIL,
    PATIENT: NAME,
}  # fmt: skip


def image(path: Path, seed: int) -> np.ndarray:
    array = phantom(seed)
    write_nifti(path, array, (0.9, 0.9, 1.5))
    return array


def mask(path: Path, array: np.ndarray) -> None:
    label = (array > 0).astype(np.uint8)
    label[:9] *= 2
    write_nifti(path, label, (0.9, 0.9, 1.5))


def msd(root: Path) -> dict[str, Any]:
    entries = []
    for n, who in enumerate(PEOPLE):
        mask(root / "labelsTr" / f"{who}.nii.gz", image(root / "imagesTr" / f"{who}.nii.gz", n))
        entries.append(
            {"image": f"./imagesTr/{who}.nii.gz", "label": f"./labelsTr/{who}.nii.gz", "who": NAME}
        )
    labels = {"0": "background", "1": f"tumour of {FAMILY}", "2": f"{PATIENT}"}
    about = {**DESCRIBED, "modality": {"0": "CT"}, "labels": labels, "training": entries, "test": []}
    (root / "dataset.json").write_text(json.dumps(about, ensure_ascii=False))
    return {"layout": "msd"}


def nnunet(root: Path) -> dict[str, Any]:
    for n, who in enumerate(PEOPLE):
        array = image(root / "imagesTr" / f"{who}_0000.nii.gz", 20 + n)
        image(root / "imagesTr" / f"{who}_0001.nii.gz", 40 + n)
        mask(root / "labelsTr" / f"{who}.nii.gz", array)
    about = {
        **DESCRIBED,
        "channel_names": {"0": f"T1 {GIVEN}", "1": f"{FAMILY} {DATE}"},
        "labels": {"background": 0, f"{LATIN}": 1, f"{FAMILY} {ADDRESS}": 2},
        "numTraining": len(PEOPLE),
        "file_ending": ".nii.gz",
    }
    (root / "dataset.json").write_text(json.dumps(about))
    return {"layout": "nnunet", "modality": "MR"}


def bids(root: Path) -> dict[str, Any]:
    (root / "dataset_description.json").parent.mkdir(parents=True, exist_ok=True)
    description = {"Name": SENTENCE, "BIDSVersion": "1.9.0", "Authors": [NAME], "HowToAcknowledge": MAIL}
    (root / "dataset_description.json").write_text(json.dumps(description))
    (root / "README").write_text(SENTENCE)
    tables = {"participants.tsv": ["participant_id", "sex", "birth", NAME.replace("^", "_")]}
    for name, head in tables.items():
        rows = [head] + [[f"sub-{GIVEN}{n}", "F", DATE, SENTENCE] for n in range(3)]
        (root / name).write_text("\n".join("\t".join(row) for row in rows))
    (root / "participants.json").write_text(json.dumps({"birth": {"Description": SENTENCE}}))
    for n in range(3):
        subject, session = f"sub-{GIVEN}{n}", f"ses-{DATE}"
        stem = f"{subject}_{session}_acq-{FAMILY}_run-1"
        folder = root / subject / session
        array = image(folder / "anat" / f"{stem}_T1w.nii.gz", 60 + n)
        sidecar = {
            "RepetitionTime": 2.3, "EchoTime": 0.003, "Manufacturer": SENTENCE, "InstitutionName": HOSPITAL,
            "InstitutionAddress": ADDRESS, "PatientName": NAME, "PatientID": PATIENT, "AcquisitionTime": DATE,
            "SeriesDescription": SENTENCE, "DeviceSerialNumber": PATIENT, "ProtocolName": LATIN,
            "Units": NAME,
            "SequenceName": FAMILY, "ScanningSequence": FAMILY, "ConversionSoftware": {"nested": [SENTENCE]},
        }  # fmt: skip
        (folder / "anat" / f"{stem}_T1w.json").write_text(json.dumps(sidecar, ensure_ascii=False))
        scans = [["filename", "acq_time"], [f"anat/{stem}_T1w.nii.gz", f"{DATE}T10:00:00"]]
        (folder / f"{subject}_{session}_scans.tsv").write_text("\n".join("\t".join(row) for row in scans))
        derived = root / "derivatives" / HOSPITAL / subject / session / "anat"
        mask(derived / f"{stem}_dseg.nii.gz", array)
    names = f"index\tname\tabbreviation\n1\t{FAMILY}\t{GIVEN}\n2\tliver of {GIVEN}\tX\n"
    (root / "derivatives" / HOSPITAL / "dseg.tsv").write_text(names)
    (root / "dseg.tsv").write_text(names)
    return {"layout": "bids"}


def table(root: Path) -> dict[str, Any]:
    head = ["image", "label", "modality", "subject", "split", "PatientName", FAMILY, f"birth {DATE}", LATIN]
    rows = []
    for n, who in enumerate(PEOPLE):
        mask(root / HOSPITAL / f"{who}_seg.nii.gz", image(root / HOSPITAL / f"{who}.nii.gz", 80 + n))
        files = [f"{HOSPITAL}/{who}.nii.gz", f"{HOSPITAL}/{who}_seg.nii.gz"]
        rows.append([*files, "CT", f"{NAME} {n}", "train", NAME, PATIENT, DATE, SENTENCE])
    with (root / "table.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([head, *rows])
    return {"path": "table.csv", "labels": {1: "bone", 2: "marrow"}}


def parquet(root: Path) -> dict[str, Any]:
    columns: dict[str, list[str]] = {
        f"image_{FAMILY}": [],
        f"image_{GIVEN}_{DATE}": [],
        "subject": [],
        NAME: [],
    }
    for n, who in enumerate(PEOPLE):
        for m, column in enumerate(list(columns)[:2]):
            image(root / f"{who}_{m}.nii.gz", 100 + 10 * m + n)
            columns[column].append(f"{who}_{m}.nii.gz")
        columns["subject"].append(f"{PATIENT} {n}")
        columns[NAME].append(SENTENCE)
    data = pa.table(columns).replace_schema_metadata({"patient": NAME, FAMILY: SENTENCE})
    pq.write_table(data, root / f"{FAMILY}.parquet")
    return {"path": f"{FAMILY}.parquet", "modality": "MR"}


def folder(root: Path) -> dict[str, Any]:
    with (root.parent / f"{HOSPITAL}-groups.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["case", "group", "born"])
        for n, who in enumerate(PEOPLE):
            place = root / f"{HOSPITAL} {DATE}" / f"ward {FAMILY}"
            mask(place / f"{who}_label.nii.gz", image(place / f"{who}_ct.nii.gz", 130 + n))
            writer.writerow([f"{who}_ct", f"{NAME}{n}", DATE])
    return {
        "include": ["**/*_ct.nii.gz"], "label_glob": "**/*_label.nii.gz", "modality": "CT",
        "labels": {1: "bone", 2: "marrow"}, "subjects": str(root.parent / f"{HOSPITAL}-groups.csv"),
    }  # fmt: skip


def arrays(root: Path) -> dict[str, Any]:
    for n, who in enumerate(PEOPLE):
        texts = {
            "patient": np.array(NAME),
            FAMILY: np.array([DATE, SENTENCE]),
            "comment": np.array(SENTENCE.encode()),
        }
        volume = phantom(160 + n).T
        np.savez(root / f"{who}.npz", image=volume, spacing=np.array([1.5, 0.9, 0.9]), **texts)
    return {"layout": "folder", "modality": "CT"}


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Built:
    root = tmp_path_factory.mktemp("in") / f"{HOSPITAL} {NAME}"
    sources = []
    for make in (msd, nnunet, bids, table, parquet, folder, arrays):
        place = root / f"{make.__name__}-{FAMILY}-{DATE}"
        place.mkdir(parents=True)
        stated = make(place)
        path = str(place / stated.pop("path", "."))
        sources.append({"path": path, "name": make.__name__, "label_origin": "human", **stated})
    return run_build({"sources": sources}, tmp_path_factory.mktemp("out"))


def test_the_build_reads_every_layout(planted: Built) -> None:
    assert planted.code == 0, planted.printed.decode()
    counts = Counter(str(row["source"]) for row in planted.manifest())
    many = dict.fromkeys(("msd", "nnunet", "table", "parquet", "folder", "arrays"), len(PEOPLE))
    assert counts == {**many, "bids": 3}
    assert planted.quarantine() == []
    labelled = Counter(str(row["source"]) for row in planted.manifest() if row["classes"])
    assert labelled == dict.fromkeys(("msd", "nnunet", "table", "folder"), len(PEOPLE)) | {"bids": 3}


def test_nothing_planted_is_in_the_dataset(planted: Built) -> None:
    assert leaks(planted.out) == []


def test_nothing_planted_is_printed(planted: Built) -> None:
    assert finds(planted.printed) == []


def test_names_that_identify_become_hashes_and_numbers(planted: Built) -> None:
    rows = planted.manifest()
    classes = {str(name) for row in rows for name in row["annotated"]}  # type: ignore[attr-defined]
    assert {"bone", "marrow"} < classes
    assert all(name in ("bone", "marrow") or re.fullmatch(r"roi_[0-9a-f]{12}", name) for name in classes)
    channels = {str(name) for row in rows for name in row["channels"]}  # type: ignore[attr-defined]
    assert channels <= {"CT", "MR", "channel_0", "channel_1"}


def test_the_private_folder_is_its_owner_s_alone(planted: Built) -> None:
    """And it is where the way back is: every planted path, by the hashes that the dataset knows."""
    for path in [planted.private, *planted.private.rglob("*")]:
        assert path.stat().st_mode & 0o077 == 0, path
    index = planted.index()
    assert {row["key"] for row in planted.manifest()} <= {key for e in index for key in e["keys"]}  # type: ignore[attr-defined]
    assert all(finds(str(entry["paths"]).encode()) for entry in index)


def test_a_mistake_met_by_a_worker_is_one_line(tmp_path: Path) -> None:
    """No traceback, no arguments of a task: one line with the path, the fault and the remedy."""
    place = tmp_path / "in"
    image(place / "a.nii.gz", 1)
    (place / "t.csv").write_text(f"image,modality,subject\na.nii.gz,XYZ,{NAME}\n")
    built = run_build({"sources": [{"path": str(place / "t.csv"), "name": "s"}]}, tmp_path / "out")
    lines = [line for line in built.printed.decode().splitlines() if not line.endswith(" ...")]
    assert built.code == 2
    assert len(lines) == 1, lines
    assert lines[0].startswith("medfm: error")
    assert finds(built.printed) == []
    assert not built.out.exists()


def test_what_is_shown_of_it_names_nobody(planted: Built, tmp_path: Path) -> None:
    """`inspect` of every sample, its picture, `verify` and `order`: hashes only."""
    program = "import sys; from launch.cli import main; sys.exit(main())"
    keys = [str(row["key"]) for row in planted.manifest()][:3]
    calls = [["inspect", str(planted.out), "--key", k, "--picture", str(tmp_path / f"{k}.png")] for k in keys]
    calls += [["verify", str(planted.out)], ["order", str(planted.out), "--updates", "1"]]
    for call in calls[:1] + calls[-2:]:
        done = subprocess.run(
            [sys.executable, "-c", program, "shards", *call],
            cwd=REPOSITORY, capture_output=True, timeout=120, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr.decode()
        assert finds(done.stdout + done.stderr) == [], call
    for picture in tmp_path.glob("*.png"):
        from planted import inside

        assert not [
            what for place, data in inside(picture.name, picture.read_bytes()) for what in finds(data)
        ]


def test_a_split_of_a_table_s_own_words_is_refused(tmp_path: Path) -> None:
    """Split names stand in file names: a table's may be train, val, test or one that the recipe states."""
    image(tmp_path / "a.nii.gz", 1)
    (tmp_path / "t.csv").write_text(f"image,modality,split\na.nii.gz,CT,{FAMILY}\n")
    with pytest.raises(UserError, match="is none of test, train, val"):
        discover(SourceConfig(path=tmp_path / "t.csv"))
    stated = SourceConfig(path=tmp_path / "t.csv", split={FAMILY: 0.5, "train": 0.5})
    assert discover(stated)[0].split == FAMILY


def test_a_source_is_not_called_by_its_folder(tmp_path: Path) -> None:
    assert FAMILY not in SourceConfig(path=tmp_path / FAMILY).name
