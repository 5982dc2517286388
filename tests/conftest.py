"""Fixtures every test may use, and the order in which tests run."""

from __future__ import annotations

import fcntl
import itertools
import os
import random
import secrets
import shutil
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace

import hypothesis
import numpy as np
import pytest
import torch

from data_pipeline import privacy

# The same examples on every run, and no limit of time on one: a fault found by chance, or by a busy machine,
# would be laid to the change under test. Loaded here, before any test is defined.
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None)
hypothesis.settings.load_profile("repeatable")


def pytest_configure(config: pytest.Config) -> None:
    """GPUs are for `-m gpu` alone: the other tests are of the CPU, and a process that has trained there, with
    its group and DeepSpeed's device, cannot go over to a GPU."""
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first, whole runs before all: with several workers none idles at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: (item.path.parent.name != "end_to_end", item.path not in slow))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """A test meets the same global generators and hash keys on every run, whatever ran before it in its
    process: what a model learns depends on the split, and the split on the key.
    """
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - for code that draws from the global generator
    torch.manual_seed(0)
    count = itertools.count()
    privacy.secrets = SimpleNamespace(  # type: ignore[assignment]
        token_bytes=lambda size: sha256(b"test key %d" % next(count)).digest()[:size],
        token_hex=secrets.token_hex,
    )


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
