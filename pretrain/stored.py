"""Kept checkpoints of a pretraining run, found and read back by one process beside the run."""

from __future__ import annotations

from pathlib import Path

import torch
import xxhash
from safetensors import SafetensorError
from torch import Tensor

from engine import checkpoint
from engine.errors import UserError
from engine.recipe import load_recipe
from pretrain.mae import MaskedAutoencoder
from pretrain.recipe import PretrainRecipe


class Gone(Exception):
    """A checkpoint was deleted while it was read, as a run deletes all but the newest few."""


def kept(run: Path) -> list[Path]:
    """Folders of the complete checkpoints, oldest first."""
    return sorted(p.parent for p in (run / "checkpoints").glob("update-*/complete.json"))


def update_of(folder: Path) -> int:
    """The update a checkpoint was saved after."""
    return int(folder.name.removeprefix("update-"))


def fingerprint(folder: Path) -> str:
    """Hash of a checkpoint's list of hashes: another one where any of its bytes differ. Raises `Gone`."""
    try:
        return xxhash.xxh3_128_hexdigest((folder / "complete.json").read_bytes())
    except FileNotFoundError:
        raise Gone(folder.name) from None


def recipe_of(run: Path) -> PretrainRecipe:
    """The recipe a run was started with. Raises UserError, also for a run of another stage."""
    return load_recipe(run / "recipe.yaml", [], PretrainRecipe)


def read_network(folder: Path, recipe: PretrainRecipe, device: torch.device) -> MaskedAutoencoder:
    """The network of a checkpoint in eval mode, after every byte was checked.

    Raises `Gone` where the folder disappears meanwhile, UserError where it is damaged or of another network.
    """
    network = MaskedAutoencoder(recipe.encoder, recipe.objective, crops_per_update=1)
    state = _read_state(folder)
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        lines = [" ".join(line.split()) for line in str(error).splitlines()]
        raise UserError(f"{folder}: not the network of its recipe.yaml ({' '.join(lines[1:2])})") from None
    return network.to(device).eval()


def _read_state(folder: Path) -> dict[str, Tensor]:
    try:
        if fault := checkpoint.fault(folder):
            raise UserError(f"{folder}: damaged ({fault})")
        return checkpoint.Checkpoint(folder).model_state()
    except (OSError, SafetensorError, UserError):
        if not folder.is_dir():
            raise Gone(folder.name) from None
        raise
