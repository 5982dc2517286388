"""DICOM trees: headers, series whatever the folders, and the labels that refer to them."""

from __future__ import annotations

import pickle
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pydicom
import pytest
from dicom_files import ORIGIN, dataset, series_of
from dicom_label_files import contour, headers, images, rtstruct, seg
from pydicom.dataset import FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian

from data_pipeline.errors import Quarantined
from data_pipeline.layouts import Case, discover, read_case
from data_pipeline.privacy import KeyedHash
from data_pipeline.readers.dicom_kinds import refusal
from data_pipeline.readers.dicom_series import Header, scan_headers, series_in
from data_pipeline.sources import SourceConfig

SQUARE = np.array([[2.5, 1.5], [2.5, 6.5], [8.5, 6.5], [8.5, 1.5]])
PIXELS = np.arange(12, dtype=np.uint16).reshape(3, 4)


def above(k: int) -> np.ndarray:
    return ORIGIN + np.array([0, 0, k])


def tree(folder: Path, **stated: object) -> tuple[list[Case], Counter[str]]:
    notes: Counter[str] = Counter()
    src = SourceConfig(path=folder, layout="dicom", **stated)
    return discover(src, hashes=KeyedHash(b"k" * 32), notes=notes), notes


def codes(cases: list[Case]) -> list[str | None]:
    return [case.refused.code if case.refused else None for case in cases]


def save(path: Path, ds: pydicom.Dataset) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    ds.save_as(path, enforce_file_format=True)
    return path


def test_series_go_by_uid_whatever_folders_and_names(tmp_path: Path) -> None:
    for k in range(6):
        ds = dataset(PIXELS, above(k), "1.2.7", k + 1)
        save(tmp_path / f"disk{k % 3}" / "PAT" / f"IM{k:05d}", ds)
        ds = dataset(PIXELS, above(k), "1.2.8", k + 1, PatientID="MRN-4712")
        save(tmp_path / f"disk{k % 2}" / "PAT" / f"{k}.dcm", ds)
    cases, notes = tree(tmp_path)
    assert {(case.series, len(case.files or ()), case.subject) for case in cases} == {
        ("1.2.7", 6, "MRN-4711"),
        ("1.2.8", 6, "MRN-4712"),
    }
    assert codes(cases) == [None, None]
    assert not notes


def test_patients_are_subjects_and_studies_where_there_is_no_patient(tmp_path: Path) -> None:
    for n, (patient, study) in enumerate(
        (("A", "1.1"), ("A ", "1.2"), ("", "1.3"), ("", "1.3"), ("B", "1.3"))
    ):
        ds = dataset(PIXELS, ORIGIN, f"1.5.{n}", PatientID=patient, StudyInstanceUID=study)
        save(tmp_path / f"{n}.dcm", ds)
    assert Counter(case.subject for case in tree(tmp_path)[0]) == {"A": 2, "1.3": 2, "B": 1}


def test_files_stored_twice_count_once_and_one_uid_of_two_slices_does_not_lose_one(tmp_path: Path) -> None:
    first, second = (dataset(PIXELS, above(k), "1.2.7", k + 1) for k in range(2))
    save(tmp_path / "a" / "1.dcm", first)
    shutil.copytree(tmp_path / "a", tmp_path / "copy")
    second.SOPInstanceUID = first.SOPInstanceUID
    save(tmp_path / "a" / "2.dcm", second)
    (case,), notes = tree(tmp_path)
    assert case.files == (tmp_path / "a" / "1.dcm", tmp_path / "a" / "2.dcm")
    assert notes == {"files stored twice": 1}


def test_what_is_no_dicom_is_counted_and_what_cannot_be_read_is_refused_alone(tmp_path: Path) -> None:
    save(tmp_path / "1.dcm", dataset(PIXELS, ORIGIN, "1.2.7"))
    bare = save(tmp_path / "IM0001", dataset(PIXELS, ORIGIN, "1.2.8"))
    bare.write_bytes(
        bare.read_bytes()[bare.read_bytes().index(b"\x08\x00\x08\x00") :]
    )  # neither preamble nor suffix
    directory = dataset(PIXELS, ORIGIN, "1.2.9")
    directory.SOPClassUID = directory.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.1.3.10"
    save(tmp_path / "INDEX.dcm", directory)
    (tmp_path / "DICOMDIR").write_bytes((tmp_path / "1.dcm").read_bytes())
    (tmp_path / "bad.dcm").write_bytes(b"\0" * 128 + b"DICM" + b"nonsense")
    (tmp_path / "cut.dcm").write_bytes((tmp_path / "1.dcm").read_bytes()[:140])
    for name in ("a.nii.gz", "b.txt", "c.doejane", "d"):
        (tmp_path / name).write_text("Jane Doe " * 40)
    cases, notes = tree(tmp_path)
    assert Counter(codes(cases)) == {None: 2, "unreadable": 2}
    assert {case.series for case in cases if case.refused is None} == {"1.2.7", "1.2.8"}
    assert notes == {
        "DICOMDIR files": 1,
        "files that are no DICOM: .gz": 1,
        "files that are no DICOM: .txt": 1,
        "files that are no DICOM: other": 2,
        "files that are no DICOM: .dcm": 1,
    }


def test_objects_that_are_no_images_leave_with_their_code_also_from_within_a_series(tmp_path: Path) -> None:
    for k in range(3):
        save(tmp_path / f"{k}.dcm", dataset(PIXELS, above(k), "1.2.7", k + 1))
    scout = dataset(PIXELS, ORIGIN, "1.2.7", 9, ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    save(tmp_path / "scout.dcm", scout)
    for n, (modality, sop_class) in enumerate(
        (("SR", "88.11"), ("RTDOSE", "481.2"), ("RTPLAN", "481.5"), ("PR", "11.1"))
    ):
        ds = dataset(
            PIXELS, ORIGIN, f"1.9.{n}", Modality=modality, SOPClassUID=f"1.2.840.10008.5.1.4.1.1.{sop_class}"
        )
        save(tmp_path / f"{modality}.dcm", ds)
    cases, _ = tree(tmp_path)
    assert Counter(codes(cases)) == {None: 1, "localizer": 1, "not_an_image": 4}
    (image,) = (case for case in cases if case.refused is None)
    assert len(image.files or ()) == 3


def test_radiographs_of_one_series_are_cases_of_their_own(tmp_path: Path) -> None:
    series_of(tmp_path, np.zeros((3, 4, 5), np.uint16), Modality="DX")
    cases, _ = tree(tmp_path)
    assert [(len(case.files or ()), case.modality) for case in cases] == [(1, ("XR",))] * 3


def test_headers_may_be_read_by_others_in_batches(tmp_path: Path) -> None:
    for k in range(300):
        (tmp_path / f"{k:03d}.dcm").write_bytes(b"")
    save(tmp_path / "300.dcm", dataset(PIXELS, ORIGIN, "1.2.7"))
    sizes = []

    def each(function, arguments):  # as processes would: everything is pickled
        sizes.extend(len(paths) for (paths,) in arguments)
        function, arguments = pickle.loads(pickle.dumps((function, arguments)))
        return pickle.loads(pickle.dumps([function(*one) for one in arguments]))

    src = SourceConfig(path=tmp_path, layout="dicom")
    spread, plain = discover(src, each=each), discover(src)
    assert sizes == [256, 45]
    assert [(c.images, c.files, c.subject, c.refused and c.refused.code) for c in spread] == [
        (c.images, c.files, c.subject, c.refused and c.refused.code) for c in plain
    ]
    assert Counter(codes(plain)) == {None: 1, "unreadable": 300}


def test_the_short_header_is_judged_like_the_whole_one(tmp_path: Path) -> None:
    kinds = {
        "phase": {"Modality": "MR", "ComplexImageComponent": "PHASE"},
        "mip": {"ImageType": ["DERIVED", "PRIMARY", "MIP"]},
        "capture": {"SOPClassUID": "1.2.840.10008.5.1.4.1.1.7"},
        "fine": {},
    }
    for name, tags in kinds.items():
        save(tmp_path / f"{name}.dcm", dataset(PIXELS, ORIGIN, "1.2.7", **tags))
    ge = dataset(PIXELS, ORIGIN, "1.2.8", Modality="MR", Manufacturer="GE MEDICAL SYSTEMS")
    block = ge.private_block(0x0043, "GEMS_PARM_01", create=True)
    block.add_new(0x2F, "SS", 2)
    save(tmp_path / "ge.dcm", ge)
    found = {h.path.stem: h.code for h in scan_headers(tuple(sorted(tmp_path.iterdir())))}
    whole = {p.stem: refusal(pydicom.dcmread(p)) for p in tmp_path.iterdir()}
    assert found == whole
    assert found == {
        "phase": "phase_image",
        "mip": "projection",
        "capture": "secondary_capture",
        "fine": None,
        "ge": "phase_image",
    }


@pytest.mark.real_data
def test_real_headers_are_judged_like_whole_ones(real_data: Path) -> None:
    files = [p for p in sorted((real_data / "hard").rglob("*")) if p.is_file()]
    scanned = [h for h in scan_headers(tuple(files)) if h.bad is None]
    assert len(scanned) > 60
    for header in scanned:
        whole = pydicom.dcmread(str(header.path), force=True, stop_before_pixels=True)
        assert header.code == refusal(whole), header.path
        assert header.series == str(whole.get("SeriesInstanceUID", "") or "")


def test_one_uid_of_several_patients_or_studies_is_several_series() -> None:
    def header(n: int, patient: str, study: str) -> Header:
        return Header(Path(f"/x/{n}"), "1.2", study, patient, f"1.4.{n // 2}", f"1.4.{n // 2}")

    found, twice = series_in(header(n, patient, "1.3") for n, patient in enumerate(["A", "B", "B", "A", ""]))
    assert [(s.patient, len(s.files)) for s in found] == [("A", 3), ("B", 2)]
    assert twice == 0
    found, twice = series_in(
        header(n, "A", study) for n, study in enumerate(["1.3", "1.4", "1.4", "1.3", ""])
    )
    assert [(s.study, len(s.files)) for s in found] == [("1.3", 3), ("1.4", 2)]


def test_series_of_one_uid_never_mix_and_their_labels_go_by_patient(tmp_path: Path) -> None:
    stacks = np.random.default_rng(0).integers(0, 2000, (3, 5, 12, 10)).astype(np.uint16)
    for n, (patient, study) in enumerate((("A", "1.1"), ("A", "1.2"), ("B", "1.3"))):
        own = {"PatientID": patient, "StudyInstanceUID": study, "FrameOfReferenceUID": "1.7"}
        series_of(tmp_path / str(n), stacks[n], uid="1.2.9", **own)
    label = rtstruct(
        tmp_path / "RS.dcm", headers(tmp_path / "2"), {"Liver": [contour(SQUARE, 2)]}, frame="1.7"
    )
    ds = pydicom.dcmread(label)
    ds.PatientID = "B"
    save(label, ds)
    cases, notes = tree(tmp_path)
    assert not notes
    assert [(c.subject, len(c.files or ()), len(c.dicom_labels)) for c in cases] == [
        ("A", 5, 0),
        ("A", 5, 0),
        ("B", 5, 1),
    ]
    for case, stack in zip(cases, stacks):
        (volume,) = read_case(case, SourceConfig(path=tmp_path))
        assert sorted(volume.voxels.ravel()) == sorted(stack.ravel())


def test_every_case_of_a_tree_has_a_name_of_its_own(tmp_path: Path) -> None:
    """A build refuses an input that is listed twice; parts of one series are not."""
    stack = np.arange(60, dtype=np.uint16).reshape(5, 3, 4)
    for part in ("M", "P"):
        kind = ["ORIGINAL", "PRIMARY", part]
        series_of(tmp_path / part, stack, uid="1.2.9", Modality="MR", ImageType=kind)
    for study in ("1.1", "1.2"):
        series_of(tmp_path / study, stack, uid="1.2.8", StudyInstanceUID=study)
    cases, _ = tree(tmp_path)
    assert sorted(map(str, codes(cases))) == ["None", "None", "None", "phase_image"]
    assert len({(case.subject, case.series) for case in cases}) == 4


def test_series_without_uid_go_by_folder_and_number(tmp_path: Path) -> None:
    for n in (1, 2):
        for k in range(4):
            ds = dataset(PIXELS, above(k) + n / 3, "1.2", k + 1, SeriesInstanceUID=None, SeriesNumber=n)
            save(tmp_path / f"{n}{k}.dcm", ds)
    cases, _ = tree(tmp_path)
    assert [len(case.files or ()) for case in cases] == [4, 4]


def test_one_file_without_preamble_and_suffix_is_read(tmp_path: Path) -> None:
    ds = dataset(PIXELS, ORIGIN, "1.2.9")
    del ds.file_meta
    pydicom.dcmwrite(tmp_path / "IM0001", ds, implicit_vr=True, little_endian=True)
    (case,), _ = tree(tmp_path)
    (volume,) = read_case(case, SourceConfig(path=tmp_path))
    np.testing.assert_array_equal(np.sort(volume.voxels.ravel()), PIXELS.ravel())


@pytest.mark.parametrize(
    ("refer", "joined"),
    [
        (("series", "images", "frame"), True),
        (("series", "frame"), True),
        (("images", "frame"), True),
        (("frame",), True),  # one series alone in its frame of reference
        ((), False),
    ],
)
def test_structure_sets_join_by_their_references(
    tmp_path: Path, refer: tuple[str, ...], joined: bool
) -> None:
    source = headers(images(tmp_path / "a" / "ct"))
    rtstruct(tmp_path / "b" / "c" / "rs.dcm", source, {"liver": [contour(SQUARE, 2)]}, refer=refer)
    cases, _ = tree(tmp_path)
    assert codes(cases) == ([None] if joined else [None, "label_no_image"])
    assert [label.kind for label in cases[0].dicom_labels] == ["rtstruct"] * joined


def test_two_series_of_one_frame_of_reference_are_not_confused(tmp_path: Path) -> None:
    ct, other = headers(images(tmp_path / "ct")), headers(images(tmp_path / "pet"))
    square = {"liver": [contour(SQUARE, 2)]}
    rtstruct(tmp_path / "ct" / "on the other.dcm", other, square)
    rtstruct(tmp_path / "pet" / "on ct.dcm", ct, {"spleen": square["liver"]})
    rtstruct(tmp_path / "of either.dcm", ct, {"kidney": square["liver"]}, refer=("frame",))
    cases, _ = tree(tmp_path)
    labels = {
        case.series: [list(label.regions) for label in case.dicom_labels]
        for case in cases
        if not case.refused
    }
    assert labels == {ct[0].SeriesInstanceUID: [["spleen"]], other[0].SeriesInstanceUID: [["liver"]]}
    assert codes(cases)[2:] == ["label_no_image"]


def test_labels_whose_images_are_not_here_are_refused_by_name(tmp_path: Path) -> None:
    images(tmp_path / "in" / "ct")
    away = headers(images(tmp_path / "away", FrameOfReferenceUID="1.2.99"))
    rtstruct(tmp_path / "in" / "rs.dcm", away, {"Jane Doe": [contour(SQUARE, 2)]}, frame="1.2.99")
    seg(tmp_path / "in" / "seg.dcm", away, np.ones((5, 12, 10), np.uint8), ("Jane Doe",))
    cases, _ = tree(tmp_path / "in")
    assert codes(cases) == [None, "label_no_image", "label_no_image"]
    for case in cases[1:]:
        assert isinstance(case.refused, Quarantined)
        assert case.refused.detail == "1 structures"
        assert case.subject == "MRN-4711"


def test_another_frame_of_reference_is_another_place(tmp_path: Path) -> None:
    source = headers(images(tmp_path / "ct"))
    rtstruct(tmp_path / "rs.dcm", source, {"liver": [contour(SQUARE, 2)]}, frame="1.2.99")
    cases, _ = tree(tmp_path)
    assert codes(cases) == [None, "label_frame"]
    assert cases[0].dicom_labels == ()


def test_names_that_are_not_allowed_are_hashed_or_mapped_and_spellings_join(tmp_path: Path) -> None:
    source = headers(images(tmp_path / "ct"))
    square = [contour(SQUARE, 2)]
    rois = {"GTV Doe": square, "Left Lung": square, "LEFT_LUNG": square, "spleen": square}
    rtstruct(tmp_path / "rs.dcm", source, rois)
    (case,), _ = tree(tmp_path, label_names={"spleen": "Milz"})
    regions = case.dicom_labels[0].regions
    assert list(regions)[1:] == ["left_lung", "Milz"]
    assert regions["left_lung"] == (2, 3)
    assert next(iter(regions)).startswith("roi_")


def test_a_label_stored_twice_is_one_annotator(tmp_path: Path) -> None:
    source = headers(images(tmp_path / "ct"))
    path = rtstruct(tmp_path / "rs.dcm", source, {"liver": [contour(SQUARE, 2)]})
    shutil.copy(path, tmp_path / "copy.dcm")
    seg(tmp_path / "z.dcm", source, np.ones((5, 12, 10), np.uint8), ("liver",))
    (case,), _ = tree(tmp_path)
    assert [(label.kind, label.annotator) for label in case.dicom_labels] == [("rtstruct", 0), ("seg", 1)]


def test_a_structure_set_is_scanned_without_its_file_meta(tmp_path: Path) -> None:
    source = headers(images(tmp_path / "ct"))
    path = rtstruct(tmp_path / "rs.dcm", source, {"liver": [contour(SQUARE, 2)]})
    ds = pydicom.dcmread(path)
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    pydicom.dcmwrite(path, ds, enforce_file_format=False, implicit_vr=False, little_endian=True)
    (header,) = scan_headers((path,))
    assert header.references is not None
    assert [s.name for s in header.references.structures] == ["liver"]
