"""SIGKILL at any change of the file system: the same command started again gives the same bytes.

The builds run in forks of one small process, each killed at its n-th file written, renamed or removed.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).parents[2]
PROGRAM = '''
import hashlib, os, shutil, signal, sys
from pathlib import Path

import numpy as np
import webdataset  # imported once, not in every fork
from scan_files import phantom, write_nifti

from data_pipeline.build import build
from data_pipeline.merge import merge
from data_pipeline.sources import SourceConfig

CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir"}
changes, limit = 0, None


def count(event, args):
    global changes
    writes = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
    if limit is not None and (event in CHANGES or writes):
        if changes == limit:
            os.kill(os.getpid(), signal.SIGKILL)
        changes += 1


sys.addaudithook(count)


def killed(run, at):
    """Whether a fork that does `run` comes to change number `at`, where it is killed."""
    global limit
    pid = os.fork()
    if pid == 0:
        limit = at
        run()
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code in (0, -signal.SIGKILL), code
    return code != 0


def scan(n, label):
    ct = phantom(n)[:12, :12, :12]
    write_nifti(root / "in" / f"p{n}_img.nii.gz", ct)
    write_nifti(root / "in" / f"p{n}_lab.nii.gz", (ct > label).astype(np.uint8))


def go(out, part=None):
    source = SourceConfig(name="ct", path=root / "in", modality="CT", include=("*_img.nii.gz",),
                          label_glob="*_lab.nii.gz", labels={1: "bone"})
    build([source], root / out, shard_samples=2, part=part, progress=False)


def state(out):
    files = [*(root / out).iterdir()]
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def put(out, start):
    """`out` and its private folder as they are in `start`."""
    for end in ("", "-private"):
        shutil.rmtree(root / f"{out}{end}", ignore_errors=True)
        if (root / f"{start}{end}").exists():
            shutil.copytree(root / f"{start}{end}", root / f"{out}{end}")


def key_only(name, other):
    (root / f"{name}-private").mkdir()
    shutil.copy(root / f"{other}-private" / "hash.key", root / f"{name}-private")


root, what, stride = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
for n in range(2):
    scan(n, 0)
go("whole")
key_only("start", "whole")
run = lambda: go("out")
if what == "update":
    put("start", "whole")
    scan(1, 50)
    scan(5, 0)
    put("whole", "start")
    go("whole")
if what == "merge":
    for number in (1, 2):
        go("start", (number, 2))
    run = lambda: merge(root / "out", progress=False)
expected = state("whole")
at = 0
while True:
    put("out", "start")
    if not killed(run, at):
        break
    run()
    assert state("out") == expected, at
    left = {path.name for path in (root / "out-private").iterdir() if path.name[0] != "."}
    assert left == {"hash.key", "index.jsonl"}, (at, left)
    at += stride
print(at)
'''


@pytest.mark.parametrize("what", ["fresh", "update", "merge"])
def test_killed_at_any_change(what: str, tmp_path: Path) -> None:
    """Every third change; MEDFM_EVERY_KILL=1 tries them all."""
    stride = os.environ.get("MEDFM_EVERY_KILL", "3")
    paths = f"{REPO}{os.pathsep}{Path(__file__).parent}"
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path), what, stride], env={**os.environ, "PYTHONPATH": paths},
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 30
