"""A build may be killed, divided or added to: the dataset comes out the same to the byte. Real processes and
signals."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections import Counter
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from scan_files import phantom, write_nifti

from data_pipeline.build import build
from data_pipeline.errors import UserError
from data_pipeline.layouts import Case
from data_pipeline.manifest import Manifest
from data_pipeline.merge import merge
from data_pipeline.sources import SourceConfig
from data_pipeline.verify import verify
from data_pipeline.volume import Volume

REPO = Path(__file__).parents[2]
RECIPE = """
shard_samples: 3
level_min_voxels: 2000
sources:
  - {name: ct, path: ct, modality: CT, include: ["*_img.nii.gz"], label_glob: "*_lab.nii.gz",
     labels: {1: bone}}
  - {name: mr, path: mr, modality: MR, subject_pattern: "^(p[0-9]+)"}
"""


def write_scan(root: Path, n: int) -> None:
    ct = phantom(n)
    write_nifti(root / "ct" / f"p{n}_img.nii.gz", ct)
    write_nifti(root / "ct" / f"p{n}_lab.nii.gz", (ct > 0).astype(np.uint8))
    noise = np.random.default_rng(n).gamma(2.0, 100.0, (40, 36, 24)).astype(np.float32)
    write_nifti(root / "mr" / f"p{n}.nii.gz", noise)


@pytest.fixture
def scans(tmp_path: Path) -> Path:
    for n in range(7):
        write_scan(tmp_path / "in", n)
    write_nifti(tmp_path / "in" / "mr" / "p7.nii.gz", phantom(2).astype(np.float32))  # a CT once more
    (tmp_path / "in" / "mr" / "p8.nii.gz").write_bytes(b"no scan")
    (tmp_path / "in" / "r.yaml").write_text(RECIPE)
    return tmp_path / "in"


def sources(root: Path) -> list[SourceConfig]:
    from data_pipeline.build_recipe import read_recipe

    return list(read_recipe(root / "r.yaml").sources)


def tree(root: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(root.iterdir())}


def whole(root: Path, out: Path, private: Path | None = None) -> Path:
    build(sources(root), out, private, shard_samples=3, level_min_voxels=2000, progress=False)
    return out


def command(scans: Path, out: Path, private: Path, *more: str) -> list[str]:
    start = [sys.executable, "-m", "launch.cli", "shards", "build", str(scans / "r.yaml")]
    return [*start, "--out", str(out), "--private", str(private), *more]


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(REPO), **more}


def share_key(private: Path, other: Path) -> Path:
    other.mkdir()
    shutil.copy(private / "hash.key", other / "hash.key")
    return other


def test_cut_off_at_every_step_of_completing(
    scans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An exception at the n-th write of the dataset, for every n, first into nothing, then into a dataset."""
    from data_pipeline.place import Place

    first = whole(scans, tmp_path / "a")
    key = tmp_path / "a-private"
    write_scan(scans, 11)
    expected = tree(whole(scans, first))
    (scans / "extra").mkdir()
    for path in (scans / "ct").glob("p11_*"):
        shutil.move(path, scans / "extra" / path.name)
    shutil.move(scans / "mr" / "p11.nii.gz", scans / "extra" / "p11.nii.gz")

    steps = {"count": 0, "limit": -1}
    for name in ("write", "take", "remove"):
        original = getattr(Place, name)

        def counted(self: Place, *args: object, original: object = original) -> object:
            if steps["count"] == steps["limit"]:
                raise KeyboardInterrupt
            steps["count"] += 1
            return original(self, *args)  # type: ignore[operator]

        monkeypatch.setattr(Place, name, counted)
    out, private = tmp_path / "b", share_key(key, tmp_path / "b-private")

    def interrupted() -> int:
        """Start the build again, each time cut off one step later, until it gets through."""
        for limit in range(200):
            steps.update(count=0, limit=limit)
            try:
                whole(scans, out, private)
                return limit
            except KeyboardInterrupt:
                continue
        raise AssertionError

    assert interrupted() >= 4
    for path in (scans / "extra").iterdir():
        shutil.move(path, scans / ("mr" if path.name == "p11.nii.gz" else "ct") / path.name)
    assert interrupted() >= 3
    assert tree(out) == expected
    assert verify(out) == []


KILLER = """
import os, signal, sys
def hook(event, args):
    if event == "open" and isinstance(args[0], (str, bytes, os.PathLike)):
        name = os.path.basename(os.fsdecode(args[0]))
        if name == os.environ.get("KILLS_ALL"):
            os.killpg(0, signal.SIGKILL)
        if name == os.environ.get("KILLS_ONCE"):
            try:
                os.close(os.open(os.environ["ONCE"], os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                return
        if name in (os.environ.get("KILLS_ONCE"), os.environ.get("KILLS")):
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(hook)
"""


def deadly(folder: Path, **files: str) -> dict[str, str]:
    """Environment in which whoever opens one of the files named is killed, as the system does for memory."""
    (folder / "site").mkdir(exist_ok=True)
    (folder / "site" / "sitecustomize.py").write_text(KILLER)
    return environment(PYTHONPATH=f"{folder / 'site'}:{REPO}", ONCE=str(folder / "once"), **files)


@pytest.mark.slow
def test_killed_again_and_again_and_still_the_same_bytes(scans: Path, tmp_path: Path) -> None:
    """SIGKILL of the whole process group by a worker that opens a scan; in the next start, a later one."""
    expected = tree(whole(scans, tmp_path / "a"))
    private = share_key(tmp_path / "a-private", tmp_path / "b-private")
    start = command(scans, tmp_path / "b", private)
    before = -1
    for workers, name in (("2", "p3_img.nii.gz"), ("1", "p5.nii.gz")):
        killed = subprocess.run(
            [*start, "--workers", workers], env=deadly(tmp_path, KILLS_ALL=name), start_new_session=True,
            capture_output=True, timeout=240,
        )  # fmt: skip
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        done = len(list(private.glob("work/cases/*/*.json")))
        assert before < done < 16
        before = done
    whole(scans, tmp_path / "b", private)
    assert tree(tmp_path / "b") == expected
    assert not (private / "work").exists()
    assert verify(tmp_path / "b") == []


@pytest.mark.slow
def test_a_scan_that_kills_workers_is_quarantined_and_nothing_else(scans: Path, tmp_path: Path) -> None:
    """The system kills whoever opens it, as it does for memory."""
    write_scan(scans, 20)
    environ = deadly(tmp_path, KILLS="p20.nii.gz")
    done = subprocess.run(
        command(scans, tmp_path / "o", tmp_path / "p", "--workers", "2"), env=environ, capture_output=True,
        text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    info = json.loads((tmp_path / "o" / "dataset.json").read_text())
    assert info["counts"]["refused"] == {"unreadable": 1, "kills_workers": 1}
    assert info["counts"]["samples"] == 7 + 1 + 7
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_worker_killed_once_costs_nothing(scans: Path, tmp_path: Path) -> None:
    write_scan(scans, 20)
    expected = tree(whole(scans, tmp_path / "a"))
    environ = deadly(tmp_path, KILLS_ONCE="p20.nii.gz")
    private = share_key(tmp_path / "a-private", tmp_path / "p")
    done = subprocess.run(
        command(scans, tmp_path / "o", private, "--workers", "2"), env=environ, capture_output=True,
        text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "once").exists()
    assert tree(tmp_path / "o") == expected


@pytest.mark.parametrize(("fault", "code"), [(MemoryError, "kills_workers"), (RecursionError, "unforeseen")])
def test_a_scan_that_cannot_be_read_here(
    fault: type[Exception], code: str, scans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from data_pipeline import sample

    read = sample.read_case
    tries = Counter[str]()

    def failing(case: Case, source: SourceConfig, seed: int) -> list[Volume]:
        tries[case.images[0].name] += 1
        if case.images[0].name == "p3.nii.gz" or (
            tries["p4.nii.gz"] == 1 and case.images[0].name == "p4.nii.gz" and fault is MemoryError
        ):
            raise fault
        return read(case, source, seed)

    monkeypatch.setattr(sample, "read_case", failing)
    report = build(sources(scans), tmp_path / "a", progress=False)
    assert report.quarantined == {code: 1, "unreadable": 1}
    assert report.samples == 13  # another scan had too little memory once, beside the large one


def test_parts_and_merge_give_the_bytes_of_one_build(scans: Path, tmp_path: Path) -> None:
    expected = tree(whole(scans, tmp_path / "a"))
    private = share_key(tmp_path / "a-private", tmp_path / "p")
    how = {"shard_samples": 3, "level_min_voxels": 2000, "progress": False}
    for number in (2, 3, 1):
        report = build(sources(scans), tmp_path / "o", private, part=(number, 3), **how)  # type: ignore[arg-type]
        assert f"part {number} of 3" in report.text()
        assert not (tmp_path / "o").exists()
        if number == 3:
            with pytest.raises(UserError, match="part 1 of 3 is missing"):
                merge(tmp_path / "o", private=private, progress=False)
    folders = sorted(private.glob("work-*"))
    elsewhere = [tmp_path / "carried" / folder.name for folder in folders]  # as from other machines' disks
    (tmp_path / "carried").mkdir()
    for folder, place in zip(folders, elsewhere):
        shutil.move(folder, place)
    report = merge(tmp_path / "o", elsewhere, private, progress=False)
    assert report.samples == 14
    assert tree(tmp_path / "o") == expected
    assert not any(place.exists() for place in elsewhere)


def test_parts_of_different_builds_are_not_merged(scans: Path, tmp_path: Path) -> None:
    build(sources(scans), tmp_path / "o", part=(1, 2), progress=False)
    build(sources(scans), tmp_path / "o", part=(2, 2), seed=5, progress=False)
    with pytest.raises(UserError, match="another build"):
        merge(tmp_path / "o", progress=False)


def test_what_changed_while_a_build_was_cut_off(
    scans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cases move to other places in the order and to other splits: what was read before follows."""

    def changed() -> list[SourceConfig]:
        ct, mr = sources(scans)
        return [ct.model_copy(update={"splits": {"p0*": "val", "p1*": "test"}}), mr]

    whole(scans, tmp_path / "a")
    private = share_key(tmp_path / "a-private", tmp_path / "b-private")
    how = {"shard_samples": 3, "level_min_voxels": 2000, "progress": False}
    with monkeypatch.context() as patch:
        patch.setattr("data_pipeline.build.complete", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            build(sources(scans), tmp_path / "b", private, **how)  # type: ignore[arg-type]
    assert len(list(private.glob("work/cases/*/*.json"))) == 16
    write_nifti(scans / "ct" / "a0_img.nii.gz", phantom(3))  # a copy that comes first, labelled otherwise
    write_nifti(scans / "ct" / "a0_lab.nii.gz", (phantom(3) > 50).astype(np.uint8))
    report = build(changed(), tmp_path / "b", private, **how)  # type: ignore[arg-type]
    fresh = share_key(private, tmp_path / "c-private")
    build(changed(), tmp_path / "c", fresh, **how)  # type: ignore[arg-type]
    assert tree(tmp_path / "b") == tree(tmp_path / "c")
    assert report.notes["label conflicts between duplicates"] == 1
    updated = build(changed(), tmp_path / "a", **how)  # type: ignore[arg-type]
    assert updated.read == 2  # the copy and its twin
    given = split_of_inputs(tmp_path / "a")
    entries = [json.loads(line) for line in (tmp_path / "a-private" / "index.jsonl").open()]
    stated = {key: entry["split"] for entry in entries if entry["split"] for key in entry["keys"]}
    assert len(stated) == 2
    assert {key: given[key] for key in stated} == stated


def test_the_folder_for_unfinished_work_keeps_what_else_it_holds(scans: Path, tmp_path: Path) -> None:
    (tmp_path / "scratch").mkdir()
    (tmp_path / "scratch" / "mine.txt").write_text("of somebody")
    build(sources(scans), tmp_path / "o", work=tmp_path / "scratch", progress=False)
    assert [path.name for path in (tmp_path / "scratch").iterdir()] == ["mine.txt"]


def test_a_private_folder_of_another_dataset(scans: Path, tmp_path: Path) -> None:
    whole(scans, tmp_path / "a", tmp_path / "p")
    write_scan(scans, 9)
    whole(scans, tmp_path / "b", tmp_path / "p")
    with pytest.raises(UserError, match="one for each dataset"):
        whole(scans, tmp_path / "a", tmp_path / "p")


def test_a_shard_that_is_gone_is_not_added_to(scans: Path, tmp_path: Path) -> None:
    whole(scans, tmp_path / "a")
    gone = next((tmp_path / "a").glob("train-ct-*.tar"))
    gone.unlink()
    with pytest.raises(UserError, match=rf"{gone.name} is missing"):
        whole(scans, tmp_path / "a")


def test_merged_twice(scans: Path, tmp_path: Path) -> None:
    """A job script that is started again after all is done."""
    build(sources(scans), tmp_path / "o", part=(1, 1), progress=False)
    first = merge(tmp_path / "o", progress=False)
    before = tree(tmp_path / "o")
    second = merge(tmp_path / "o", progress=False)
    assert (second.samples, second.shards, second.counts) == (first.samples, first.shards, first.counts)
    assert tree(tmp_path / "o") == before


class TestAdding:
    def test_nothing_new_changes_nothing(self, scans: Path, tmp_path: Path) -> None:
        before = tree(whole(scans, tmp_path / "a"))
        report = build(sources(scans), tmp_path / "a", shard_samples=3, level_min_voxels=2000, progress=False)
        assert report.read == 0
        assert tree(tmp_path / "a") == before

    def test_only_the_new_is_read_and_the_rest_stays(self, scans: Path, tmp_path: Path) -> None:
        before = tree(whole(scans, tmp_path / "a"))
        splits = split_of_inputs(tmp_path / "a")
        for n in range(30, 36):
            write_scan(scans, n)
        report = build(sources(scans), tmp_path / "a", shard_samples=3, level_min_voxels=2000, progress=False)
        assert report.read == 12
        after = tree(tmp_path / "a")
        shards = {name for name in before if name.endswith(".tar")}
        assert {name: after[name] for name in shards} == {name: before[name] for name in shards}
        assert report.samples == 14 + 12
        now = split_of_inputs(tmp_path / "a")
        assert {name: now[name] for name in splits} == splits
        assert verify(tmp_path / "a") == []
        fresh = share_key(tmp_path / "a-private", tmp_path / "f-private")
        whole(scans, tmp_path / "f", fresh)
        one, other = Manifest.open(tmp_path / "a"), Manifest.open(tmp_path / "f")
        for column in ("key", "content_hash"):
            assert sorted(one.column(column)) == sorted(other.column(column))

    def test_a_changed_label_replaces_its_sample(self, scans: Path, tmp_path: Path) -> None:
        whole(scans, tmp_path / "a")
        path = scans / "ct" / "p3_lab.nii.gz"
        write_nifti(path, (phantom(3) > 50).astype(np.uint8))
        report = build(sources(scans), tmp_path / "a", shard_samples=3, level_min_voxels=2000, progress=False)
        assert report.read == 1
        assert report.samples == 14
        assert verify(tmp_path / "a") == []
        fresh = share_key(tmp_path / "a-private", tmp_path / "f-private")
        whole(scans, tmp_path / "f", fresh)
        assert foregrounds(tmp_path / "a") == foregrounds(tmp_path / "f")

    def test_a_copy_of_an_old_image_brings_its_label(self, scans: Path, tmp_path: Path) -> None:
        shutil.copy(scans / "ct" / "p5_lab.nii.gz", tmp_path / "kept.nii.gz")
        (scans / "ct" / "p5_lab.nii.gz").unlink()
        whole(scans, tmp_path / "a")
        shutil.copy(scans / "ct" / "p5_img.nii.gz", scans / "ct" / "q5_img.nii.gz")
        shutil.copy(tmp_path / "kept.nii.gz", scans / "ct" / "q5_lab.nii.gz")
        report = build(sources(scans), tmp_path / "a", shard_samples=3, level_min_voxels=2000, progress=False)
        assert report.read == 2  # the copy, and the old one again, as the two have to be joined
        assert report.samples == 14
        assert report.notes["labelled"] == 7
        assert report.notes["duplicates left out"] == 2
        assert verify(tmp_path / "a") == []

    def test_inputs_that_are_gone(self, scans: Path, tmp_path: Path) -> None:
        whole(scans, tmp_path / "a")
        (scans / "mr" / "p4.nii.gz").unlink()
        with pytest.raises(UserError, match=r"1 inputs .*p4\.nii\.gz.*--drop-missing"):
            whole(scans, tmp_path / "a")
        report = build(
            sources(scans),
            tmp_path / "a",
            shard_samples=3,
            level_min_voxels=2000,
            drop_missing=True,
            progress=False,
        )
        assert (report.read, report.samples) == (0, 13)
        assert verify(tmp_path / "a") == []

    def test_another_key_or_other_options_are_refused(self, scans: Path, tmp_path: Path) -> None:
        whole(scans, tmp_path / "a")
        with pytest.raises(UserError, match=r"another hash key|no index"):
            whole(scans, tmp_path / "a", tmp_path / "other")
        with pytest.raises(UserError, match="built with seed 0, asked for is 7"):
            build(sources(scans), tmp_path / "a", seed=7, level_min_voxels=2000, progress=False)


def split_of_inputs(root: Path) -> dict[str, str]:
    manifest = Manifest.open(root)
    return dict(zip(manifest.column("key"), manifest.column("split")))


def foregrounds(root: Path) -> dict[str, object]:
    manifest = Manifest.open(root)
    return {manifest.row(i)["key"]: manifest.row(i)["foreground"] for i in range(len(manifest))}


def test_two_builds_at_once(scans: Path, tmp_path: Path) -> None:
    """The second is told to wait, whatever it was to build."""
    folder = tmp_path / "a-private" / "work"
    folder.mkdir(parents=True)
    code = textwrap.dedent(
        f"""
        import fcntl, os, time
        file = os.open({str(folder / "lock")!r}, os.O_CREAT | os.O_RDWR)
        fcntl.flock(file, fcntl.LOCK_EX)
        print("held", flush=True)
        time.sleep(60)
        """
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(UserError, match="in use by another build"):
            whole(scans, tmp_path / "a")
        holder.kill()
    whole(scans, tmp_path / "a")


@pytest.mark.slow
def test_any_dask_scheduler_will_do(scans: Path, tmp_path: Path) -> None:
    """`--scheduler`: workers of a cluster that somebody else started."""
    expected = tree(whole(scans, tmp_path / "a"))
    private = share_key(tmp_path / "a-private", tmp_path / "p")
    dask = [sys.executable, "-m", "distributed.cli.dask_scheduler"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "env": environment()}
    file = tmp_path / "scheduler.json"
    scheduler = subprocess.Popen(
        [*dask, "--port", "0", "--dashboard-address", ":0", "--scheduler-file", str(file)], **quiet
    )
    worker = None
    try:
        for _ in range(200):
            if file.exists():
                break
            time.sleep(0.1)
        address = json.loads(file.read_text())["address"]
        worker = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "distributed.cli.dask_worker",
                address,
                "--nworkers",
                "1",
                "--nthreads",
                "1",
                "--no-nanny",
            ],
            **quiet,
        )
        done = subprocess.run(
            command(scans, tmp_path / "o", private, "--scheduler", address), env=environment(),
            capture_output=True, text=True, timeout=240,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert tree(tmp_path / "o") == expected
    finally:
        for process in (worker, scheduler):
            if process is not None:
                process.terminate()
                process.wait(30)
