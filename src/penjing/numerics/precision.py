"""Which dtype the arithmetic runs in: bf16 where the processor multiplies bf16 matrices in hardware, else fp32."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def compute_dtype(device: torch.device | None = None) -> torch.dtype:
    """bf16 on CUDA and on CPUs with AMX or AVX512-BF16; fp32 elsewhere, where bf16 would be several times slower."""
    if device is not None and device.type == "cuda":
        return torch.bfloat16
    cpu = torch.cpu
    return torch.bfloat16 if cpu._is_amx_tile_supported() or cpu._is_avx512_bf16_supported() else torch.float32


@contextmanager
def holding(dtype: torch.dtype) -> Iterator[None]:
    """fp32 products inside may take their factors for values of `dtype`, which they must be; sums stay in fp32.

    A product of bf16 matrices is rounded to bf16, which makes the Gram matrix of nearly dependent inputs indefinite.
    Converted to fp32 first, their product goes through the same bf16 units of a CPU and keeps its sums. Holds for all
    threads of the process.
    """
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    if dtype == torch.bfloat16:
        matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def matmul_rate(dtype: torch.dtype) -> float:
    """Floating-point operations per second of matrix products in `dtype`, measured in some hundredths of a second."""
    matrix = torch.ones(768, 768, dtype=dtype)
    matrix @ matrix
    start = time.perf_counter()
    for _ in range(4):
        matrix @ matrix
    return 4 * 2 * 768**3 / (time.perf_counter() - start)
