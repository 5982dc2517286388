"""Scans per second of `medfm shards build`, beside nnU-Net's preprocessing and the least any build must do.

Prints a table, then one JSON object. The same gzipped NIfTI scans with labels go through

- medfm: the whole build (discovery, reading, checks, statistics, levels, compression, hashes, index, shards,
  manifest, report) on a dask cluster of one, then of two processes;
- nnU-Net v2: `DefaultPreprocessor.run_case_save` in a pool of one, then of two processes, as
  `nnUNetv2_plan_and_preprocess` runs it; the target spacing is each scan's own, so that neither resamples;
- the floor: decode every file and compress every member that the dataset holds (image, levels, label), in
  this process. It uses our own decoder (ISA-L) and codec, which makes it lower than the standard library's.
  In two processes, half of the scans each, it shows what a second process can gain on the machine
  (`floor_speedup_2`).

One thread a process. Processes are started and have imported what they need before the clock runs, for both;
`startup_s` is what that takes for a build. Rounds are interleaved, medians reported, and `ratio_to_nnunet` is
the smaller of the ratios with one and with two processes. With `--quick`, nnU-Net takes a quarter of the
scans (as many of each kind), and there is one round. It is no dependency of medfm; where it is not installed
(`pip install -e '.[bench]'`) its figures are null.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"
os.environ["ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS"] = "1"

import numpy as np


@dataclass(frozen=True)
class Scan:
    """A scan and its label, with what nnU-Net's plans have to say of it."""

    image: Path
    label: Path
    modality: str
    shape: tuple[int, ...]
    spacing: tuple[float, ...]
    classes: tuple[int, ...]

    @property
    def megabytes(self) -> float:
        """Voxels as int16, whatever the file holds: the same measure for all."""
        return 2e-6 * float(np.prod(self.shape))


def synthetic(folder: Path, count: int, side: int) -> list[Path]:
    """CT-like int16, MR-like int16 and MR-like float32 with labels, in turn."""
    return [write(folder, n, (side,) * 3, ("CT", "MR", "MR")[n % 3], n % 3 == 2) for n in range(count)]


def write(folder: Path, number: int, shape: tuple[int, ...], modality: str, floats: bool) -> Path:
    """A body of smooth tissue with noise in noisy air (that compresses as scans do), and its bright parts."""
    import nibabel
    from scipy.ndimage import gaussian_filter, zoom

    g = np.random.default_rng(number)
    coarse = gaussian_filter(g.standard_normal([-(-n // 4) for n in shape], np.float32), 3)
    smooth = zoom(coarse / coarse.std(), 4, order=1)[tuple(slice(n) for n in shape)]
    axes = [np.linspace(-1, 1, n, dtype=np.float32) for n in shape]
    body = axes[1][:, None] ** 2 + axes[2] ** 2 < 0.7
    noise = g.standard_normal(shape, np.float32)
    if modality == "CT":
        voxels = np.clip(np.where(body, smooth * 150 + noise * 12 + 40, noise * 8 - 1000), -1024, 3071)
    else:
        voxels = np.abs(np.where(body, smooth * 90 + noise * 15 + 400, noise * 8))
    stored = voxels.astype(np.float32 if floats else np.int16)
    place = folder / modality / f"{number:04d}_image.nii.gz"
    place.parent.mkdir(parents=True, exist_ok=True)
    affine = np.diag([-1.0, -1.0, 1.5, 1.0])
    for path, array in ((place, stored), (label_of(place), ((smooth > 1.2) & body).astype(np.uint8))):
        image = nibabel.Nifti1Image(np.asfortranarray(array.T), affine)
        image.set_sform(affine, 1)
        nibabel.save(image, path)
    return place


def label_of(image: Path) -> Path:
    return image.with_name(image.name.replace("_image", "_mask"))


def real(data: Path, folder: Path) -> list[Path]:
    """Labelled scans of the shared folder, linked under one layout: CT, MR and PET of the sarcoma patients
    and the MR crops of the hippocampus."""
    pairs = [
        (path, label_of(path), "PT" if "PET" in path.name else path.name[:2])
        for path in sorted(data.glob("ct_mr_pet_sarcoma/*/*_image.nii.gz"))
    ]
    pairs += [
        (path, data / "mr_hippocampus" / "labelsTr" / path.name, "MR")
        for path in sorted((data / "mr_hippocampus" / "imagesTr").glob("*.nii.gz"))
    ]
    links = []
    for number, (image, label, modality) in enumerate((i, la, m) for i, la, m in pairs if la.exists()):
        links.append(folder / modality / f"{number:04d}_image.nii.gz")
        links[-1].parent.mkdir(parents=True, exist_ok=True)
        links[-1].symlink_to(image.resolve())
        label_of(links[-1]).symlink_to(label.resolve())
    return links


def scan_of(image: Path) -> Scan:
    import SimpleITK as sitk

    found = sitk.ReadImage(str(image))
    label = sitk.GetArrayViewFromImage(sitk.ReadImage(str(label_of(image))))
    classes = tuple(int(v) for v in np.unique(label) if v)
    return Scan(
        image, label_of(image), image.parent.name, found.GetSize()[::-1], found.GetSpacing()[::-1], classes
    )


def sources(folder: Path) -> list[Any]:
    from data_pipeline.sources import SourceConfig

    return [
        SourceConfig(
            path=part,
            name=part.name,
            modality=part.name,
            include=("*_image.nii.gz",),
            label_glob="*_mask.nii.gz",
            labels={v: f"class {v}" for v in range(1, 8)},
            label_geometry="image",
        )
        for part in sorted(folder.iterdir())
    ]


def medfm(folder: Path, work: Path, **how: Any) -> int:
    """Build, check that every scan is there, throw away; returns the bytes of the shards."""
    from data_pipeline.build import build

    report = build(sources(folder), work / "out", progress=False, **how)
    scans = len(list(folder.rglob("*_image.nii.gz")))
    if report.samples + report.notes.get("duplicates left out", 0) != scans or report.quarantined:
        raise RuntimeError(f"{report.samples} of {scans} scans were built: {report.text()}")
    size = sum(path.stat().st_size for path in (work / "out").glob("*.tar"))
    shutil.rmtree(work)
    return size


@contextmanager
def cluster(workers: int, folder: Path) -> Iterator[str]:
    """The address of a warm dask cluster, like the one a build starts for itself."""
    import dask
    from distributed import LocalCluster

    from data_pipeline.workers import MALLOC

    with (
        dask.config.set({"distributed.nanny.pre-spawn-environ": MALLOC}),
        LocalCluster(
            n_workers=workers, threads_per_worker=1, dashboard_address=None, memory_limit=0, silence_logs=50
        ) as found,
    ):
        medfm(folder, folder.with_name(f"warm-{workers}"), scheduler=found.scheduler_address)
        yield found.scheduler_address


def preprocess(scan: Scan, out: str) -> None:
    """One case to the files `out`.*, as nnU-Net's loop hands it to a process; the plans keep its spacing."""
    from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    keep = {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None}
    keep_label = {"is_seg": True, "order": 1, "order_z": 0, "force_separate_z": None}
    normal = "CTNormalization" if scan.modality == "CT" else "ZScoreNormalization"
    configuration = {
        "data_identifier": "bench", "preprocessor_name": "DefaultPreprocessor", "batch_size": 2,
        "patch_size": [min(128, n) for n in scan.shape], "spacing": list(scan.spacing),
        "normalization_schemes": [normal], "use_mask_for_norm": [False],
        "resampling_fn_data": "resample_data_or_seg_to_shape", "resampling_fn_data_kwargs": keep,
        "resampling_fn_seg": "resample_data_or_seg_to_shape", "resampling_fn_seg_kwargs": keep_label,
        "architecture": {},
    }  # fmt: skip
    intensities = {"mean": 40.0, "std": 200.0, "percentile_00_5": -900.0, "percentile_99_5": 900.0}
    plans = {
        "dataset_name": "bench", "plans_name": "bench", "image_reader_writer": "SimpleITKIO",
        "transpose_forward": [0, 1, 2], "transpose_backward": [0, 1, 2], "label_manager": "LabelManager",
        "configurations": {"bench": configuration},
        "foreground_intensity_properties_per_channel": {"0": intensities},
    }  # fmt: skip
    labels = {"background": 0, **{f"class {v}": v for v in scan.classes}}
    manager = PlansManager(plans)
    DefaultPreprocessor(verbose=False).run_case_save(
        out, [str(scan.image)], str(scan.label), manager, manager.get_configuration("bench"),
        {"labels": labels, "file_ending": ".nii.gz"},
    )  # fmt: skip


@contextmanager
def nnunet(warm: Scan, folder: Path) -> Iterator[Callable[[list[Scan], int], None]]:
    """nnU-Net's pool of processes, warm; the function takes scans and how many of the processes to use."""
    out = folder / "nnunet"
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        os.environ[name] = str(out)  # or it warns
    with get_context("spawn").Pool(2) as pool:

        def run(scans: list[Scan], processes: int) -> None:
            out.mkdir()
            work = [(scan, str(out / str(number))) for number, scan in enumerate(scans)]
            if processes == 1:
                for arguments in work:
                    pool.apply(preprocess, arguments)
            else:
                for result in [pool.apply_async(preprocess, arguments) for arguments in work]:
                    result.get()
            shutil.rmtree(out)

        run([warm] * 2, 2)
        yield run


def members(scan: Scan) -> list[tuple[np.ndarray, tuple[int, ...]]]:
    """The arrays that the dataset holds of a scan, with their chunks."""
    from data_pipeline.build import LEVEL_MIN_VOXELS
    from data_pipeline.geometry import geometry_of, level_factors
    from data_pipeline.readers import read
    from data_pipeline.storage import block_means, chunk_shape, level_shape, quantise

    volume, label = (read(path, modality=scan.modality) for path in (scan.image, scan.label))
    kind, axes = geometry_of(volume.shape, volume.spacing)
    image = quantise(volume.voxels, volume.slope, volume.intercept, volume.invalid).voxels
    factors = level_factors(kind, axes)
    large = [np.prod(level_shape(volume.shape, f)) > LEVEL_MIN_VOXELS for f in factors[:2]]
    arrays = [image, *block_means(image, factors[1 : 1 + sum(large)]), label.voxels.astype(np.uint8)]
    return [(array, chunk_shape(array.shape, kind, axes)) for array in arrays]


def floor(scans: list[Scan], arrays: list[list[tuple[np.ndarray, tuple[int, ...]]]]) -> None:
    from data_pipeline.readers import nifti
    from data_pipeline.storage import encode

    for scan, parts in zip(scans, arrays):
        nifti.decode(scan.image)
        nifti.decode(scan.label)
        for array, chunks in parts:
            encode(array, chunks)


HELD: list[Any] = []  # of a process: its scans and their arrays, made before the clock runs


def hold(images: list[Path]) -> None:
    scans = [scan_of(image) for image in images]
    HELD[:] = [scans, [members(scan) for scan in scans]]
    floor(scans[:1], HELD[1][:1])


def floor_of_held() -> None:
    floor(*HELD)


@contextmanager
def two_floors(scans: list[Scan]) -> Iterator[Callable[[], None]]:
    """The floor in two processes, half of the scans each: what two processes can gain on this machine."""
    with ExitStack() as stack:
        pools = [stack.enter_context(get_context("spawn").Pool(1)) for _ in range(2)]
        for n, each in enumerate(pools):
            each.apply(hold, ([scan.image for scan in scans[n::2]],))

        def run() -> None:
            for result in [each.apply_async(floor_of_held) for each in pools]:
                result.get()

        yield run


def measure(
    scans: list[Scan], folder: Path, work: Path, rounds: int, part: int, peer_rounds: int
) -> dict[str, float]:
    """Median seconds a scan of each contestant over interleaved rounds; nnU-Net takes the first `part` scans
    in the first `peer_rounds`."""
    arrays = [members(scan) for scan in scans]
    found: dict[str, list[float]] = {}

    def timed(name: str, count: int, run: Callable[[], Any]) -> None:
        started = time.perf_counter()
        run()
        found.setdefault(name, []).append((time.perf_counter() - started) / count)

    warm = work / "warm"
    tiny = scan_of(write(warm, 0, (16, 16, 16), "MR", False))
    with ExitStack() as stack:
        clusters = {}
        for n in (1, 2):
            timed("startup", 1, lambda n=n: clusters.update({n: stack.enter_context(cluster(n, warm))}))
        floors = stack.enter_context(two_floors(scans))
        run = stack.enter_context(nnunet(tiny, work)) if find_spec("nnunetv2") is not None else None
        floor(scans[:1], arrays[:1])
        for number in range(rounds):
            timed("floor", len(scans), partial(floor, scans, arrays))
            timed("floor 2", len(scans), floors)
            for n, address in clusters.items():
                timed(f"medfm {n}", len(scans), partial(medfm, folder, work / "timed", scheduler=address))
            if run is not None and number < peer_rounds:
                for n in (1, 2):
                    timed(f"nnunet {n}", part, partial(run, scans[:part], n))
    return {name: statistics.median(runs) for name, runs in found.items()}


def report(title: str, scans: list[Scan], found: dict[str, float]) -> dict[str, Any]:
    megabytes = sum(scan.megabytes for scan in scans) / len(scans)
    names = {
        "floor": "floor: decode and compress alone", "floor 2": "floor, 2 processes",
        "medfm 1": "medfm, 1 process",
        "medfm 2": "medfm, 2 processes", "nnunet 1": "nnU-Net, 1 process", "nnunet 2": "nnU-Net, 2 processes",
    }  # fmt: skip
    print(f"\n{title}: {len(scans)} labelled scans, {megabytes:.1f} MB each as 16-bit voxels")
    for key, name in names.items():
        if key in found:
            s = found[key]
            print(f"  {name:34}{1 / s:9.2f} scans/s {megabytes / s:8.1f} MB/s", flush=True)
    peer = [found[f"nnunet {n}"] / found[f"medfm {n}"] for n in (1, 2) if f"nnunet {n}" in found]
    return {
        "ratio_to_nnunet": round(min(peer), 3) if peer else None,
        "ratios_to_nnunet": [round(r, 3) for r in peer],
        "floor_share": round(found["floor"] / found["medfm 1"], 3),
        "speedup_2_workers": round(found["medfm 1"] / found["medfm 2"], 3),
        "floor_speedup_2": round(found["floor"] / found["floor 2"], 3),
        "scans_per_s": {name: round(1 / found[name], 3) for name in names if name in found},
        "mb_per_s": {name: round(megabytes / found[name], 2) for name in names if name in found},
        "startup_s": round(found["startup"], 2),
        "scans": len(scans),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="few, small scans: under 50 s on 2 cores")
    parser.add_argument("--data", type=Path, help="folder of shared scans, measured after the synthetic ones")
    parser.add_argument("--scans", type=int, help="number of synthetic volumes")
    parser.add_argument("--side", type=int, help="their side in voxels")
    parser.add_argument("--rounds", type=int, help="interleaved rounds to take the median of")
    args = parser.parse_args()
    count, side = args.scans or (12 if args.quick else 36), args.side or (160 if args.quick else 192)
    rounds = args.rounds or (1 if args.quick else 5)
    part, peer_rounds = (count // 4, 1) if args.quick else (count, 2)
    if find_spec("nnunetv2") is None:
        print("nnU-Net is not installed here: pip install -e '.[bench]' to compare with it")
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        os.environ["MEDFM_CACHE"] = str(root / "cache")
        made = root / "synthetic"
        scans = [scan_of(path) for path in synthetic(made, count, side)]
        (root / "a").mkdir()
        result = report(
            f"Synthetic, {side} cubed", scans, measure(scans, made, root / "a", rounds, part, peer_rounds)
        )
        if args.data is not None:
            linked = root / "real"
            scans = [scan_of(path) for path in real(args.data, linked)]
            (root / "b").mkdir()
            found = measure(scans, linked, root / "b", rounds, len(scans), peer_rounds)
            result["real"] = report("Shared scans", scans, found)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
