"""Units by the size of their weights, of their outputs, or of what they add to the next linear's output.

    magnitude     sum over the weights w of the unit, rows and columns, of |w|^p                        p = 1, 2
    activation    ||X_u||_F: how large the unit's outputs are over all tokens
    contribution  ||W_u X_u||_F = sqrt(tr(W_u G_uu W_u^T)): how large what it adds is, G = X X^T

A neuron with large outputs that nobody reads has activation but no contribution; the two agree where all columns of W
are equally long. For a head, activation is the L2 norm over its channels (Minitron), contribution is exact.

Worked example: two neurons, columns of W [2, 0] and [0, 1], outputs over tokens of squared norm 1 and 9

    activation [1, 3]        contribution [2, 3]

Sources: magnitude as in Li et al. 2017 (arXiv:1608.08710); activation as in Sandri et al. 2025, "2SSP"
(arXiv:2501.17771), and Muralidharan et al. 2024, "Compact Language Models via Pruning and Knowledge Distillation"
(arXiv:2407.14679), section 2.2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from penjing.methods.pruning.units import Units, per_unit


def magnitude(units: Units, order: int) -> Tensor:
    """L1 (`order` 1) or squared L2 (2) norm of all weights of each unit: fp64 (U,)."""
    return per_unit((units.columns, *units.rows), order)


def activation(units: Units) -> Tensor:
    """L2 norm of each unit's outputs: (U,)."""
    return units.power.double().sum(1).sqrt()


def contribution(columns: Tensor, gram: Tensor) -> Tensor:
    """Norm of what each unit adds to the outputs of the next linear: fp64 (U,) from columns (U, N, S), gram (K, K)."""
    count, _, size = columns.shape
    blocks = gram.view(count, size, count, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1).double()
    weight = columns.double()
    return torch.einsum("uns,ust,unt->u", weight, blocks, weight).clamp(min=0).sqrt()
