"""Which dtype the arithmetic runs in: bf16 where the processor multiplies bf16 matrices in hardware, else fp32."""

from __future__ import annotations

import torch


def compute_dtype(device: torch.device | None = None) -> torch.dtype:
    """bf16 on CUDA and on CPUs with AMX or AVX512-BF16; fp32 elsewhere, where bf16 would be several times slower."""
    if device is not None and device.type == "cuda":
        return torch.bfloat16
    cpu = torch.cpu
    return torch.bfloat16 if cpu._is_amx_tile_supported() or cpu._is_avx512_bf16_supported() else torch.float32
