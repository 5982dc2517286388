"""Processes: starting and ending them as one group, and the few collectives the engine itself uses."""

from __future__ import annotations

import atexit
import contextlib
import json
import logging
import os
import random
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from engine.errors import UserError
from engine.recipe import EngineConfig
from engine.signals import die_with_parent


@dataclass(frozen=True)
class World:
    """This process among all of them."""

    rank: int
    size: int
    local_rank: int
    device: torch.device

    def sum(self, values: Sequence[Tensor | float]) -> list[float]:
        """Element-wise sum over ranks, in float64; the same bits on every rank.

        Takes 0-d tensors on the device and plain numbers. The host waits for the device once, at the end.
        """
        numbers = torch.tensor([v for v in values if not isinstance(v, Tensor)], dtype=torch.float64)
        if self.device.type == "cuda":  # from pinned memory a copy is queued; any other would be waited for
            numbers = numbers.pin_memory().to(self.device, non_blocking=True)
        number = iter(numbers.unbind())
        vector = torch.stack([v.double() if isinstance(v, Tensor) else next(number) for v in values])
        dist.all_reduce(vector)
        return [float(v) for v in vector.tolist()]

    def all_agree(self, fine: bool) -> bool:
        """True where every rank says so; also a barrier."""
        return self.sum([0.0 if fine else 1.0])[0] == 0.0

    def barrier(self) -> None:
        """Wait for every rank."""
        self.all_agree(True)

    def from_first(self, value: Any) -> Any:
        """Rank 0's JSON value, on every rank (no pickle)."""
        return self.gather(value if self.rank == 0 else None)[0]

    def gather(self, value: Any) -> list[Any]:
        """Every rank's JSON value, by rank, on every rank (no pickle)."""
        text = json.dumps(value).encode()
        sizes = self.sum([float(len(text)) if r == self.rank else 0.0 for r in range(self.size)])
        mine = torch.zeros(int(max(sizes)), dtype=torch.uint8, device=self.device)
        mine[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8).to(self.device)
        parts = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(parts, mine)
        return [json.loads(bytes(p[: int(n)].cpu().numpy())) for p, n in zip(parts, sizes, strict=True)]


def pick_device(config: EngineConfig) -> torch.device:
    """The device of this process: its own GPU, or the CPU.

    Raises UserError where CUDA is asked for and not there, and where this host has fewer GPUs than processes.
    """
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "engine.device: cuda was asked for, but this machine shows no CUDA device; use auto or cpu"
        )
    if config.device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    place, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if place >= gpus:
        here = int(os.environ.get("LOCAL_WORLD_SIZE", place + 1))
        raise UserError(
            f"{here} processes on this host with {gpus} GPU{'s' * (gpus > 1)}, and each needs its own: "
            f"start it with --processes {gpus}, or set engine.device cpu"
        )
    return torch.device("cuda", place)


def join(config: EngineConfig) -> World:
    """Join the processes torchrun started (or be the only one).

    The group serves every later call in this process, since DeepSpeed keeps its own reference to it, and is
    destroyed at exit: a gloo thread that outlives it aborts the interpreter now and then.
    """
    die_with_parent()
    device = pick_device(config)
    if config.threads:
        torch.set_num_threads(config.threads)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        os.environ["DS_ACCELERATOR"] = "cpu"
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
    seed_process(config.seed)
    os.environ.setdefault("LOCAL_RANK", "0")
    if not dist.is_initialized():
        backend, wait = "gloo", patience(config)
        if device.type == "cuda":
            backend = "cpu:gloo,cuda:nccl"
            # After 8 minutes in which the driver answers nothing PyTorch would abort without a word of ours.
            os.environ.setdefault("TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC", f"{wait.total_seconds():.0f}")
        if {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys():
            dist.init_process_group(backend, timeout=wait)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=wait)
        atexit.register(leave)
    return World(dist.get_rank(), dist.get_world_size(), int(os.environ["LOCAL_RANK"]), device)


def patience(config: EngineConfig) -> timedelta:
    """How long a collective may take: longer than the watchdog waits, which leaves the stacks; without one, a
    day."""
    return timedelta(minutes=config.hang_minutes + 10.0 if config.hang_minutes else 1440.0)


def leave() -> None:
    """Leave the group; harmless where there is none."""
    if dist.is_initialized():
        dist.destroy_process_group()


def stay(world: World) -> None:
    """Let the end of this process be all that the group hears of it; for a rank that fails alone. NCCL ends a
    group together: leaving it, this rank would wait for the others, and they wait for its next collective."""
    if world.device.type == "cuda":
        atexit.unregister(leave)


def seed_process(seed: int) -> None:
    """Seed every generator of the process; the same on all ranks, since no choice may depend on the rank."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - for code that still draws from the global generator


@contextlib.contextmanager
def untouched_generators(device: torch.device) -> Iterator[None]:
    """Give the process its random state back afterwards.

    device: this process's; left to itself PyTorch would open a context on every GPU of the machine.
    """
    python, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield
    random.setstate(python)
    np.random.set_state(numpy_state)  # noqa: NPY002


def import_deepspeed() -> Any:
    """Import DeepSpeed without its log lines and without the op it would otherwise compile when it starts.

    Nor does it load what is not used here, 3 s of every start: its autotuner would load MLflow, its Muon
    optimizer (which ZeRO looks at) PyTorch's compiler.
    """
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module="torch.distributed")
    os.environ.setdefault("DS_LOG_LEVEL", "error")
    modules: dict[str, Any] = sys.modules
    hidden = "mlflow" not in modules
    logging.disable(logging.WARNING)
    try:
        if hidden:
            modules["mlflow"] = None  # makes importing it an ImportError, which DeepSpeed expects
        import deepspeed
        import deepspeed.ops
        from deepspeed.runtime import compiler

        with patch.object(compiler, "compile", lambda: lambda function: function):
            import deepspeed.runtime.zero.muon.muon_optimizer
    finally:
        logging.disable(logging.NOTSET)
        if hidden:
            del modules["mlflow"]
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    for name in ("DeepSpeed", "deepspeed", "torch.distributed"):
        logging.getLogger(name).setLevel(logging.ERROR)
    return deepspeed
