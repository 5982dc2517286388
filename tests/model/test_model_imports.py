"""The room can be lifted out: it needs no other room, and no training or raw-format library."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
FORBIDDEN = {
    "data_pipeline", "engine", "pretrain", "finetune", "launch", "deepspeed", "webdataset", "dask",
    "SimpleITK", "pydicom", "nibabel", "monai", "pickle",
}  # fmt: skip


def test_source_imports_no_other_room() -> None:
    files = sorted((ROOT / "model").glob("*.py"))
    assert len(files) > 8
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            for name in names:
                assert name.split(".")[0] not in FORBIDDEN, f"{path.name} imports {name}"


def imported_by(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(' '.join(sorted({{name.split('.')[0] for name in sys.modules}})))"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=120
    )
    return set(result.stdout.split())


def test_load_encoder_pulls_in_no_training_library() -> None:
    loaded = imported_by("from model import load_encoder, Encoder")
    assert "torch" in loaded
    assert not loaded & (FORBIDDEN - {"pickle"})  # torch itself imports pickle


def test_a_plan_is_read_without_torch() -> None:
    assert "torch" not in imported_by("from model import AdaptationPlan, EncoderConfig, normalise_for")
