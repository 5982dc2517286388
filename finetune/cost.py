"""What a micro-step of fine-tuning takes in memory: the training's own code, run on tensors without data.

Shapes depend on the recipe and on the grids of the data alone, never on what a window shows or where a person
clicks. So forward and backward pass run here as they do in training, on fake tensors, which have a device and
a size but no memory; what they would hold at the worst moment is counted.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from finetune.batch import Batch, Windows, window_size
from finetune.clicks import ClickTraining, People
from finetune.network import Scale, Triple
from finetune.promptable import Features
from finetune.prompts import Prompts


class Shape(NamedTuple):
    """Windows that are convolved alike: how many, their size and scales, in stem order."""

    windows: int
    geometry: str
    size: Triple
    scales: tuple[Scale, ...]

    def elements(self, widths: Sequence[int]) -> int:
        """Values of a feature map at every scale, by which shapes of one geometry compare."""
        total, volume = 0, float(np.prod(self.size))
        for scale, width in zip(self.scales, widths):
            volume /= np.prod(scale.stride)
            total += int(volume) * width
        return self.windows * total


def largest_shape(
    count: int,
    geometry: str,
    shapes: np.ndarray,
    spacings: np.ndarray,
    window: Triple,
    patch: Triple,
    widths: Sequence[int],
) -> Shape:
    """The shape that takes most among the windows of images.

    Args:
        count: windows at a time.
        geometry: of all the images.
        shapes, spacings: (n, 3) voxels and mm, stem order.
        window: voxels asked for.
        patch: of a token.
        widths: channels at each scale.
    """
    ratios = np.round(spacings / spacings.min(axis=1, keepdims=True), 2)
    kinds = np.unique(np.column_stack([shapes == 1, ratios]), axis=0)
    found = [
        Shape(count, geometry, *window_size(window, [1 if f else 2 for f in kind[:3]], kind[3:], patch))
        for kind in kinds
    ]
    return max(found, key=lambda shape: shape.elements(widths))


def micro_step_bytes(
    training: ClickTraining,
    shapes: Sequence[Shape],
    *,
    device: torch.device,
    precision: str,
    checkpointing: bool,
) -> int:
    """Most bytes that stand at a time in a micro-step with these windows and as many prompts as there may be.

    Weights and their bf16 copies are not counted, as though these stood to the end; gradients are, since they
    come while activations still stand.

    Args:
        training: on any device; it is left as it is.
        shapes: windows of the micro-step.
        device: where it will run.
        precision: "bf16" or "fp32".
        checkpointing: blocks of the encoder are computed again.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode  # takes a second to load

    trace = _Trace(training, shapes)
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with fake:
        tensors: dict[str, Tensor] = {
            name: nn.Parameter(torch.empty_like(p, device=device), requires_grad=p.requires_grad)
            for name, p in trace.named_parameters()
        }
        tensors |= {name: torch.empty_like(b, device=device) for name, b in trace.named_buffers()}
    encoder = cast(Any, training.net.encoder)
    before = encoder is not None and encoder.checkpointing
    trace.set_checkpointing(checkpointing)
    try:
        with fake, _Live(tensors.values()) as live:
            batch = Batch(0, [_windows(shape, training.net.config.channels, device) for shape in shapes])
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                loss, _ = torch.func.functional_call(trace, tensors, (batch,))
            loss.backward()
    finally:
        trace.set_checkpointing(before)
    return live.peak - live.copies


class _Trace(ClickTraining):
    """The training with the most rounds, and prompts that do not depend on data."""

    def __init__(self, training: ClickTraining, shapes: Sequence[Shape]) -> None:
        super().__init__(training.net, training.config, training.samples_per_update, training.seed)
        self._left = [shape.scales for shape in shapes]

    def nothing(self) -> Tensor:
        trained = [p for p in self.parameters() if p.requires_grad]
        return cast(Tensor, _Nothing.apply(*trained))

    def rounds(self, update: int) -> int:
        return self.config.rounds[1]

    def people(self, windows: Windows) -> People:
        return _Boxes(windows)

    def features(self, windows: Windows) -> Features:
        return self.net.encode(
            windows.image, windows.spacing, windows.geometry, windows.axes, windows.valid, self._left.pop(0)
        )


class _Nothing(torch.autograd.Function):
    """The 0 of `ClickTraining.nothing` in one step, where it would be half of all operators."""

    @staticmethod
    def forward(ctx: Any, *parameters: Tensor) -> Tensor:
        ctx.shapes = [p.shape for p in parameters]
        return parameters[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return tuple(grad.expand(shape) for shape in ctx.shapes)


class _Boxes(People):
    """Everybody gives one more box each time. A box costs what a click costs, and one token more."""

    def __init__(self, windows: Windows) -> None:
        self.spacing, self._given = windows.spacing, 0

    def speak(self, previous: Tensor | None) -> Prompts:
        self._given += 1
        rows, given, device = len(self.spacing), self._given, self.spacing.device
        return Prompts(
            torch.zeros(rows, 0, 3, device=device),
            torch.zeros(rows, 0, dtype=torch.int64, device=device),
            torch.zeros(rows, given, 2, 3, device=device),
            torch.ones(rows, given, dtype=torch.bool, device=device),
            self.spacing,
        )


class _Live(TorchDispatchMode):
    """Counts the storages that operators make, from making to release.

    Attributes:
        peak: the most bytes at a time.
        copies: bytes of all copies of weights that autocast makes.

    Args:
        weights: what is there before; views of it count nothing.
    """

    def __init__(self, weights: Iterable[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = self.copies = 0
        self._weights = list(weights)
        self._seen: dict[int, Any] = {w.untyped_storage()._cdata: w for w in self._weights}
        self._matrices = {w.untyped_storage()._cdata for w in self._weights if w.requires_grad and w.ndim > 1}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.namespace == "prim":  # most calls: what device a tensor is on
            return out
        if func is torch.ops.aten._to_copy.default and self._is_matrix(args[0]):
            self.copies += out.untyped_storage().nbytes()
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._note(tensor.untyped_storage())
        self.peak = max(self.peak, self.now)
        return out

    def _is_matrix(self, tensor: Tensor) -> bool:
        """Whether it is a whole weight, whose copy autocast keeps until the end of the pass."""
        storage = tensor.untyped_storage()
        return storage._cdata in self._matrices and storage.nbytes() == tensor.numel() * tensor.element_size()

    def _note(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._seen:
            self._seen[key] = weakref.ref(storage, partial(self._gone, key, size))
            self.now += size

    def _gone(self, key: int, size: int, _: object) -> None:
        del self._seen[key]
        self.now -= size


def _windows(shape: Shape, channels: int, device: torch.device) -> Windows:
    n, size = shape.windows, shape.size
    mark = torch.ones(n, *size, dtype=torch.bool, device=device)
    return Windows(
        image=torch.zeros(n, channels, *size, device=device),
        truth=mark,
        known=mark.clone(),
        valid=mark.clone(),
        spacing=torch.ones(n, 3, device=device),
        weight=torch.ones(n, device=device),
        index=torch.zeros(n, dtype=torch.int64, device=device),
        geometry=shape.geometry,
        axes=(0, 1, 2),
    )
