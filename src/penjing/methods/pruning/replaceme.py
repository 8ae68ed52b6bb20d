"""ReplaceMe: a run of blocks is replaced by one matrix, which then disappears into the MLP before it.

With M the output of the MLP of the last block before the run, Y what it is added to, and L the output of the run,

    T = argmin || Y + M T - L ||^2 + alpha ||T - I||^2 = (M^T M + alpha I)^-1 (M^T (L - Y) + alpha I)

and since M = h W^T of the linear W that ends the MLP, T^T W in its place computes Y + M T: a checkpoint with fewer
blocks and nothing new in it. A bias b of W becomes T^T b. The ridge is relative to the mean diagonal of M^T M and draws
towards the identity, which is plain removal.

Worked example: M = [[1, 0], [0, 1]], Y = 0, L = [[2, 0], [0, 3]]: T = diag(2, 3), and the rows of W are doubled and
tripled.

Source: Shopkhoev et al. 2025, "ReplaceMe: Network Simplification via Depth Pruning and Transformer Block
Linearization" (arXiv:2505.02819), eq. 5-6.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from penjing.errors import CalibrationError
from penjing.methods.pruning.angular_layers import RunOptions
from penjing.numerics.finite import all_finite


class ReplaceMeOptions(RunOptions):
    """Recipe keys of ReplaceMe."""

    ridge: float = Field(1e-2, gt=0, description="pull towards plain removal, of the mean of the diagonal of M^T M")


def transform(gram: Tensor, cross: Tensor, *, ridge: float = 1e-2) -> Tensor:
    """T, fp64 (D, D), from M^T M and M^T (L - Y), both (D, D). Raises CalibrationError when they are not finite."""
    if not (all_finite(gram) and all_finite(cross)):
        raise CalibrationError("hidden states are not finite: activations overflowed; use fp32")
    left, right = gram.double().clone(), cross.double().clone()
    strength = ridge * left.diagonal().mean()
    if not strength > 0:
        return torch.eye(len(gram), dtype=torch.float64)
    left.diagonal().add_(strength)
    right.diagonal().add_(strength)
    return torch.linalg.solve(left, right)


def folded(matrix: Tensor, tensor: Tensor) -> Tensor:
    """T^T W of a weight (N, K), or T^T b of a bias (N,), in fp32."""
    return (matrix.double().T @ tensor.double()).float()
