"""Nothing planted in NIfTI, NRRD, MetaImage and picture files is in any byte of the dataset or printed.

Every text field, extension, comment and tag, names of files and folders, bytes between and behind the parts,
and files made to fail. One build with a worker, run as a user runs it.
"""

from __future__ import annotations

import gzip
import io
import struct
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from nibabel.nifti1 import Nifti1Extension
from PIL import Image, PngImagePlugin, TiffImagePlugin
from planted import (
    ADDRESS,
    DATE,
    DAY,
    FAMILY,
    GIVEN,
    HOSPITAL,
    LATIN,
    NAME,
    NUMBER,
    PATIENT,
    SENTENCE,
    TIME,
    Built,
    everything,
    finds,
    leaks,
    run_build,
)

SPACING = (0.9, 0.8, 2.0)  # x, y, z
FOLDER = Path(f"{HOSPITAL} {DATE}") / f"{FAMILY}, {GIVEN}"
#: What a damaged file may be called in a dataset, and nothing else.
DAMAGED = {
    "unreadable", "truncated", "unsupported_layout", "unsupported_format", "no_pixel_data", "missing",
    "bad_geometry", "no_geometry", "constant", "no_valid_voxels", "no_spacing", "sheared", "colour",
}  # fmt: skip


def scan(seed: int, shape: tuple[int, ...] = (20, 18, 9)) -> np.ndarray:
    """(x, y, z) int16 with some structure."""
    array = np.random.default_rng(seed).integers(-50, 900, shape).astype(np.int16)
    array[:3] = 0
    return array


def names(suffix: str) -> Iterator[Path]:
    """File names that identify, in one folder that does."""
    for number in range(1000):
        yield FOLDER / f"{PATIENT}_{FAMILY}-{GIVEN}_{DATE}_{number}{suffix}"


def nifti(array: np.ndarray, number: int, kind: type = nib.Nifti1Image, order: str = "<") -> bytes:
    """A single-file NIfTI whose every free field, extension and gap is planted."""
    affine = np.diag([*SPACING, 1.0])
    base = kind(array, affine)
    header = base.header_class.from_header(base.header, check=False)
    header = header.as_byteswapped(order)
    text = SENTENCE.encode()
    for field in ("descrip", "aux_file", "intent_name", "data_type", "db_name"):
        if field in header.keys():  # noqa: SIM118  (a header is no mapping)
            header[field] = (NAME if number % 2 else SENTENCE).encode()[: header[field].dtype.itemsize]
    for field, value in (
        ("cal_max", DAY), ("cal_min", NUMBER), ("toffset", DAY), ("slice_duration", DAY), ("intent_p1", DAY),
        ("intent_p2", NUMBER), ("intent_p3", DAY), ("glmax", DAY), ("glmin", NUMBER), ("extents", DAY),
        ("session_error", 17),
    ):  # fmt: skip
        if field in header.keys():  # noqa: SIM118
            header[field] = value
    header.set_sform(affine, 1)
    header.set_xyzt_units("mm")
    image = kind(array, affine, header)
    for code in (0, 2, 4, 6, 22, 44):
        body = f"{SENTENCE} {NAME}".encode("utf-16-le" if code == 44 else "utf-8")
        image.header.extensions.append(Nifti1Extension(code, body))
    file = io.BytesIO()
    holder = kind.make_file_map({"image": file, "header": file})
    image.to_file_map(holder)
    return file.getvalue() + text


def gzipped(data: bytes) -> bytes:
    """gzip with a file name and a comment in its header, as gzip and pigz write them."""
    body = zlib.compressobj(6, zlib.DEFLATED, -zlib.MAX_WBITS)
    head = b"\x1f\x8b\x08\x18" + struct.pack("<I", DAY) + b"\x00\x03" + f"{NAME}.nii".encode() + b"\0"
    tail = struct.pack("<II", zlib.crc32(data), len(data) & 0xFFFFFFFF)
    return head + SENTENCE.encode() + b"\0" + body.compress(data) + body.flush() + tail


def write_nifti(root: Path) -> None:
    name = names(".nii")
    for number, (kind, order) in enumerate(
        [(nib.Nifti1Image, "<"), (nib.Nifti1Image, ">"), (nib.Nifti2Image, "<")]
    ):
        put(root / next(name), nifti(scan(number), number, kind, order))
    put(root / next(names(".nii.gz")), gzipped(nifti(scan(3), 3)))


def write_itk(root: Path) -> None:
    array = np.ascontiguousarray(scan(10).T)
    for number, suffix in enumerate((".nrrd", ".mha", ".mhd", ".nhdr")):
        image = sitk.GetImageFromArray(array + np.int16(number))
        image.SetSpacing(SPACING)
        for key, value in (
            ("PatientName", NAME), (FAMILY, GIVEN), ("ITK_InputFilterName", HOSPITAL), ("0010|0010", NAME),
            ("Comment", SENTENCE), ("content", SENTENCE), (PATIENT, DATE), ("AcquisitionDate", DATE),
        ):  # fmt: skip
            image.SetMetaData(key, value)
        path = root / FOLDER / f"{PATIENT}_{FAMILY}{number}{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        sitk.WriteImage(image, str(path))
    raw = (array + 5).astype("<i2").tobytes()
    fields = (
        f"NRRD0005\n# {SENTENCE}\n# {ADDRESS}\ncontent: {NAME}\ntype: int16\ndimension: 3\n"
        f"space: left-posterior-superior\nsizes: 20 18 9\nspace directions: (0.9,0,0) (0,0.8,0) (0,0,2)\n"
        f"space origin: (0,0,0)\nendian: little\nencoding: raw\nsample units: {FAMILY}\n"
        f'space units: "mm" "mm" "mm"\nlabels: "{NAME}" "{DATE}" "{PATIENT}"\n'
        f"PatientName:={NAME}\n{FAMILY}:={DATE}\nLatin:={LATIN}\n\n"
    )
    put(root / FOLDER / f"{NAME}.nrrd", fields.encode("latin-1") + raw + SENTENCE.encode())
    raw = (array + 6).astype("<i2").tobytes()
    fields = (
        f"ObjectType = Image\nNDims = 3\nComment = {SENTENCE}\nObjectSubType = {FAMILY}\nName = {NAME}\n"
        f"ID = {NUMBER}\nAcquisitionDate = {DATE}\nAnatomicalOrientation = {GIVEN}\nDimSize = 20 18 9\n"
        f"ElementSpacing = 0.9 0.8 2\nOffset = 0 0 0\nTransformMatrix = 1 0 0 0 1 0 0 0 1\n"
        f"BinaryDataByteOrderMSB = False\nElementMin = {NUMBER}\nElementMax = {DAY}\n"
        f"Patient_{FAMILY} = {ADDRESS}\n"
        f"ElementType = MET_SHORT\nElementDataFile = LOCAL\n"
    )
    put(root / FOLDER / f"{NAME}.mha", fields.encode() + raw + SENTENCE.encode())


def exif() -> Image.Exif:
    found = Image.Exif()
    for tag in (0x010E, 0x013B, 0x8298, 0x013C, 0x9C9B, 0x9C9D, 0x9286, 0x927C, 0xA420, 0xA430, 0xFDE8):
        found[tag] = SENTENCE
    found[0x0132] = "1947:12:31 23:59:47"
    found.get_ifd(0x8825)[29] = "1947:12:31"
    return found


def write_pictures(root: Path) -> None:
    grey = np.random.default_rng(3).integers(0, 255, (30, 26), dtype=np.uint8)
    place = root / FOLDER
    place.mkdir(parents=True, exist_ok=True)
    text = PngImagePlugin.PngInfo()
    for number, key in enumerate(("Author", "Comment", "Patient", FAMILY)):
        text.add_text(key, SENTENCE, zip=bool(number % 2))
        text.add_itxt(f"i{key}", f"{LATIN} {NAME}", lang="en", tkey=FAMILY, zip=bool(number % 2))
    text.add(b"prVt", SENTENCE.encode())
    png = place / f"{NAME}_{DATE}.png"
    Image.fromarray(grey).save(
        png, pnginfo=text, exif=exif(), icc_profile=SENTENCE.encode(), dpi=(DAY % 9999, 72)
    )
    put(png, png.read_bytes() + SENTENCE.encode())
    deep = (grey.astype(np.uint16) << 4) | 5
    Image.fromarray(deep).save(place / f"{PATIENT}.png", pnginfo=text)
    for number, suffix in enumerate((".jpg", ".jpeg")):
        jpeg = place / f"{FAMILY}{number}{suffix}"
        Image.fromarray(grey + number + 1).save(
            jpeg, exif=exif(), comment=SENTENCE.encode(), xmp=f"<x>{SENTENCE}</x>".encode(), quality=95
        )
        data = jpeg.read_bytes()
        iptc = b"Photoshop 3.0\x008BIM\x04\x04\0\0" + SENTENCE.encode()
        put(
            jpeg,
            data[:2] + b"\xff\xed" + struct.pack(">H", len(iptc) + 2) + iptc + data[2:] + SENTENCE.encode(),
        )
    for number, compression in enumerate((None, "tiff_lzw", "tiff_deflate")):
        tags = TiffImagePlugin.ImageFileDirectory_v2()
        for tag in (269, 270, 271, 272, 285, 305, 315, 316, 33432, 65000, 65001):
            tags[tag] = SENTENCE
            tags.tagtype[tag] = 2
        tags[306] = "1947:12:31 23:59:47"
        Image.fromarray(deep + number + 1).save(
            place / f"{GIVEN}{number}.tif", tiffinfo=tags, compression=compression, description=NAME
        )


def put(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def damaged(whole: Path, root: Path) -> None:
    """Every file of `whole` cut in three places, overwritten by text, with a text in its header."""
    for path in sorted(p for p in whole.rglob("*") if p.is_file()):
        data = path.read_bytes()
        place = root / path.parent.relative_to(whole)
        if path.suffix in (".raw", ".zraw"):
            continue
        packed = path.suffix in (".gz", ".png", ".jpg", ".jpeg")  # elsewhere the text would be voxels
        versions = {
            "cut20": data[: len(data) // 5],
            "cut60": data[: len(data) * 3 // 5],
            "cut98": data[: len(data) * 49 // 50],
            "text": SENTENCE.encode() * 20,
            "magic": data[:8] + SENTENCE.encode() * 20,
            "middle": data[:40] + SENTENCE.encode() + data[40 + len(SENTENCE) :],
            "late": data[: len(data) // 2] + SENTENCE.encode() + data[len(data) // 2 + len(SENTENCE) :],
            "empty": b"",
        }
        for kind, content in versions.items():
            if kind == "late" and not packed:
                continue
            put(place / f"{kind}-{path.name}", content)


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Built:
    root = tmp_path_factory.mktemp("in") / HOSPITAL
    write_nifti(root / "volumes")
    write_itk(root / "volumes")
    write_pictures(root / "pictures")
    damaged(root / "volumes", root / "bad-volumes")
    damaged(root / "pictures", root / "bad-pictures")
    common = {"layout": "folder", "burned_in": "accept", "field_mm": 300.0}
    sources = [
        {
            "path": str(root / part),
            "name": f"s{n}",
            "modality": "XR" if "pictures" in part else "MR",
            **common,
        }
        for n, part in enumerate(("volumes", "pictures", "bad-volumes", "bad-pictures"))
    ]
    return run_build({"sources": sources}, tmp_path_factory.mktemp("out"))


def test_the_files_are_full_of_finds(tmp_path: Path) -> None:
    write_nifti(tmp_path)
    write_itk(tmp_path)
    write_pictures(tmp_path)
    for path in (p for p in tmp_path.rglob("*") if p.is_file() and p.suffix not in (".raw", ".gz")):
        assert len(finds(path.read_bytes())) > 2, path
    packed = next(tmp_path.rglob("*.gz")).read_bytes()
    assert len(finds(packed)) > 1
    assert len(finds(gzip.decompress(packed))) > 8


def test_the_build_reads_what_it_should(planted: Built) -> None:
    assert planted.code == 0, planted.printed.decode()
    by_source = Counter(str(row["source"]) for row in planted.manifest())
    assert by_source["s0"] == 10  # 4 NIfTI, 3 NRRD, 3 MetaImage
    assert by_source["s1"] == 7  # 2 PNG, 2 JPEG, 3 TIFF
    codes = Counter(entry["code"] for entry in planted.quarantine())
    assert codes["truncated"] > 5
    assert codes["unreadable"] > 5
    assert set(codes) <= DAMAGED


def test_nothing_planted_is_in_the_dataset(planted: Built) -> None:
    assert leaks(planted.out) == []


def test_nothing_planted_is_printed(planted: Built) -> None:
    assert finds(planted.printed) == []


def test_every_kind_of_place_was_searched(planted: Built) -> None:
    """Members of shards, decompressed frames, Parquet rows and pages, pictures of the report, files."""
    places = [place for place, _ in everything(planted.out)]
    for ending in (
        ".b2nd",
        ".b2nd voxels",
        ".b2nd metadata",
        ".idx",
        ".json values",
        "rows",
        "column",
        " pixels",
    ):
        assert any(place.endswith(ending) for place in places), ending
    for name in ("report.html", "dataset.json", "quarantine.jsonl", "manifest.parquet"):
        assert name in places
    assert TIME not in "".join(places)
