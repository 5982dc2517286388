"""Fixtures every test may use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of real scans; tests that need it skip, saying so, where it is absent."""
    root = Path(os.environ.get("MEDFM_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not (root / "MANIFEST.csv").is_file():
        pytest.skip(
            f"real scans not found at {root}; set MEDFM_TEST_DATA to the folder that holds MANIFEST.csv"
        )
    return root
