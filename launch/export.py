"""`medfm export --format safetensors`: weights and plan in a folder, checked by loading them again."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from model.errors import UserError
from model.plan import PLAN_FILE
from model.weights import MODEL_FILE, WEIGHTS_FILE, find_weights, load_encoder, save_encoder


@dataclass(frozen=True)
class Exported:
    """What was written, and the largest difference between the outputs before and after."""

    folder: Path
    files: tuple[str, ...]
    max_difference: float

    @property
    def ok(self) -> bool:
        """The exported weights give the very outputs of the source: nothing is converted, so
        nothing may differ.
        """
        return self.max_difference == 0.0

    def __str__(self) -> str:
        verdict = "loaded again and run" if self.ok else "NOT the same model"
        files = ", ".join(self.files)
        return (
            f"{self.folder}: {files}; {verdict}, largest difference of the outputs {self.max_difference:.3g}"
        )


def export_safetensors(source: Path, out: Path) -> Exported:
    """Export the newest weights of a run, checkpoint or exported folder.

    A bare encoder gives encoder.safetensors and plan.json; a fine-tuned model model.safetensors as well.
    What was written is loaded again, and both run the same fixed inputs: an encoder one for each stem, a
    promptable model one image and one click. `export.json` says what came out.

    Raises:
        UserError: nothing to load at `source`, or `out` is `source`.
    """
    here = weights_folder(source)
    if out.resolve() == here.resolve():
        raise UserError(f"{out}: the weights are there already; give another folder with --out")
    files, differences = [], []
    out.mkdir(parents=True, exist_ok=True)
    if (here / WEIGHTS_FILE).is_file():
        save_encoder(out, load_encoder(here / WEIGHTS_FILE))
        differences.append(encoder_difference(here / WEIGHTS_FILE, out / WEIGHTS_FILE))
        files.append(WEIGHTS_FILE)
    if (here / MODEL_FILE).is_file():
        shutil.copyfile(here / MODEL_FILE, out / MODEL_FILE)
        shutil.copyfile(here / PLAN_FILE, out / PLAN_FILE)
        differences.append(
            max(tensor_difference(here / MODEL_FILE, out / MODEL_FILE), mask_difference(here, out))
        )
        files.append(MODEL_FILE)
    done = Exported(out, (*files, PLAN_FILE), max(differences))
    report = {
        "format": "safetensors",
        "files": list(done.files),
        "max_difference": done.max_difference,
        "ok": done.ok,
    }
    (out / "export.json").write_text(json.dumps(report) + "\n", encoding="utf-8")
    return done


def weights_folder(source: Path) -> Path:
    """The folder that holds the weights `source` means."""
    try:
        return find_weights(source)[0].parent
    except UserError:
        if not source.is_dir():
            raise
        from finetune.weights import find_model

        return find_model(source)[0].parent  # a fine-tuned model without an encoder


def mask_difference(one: Path, two: Path) -> float:
    """Largest absolute difference of the logits of two stored promptable models, on a fixed image and
    click.
    """
    import numpy as np

    from finetune.session import PromptableSession

    answers = []
    for folder in (one, two):
        session = PromptableSession(folder, precision="fp32")
        channels = session.net.config.channels
        size = (channels, 24, 32, 32) if channels > 1 else (24, 32, 32)
        image = np.random.default_rng(0).normal(100, 30, size).astype(np.float32)
        session.set_image(image, spacing=(1.5, 1.5, 1.5), modality="MR")
        session.add_point((12, 16, 16))
        session.predict()
        answers.append(session.logits)
    return float(np.abs(answers[0] - answers[1]).max())


def tensor_difference(one: Path, two: Path) -> float:
    """Largest absolute difference of two weight files, tensor by tensor; infinite where names or shapes
    differ.
    """
    from safetensors.torch import load_file

    a, b = load_file(one), load_file(two)
    if a.keys() != b.keys() or any(a[name].shape != b[name].shape for name in a):
        return float("inf")
    names = [name for name in a if a[name].numel()]
    return max((float((a[name].double() - b[name].double()).abs().max()) for name in names), default=0.0)


def encoder_difference(one: Path, two: Path) -> float:
    """Largest absolute difference of the features of two stored encoders, over one fixed input for each
    stem.
    """
    import torch

    first, second = load_encoder(one), load_encoder(two)
    if first.config != second.config:
        return float("inf")
    worst = 0.0
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        for kind, patch in first.config.patch.items():
            tokens = (1, 4, 3) if kind == "planar" else (2, 4, 3)
            size = [n * p for n, p in zip(tokens, patch, strict=True)]
            image = torch.randn(1, first.config.channels, *size, generator=generator)
            spacing = torch.tensor([[5.0 if kind == "slab" else 1.5, 1.5, 1.5]])
            depths = tuple(range(first.depth))
            for a, b in zip(
                first(image, spacing, kind, depths), second(image, spacing, kind, depths), strict=True
            ):
                worst = max(worst, float((a - b).abs().max()))
    return worst
