"""The MLP of a block and the gain on its branches; parameters are named as in timm.

Written out here because importing timm loads torchvision and PyTorch's compiler, 3 s at the start of every
process.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class Mlp(nn.Module):
    """fc2(gelu(fc1(x)))."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) -> (..., width)."""
        out: Tensor = self.fc2(functional.gelu(self.fc1(x)))
        return out


class SwiGlu(nn.Module):
    """fc2(silu(a) b) with a, b the halves of fc1(x) (Shazeer 2020); hidden: channels of each half."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 2 * hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) -> (..., width)."""
        gate, value = self.fc1(x).chunk(2, -1)
        out: Tensor = self.fc2(functional.silu(gate) * value)
        return out


class LayerScale(nn.Module):
    """A learned gain on every channel of a branch (Touvron et al. 2021)."""

    def __init__(self, width: int, initial: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), initial))

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) -> (..., width)."""
        return x * self.gamma
