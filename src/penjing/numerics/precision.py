"""Which dtype the arithmetic runs in: bf16 where the processor multiplies bf16 matrices in hardware, else fp32."""

from __future__ import annotations

import time

import torch


def compute_dtype(device: torch.device | None = None) -> torch.dtype:
    """bf16 on CUDA and on CPUs with AMX or AVX512-BF16; fp32 elsewhere, where bf16 would be several times slower."""
    if device is not None and device.type == "cuda":
        return torch.bfloat16
    cpu = torch.cpu
    return torch.bfloat16 if cpu._is_amx_tile_supported() or cpu._is_avx512_bf16_supported() else torch.float32


def matmul_rate(dtype: torch.dtype) -> float:
    """Floating-point operations per second of matrix products in `dtype`, measured in some hundredths of a second."""
    matrix = torch.ones(768, 768, dtype=dtype)
    matrix @ matrix
    start = time.perf_counter()
    for _ in range(4):
        matrix @ matrix
    return 4 * 2 * 768**3 / (time.perf_counter() - start)
