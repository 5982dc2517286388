"""What the device can do at best, to hold a run's speed against."""

from __future__ import annotations

import torch

from engine.metrics import Stopwatch

CPU_RUNS = 5
GPU_SECONDS = 0.5  # an idle GPU takes a while to raise its clocks


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of the fastest of a few square matrix products, 2 n^3 operations each.

    n is 8192 on CUDA, where ten at a time are queued and timed by the device, so that the start of a kernel
    does not count; and 2048 on the CPU, where the rate is already that of 4096 and the whole takes about a
    second.
    """
    on_gpu = device.type == "cuda"
    n, together = (8192, 10) if on_gpu else (2048, 1)
    generator = torch.Generator(device).manual_seed(0)  # the run's own generators are left alone
    a, b = (torch.randn(n, n, device=device, generator=generator).to(dtype) for _ in range(2))
    watch, runs = Stopwatch(device), list[float]()
    while len(runs) < CPU_RUNS or (on_gpu and sum(runs) < GPU_SECONDS):
        with watch.running():
            for _ in range(together):
                torch.mm(a, b)
        if on_gpu:
            torch.cuda.synchronize(device)
        runs.append(watch.take())
    return together * 2 * n**3 / min(runs)
