"""What the device can do at best, to hold a run's speed against."""

from __future__ import annotations

import time

import torch


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of the fastest of a few square matrix products, 2 n^3 operations each.

    n is 4096 on CUDA and 2048 on the CPU, where the rate is already that of 4096 and the whole takes about a
    second.
    """
    n, repeats = (4096, 50) if device.type == "cuda" else (2048, 5)
    generator = torch.Generator(device).manual_seed(0)  # the run's own generators are left alone
    a, b = (torch.randn(n, n, device=device, generator=generator).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(repeats):
        _wait_for(device)
        began = time.perf_counter()
        torch.mm(a, b)
        _wait_for(device)
        best = min(best, time.perf_counter() - began)
    return 2 * n**3 / best


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
