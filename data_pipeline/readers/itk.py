"""NRRD and MetaImage (MHA, MHD), read with SimpleITK. Sources: teem NRRD format page; MetaIO
documentation."""

from __future__ import annotations

import bz2
import math
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

import numpy as np

from data_pipeline.errors import Quarantined
from data_pipeline.locations import Location, head
from data_pipeline.readers.raw import Raw, check_extent, check_size

HEADER_LIMIT = 1 << 20
NRRD = (".nrrd", ".nhdr")
#: Frames of NRRD that say where the patient is; scanner-xyz and the handed ones do not.
PATIENT_SPACES = {
    "right-anterior-superior", "left-anterior-superior", "left-posterior-superior", "ras", "las", "lps",
    "right-anterior-superior-time", "left-anterior-superior-time", "left-posterior-superior-time", "rast",
    "last", "lpst",
}  # fmt: skip
MILLIMETRES = {
    "mm": 1.0, "millimeter": 1.0, "millimeters": 1.0, "millimetre": 1.0, "": 1.0, "um": 1e-3, "µm": 1e-3,
    "micron": 1e-3, "microns": 1e-3, "micrometer": 1e-3, "micrometers": 1e-3, "cm": 10.0, "centimeter": 10.0,
    "m": 1000.0, "meter": 1000.0,
}  # fmt: skip
SHORT = (
    "truncated",
    "could not read",
    "not enough",
    "too short",
    "eof",
    "only read",
    "read only",
    "unexpected end",
    "fread got only",
)
SINGULAR = ("zero-valued spacing", "determinant is 0", "existance of all space vector coefficients")
ELEMENT_BYTES = {
    "MET_SHORT": 2, "MET_USHORT": 2, "MET_INT": 4, "MET_UINT": 4, "MET_LONG": 4, "MET_ULONG": 4,
    "MET_LONG_LONG": 8, "MET_ULONG_LONG": 8, "MET_FLOAT": 4, "MET_DOUBLE": 8,
}  # fmt: skip
#: Where a direction that begins at this side of the patient runs, in LPS.
LETTERS = {
    "R": (1.0, 0, 0), "L": (-1.0, 0, 0), "A": (0, 1.0, 0), "P": (0, -1.0, 0), "I": (0, 0, 1.0),
    "S": (0, 0, -1.0),
}  # fmt: skip


def decode(path: Path, *, accept_no_form: bool = False, label: bool = False) -> Raw:
    """Voxels as stored. Where the header states no spacing, SimpleITK's 1 mm is not taken for one.

    A header that states spacing and no frame of the patient (NRRD without ``space``, MetaImage without a
    matrix or an anatomical orientation) is quarantined as ``no_geometry`` unless ``accept_no_form``. NRRD
    axes of kind ``list`` are frames; vectors and matrices are refused.
    """
    import SimpleITK as sitk

    fields = header_fields(path)
    nrrd = path.name.lower().endswith(NRRD)
    if nrrd and "segment0_id" in fields and not label:
        raise Quarantined("not_an_image", "a segmentation of 3D Slicer")
    if any(not (path.parent / name).exists() for name in data_files(path)):
        raise Quarantined("missing", "the file of voxels that the header names")
    if _leads_elsewhere(_voxel_file(fields)):
        raise Quarantined("missing", "the header names a file of voxels outside its folder")
    _check_stated_size(fields, path)
    try:
        with _readable(path, fields) as readable:
            image = sitk.ReadImage(str(readable))
        array = sitk.GetArrayFromImage(image)
    except MemoryError:
        raise
    except (OSError, ValueError, EOFError) as error:  # bzip2
        raise Quarantined(
            "truncated" if isinstance(error, EOFError) else "unreadable", type(error).__name__
        ) from error
    except Exception as error:  # SimpleITK raises RuntimeError for everything
        text = str(error).lower()
        if any(word in text for word in SINGULAR):
            raise Quarantined("bad_geometry", "spacing or directions that are zero or not finite") from error
        raise Quarantined(
            "truncated" if any(word in text for word in SHORT) else "unreadable", type(error).__name__
        ) from error
    if array.dtype.kind not in "iuf":
        raise Quarantined("unsupported_layout", f"voxels of type {array.dtype}")
    n = image.GetDimension()
    if n not in (2, 3, 4):
        raise Quarantined("unsupported_layout", f"{n} axes")
    frames = _frames(array, image.GetNumberOfComponentsPerPixel(), n, fields)
    affine = np.eye(4)
    k = min(n, 3)
    direction = np.array(image.GetDirection()).reshape(n, n)[:k, :k]
    affine[:k, :k] = direction * np.array(image.GetSpacing())[:k]
    affine[:k, 3] = np.array(image.GetOrigin())[:k]
    if n == 2:
        affine[2, 2] = affine[0, 0] or 1.0
    known = {"space directions", "spacings", "elementspacing", "elementsize"} & fields.keys()
    spacing_known = bool(known) and "nan" not in fields.get("spacings", "").lower()
    if nrrd and "space directions" in fields and fields["space directions"].count("(") < k:
        raise Quarantined("no_spacing", "an axis without a direction")
    provenance = {}
    if spacing_known:
        affine[:3] *= (unit := _millimetres(fields))
        if unit == 1.0:
            check_extent(affine, frames.shape[1:])
        turned = None if nrrd else _by_letters(fields)
        if turned is not None:
            affine[:3, :3] = turned * np.linalg.norm(affine[:3, :3], axis=0)
        elif not _placed(fields, nrrd):
            if not accept_no_form:
                raise Quarantined(
                    "no_geometry", "the header names no patient axes; accept_no_form takes the spacing alone"
                )
            provenance["no_form"] = "true"
            affine = np.diag([*np.linalg.norm(affine[:3, :3], axis=0), 1.0])
    return Raw(frames=frames, affine=affine, spacing_known=spacing_known, provenance=provenance)


def _frames(array: np.ndarray, components: int, axes: int, fields: dict[str, str]) -> np.ndarray:
    """(t, z, y, x) of SimpleITK's ([t,] [z,] y, x[, component])."""
    if components > 1:
        kinds = fields.get("kinds", "").lower().split()
        if "list" in kinds:
            array = np.moveaxis(array, -1, 0)
            return array if axes == 3 else array.reshape(len(array), -1, *array.shape[-2:])
        coloured = array.shape[-1] in (3, 4) and not any("vector" in k or "matrix" in k for k in kinds)
        opaque = array.shape[-1] == 4 and array[..., 3].min() == array[..., 3].max()
        grey = array[..., :3] if opaque else array  # of four components, an even last one is opacity
        if not (coloured and (array[..., :1] == grey).all()):
            code = "colour" if coloured else "unsupported_layout"
            raise Quarantined(code, f"{array.shape[-1]} components per voxel")
        array = array[..., 0]
    if axes == 2:
        array = array[np.newaxis]
    return array if axes == 4 else array[np.newaxis]


def _placed(fields: dict[str, str], nrrd: bool) -> bool:
    """Whether the header says how the axes lie in the patient."""
    if nrrd:
        return fields.get("space", "").lower() in PATIENT_SPACES and "space directions" in fields
    return bool({"transformmatrix", "rotation", "orientation"} & fields.keys())


def _by_letters(fields: dict[str, str]) -> np.ndarray | None:
    """Directions (columns x, y, z) of a MetaImage's AnatomicalOrientation, where it states no matrix: each
    letter is the side that an axis comes from, RAI being L, P, S."""
    if {"transformmatrix", "rotation", "orientation"} & fields.keys():
        return None
    letters = fields.get("anatomicalorientation", "").upper()
    if not re.fullmatch("[RLAPIS]{3}", letters):
        return None
    turned = np.array([LETTERS[letter] for letter in letters]).T
    return turned if abs(np.linalg.det(turned)) == 1.0 else None


def _millimetres(fields: dict[str, str]) -> float:
    stated = re.findall(r'"([^"]*)"', fields.get("space units", fields.get("units", "")))
    stated = stated or [fields["distanceunits"]] if "distanceunits" in fields else stated
    units = {unit.strip().lower() for unit in stated[:3]}
    if len(units) > 1 or not units <= MILLIMETRES.keys():
        raise Quarantined("bad_geometry", "a unit of length that is none of mm, cm, m and micrometre")
    return MILLIMETRES[units.pop()] if units else 1.0


def _check_stated_size(fields: dict[str, str], path: Path) -> None:
    try:
        sizes = [int(v) for v in fields.get("sizes", fields.get("dimsize", "")).split()]
        channels = int(fields.get("elementnumberofchannels", "1"))
    except ValueError:
        return
    if not sizes:
        return
    voxels = math.prod(sizes)
    packed = (
        fields.get("encoding", "raw").lower() != "raw" or "true" in fields.get("compresseddata", "").lower()
    )
    files = data_files(path)
    stored = sum(f.stat().st_size for n in files or [path.name] if (f := path.parent / n).exists())
    whole = bool(files) or not any(name in fields for name in ("data file", "datafile", "elementdatafile"))
    if whole or fields.get("elementdatafile", "").upper() == "LOCAL":
        bzip2 = fields.get("encoding", "").lower() in ("bzip2", "bz2")  # shrinks zeros without any bound
        check_size(voxels, 0 if bzip2 else voxels, stored, 1032 if packed else 1)
    if fields.get("elementdatafile", "").upper() == "LOCAL" and not packed:
        # MetaIO does not say why it cannot read
        expected = voxels * channels * ELEMENT_BYTES.get(fields.get("elementtype", "").upper(), 1)
        line = re.search(rb"ElementDataFile[^\n]*\n", head(path, HEADER_LIMIT), re.IGNORECASE)
        check_size(voxels, expected, stored - (line.end() if line else 0), 1)


@contextmanager
def _readable(path: Path, fields: dict[str, str]) -> Iterator[Path]:
    """The file under a name and in an encoding that SimpleITK takes."""
    bzip2 = path.name.lower().endswith(NRRD) and fields.get("encoding", "").lower() in ("bzip2", "bz2")
    if not bzip2 and _utf8(path):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="medfm-") as folder:
        copy = Path(folder) / f"image{path.suffix.lower()}"
        if bzip2:
            copy = copy.with_suffix(".nrrd")
            copy.write_bytes(_unpacked(path))
        else:
            copy.symlink_to(path.absolute())
            for name in data_files(path):
                (copy.parent / name).parent.mkdir(parents=True, exist_ok=True)
                (copy.parent / name).symlink_to((path.parent / name).absolute())
        yield copy


def _unpacked(path: Path) -> bytes:
    """A NRRD file of encoding bzip2 (SimpleITK's teem is built without it) with its voxels raw."""
    whole = path.read_bytes()
    gap = re.search(rb"\r?\n\r?\n", whole)
    header, packed = (whole[: gap.start()], whole[gap.end() :]) if gap else (whole, b"")
    if files := data_files(path):
        packed = (path.parent / files[0]).read_bytes()
    kept = [
        line
        for line in header.splitlines()
        if line.partition(b":")[0].strip().lower() not in (b"encoding", b"data file", b"datafile")
    ]
    return b"\n".join([*kept, b"encoding: raw", b"", b""]) + bz2.decompress(packed)


def _utf8(path: Path) -> bool:
    try:
        str(path).encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def data_files(path: Location) -> list[str]:
    """Names, relative to the header, of the one file of voxels that a detached header names; none for a list,
    a pattern, or a name that leads out of the header's folder."""
    name = _voxel_file(header_fields(path))
    if not name or name.upper().startswith(("LOCAL", "LIST")) or "%" in name or _leads_elsewhere(name):
        return []
    return [PurePosixPath(name).as_posix()]


def _voxel_file(fields: dict[str, str]) -> str:
    """What the header says of the file of voxels; empty where they follow the header."""
    return fields.get("data file", fields.get("datafile", fields.get("elementdatafile", "")))


def _leads_elsewhere(name: str) -> bool:
    plain = PurePosixPath(name)
    return plain.is_absolute() or ".." in plain.parts


def header_fields(path: Location) -> dict[str, str]:
    """Field names (lower case) and values of a NRRD or MetaImage header."""
    fields = {}
    for line in head(path, HEADER_LIMIT).split(b"\n"):
        text = line.strip().decode("utf-8", "surrogateescape")
        if not text:  # NRRD: the voxels follow an empty line
            break
        key, separator, value = (
            text.partition("=") if "=" in text and ":" not in text.split("=")[0] else text.partition(":")
        )
        if separator:
            fields[key.strip().lower()] = value.lstrip("=").strip()
        if key.strip().lower() == "elementdatafile":
            break
    return fields
