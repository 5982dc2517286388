"""The rooms import one another in one direction only; heavy libraries stay where they are needed."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("data_pipeline", "model", "engine", "pretrain", "finetune", "launch")
MAY_IMPORT = {
    "data_pipeline": set(),
    "model": set(),
    "engine": set(),
    "pretrain": {"engine", "model", "data_pipeline"},
    "finetune": {"engine", "model", "data_pipeline"},
    "launch": {"pretrain", "finetune", "engine", "model", "data_pipeline"},
}


def imported_rooms(file: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module.split(".")[0])
    return names & set(ROOMS)


@pytest.mark.parametrize("room", ROOMS)
def test_imports_run_one_way(room: str) -> None:
    files = list((ROOT / room).rglob("*.py"))
    assert files
    wrong = {
        str(f.relative_to(ROOT)): extra
        for f in files
        if (extra := imported_rooms(f) - MAY_IMPORT[room] - {room})
    }
    assert not wrong


RAW_FORMATS = ("SimpleITK", "pydicom", "nibabel")
CLUSTER = ("deepspeed", "webdataset", "dask")


FORBIDDEN = {
    "launch.cli": (*RAW_FORMATS, *CLUSTER, "torch", "monai", "timm"),
    "pretrain.task": RAW_FORMATS,
    "finetune.task": RAW_FORMATS,
    "data_pipeline.stream": RAW_FORMATS,
    **{f"model.{f.stem}": (*RAW_FORMATS, *CLUSTER) for f in (ROOT / "model").glob("[!_]*.py")},
    "finetune.session": CLUSTER,
    "finetune.evaluate": CLUSTER,
}
IMPORT_EACH = """
import gc, importlib, json, os, sys
gc.disable()
for module, forbidden in json.loads(sys.argv[1]).items():
    if "torch" not in forbidden:
        import torch  # once for all that are left
    if not os.fork():
        importlib.import_module(module)
        for name in set(forbidden) & set(sys.modules):
            print(f"{module} imports {name}", flush=True)
        os._exit(0)
    assert os.wait()[1] == 0, module
os._exit(0)
"""


def test_heavy_libraries_stay_out() -> None:
    out = subprocess.run(
        [sys.executable, "-c", IMPORT_EACH, json.dumps(FORBIDDEN)],
        cwd=ROOT, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert (out.returncode, out.stdout.splitlines()) == (0, []), out.stderr
