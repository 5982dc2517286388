"""DeepSpeed's partitions seen as named slices.

Whatever the ZeRO stage, a rank owns some flat ranges of some parameters, with their float32 master and both
Adam moments. This file is the only one that knows where DeepSpeed keeps them. It also applies an update, or
drops it: DeepSpeed judges overflow differently at each stage (not at all at stage 0 in float32), so the
engine judges once and tells it. And it puts a checkpoint back: when a run resumes, and when it goes back.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from engine.checkpoint import Checkpoint

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Slice:
    """Elements `offset … offset + numel` of the flattened parameter `name`; the tensors are 1-d views, not
    copies."""

    name: str
    shape: tuple[int, ...]
    offset: int
    numel: int
    master: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor


class Partition(ABC):
    """What one rank owns of the trainable parameters, at one ZeRO stage.

    Args:
        engine: the DeepSpeed engine, before its first update.
        model: the task's, which the engine wraps.
        rank, world: this process and the number of them.
    """

    def __init__(self, engine: Any, model: nn.Module, rank: int, world: int) -> None:
        self.engine, self.model, self.rank, self.world = engine, model, rank, world
        self.names = {parameter: name for name, parameter in model.named_parameters()}
        self.adam: torch.optim.Optimizer = engine.basic_optimizer
        self._prepare()

    @abstractmethod
    def slices(self) -> Iterator[Slice]:
        """Every slice this rank owns; over all ranks they cover each trainable parameter once."""

    def held(self) -> Iterator[Slice]:
        """Every slice this rank steps, its own or not."""
        return self.slices()

    @abstractmethod
    def gradients(self) -> list[Tensor]:
        """Owned parts of the reduced gradient, between the last backward pass of an update and `apply`."""

    @abstractmethod
    def flat_parameters(self) -> list[Tensor]:
        """The tensors AdamW steps on this rank; its state is keyed by them."""

    @abstractmethod
    def apply(self, scale: float) -> None:
        """Scale the gradient (clipping) and let DeepSpeed take the optimizer step."""

    @abstractmethod
    def drop(self) -> None:
        """Forget the gradient: no weight, moment or step count changes."""

    @torch.no_grad()
    def load(self, found: Checkpoint) -> None:
        """Put back masters, moments, step count, parameters and buffers, on all ranks together; between two
        updates.

        Raises:
            UserError: the checkpoint lacks elements of a parameter.
        """
        for part in self.held():
            for kind in ("master", *MOMENTS):
                target: Tensor = getattr(part, kind)
                target.copy_(found.read(f"{part.name}|{kind}", part.offset, part.numel))
        for parameter in self.flat_parameters():
            # Of Adam, for its bias correction.
            self.adam.state[parameter]["step"].fill_(float(found.state["update"]))
        for name, buffer in persistent_buffers(self.model):
            buffer.copy_(found.read(f"{name}|buffer", 0, buffer.numel()).view_as(buffer))
        self._show_masters()

    @abstractmethod
    def _show_masters(self) -> None:
        """Copy the masters to the parameters that the model computes with, where these are others."""

    def _prepare(self) -> None:
        """Make AdamW's state now instead of at its first step, so that it can be saved and loaded at any
        time."""
        for parameter in self.flat_parameters():
            self.adam.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
                "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
            }

    def _slice(
        self, p: nn.Parameter, shape: torch.Size, offset: int, flat: Tensor, start: int, numel: int
    ) -> Slice:
        state = self.adam.state[flat]
        views = [
            t.detach().view(-1).narrow(0, start, numel) for t in (flat, state["exp_avg"], state["exp_avg_sq"])
        ]
        return Slice(self.names[p], tuple(shape), offset, numel, *views)


class Replicated(Partition):
    """Stage 0: every rank holds everything; parameters are dealt out in turn for saving and for the norm."""

    def flat_parameters(self) -> list[Tensor]:
        return [p for group in self.adam.param_groups for p in group["params"]]

    def _trained(self) -> list[nn.Parameter]:
        return [p for p in self.names if p.requires_grad]

    def slices(self) -> Iterator[Slice]:
        return islice(self.held(), self.rank, None, self.world)

    def held(self) -> Iterator[Slice]:
        for p in self._trained():
            yield self._slice(p, p.shape, 0, p, 0, p.numel())

    def _show_masters(self) -> None:
        """They are the parameters."""

    def gradients(self) -> list[Tensor]:
        return [p.grad for p in self._trained()[self.rank :: self.world] if p.grad is not None]

    def apply(self, scale: float) -> None:
        if scale != 1.0:
            torch._foreach_mul_([p.grad for p in self.flat_parameters() if p.grad is not None], scale)
        self.engine.step()

    def drop(self) -> None:
        take_step = self.engine.optimizer.step
        self.engine.optimizer.step = lambda *_, **__: None
        try:
            self.engine.step()
        finally:
            self.engine.optimizer.step = take_step


class Sharded(Partition):
    """Stages 1 and 2: parameters of a group lie end to end in one flat tensor, cut evenly over the ranks."""

    def flat_parameters(self) -> list[Tensor]:
        return list(self.engine.optimizer.single_partition_of_fp32_groups)

    def slices(self) -> Iterator[Slice]:
        zero = self.engine.optimizer
        for group, flat in zip(zero.bit16_groups, zero.single_partition_of_fp32_groups, strict=True):
            for p in group:
                if (owned := p._hp_mapping) is not None:
                    source, target = owned.lp_fragment_address, owned.hp_fragment_address
                    yield self._slice(p, p.shape, source.start, flat, target.start, source.numel)

    def gradients(self) -> list[Tensor]:
        averaged = self.engine.optimizer.averaged_gradients
        return [g for group in averaged.values() if group is not None for g in group if g is not None]

    def _show_masters(self) -> None:
        self.engine.optimizer.update_lp_params()

    def apply(self, scale: float) -> None:
        if scale != 1.0:
            torch._foreach_mul_(self.gradients(), scale)
        self.engine.step()

    def drop(self) -> None:
        zero = self.engine.optimizer
        zero.check_grad_overflow, zero.has_overflow = True, lambda partition_gradients=True: True
        try:
            self.engine.step()
        finally:
            zero.check_grad_overflow = False
            del zero.has_overflow


class Scattered(Partition):
    """Stage 3: every parameter is cut evenly over the ranks, the last parts padded; a rank's parts lie end to
    end in sub-groups."""

    def flat_parameters(self) -> list[Tensor]:
        return list(self.engine.optimizer.fp32_partitioned_groups_flat)

    def slices(self) -> Iterator[Slice]:
        zero = self.engine.optimizer
        for group in zero.fp16_groups:
            for p in group:
                index, start, padded = zero.grad_position[zero.get_param_id(p)]
                offset = self.rank * int(p.ds_tensor.ds_numel)
                numel = min(int(padded), int(p.ds_numel) - offset)
                if numel > 0:
                    flat = zero.fp32_partitioned_groups_flat[index]
                    yield self._slice(p, p.ds_shape, offset, flat, int(start), numel)

    def gradients(self) -> list[Tensor]:
        averaged = self.engine.optimizer.averaged_gradients
        return [g for group in averaged.values() if group is not None for g in group if g is not None]

    def load(self, found: Checkpoint) -> None:
        # Small parameters stay whole between updates; they are gathered again when they are next used.
        self.engine.optimizer._partition_all_parameters()
        super().load(found)

    @torch.no_grad()
    def _show_masters(self) -> None:
        zero = self.engine.optimizer
        for parts, masters in zip(
            zero.fp16_partitioned_groups_flat, zero.fp32_partitioned_groups_flat, strict=True
        ):
            parts.copy_(masters)
        if masters.is_cuda:  # DeepSpeed gathers in a stream of its own, which does not wait for this one
            torch.cuda.current_stream().synchronize()

    def apply(self, scale: float) -> None:
        if scale != 1.0:
            torch._foreach_mul_(self.gradients(), scale)
        self._step(1.0)

    def drop(self) -> None:
        self._step(math.nan)

    def _step(self, norm: float) -> None:
        """DeepSpeed takes the norm it would compute again (two more reductions) from here; NaN makes it drop
        the update. The norm lies on the host, so that DeepSpeed's look at it does not wait for the device."""
        zero = self.engine.optimizer
        zero._get_norm_groups = lambda: [norm]
        try:
            self.engine.step()
        finally:
            del zero._get_norm_groups


def partition_of(engine: Any, model: nn.Module, stage: int, rank: int, world: int) -> Partition:
    """The partition of a DeepSpeed engine at a ZeRO stage."""
    kind = Replicated if stage == 0 else Scattered if stage == 3 else Sharded
    return kind(engine, model, rank, world)


def persistent_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The buffers that belong to a model's state."""
    kept = model.state_dict().keys()
    return ((name, buffer) for name, buffer in model.named_buffers() if name in kept)
