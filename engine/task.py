"""What a stage of training gives the engine."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from pydantic import BaseModel
from torch import Tensor, nn

Metrics = Mapping[str, tuple[Tensor | float, Tensor | float]]


class Writer(Protocol):
    """Where evaluation puts what it finds; TensorBoard's `SummaryWriter` on rank 0, silent on the others."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None: ...

    def add_image(self, tag: str, img_tensor: Any, global_step: int, *, dataformats: str = "CHW") -> None: ...

    def add_figure(self, tag: str, figure: Any, global_step: int) -> None: ...


class DataLog(Protocol):
    """What a run tells of its data."""

    def describe(self) -> str:
        """Lines said at the start."""
        ...

    def counts(self) -> dict[str, float]:
        """Counts of this process so far, of the same names on all ranks; their sums are logged as
        `data/NAME`."""
        ...

    def check(self, sums: Mapping[str, float]) -> None:
        """Given those sums on every rank alike; raises `UserError` to end the run."""
        ...

    def notices(self) -> list[str]:
        """What is new since the last call, for the rank's own log."""
        ...


class Task(Protocol):
    """A model with its data. The engine owns optimisation, precision, sharding, saving and logging.

    `model(batch)` returns `(loss, metrics)`: the loss a 0-d float32 tensor already divided by the count of
    the *whole* update over all ranks and micro-steps, so that the sum over them is the update's loss;
    `metrics` maps a name to `(sum, count)`, whose sums over ranks and micro-steps the engine divides and
    logs. Every parameter takes part in every call (a stem or head without input gets a zero-row tensor),
    otherwise ranks deadlock at ZeRO 1 to 3. The forward pass runs under bfloat16 autocast at precision bf16;
    parameters and gradients are float32.

    Optional hooks, used when present: `model.set_checkpointing(bool)`, `model.blocks_to_compile() ->
    Iterable[nn.Module]`, `model.calls_vary = True` where the number or order of calls of its parts
    depends on the data (ZeRO 3 gathers a part's weights from all ranks at its call, so it is refused);
    `data: DataLog`; `flops_per_update: int`, operations of the forward and backward passes of one update
    over all ranks (not those done again to save memory), for `rate/tflops` of each rank and `rate/mfu`, its
    share of what matrix products reach on the device; `tokens_per_update: int`, token slots of an update over
    all ranks; `findings() -> str`, what the last `evaluate` found, as lines for people;
    `sample_keys(position) -> list[str]`, the samples of an update, for the report of a bad one;
    `activation_bytes(checkpointing: bool) -> int`, most bytes of activations of a micro-step of a rank
    (`traces_activations = True` where that takes seconds: on a CPU it is asked when memory has run out), and
    `batch_fields: str`, recipe fields that make a micro-step smaller, for what is said about memory.
    """

    model: nn.Module
    samples_per_update: int

    def batches(self, start_update: int, rank: int, world: int) -> Iterator[Any]:
        """Endless batches from position `start_update`, `micro_steps(world)` consecutive ones per update, in
        order."""
        ...

    def micro_steps(self, world: int) -> int:
        """Forward and backward passes per update on each rank."""
        ...

    def recipe(self) -> BaseModel:
        """The resolved recipe; its identity fields guard a resume."""
        ...

    def data_identity(self) -> dict[str, str]:
        """Which sequence of samples a position counts in: hash of the manifest, version of the order."""
        ...

    def evaluate(self, update: int, rank: int, world: int, writer: Writer) -> dict[str, float]:
        """Called on all ranks with the model in eval mode and gradients off; returns scalars to log (rank 0's
        are logged)."""
        ...

    def pictures(self, update: int, rank: int, world: int, writer: Writer) -> None:
        """Called after `evaluate`, under the same conditions."""
        ...

    def export(self, state: Mapping[str, Tensor], folder: Path) -> None:
        """Write weights for use (`encoder.safetensors`, `plan.json`, ...) from the float32 CPU state dict;
        rank 0 only."""
        ...

    def optimizer_groups(self) -> list[dict[str, Any]]:
        """AdamW parameter groups: `params`, and if wanted `weight_decay` and `lr_scale` (a factor on the
        schedule)."""
        ...
