"""Weights on disk: safetensors and a plan, nothing that can run code."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from model.encoder import Encoder
from model.errors import UserError
from model.plan import PLAN_FILE, AdaptationPlan, read_plan, write_plan

WEIGHTS_FILE = "encoder.safetensors"
MODEL_FILE = "model.safetensors"  # encoder and head of a fine-tuned model, encoder keys under "encoder."
ENCODER_PREFIX = "encoder."


@dataclass(frozen=True)
class LoadReport:
    """What a load did, by parameter name. mismatched: "name: shape in the file, not shape in the model"."""

    matched: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    mismatched: tuple[str, ...] = ()

    @property
    def complete(self) -> bool:
        """Every parameter came from the file, and nothing in the file was left over."""
        return not (self.missing or self.unexpected or self.mismatched)

    def __str__(self) -> str:
        total = len(self.matched) + len(self.missing) + len(self.mismatched)
        lines = [f"{len(self.matched)} of {total} tensors loaded"]
        for name in ("missing", "unexpected", "mismatched"):
            keys = getattr(self, name)
            if keys:
                lines.append(f"{len(keys)} {name}: {', '.join(keys[:4])}{', ...' if len(keys) > 4 else ''}")
        return "; ".join(lines)


def save_encoder(
    folder: str | Path, encoder: Encoder | Mapping[str, Tensor], plan: AdaptationPlan | str | None = None
) -> Path:
    """Write encoder.safetensors and plan.json into `folder` (made if needed); returns the folder.

    encoder: the module, or its state dict (float32, on any device). plan: or its `plan_text`; needed with a
    state dict; for a module it defaults to the plan it was loaded with, else to a bare plan of its
    configuration. Each file appears in one step, the plan last, so that a killed save leaves no folder that
    loads.
    """
    folder = Path(folder)
    if isinstance(encoder, Encoder):
        plan = plan or encoder.plan or AdaptationPlan(architecture=encoder.config)
        state: Mapping[str, Tensor] = encoder.state_dict()
    else:
        state = encoder
    if plan is None:
        raise ValueError("save_encoder needs a plan with a state dict")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / PLAN_FILE).unlink(missing_ok=True)
    save_tensors(folder / WEIGHTS_FILE, state)
    write_plan(folder / PLAN_FILE, plan)
    return folder


def save_tensors(path: Path, state: Mapping[str, Tensor]) -> None:
    """Write a state dict as safetensors in one step, as readable as any new file (the library says 0600)."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    save_file({name: tensor.detach().contiguous().cpu() for name, tensor in state.items()}, temporary)
    umask = os.umask(0)
    os.umask(umask)
    temporary.chmod(0o666 & ~umask)
    os.replace(temporary, path)


def find_weights(path: str | Path) -> tuple[Path, Path]:
    """The weights file and the plan that `path` means.

    path: a .safetensors file with plan.json beside it; a folder that holds encoder.safetensors (or a
    fine-tuned model's model.safetensors) and plan.json; or a run folder, of which the newest complete
    checkpoint is taken.
    """
    path = Path(path)
    if path.is_file():
        if path.suffix != ".safetensors":
            raise UserError(
                f"{path}: only safetensors are read (pickled weights can run code); convert it first"
            )
        return path, path.with_name(PLAN_FILE)
    if not path.is_dir():
        raise UserError(f"{path}: no such file or folder; give a folder with {WEIGHTS_FILE}, or a run folder")
    for name in (WEIGHTS_FILE, MODEL_FILE):
        if (path / name).is_file():
            return path / name, path / PLAN_FILE
    updates = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    for folder in sorted(updates.glob("update-*"), key=lambda item: item.name, reverse=True):
        if (folder / "complete.json").is_file() and (folder / WEIGHTS_FILE).is_file():
            return folder / WEIGHTS_FILE, folder / PLAN_FILE
    raise UserError(
        f"{path}: holds neither {WEIGHTS_FILE} nor a complete checkpoints/update-*; nothing to load"
    )


def read_state(path: Path) -> dict[str, Tensor]:
    """Encoder tensors of a weights file; of a fine-tuned model, those of its encoder."""
    try:
        state = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{path}: cannot be read as safetensors ({error}); it is damaged, copy it again"
        ) from None
    if any(name.startswith(ENCODER_PREFIX) for name in state):
        return {
            name.removeprefix(ENCODER_PREFIX): tensor
            for name, tensor in state.items()
            if name.startswith(ENCODER_PREFIX)
        }
    return state


def load_state(encoder: Encoder, state: Mapping[str, Tensor]) -> LoadReport:
    """Copy what fits by name and shape into the encoder, and say what did and what did not."""
    own = encoder.state_dict()
    fitting = {
        name: tensor for name, tensor in state.items() if name in own and tensor.shape == own[name].shape
    }
    report = LoadReport(
        matched=tuple(name for name in own if name in fitting),
        missing=tuple(name for name in own if name not in state),
        unexpected=tuple(name for name in state if name not in own),
        mismatched=tuple(
            f"{name}: {tuple(state[name].shape)} in the file, not {tuple(own[name].shape)}"
            for name in own
            if name in state and name not in fitting
        ),
    )
    on_meta = encoder.norm.weight.is_meta  # has no storage to copy into: takes the tensors themselves
    encoder.load_state_dict(fitting, strict=False, assign=on_meta)
    return report


def load_encoder(
    path: str | Path,
    strict: bool = True,
    *,
    channels: int | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Encoder:
    """Encoder in eval mode, with `plan` and `load_report` set.

    path: see `find_weights`. strict: refuse weights that do not match the plan's architecture tensor for
    tensor; otherwise load what fits, and read `encoder.load_report`. channels: input channels, where they
    differ from the stored ones the stem weights are repeated and divided (`inflate_channels`). Raises
    UserError, one line, for everything that is wrong.
    """
    weights, plan_path = find_weights(path)
    plan = read_plan(plan_path)
    state = read_state(weights)
    config = plan.architecture
    if channels is not None and channels != config.channels:
        if config.channels != 1:
            raise UserError(
                f"{weights}: takes {config.channels} channels; only one channel can become {channels}"
            )
        state = inflate_channels(state, channels)
        config = config.model_copy(update={"channels": channels})
        plan = plan.model_copy(update={"architecture": config})
    # drawing random weights only to replace them takes most of a minute for the largest size
    with torch.device("meta" if strict else "cpu"):
        encoder = Encoder(config)
    report = load_state(encoder, state)
    if not report.matched or (strict and not report.complete):
        raise UserError(
            f"{weights}: is not the architecture that its {PLAN_FILE} states ({report}); "
            "find the plan that belongs to it"
        )
    encoder.plan, encoder.load_report = plan, report
    return encoder.to(device=device, dtype=dtype).eval()


def inflate_channels(state: Mapping[str, Tensor], channels: int) -> dict[str, Tensor]:
    """State dict for k input channels from one for a single channel: stem weights repeated k times and
    divided by k.

    k equal channels then give the single channel's features.
    """
    return {
        name: tensor.repeat(1, channels) / channels
        if name.startswith("stems.") and name.endswith(".weight")
        else tensor
        for name, tensor in state.items()
    }
