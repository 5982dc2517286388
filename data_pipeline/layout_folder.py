"""A plain folder of images, several kinds beside each other, and which layout a folder has."""

from __future__ import annotations

import re
from collections.abc import Callable

from data_pipeline.errors import UserError, shown
from data_pipeline.layout_described import read_json
from data_pipeline.layouts import Case, Discovery, label_for, stem
from data_pipeline.locations import TABLES, Location, files_below, relative
from data_pipeline.readers import DICOM, is_image
from data_pipeline.sources import SourceConfig
from data_pipeline.tar_members import is_archive

HEADERS = (".hdr", ".mhd", ".nhdr")  # beside which a file of voxels lies
#: Kinds of files beside images, by which they are counted; any other suffix may identify.
BESIDE = {
    ".json", ".csv", ".tsv", ".txt", ".md", ".xml", ".html", ".pdf", ".doc", ".docx", ".xls", ".xlsx",
    ".yaml", ".yml", ".bval", ".bvec", ".mat", ".zip", ".gz", ".tar", ".tgz", ".7z", ".rar", ".py",
    ".ipynb", ".log", ".db", ".npy", ".h5", ".hdf5", ".pkl", ".pt", ".pth", ".parquet", ".exe", ".ini",
    ".raw", ".zraw", ".img", ".bmp", ".gif", ".svg", ".webp", ".mgz", ".mgh", ".minc", ".mnc", ".vtk",
    ".vti", ".stl", ".obj", ".ply", ".gii", ".sh",
}  # fmt: skip


def detect(src: SourceConfig) -> str:
    """The layout of ``src.path``."""
    if src.path.is_file():
        if is_archive(src.path):
            return "webdataset"
        if src.path.suffix.lower() in TABLES:
            return "table"
        return "dicom" if claims_dicom(src.path) else "folder"
    if (src.path / "dataset_description.json").is_file():
        return "bids"
    if (src.path / "dataset.json").is_file():
        described = read_json(src.path / "dataset.json")
        images = src.path / "imagesTr"
        numbered = images.is_dir() and any(re.search(r"_0000\.", p.name) for p in images.iterdir())
        if "channel_names" in described or numbered or isinstance(described.get("dataset"), dict):
            return "nnunet"
        if "training" in described:
            return "msd"
    files = image_files(src)
    if any(is_image(path) and not path.name.lower().endswith(DICOM) for path in files):
        return "folder"
    if any(claims_dicom(path) for path in files):
        return "dicom"
    return "webdataset" if any(is_archive(path) for path in files_below(src.path)) else "folder"


def folder(find: Discovery) -> list[Case]:
    """Every image file below the folder that include and exclude leave, and every DICOM series among them;
    labels by ``label_glob``. Other files are counted by their suffix."""
    src = find.src
    unlisted: list[None] = []
    files = image_files(src, lambda: unlisted.append(None))
    label_of = {path: label_for(src, relative(path, src.path)) for path in files if is_image(path)}
    labels = {label for path, label in label_of.items() if label != path}  # npz may hold both
    cases: list[Case] = []
    dicom = False
    for path in files:
        if path in labels:
            continue
        if claims_dicom(path):
            dicom = True
            continue
        if not is_image(path):
            if not any(path.with_suffix(header) in label_of for header in HEADERS):
                suffix = path.suffix.lower()
                find.count(f"files that are no image: {suffix if suffix in BESIDE else 'other'}")
            continue
        rel = relative(path, src.path)
        modality = src.modality_of(rel)
        if modality is None:
            hint = "state modality: CT, MR, XR or PT, or modality: {glob: CT, ...} where they differ"
            raise UserError(
                f"{shown(path)}: source {src.name!r} does not say what kind of image this is; {hint}"
            )
        cases.append(Case(src.name, (path,), label_of[path], "", None, (modality,), name=stem(path)))
    if not dicom:
        find.count("folders that cannot be listed", len(unlisted))
        return cases
    from data_pipeline.layout_dicom import dicom_tree  # counts those folders too

    return cases + dicom_tree(find, count_others=False)


def image_files(src: SourceConfig, unreadable: Callable[[], None] = lambda: None) -> list[Location]:
    """Every file of a source that its include and exclude leave, sorted."""
    return [p for p in files_below(src.path, unreadable) if src.selects(relative(p, src.path))]


def claims_dicom(path: Location) -> bool:
    """Whether a file says that it is DICOM; files of other known kinds are not opened."""
    from data_pipeline.readers import dicom_series

    if is_image(path) and not path.name.lower().endswith(DICOM):
        return False
    return path.suffix.lower() not in BESIDE and dicom_series.claims_dicom(path)
