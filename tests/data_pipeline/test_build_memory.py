"""Memory of a build: bounded by the largest scan of a worker, whatever the number of scans."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scan_files import write_nifti

REPO = Path(__file__).parents[2]
CODE = """
import resource, sys
from pathlib import Path
from data_pipeline.build import build
from data_pipeline.sources import SourceConfig
source = SourceConfig(path=Path(sys.argv[1]), name="a", modality="MR", include=(sys.argv[3],))
build([source], sys.argv[2], progress=False)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("in")
    for n in range(16):
        voxels = np.random.default_rng(n).integers(0, 900, (128, 128, 128)).astype(np.int16)
        write_nifti(root / f"p{n:02d}.nii.gz", voxels)
    write_nifti(root / "small.nii.gz", voxels[:8, :8, :8])
    return root


def peak(scans: Path, out: Path, include: str) -> int:
    """Largest resident set of a process that builds, bytes."""
    command = [sys.executable, "-c", CODE, str(scans), str(out), include]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=300, check=True)
    return int(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_memory_follows_the_largest_scan(scans: Path, tmp_path: Path) -> None:
    """Over that of a build of almost nothing: at most 6 times the voxels of a scan, for 3 scans as for 16."""
    voxels = 128**3 * 2
    idle = peak(scans, tmp_path / "a", "small*")
    few = peak(scans, tmp_path / "b", "p0[0-2]*")
    many = peak(scans, tmp_path / "c", "p*")
    assert few - idle < 6 * voxels + (16 << 20)
    assert many - few < 2 * voxels
