"""How the end of a launch is told."""

from __future__ import annotations

import pytest
import torch

from engine.verdict import out_of_memory


@pytest.mark.parametrize(
    "text",
    [
        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.19 GiB",
        "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported later",
        "CUDA driver error: out of memory",
        "NCCL error in: ProcessGroupNCCL.cpp:77, unhandled cuda error, NCCL version 2.29.3\n"
        "ncclUnhandledCudaError: Call to CUDA function failed.\nLast error:\nCuda failure 2 'out of memory'",
        "ncclUnhandledCudaError: Call to CUDA function failed.\nLast error:\n"
        "Failed to CUDA calloc async 608 bytes",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
    ],
)
def test_lack_of_memory_on_a_gpu_is_known_whoever_says_it(text: str) -> None:
    assert out_of_memory(torch.AcceleratorError(text))


@pytest.mark.parametrize(
    "text",
    [
        "CUDA error: an illegal memory access was encountered",
        "CUDA error: invalid device ordinal",
        "NCCL error: ncclRemoteError: A call failed possibly due to a network error",
    ],
)
def test_other_errors_of_a_gpu_are_not(text: str) -> None:
    assert not out_of_memory(torch.AcceleratorError(text))
