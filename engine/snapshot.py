"""A copy of what a rank owns, in host memory of its own, from which a checkpoint is written while training
goes on."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from engine.zero_state import MOMENTS, Partition


class Snapshot:
    """Host buffers for one rank's slices, made once and filled again for every save; pinned where they are
    filled from a GPU.

    Args:
        partition: what this rank owns; 12 bytes per element of it are kept here.
        whole: frozen parameters and buffers to keep beside it, as `NAME|frozen` and `NAME|buffer`.
        device: where the tensors live.

    Attributes:
        tensors: key -> flat host tensor, valid once `wait` has returned.
        metadata: what the header of a rank file says: where every slice lies in its parameter.
    """

    def __init__(self, partition: Partition, whole: Mapping[str, Tensor], device: torch.device) -> None:
        self.device, self.tensors = device, {}
        where: dict[str, dict[str, Any]] = {}
        pinned = device.type == "cuda"
        numel = sum(part.numel for part in partition.slices())
        # Zeros are written, so that the pages are there before the first save.
        kinds = [torch.empty(numel, pin_memory=pinned).zero_() for _ in ("master", *MOMENTS)]
        start = 0
        for part in partition.slices():
            for kind, buffer in zip(("master", *MOMENTS), kinds, strict=True):
                key = f"{part.name}|{kind}"
                self.tensors[key] = buffer[start : start + part.numel]
                where[key] = {"global_shape": part.shape, "offset": part.offset, "numel": part.numel}
            start += part.numel
        for key, tensor in whole.items():
            self.tensors[key] = torch.empty(tensor.numel(), dtype=tensor.dtype, pin_memory=pinned)
            where[key] = {"global_shape": tuple(tensor.shape), "offset": 0, "numel": tensor.numel()}
        self.metadata = {"slices": json.dumps(where)}
        self._edges = (
            [torch.cuda.Event(enable_timing=True, blocking=True) for _ in range(2)] if pinned else []
        )

    def take(self, partition: Partition, whole: Mapping[str, Tensor]) -> None:
        """Copy what is there now. On CUDA the copies are queued behind what is under way and before what
        comes next, and the host does not wait for them."""
        for edge in self._edges[:1]:
            edge.record()
        for key, source in _sources(partition, whole):
            self.tensors[key].copy_(source.detach().reshape(-1), non_blocking=True)
        for edge in self._edges[1:]:
            edge.record()

    def wait(self) -> float:
        """Until the copy is whole, for the thread that writes it; returns the seconds that the device was
        busy with it."""
        if not self._edges:
            return 0.0
        began, ended = self._edges
        # A thread begins at GPU 0, where the first call would open a context of half a GiB for every rank.
        with torch.cuda.device(self.device):
            ended.synchronize()
            return began.elapsed_time(ended) / 1000.0


def _sources(partition: Partition, whole: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    for part in partition.slices():
        for kind in ("master", *MOMENTS):
            yield f"{part.name}|{kind}", getattr(part, kind)
    yield from whole.items()
