"""Wanda-sp: Wanda's scores |W_ij| ||x_j||, added up over all outputs of an input, for whole inputs at a time.

    score_u = mean over the unit's inputs j of the sum over i of |W_ij| ||x_j||_2

W is the linear that reads the units (`down_proj`, `o_proj`). No weight is updated by the method itself.

Worked example: W = [[4, -1], [1, 2]], ||x|| = [1, 8]      scores = [5 * 1, 3 * 8] = [5, 24]

Source: the structured baseline of An et al. 2024, "Fluctuation-based Adaptive Structured Pruning for Large Language
Models" (arXiv:2312.11983), from Wanda (arXiv:2306.11695).
"""

from __future__ import annotations

from torch import Tensor


def wanda_sp(columns: Tensor, power: Tensor) -> Tensor:
    """Scores fp64 (U,) from columns (U, N, S) and the sum over tokens of squared inputs, `power` (U, S)."""
    return (columns.double().abs().sum(1) * power.double().sqrt()).mean(1)
