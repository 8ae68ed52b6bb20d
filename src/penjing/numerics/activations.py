"""Dynamic quantisation of activations, one symmetric scale per token, as integer engines apply it at run time.

    scale = max|x| / ((2**bits - 1) / 2)          x' = scale * clamp(round(x / scale), -2**(bits-1), 2**(bits-1) - 1)

This is what compressed-tensors 0.20 does in transformers: every operation runs, and rounds, in the dtype of `x`.
"""

from __future__ import annotations

import torch
from torch import Tensor


def activation_fake_quant(x: Tensor, bits: int = 8) -> Tensor:
    """The values that a linear sees instead of `x` (..., K); same shape and dtype, one scale per vector of K.

    A token of zeros stays zero. Equals the compressed-tensors loader bit for bit on inputs of three dimensions, as
    decoder linears get; on inputs of two dimensions that loader takes one scale for the whole matrix.
    """
    levels = x.new_tensor((2**bits - 1) / 2)
    scale = x.abs().amax(-1, keepdim=True) / levels
    scale = torch.where(scale == 0, torch.finfo(x.dtype).eps, scale)
    return (x / scale).clamp_(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1).round_().mul_(scale)
