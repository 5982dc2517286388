"""Compiling a model's blocks one by one with torch.compile."""

from __future__ import annotations

import os
import shutil
import sysconfig
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch import nn

from engine.errors import UserError
from engine.recipe import EngineConfig

GRAPHS_TO_EXPECT = 48  # kinds of block times shapes in a batch; more means that shapes change all the time
RECOMPILE_LIMIT = 128  # of one piece of code, which blocks of one kind share; PyTorch gives 8


class Compilation:
    """Switches compilation on where the recipe and the device ask for it, and watches it.

    Blocks are compiled when they are first called, once for each shape of a batch (layouts are constants of
    the code). State-dict keys do not change. `block.compile()` of PyTorch is used, so that blocks of one kind
    share what was compiled.

    Args:
        model: gives its blocks through `blocks_to_compile()`.
        config: `compile` and `zero_stage` are looked at.
        device: where the model will run.

    Raises:
        UserError: compilation is asked for, and the model names no blocks, or the machine cannot do it.
    """

    def __init__(self, model: nn.Module, config: EngineConfig, device: torch.device) -> None:
        hook = getattr(model, "blocks_to_compile", None)
        blocks: list[nn.Module] = list(hook()) if callable(hook) else []
        reason = ""
        if config.compile is False:
            reason = "engine.compile is false"
        elif config.compile == "auto":
            if device.type != "cuda":
                reason = "engine.compile auto does so on CUDA only"
            elif config.zero_stage == 3:
                reason = "engine.compile auto does so at ZeRO 0 to 2"
            elif not blocks:
                reason = "the model names none"
            elif lacking := missing_tool():
                reason = f"{lacking}; updates are slower and take more memory"
        elif not blocks:
            raise UserError(
                "engine.compile: this model names no blocks to compile; leave it at auto or set it to false"
            )
        elif device.type == "cuda" and (lacking := missing_tool()):
            raise UserError(f"engine.compile: {lacking}; install it, or set engine.compile to auto or false")
        self.on = not reason
        self.text = f"blocks are not compiled: {reason}" if reason else f"{len(blocks)} blocks are compiled"
        self._told = GRAPHS_TO_EXPECT
        if self.on:
            import torch._dynamo  # 2 s, so only where it is needed

            torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
            for block in blocks:
                block.compile(dynamic=False)

    def paused(self) -> AbstractContextManager[object]:
        """Inside, blocks run uncompiled: evaluations have shapes of their own."""
        return torch.compiler.set_stance("force_eager") if self.on else nullcontext()

    def warning(self) -> str | None:
        """A line where there are more compiled graphs than shapes should need; again when they have
        doubled."""
        if not self.on or (graphs := compiled_graphs()) <= self._told:
            return None
        self._told = 2 * graphs
        return (
            f"blocks were compiled {graphs} times, so their shapes change from update to update; past "
            f"{RECOMPILE_LIMIT} new shapes run uncompiled; set engine.compile false, or see the reasons with "
            "TORCH_LOGS=recompiles"
        )


def missing_tool() -> str:
    """What this machine lacks for compiling on CUDA, "" for nothing.

    Triton builds its link to the driver from C when it first runs; that would fail in the first update.
    """
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "this machine has no C compiler (gcc or clang)"
    scheme = sysconfig.get_default_scheme()
    folder = sysconfig.get_paths("posix_prefix" if scheme == "posix_local" else scheme)["include"]
    if not (Path(folder) / "Python.h").exists():
        return f"this Python has no headers (Python.h is not in {folder}; Debian: python3-dev)"
    return ""


def compiled_graphs() -> int:
    """Graphs torch.compile has made in this process."""
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])
