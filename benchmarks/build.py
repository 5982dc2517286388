"""Volumes per second of `medfm shards build`, the least that any build must do, and nnU-Net's way.

Prints a table, then one JSON object. All build from the same gzipped NIfTI files of labelled CT-like
volumes, one thread a process. The floor decodes each file and compresses its voxels as our shards hold them
(zstd 5), nothing more: no geometry, statistics, levels, index, hash or report. The peer does the steps that
nnU-Net v2's preprocessing does where the spacing is kept: read with SimpleITK, crop to non-zero, z-score to
float32, sample foreground voxels, write Blosc2 (zstd 8). It is written here after nnU-Net's documentation;
nnU-Net itself is not needed.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = os.environ["ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS"] = "1"

import blosc2
import nibabel as nib
import numpy as np
import SimpleITK as sitk
from scipy.ndimage import gaussian_filter

from data_pipeline.build import build
from data_pipeline.sources import SourceConfig
from data_pipeline.storage import encode

CHUNK = (1, 32, 32, 32)


def write_scans(folder: Path, volumes: int, side: int) -> None:
    """Labelled volumes in Hounsfield units, smooth tissue with noise, as NIfTI."""
    for number in range(volumes):
        g = np.random.default_rng(number)
        smooth = gaussian_filter(g.standard_normal((side // 4,) * 3).astype(np.float32), 3)
        body = np.kron(smooth / smooth.std(), np.ones((4, 4, 4), np.float32)) * 300
        voxels = (body + g.standard_normal(body.shape, dtype=np.float32) * 12).astype(np.int16)
        for name, array in (("image", voxels), ("label", (body > 500).astype(np.uint8))):
            file = nib.Nifti1Image(array, np.eye(4))
            file.set_sform(np.eye(4), 1)
            nib.save(file, folder / f"{number:03d}_{name}.nii.gz")


def ours(scans: Path, out: Path, workers: int) -> None:
    source = SourceConfig(
        path=scans,
        name="ct",
        modality="CT",
        include=("*_image.nii.gz",),
        label_glob="*_label.nii.gz",
        labels={1: "bone"},
    )
    build([source], out, workers=workers, progress=False)


def floor(scans: Path, out: Path) -> None:
    out.mkdir()
    for path in sorted(scans.iterdir()):
        array = np.asarray(nib.load(path).dataobj).T[None]
        (out / path.name).write_bytes(encode(array, CHUNK))


def nnunet(scans: Path, out: Path) -> None:
    out.mkdir()
    parameters = blosc2.CParams(codec=blosc2.Codec.ZSTD, clevel=8, nthreads=1)
    for path in sorted(scans.glob("*_image.nii.gz")):
        image = sitk.GetArrayFromImage(sitk.ReadImage(str(path))).astype(np.float32)
        label = sitk.GetArrayFromImage(sitk.ReadImage(str(path).replace("_image", "_label"))).astype(np.int8)
        bounds = tuple(slice(int(w.min()), int(w.max()) + 1) for w in np.nonzero(image))
        image, label = image[bounds], label[bounds]
        image = (image - image.mean()) / max(float(image.std()), 1e-8)
        where = np.argwhere(label == 1)
        np.random.default_rng(0).choice(where, min(10_000, len(where)), replace=False)
        for name, array in (("image", image[None]), ("label", label[None])):
            frame = blosc2.asarray(
                np.ascontiguousarray(array), chunks=array.shape, blocks=CHUNK, cparams=parameters
            )
            (out / f"{path.name}.{name}").write_bytes(frame.to_cframe())


def timed(name: str, run: Callable[[], None], volumes: int) -> float:
    started = time.perf_counter()
    run()
    seconds = time.perf_counter() - started
    print(f"{name:<28} {seconds:8.2f} s {volumes / seconds:8.2f} volumes/s", flush=True)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer, smaller volumes: under 50 s on 2 cores")
    parser.add_argument("--volumes", type=int, default=None)
    parser.add_argument("--side", type=int, default=None)
    args = parser.parse_args()
    volumes = args.volumes or (12 if args.quick else 48)
    side = args.side or (128 if args.quick else 192)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        os.environ["MEDFM_CACHE"] = str(root / "cache")
        scans = root / "scans"
        scans.mkdir()
        write_scans(scans, volumes, side)
        print(f"{volumes} labelled volumes of {side} cubed, int16")
        ours(scans, root / "warm", 1)  # imports and file cache, not timed
        least = timed("floor (decode, compress)", lambda: floor(scans, root / "floor"), volumes)
        peer = timed("as nnU-Net v2, 1 process", lambda: nnunet(scans, root / "peer"), volumes)
        one = timed("medfm, 1 process", lambda: ours(scans, root / "one", 1), volumes)
        two = timed("medfm, 2 workers", lambda: ours(scans, root / "two", 2), volumes)
    result = {
        "ratio_to_nnunet": round(peer / one, 3),
        "floor_share": round(least / one, 3),
        "speedup_2_workers": round(one / two, 3),
        "volumes": volumes,
        "side": side,
        "seconds": {
            "floor": round(least, 3),
            "nnunet": round(peer, 3),
            "one": round(one, 3),
            "two": round(two, 3),
        },
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
