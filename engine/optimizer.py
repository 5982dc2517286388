"""AdamW and the DeepSpeed engine around a task's model."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from engine.distributed import World, import_deepspeed, patience
from engine.errors import UserError
from engine.memory import BUCKET
from engine.recipe import EngineConfig
from engine.task import Task
from engine.zero_state import Partition, partition_of


class Autocast(nn.Module):
    """The task's model under bfloat16 autocast.

    Weights, gradients and their reduction stay float32 (so results depend little on the world size); matrix
    products and convolutions run in bfloat16. The models keep norms, positions and losses in float32
    themselves.
    """

    def __init__(self, model: nn.Module, device: torch.device, enabled: bool) -> None:
        super().__init__()
        self.model = model
        self._context = {"device_type": device.type, "dtype": torch.bfloat16, "enabled": enabled}

    def forward(self, batch: Any) -> Any:
        """The model's `(loss, metrics)`."""
        with torch.autocast(**self._context):  # type: ignore[arg-type]
            return self.model(batch)


def stage_of(config: EngineConfig, world: World) -> int:
    """The ZeRO stage in use: one process has nothing to shard, and is spared the copies that sharding
    makes."""
    return config.zero_stage if world.size > 1 else 0


def wrap(task: Task, config: EngineConfig, world: World) -> tuple[Any, Partition]:
    """Build AdamW and the DeepSpeed engine; returns the engine and what this rank owns of the parameters.

    Raises UserError for ZeRO 3 over several ranks with a model whose calls depend on the data.
    """
    stage = stage_of(config, world)
    if stage == 3 and getattr(task.model, "calls_vary", False):
        raise UserError(
            "engine.zero_stage 3: ranks call this model's parts in different numbers, and ZeRO 3 gathers "
            "weights at each call; use stage 0, 1 or 2"
        )
    deepspeed = import_deepspeed()
    _share_group(deepspeed.utils.groups, config, world)
    groups = [g for g in task.optimizer_groups() if g["params"]]
    adam = torch.optim.AdamW(
        groups,
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=True,
    )
    numel = sum(p.numel() for p in task.model.parameters())
    zero: dict[str, Any] = {"stage": stage}
    if stage:
        zero["reduce_bucket_size"] = min(BUCKET, max(numel, 1024))
    if stage in (1, 2):
        zero |= {"allgather_bucket_size": BUCKET, "compute_grad_norm": False}
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": task.micro_steps(world.size),
        "gradient_clipping": 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": None,
        "wall_clock_breakdown": False,
        # On by default, and it waits for the device before every forward pass and after every update.
        "timers": {"throughput": {"enabled": False}},
    }
    model = Autocast(task.model, world.device, config.precision == "bf16").to(world.device)
    engine, *_ = deepspeed.initialize(model=model, optimizer=adam, config=settings, dist_init_required=False)
    if stage == 0 and world.size == 1:
        engine.enable_backward_allreduce = False  # it would flatten the gradient for nobody
    return engine, partition_of(engine, task.model, stage, world.rank, world.size)


def _share_group(groups: Any, config: EngineConfig, world: World) -> None:
    """Make the group of all ranks that DeepSpeed would make for itself, whose collectives would then fail
    after half an hour, whatever the watchdog is set to."""
    if groups._WORLD_GROUP is None:
        groups._WORLD_GROUP = dist.new_group(range(world.size), timeout=patience(config))


def whole_model(engine: Any) -> AbstractContextManager[Any]:
    """Inside, every rank holds every parameter, so that evaluation need not run in step on all ranks (ZeRO
    3)."""
    if engine.zero_optimization_stage() < 3:
        return nullcontext()
    context: AbstractContextManager[Any] = import_deepspeed().zero.unwrap_model_for_generation(engine)
    return context


def switch_on_checkpointing(model: nn.Module) -> None:
    """Let the model recompute its blocks in the backward pass; UserError where it cannot."""
    switch = getattr(model, "set_checkpointing", None)
    if not callable(switch):
        raise UserError(
            "engine.activation_checkpointing: this model cannot recompute its blocks; set it false"
        )
    switch(True)
