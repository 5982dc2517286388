"""Bytes of the tensors that are alive, measured while a program runs."""

from __future__ import annotations

import time
import weakref
from functools import partial
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Bytes of all storages that operators have made and nothing has given back; a small and fast
    `torch.distributed._tools.mem_tracker`.

    A thread of Gloo may hold the tensor that it reduced for a moment longer than the caller; a peak after a
    collective counts only if it lasts.

    Attributes: `now`, `peak`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._reduced = False
        self._seen: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if (size := storage.nbytes()) and storage._cdata not in self._seen:
                    self._seen[storage._cdata] = weakref.ref(
                        storage, partial(self._gone, storage._cdata, size)
                    )
                    self.now += size
        if func.namespace == "c10d":
            self._reduced = True
        elif self.now > self.peak:
            for _ in range(50 * self._reduced):
                if self.now <= self.peak:
                    break
                time.sleep(0.002)
            self._reduced = False
            self.peak = max(self.peak, self.now)
        return out

    def _gone(self, key: int, size: int, _: object) -> None:
        del self._seen[key]
        self.now -= size
