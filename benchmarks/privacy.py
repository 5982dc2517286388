"""What defacing and text masking find, miss and cost: shares, on scans with known faces, brains and text.

Prints a table, then one JSON object.

Text: words, dates and side markers in four DejaVu fonts are drawn into the shared chest X-rays, bright or
dark, at several strengths and sizes, most near the border, and at four times the size with noise. A
character is missed if less than 80 % of its ink is masked; a line leaks if a character of it is missed.
Thresholds were chosen on the 41 training pictures, so the 15 test pictures are shown apart. Cost is counted
on the pictures as they are, most of which hold one side marker.

Faces: none of the shared heads has its face (they are skull-stripped, or cut off below the eyes), which is
checked: the mask must be None for all of them and for every other scan. The face and the brain labels are
therefore measured on the shared labelled brains inside a made-up head (launch/head_phantom.py) at several
turns and grids, and on the head of the package `pydeface` with its own mask where that package is
installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
from PIL import Image
from scipy import ndimage

from data_pipeline.burned_in import text_mask
from data_pipeline.deface import face_mask
from data_pipeline.errors import Quarantined
from data_pipeline.readers import read
from data_pipeline.volume import Channel, Volume
from launch.head_phantom import Head, head
from launch.planted_text import Planted, plant

DATA = Path(os.environ.get("MEDFM_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))
BANDS = ((0.5, "contrast 0.5 and more"), (0.25, "contrast 0.25 to 0.5"), (0.15, "contrast 0.15 to 0.25"))
TURNS = ((0, 0, 0), (15, 0, 0), (-15, 0, 0), (0, 8, 0), (0, 0, 10))


def radiograph(plane: np.ndarray) -> Volume:
    return Volume.on_grid(plane[None, None], (Channel("XR", "XR", "arbitrary"),), np.eye(4))


def pictures(folder: Path, side: int) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
    """(picture in 0..1, lung mask or None); larger than stored: interpolated, with noise."""
    for number, path in enumerate(sorted((folder / "images").glob("*.png"))):
        image, lung = Image.open(path).convert("L"), folder / "mask" / path.name
        plane = np.asarray(image.resize((side, side), Image.Resampling.BICUBIC)) / 255.0
        if side != image.width:
            plane = np.clip(plane + np.random.default_rng(number).normal(0, 0.01, plane.shape), 0, 1)
        mask = None
        if lung.is_file():
            mask = (
                np.asarray(Image.open(lung).convert("L").resize((side, side), Image.Resampling.NEAREST))
                >= 128
            )
        yield plane, mask


def measure_text(folder: Path, side: int, most: int) -> dict[str, Any]:
    found: list[tuple[float, int, int]] = []
    cost, lungs = [], []
    for number, (plane, lung) in enumerate(pictures(folder, side)):
        if number >= most:
            break
        clean = text_mask(radiograph(plane))[0]
        cost.append(clean.mean())
        if lung is not None:
            lungs.append((clean & lung).sum() / lung.sum())
        generator = np.random.default_rng(number)
        taken = np.zeros(plane.shape, bool)
        lines: list[Planted] = []
        sizes = (8, 24) if side < 512 else (12, 64)
        for _ in range(3):
            plane, planted = plant(plane, generator, sizes, taken)
            lines += [planted] if planted is not None else []
        mask = text_mask(radiograph(plane))[0]
        for line in lines:
            missed = sum(float(mask[line.box][ink].mean()) < 0.8 for ink in line.characters)
            found.append((line.contrast, len(line.characters), missed))
    result: dict[str, Any] = {
        "pictures": len(cost),
        "masked": float(np.mean(cost)),
        "lung_lost": float(np.mean(lungs)) if lungs else None,
        "lung_lost_worst": float(np.max(lungs)) if lungs else None,
        **_missed(found),
    }
    above = 2.0
    for low, name in BANDS:
        result[name] = _missed([line for line in found if low <= line[0] < above])
        above = low
    return result


def _missed(lines: list[tuple[float, int, int]]) -> dict[str, Any]:
    characters = sum(n for _, n, _ in lines)
    return {
        "characters": characters,
        "lines": len(lines),
        "characters_missed": sum(m for *_, m in lines) / max(characters, 1),
        "lines_leaking": sum(m > 0 for *_, m in lines) / max(len(lines), 1),
        "lines_wholly_missed": sum(m == n for _, n, m in lines) / max(len(lines), 1),
    }


def brains() -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """(name, brain labels as bool, image) in L, P, S order, 1 mm."""
    folder = DATA / "mr_brain_mni152"
    parts = [
        read(folder / f"mni_icbm152_{what}_tal_nlin_sym_09a_converted.nii.gz", modality="MR").voxels[0]
        for what in ("gm", "wm", "t1")
    ]
    yield "MNI152", parts[0].astype(int) + parts[1] > 127, parts[2]
    with np.load(DATA / "mr_brain_voxelmorph" / "test_scan.npz") as file:
        # Stored left to right reversed, head to foot, back to front.
        image, labels = (file[name].transpose(1, 2, 0)[::-1, ::-1] for name in ("vol", "seg"))
    yield "voxelmorph", (labels > 0) & (labels != 24), image


def volume_of(phantom: Head, modality: str, thick: int) -> tuple[Volume, np.ndarray, np.ndarray]:
    """The phantom as a scan whose slices are `thick` voxels, and its brain and face on that grid."""
    units = "HU" if modality == "CT" else "arbitrary"
    values = ndimage.uniform_filter1d(phantom.values, thick, axis=0)[thick // 2 :: thick]
    affine = np.diag([phantom.spacing, phantom.spacing, phantom.spacing * thick, 1.0])
    scan = Volume.on_grid(values[None], (Channel(modality, modality, units),), affine)  # type: ignore[arg-type]
    return scan, phantom.brain[thick // 2 :: thick], phantom.face[thick // 2 :: thick]


def measure_faces(turns: tuple[tuple[int, int, int], ...]) -> list[dict[str, Any]]:
    rows = []
    for name, brain, image in brains():
        for modality in ("MR", "CT"):
            for turn in turns:
                phantom = head(modality, brain, image, spacing=2.0, turn=turn)
                for thick in (1, 3) if turn == (0, 0, 0) else (1,):
                    scan, inside, face = volume_of(phantom, modality, thick)
                    mask = face_mask(scan)
                    row: dict[str, Any] = {
                        "brain": name,
                        "modality": modality,
                        "turn": turn,
                        "slice_mm": 2.0 * thick,
                    }
                    row["found"] = mask is not None
                    mask = np.zeros(inside.shape, bool) if mask is None else mask
                    near = (
                        ndimage.distance_transform_edt(~mask, sampling=scan.spacing) if mask.any() else None
                    )
                    row["face_removed"] = float(mask[face].mean())
                    row["brain_voxels"], row["brain_lost"] = int(inside.sum()), int((mask & inside).sum())
                    row["closest_mm"] = None if near is None else float(near[inside].min())
                    rows.append(row)
    return rows


def measure_pydeface() -> dict[str, Any] | None:
    """The template head of pydeface against its own mask: the share of the head in its mask that is in
    ours."""
    place = importlib.util.find_spec("pydeface")
    if place is None or place.origin is None:
        return None
    folder = Path(place.origin).parent / "data"
    scan = read(folder / "mean_reg2mean.nii.gz", modality="MR")
    theirs = read(folder / "facemask.nii.gz", modality="MR").voxels[0] < 0.5
    mask = face_mask(scan)
    tissue = scan.voxels[0] > 0.25 * np.percentile(scan.voxels[0], 90)
    ours = np.zeros(scan.shape, bool) if mask is None else mask
    return {"found": mask is not None, "of_theirs": float(ours[theirs & tissue].mean())}


def measure_others(quick: bool) -> dict[str, Any]:
    """Shared scans of which none is a head with its face: how many get a mask."""
    files = sorted(p for p in DATA.rglob("*.nii.gz") if not p.name.startswith("._"))
    chosen = [p for p in files if "mr_hippocampus" not in p.parts] + [
        p for p in files if "mr_hippocampus" in p.parts
    ][:3]
    asked, masked = 0, 0
    for path in chosen[::8] if quick else chosen:
        for modality in ("CT", "MR"):
            try:
                scan = read(path, modality=modality, units="HU" if modality == "CT" else None)
            except Quarantined:
                continue
            asked, masked = asked + 1, masked + (face_mask(scan) is not None)
    return {"scans": asked, "masked": masked}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="fewer pictures and turns: under 50 s on 2 cores"
    )
    args = parser.parse_args()
    if not (DATA / "MANIFEST.csv").is_file():
        raise SystemExit(f"no scans at {DATA}; set MEDFM_TEST_DATA to the folder that holds MANIFEST.csv")
    text = {}
    for name, side, most in (("train", 256, 41), ("test", 256, 15), ("train", 1024, 15), ("test", 1024, 15)):
        if args.quick and (name, side) not in (("train", 256), ("test", 256)):
            continue
        most = 12 if args.quick else most
        key = f"{name}_{side}"
        text[key] = measured = measure_text(DATA / "xray_lungs" / name, side, most)
        lost = "" if measured["lung_lost"] is None else f", of the lungs {measured['lung_lost']:.1%}"
        print(f"{key}: {measured['pictures']} pictures; {measured['masked']:.1%} masked as they are{lost}")
        for band, part in [("all", measured), *((b, measured[b]) for _, b in BANDS)]:
            print(
                f"  {band:<24}{part['characters']:5d} characters, {part['characters_missed']:6.1%} missed; "
                f"{part['lines']:4d} lines, {part['lines_leaking']:6.1%} leak, "
                f"{part['lines_wholly_missed']:6.1%} wholly missed"
            )
    faces = measure_faces(TURNS[:1] if args.quick else TURNS)
    for row in faces:
        closest = "" if row["closest_mm"] is None else f", closest {row['closest_mm']:.1f} mm"
        print(
            f"{row['brain']:<11}{row['modality']} turned {row['turn']!s:<13} {row['slice_mm']} mm: "
            f"face removed {row['face_removed']:6.1%}, "
            f"brain voxels lost {row['brain_lost']} of {row['brain_voxels']}{closest}"
        )
    pydeface, others = measure_pydeface(), measure_others(args.quick)
    print(f"scans without a face: {others['scans']}, masked {others['masked']}")
    print("pydeface's head: not installed" if pydeface is None else f"pydeface's head: {pydeface}")
    removed = [row["face_removed"] for row in faces]
    summary = {
        "text": text,
        "face_removed_mean": float(np.mean(removed)),
        "face_removed_least": float(np.min(removed)),
        "brain_voxels_lost": sum(row["brain_lost"] for row in faces),
        "brain_closest_mm": min(row["closest_mm"] for row in faces if row["closest_mm"] is not None),
        "faces": faces,
        "pydeface": pydeface,
        "others": others,
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
