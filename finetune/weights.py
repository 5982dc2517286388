"""A promptable model from a recipe, to a folder and back: `model.safetensors` and `plan.json`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from engine.errors import UserError
from finetune.promptable import HeadConfig, PromptableModel
from model.config import EncoderConfig
from model.encoder import Encoder
from model.plan import PLAN_FILE, AdaptationPlan, installed_versions, read_plan, write_plan
from model.weights import ENCODER_PREFIX, MODEL_FILE, find_weights, load_encoder, save_encoder, save_tensors

if TYPE_CHECKING:
    from data_pipeline.manifest import Manifest
    from finetune.recipe import EncoderChoice, FinetuneRecipe


def build_model(head: HeadConfig, choice: EncoderChoice, seed: int) -> PromptableModel:
    """A model with its first weights: the head's from `seed`, the encoder's from `choice`.

    The head starts from the same numbers with every encoder, so runs with and without one compare.
    """
    encoder: Encoder | None = None
    if choice.path:
        encoder = load_encoder(choice.path, channels=head.channels)
        if choice.from_scratch:
            torch.manual_seed(seed + 1)
            encoder.reset_parameters()
    elif choice.config is not None:
        torch.manual_seed(seed + 1)
        encoder = Encoder(choice.config.model_copy(update={"channels": head.channels}))
    torch.manual_seed(seed)
    head = head.model_copy(update={"encoder": encoder is not None})
    return PromptableModel(head, encoder, frozen=choice.mode == "frozen")


def export_model(
    net: PromptableModel,
    state: Mapping[str, Tensor],
    folder: Path,
    recipe: FinetuneRecipe,
    manifest: Manifest,
    rows: np.ndarray,
) -> None:
    """Write `model.safetensors`, `encoder.safetensors` where there is an encoder, and `plan.json`.

    The plan keeps the keyed hashes of the training subjects and the hashes of their images, so that an
    evaluation can tell a test case that was seen.
    """
    before = getattr(net.encoder, "plan", None)
    encoder_config = (
        net.encoder.config
        if isinstance(net.encoder, Encoder)
        else EncoderConfig(channels=net.config.channels)
    )
    spacing = manifest.column("spacing")[rows]
    pretraining: dict[str, Any] = {}
    if recipe.encoder.path and not recipe.encoder.from_scratch:
        known = {} if before is None else before.training_data
        pretraining = dict(known) or {"unknown": "the encoder's plan does not say what it was trained on"}
    plan = AdaptationPlan(
        architecture=encoder_config,
        spacing_range=(float(spacing.min()), float(spacing.max())),
        stems=tuple(sorted(set(manifest.column("geometry")[rows]))),
        training_data={
            "manifest": manifest.hash,
            "samples": len(rows),
            "split": recipe.data.split,
            "labels": manifest.info.get("labels", {}),
            "subject_keys": sorted(set(manifest.column("subject")[rows].astype(str))),
            "content_hashes": sorted(set(manifest.column("content_hash")[rows].astype(str))),
            "pretraining": pretraining,
        },
        licence=None if before is None else before.licence,
        versions=installed_versions(),
        head=net.config.model_dump(mode="json"),
    )
    if before is not None:
        plan = plan.model_copy(update={"normalisation": before.normalisation})
    folder.mkdir(parents=True, exist_ok=True)
    if net.encoder is not None:
        own = {k.removeprefix(ENCODER_PREFIX): v for k, v in state.items() if k.startswith(ENCODER_PREFIX)}
        save_encoder(folder, own, plan)
    else:
        (folder / PLAN_FILE).unlink(missing_ok=True)
    save_tensors(folder / MODEL_FILE, {name: tensor.float() for name, tensor in state.items()})
    write_plan(folder / PLAN_FILE, plan)


def find_model(path: str | Path) -> tuple[Path, Path]:
    """The `model.safetensors` and `plan.json` that `path` means: a file, a folder, or the newest checkpoint
    of a run."""
    path = Path(path)
    if path.is_file():
        return path, path.with_name(PLAN_FILE)
    folder = path if (path / MODEL_FILE).is_file() else find_weights_folder(path)
    return folder / MODEL_FILE, folder / PLAN_FILE


def find_weights_folder(path: Path) -> Path:
    """The newest complete checkpoint of a run folder that holds a fine-tuned model."""
    updates = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    for folder in sorted(updates.glob("update-*"), key=lambda item: item.name, reverse=True):
        if (folder / "complete.json").is_file() and (folder / MODEL_FILE).is_file():
            return folder
    if path.is_dir():
        find_weights(path)  # says what is wrong with a folder that holds nothing at all
        raise UserError(
            f"{path}: holds an encoder but no segmentation model; run `medfm finetune` with it first"
        )
    raise UserError(f"{path}: no such file or folder; give the run folder of a `medfm finetune`")


def device_of(name: torch.device | str) -> torch.device:
    """The device of that name; UserError where this machine has none such."""
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise UserError(f"device {name}: not on this machine; use cpu, or cuda with a GPU") from None
    return device


def load_model(
    path: str | Path, device: torch.device | str = "cpu"
) -> tuple[PromptableModel, AdaptationPlan]:
    """A fine-tuned model in eval mode and its plan.

    Raises UserError, one line, where there is no such device, the folder holds no such model or its weights
    are not those its plan states.
    """
    device = device_of(device)
    weights, plan_path = find_model(path)
    plan = read_plan(plan_path)
    if plan.head is None or plan.head.get("kind") != "promptable":
        raise UserError(f"{plan_path}: names no promptable head; give a model that `medfm finetune` wrote")
    try:
        head = HeadConfig.model_validate(plan.head)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise UserError(
            f"{plan_path}: head.{field}: {first['msg']}; the model is of another version of medfm"
        ) from None
    net = PromptableModel(head, Encoder(plan.architecture) if head.encoder else None)
    try:
        state = load_file(weights)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{weights}: cannot be read as safetensors ({error}); copy it again") from None
    own = net.state_dict()
    wrong = [name for name in own if name not in state or state[name].shape != own[name].shape]
    wrong += [name for name in state if name not in own]
    if wrong:
        raise UserError(
            f"{weights}: is not the architecture that its {PLAN_FILE} states ({len(wrong)} of "
            f"{len(own)} tensors differ, first {wrong[0]}); find the plan that belongs to it"
        )
    net.load_state_dict(state)
    return net.to(device).eval(), plan
