"""Memory of a build: bounded by the largest scan of a worker, whatever the number of scans."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scan_files import write_nifti

REPO = Path(__file__).parents[2]
#: Builds one after another; prints the largest resident set so far, bytes, after each.
CODE = """
import resource, sys
from pathlib import Path
from data_pipeline.build import build
from data_pipeline.sources import SourceConfig
scans, out, *patterns = sys.argv[1:]
for number, pattern in enumerate(patterns):
    source = SourceConfig(path=Path(scans), name="a", modality="MR", include=(pattern,))
    build([source], f"{out}/{number}", progress=False)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("in")
    for n in range(10):
        voxels = np.random.default_rng(n).integers(0, 900, (128, 128, 128)).astype(np.int16)
        write_nifti(root / f"p{n:02d}.nii.gz", voxels)
    write_nifti(root / "small.nii.gz", voxels[:8, :8, :8])
    return root


@pytest.mark.slow
def test_memory_follows_the_largest_scan(scans: Path, tmp_path: Path) -> None:
    """Over that of a build of almost nothing: at most 6 times the voxels of a scan, for 3 scans as for 10."""
    voxels = 128**3 * 2
    patterns = ("small*", "p0[0-2]*", "p*")
    command = [sys.executable, "-c", CODE, str(scans), str(tmp_path), *patterns]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=300, check=True)
    idle, few, many = map(int, done.stdout.split())
    assert few - idle < 6 * voxels + (16 << 20)
    assert many - few < 2 * voxels
