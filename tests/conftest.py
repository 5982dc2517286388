"""Fixtures every test may use, and the order in which tests run."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first, whole runs before all: with several workers none idles at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: (item.path.parent.name != "end_to_end", item.path not in slow))


@pytest.fixture(scope="session")
def built_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], None]], Path]:
    """`built_once(name, build)`: a folder that `build(folder)` fills once for all workers; read only."""
    own = tmp_path_factory.getbasetemp()
    root = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own

    def folder_of(name: str, build: Callable[[Path], None]) -> Path:
        folder = root / f"once-{name}"
        with open(root / f"once-{name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (folder / "built").exists():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                build(folder)
                (folder / "built").touch()
        return folder

    return folder_of


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of real scans; tests that need it skip, saying so, where it is absent."""
    root = Path(os.environ.get("MEDFM_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not (root / "MANIFEST.csv").is_file():
        pytest.skip(
            f"real scans not found at {root}; set MEDFM_TEST_DATA to the folder that holds MANIFEST.csv"
        )
    return root
