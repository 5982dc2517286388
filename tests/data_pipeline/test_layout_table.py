"""Tables as spreadsheets and scripts write them."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import nibabel
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipeline.errors import Quarantined, UserError
from data_pipeline.layouts import discover, read_case
from data_pipeline.sources import SourceConfig


@pytest.fixture(autouse=True)
def scans(tmp_path: Path) -> None:
    for name in ("a", "b", "c, d"):
        data = np.random.default_rng(0).integers(1, 99, (4, 5, 6)).astype(np.int16)
        nibabel.save(nibabel.Nifti1Image(data, np.eye(4)), tmp_path / f"{name}.nii.gz")


def table(folder: Path, content: str | bytes, suffix: str = ".csv") -> SourceConfig:
    path = folder / f"t{suffix}"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return SourceConfig(path=path, labels={1: "liver"})


def rows(src: SourceConfig) -> list[tuple]:
    return [(c.images[0].name, c.modality, c.subject, c.split) for c in discover(src)]


EXPECTED = [("a.nii.gz", ("MR",), "p1", "train"), ("b.nii.gz", ("CT",), "p2", "test")]
PLAIN = "path,modality,subject,split\na.nii.gz,MR,p1,train\nb.nii.gz,CT,p2,test\n"


@pytest.mark.parametrize(
    "content",
    [
        PLAIN,
        PLAIN.replace(",", ";"),
        PLAIN.replace(",", "\t"),
        PLAIN.replace("\n", "\r\n"),
        "\n\n" + PLAIN.replace("\n", "\n\n,,,\n"),
        PLAIN.encode("utf-16"),
        b"\xef\xbb\xbf" + PLAIN.encode(),
        PLAIN.replace("path", " Image ").replace("subject", "Patient_ID"),
        PLAIN.replace("a.nii.gz", '"a.nii.gz"').replace("train", " train "),
        PLAIN.replace("path", "filename").replace("a.nii.gz", "./a.nii.gz"),
    ],
    ids=[
        "plain",
        "semicolons",
        "tabs",
        "windows",
        "empty lines",
        "utf-16",
        "mark",
        "names",
        "quotes",
        "relative",
    ],
)
@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_forms_of_one_table(tmp_path: Path, content: str | bytes, suffix: str) -> None:
    src = table(tmp_path, content, suffix)
    assert rows(src) == EXPECTED
    assert read_case(discover(src)[0], src)[0].shape == (6, 5, 4)


def test_quoted_commas_and_absolute_paths(tmp_path: Path) -> None:
    src = table(tmp_path, f'path,modality\n"c, d.nii.gz",MR\n{tmp_path}/a.nii.gz,MR\n')
    assert [c.name for c in discover(src)] == ["c, d", "a"]
    for case in discover(src):
        assert read_case(case, src)
    with pytest.raises(UserError, match="row 1 has 3 cells for 2 columns"):
        discover(table(tmp_path, "path,modality\nc, d.nii.gz,MR\n"))


def test_numbers_of_parquet_are_text_without_a_point(tmp_path: Path) -> None:
    columns = {
        "path": ["a.nii.gz", "b.nii.gz"],
        "subject": [7.0, None],
        "modality": ["MR", "MR"],
        "label": [None, None],
    }
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    assert rows(SourceConfig(path=tmp_path / "t.parquet")) == [
        ("a.nii.gz", ("MR",), "7", None),
        ("b.nii.gz", ("MR",), "b", None),
    ]


def test_rows_listed_twice_and_columns_not_used_are_counted(tmp_path: Path) -> None:
    src = table(
        tmp_path, "path,modality,age,doctor\na.nii.gz,MR,41,X\na.nii.gz,MR,42,Y\n,MR,1,Z\nb.nii.gz,MR,3,X\n"
    )
    notes: Counter[str] = Counter()
    assert len(discover(src, notes=notes)) == 2
    assert notes == {
        "columns of a table not used": 2,
        "rows of a table listed twice": 1,
        "rows of a table without an image": 1,
    }
    for column in ("subject", "split", "label"):
        content = f"path,modality,{column}\na.nii.gz,MR,x\na.nii.gz,MR,y\n"
        with pytest.raises(UserError, match=f"listed twice with different {column}"):
            discover(table(tmp_path, content))


@pytest.mark.parametrize(
    ("content", "error"),
    [
        ("pth,modality\na.nii.gz,MR\n", "'pth': did you mean 'path'"),
        ("path,modalty\na.nii.gz,MR\n", "'modalty': did you mean 'modality'"),
        ("path,lable\na.nii.gz,\n", "'lable': did you mean 'label'"),
        ("scan,thing\na.nii.gz,MR\n", "no column image or path; columns: scan, thing"),
        ("path,image\na.nii.gz,a.nii.gz\n", "two columns mean 'image'"),
        ("path\na.nii.gz\n", "add a column modality"),
        ("path,modality\na.nii.gz,MR;CT\n", "2 modalities for the 1 files"),
        ("path,modality,sequence\na.nii.gz,MR,weird\n", "'weird' is none of"),
        ("path,modality\na.nii.gz,MR\nb.nii.gz,spaghetti\n", "modality 'spaghetti' is not known"),
        ("path,modality\nnone://x/a.nii.gz,MR\n", "no file system for addresses none://"),
        ('path,modality\n"a.nii.gz,MR\n', "cannot be read"),
        ("", "no column image"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, content: str, error: str) -> None:
    with pytest.raises(UserError, match=error) as found:
        discover(table(tmp_path, content))
    assert "\n" not in str(found.value)


def test_a_file_that_is_not_there_is_one_quarantined_row(tmp_path: Path) -> None:
    src = table(tmp_path, "path,modality\na.nii.gz,MR\ngone.nii.gz,MR\n")
    cases = discover(src)
    assert read_case(cases[0], src)
    with pytest.raises(Quarantined, match="missing"):
        read_case(cases[1], src)


def test_one_name_in_two_folders(tmp_path: Path) -> None:
    for day in ("one", "two"):
        (tmp_path / day).mkdir()
        (tmp_path / day / "a.nii.gz").write_bytes((tmp_path / "a.nii.gz").read_bytes())
    content = "path,subject\none/a.nii.gz,p\ntwo/a.nii.gz,p\n"
    (tmp_path / "t.csv").write_text(content)
    src = SourceConfig(
        path=tmp_path / "t.csv", modality={"one/*": "MR", "two/*": "CT"}, splits={"two/**": "test"}
    )
    assert [(c.modality, c.subject, c.split) for c in discover(src)] == [
        (("MR",), "p", None),
        (("CT",), "p", "test"),
    ]


def test_sequences_of_a_column(tmp_path: Path) -> None:
    src = table(tmp_path, "path,modality,sequence\na.nii.gz,MR,FLAIR\nb.nii.gz,MR,t1 post contrast\n")
    assert [c.sequence for c in discover(src)] == ["FLAIR", "T1w-ce"]
    assert read_case(discover(src)[0], src)[0].provenance["sequence"] == "FLAIR"


def test_channels_by_columns(tmp_path: Path) -> None:
    src = table(tmp_path, "image_t1,image_smith,modality\na.nii.gz,b.nii.gz,MR\n")
    (case,) = discover(src)
    assert case.channel_names == ("t1", "channel_1")
    src = table(tmp_path, "image_t1,image_ct\na.nii.gz,b.nii.gz\n")
    assert discover(src)[0].modality == ("MR", "CT")


def test_relative_paths_of_windows(tmp_path: Path) -> None:
    (tmp_path / "scans").mkdir()
    for name in ("scans/a.nii.gz", "back\\slash.nii.gz"):
        shutil.copy(tmp_path / "a.nii.gz", tmp_path / name)
    src = table(tmp_path, "path,modality,label\nscans\\a.nii.gz,MR,scans\\a.nii.gz\nback\\slash.nii.gz,MR,\n")
    first, second = discover(src)
    assert (first.images, first.label) == ((tmp_path / "scans/a.nii.gz",), tmp_path / "scans/a.nii.gz")
    assert read_case(second, src)[0].shape == (6, 5, 4)
