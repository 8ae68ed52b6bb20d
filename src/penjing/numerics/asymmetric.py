"""The weight to aim at when a linear's inputs are not those it would have had in the dense model.

X (T, K) are the inputs that compressed blocks leave, X' those of the dense model, H = X^T X, C = (X' - X)^T X. The
weight whose outputs on X are closest to the dense model's outputs W X' is, by least squares,

    W* = W + W C H^-1

On T tokens that fit also follows what X' - X has by chance: with T not far above K it does more harm than good on other
text. So only a part a of the step is taken, and the tokens themselves say which. With C = C1 + C2 from two halves of
them, chance does not repeat in the other half, so that the first product estimates what is real, the second all of it:

    a = 4 <W C1 H^-1, W C2> / <W C H^-1, W C>    cut to [0, 1]        target = W + a W C H^-1

A linear whose outputs are added to the residual stream can also make up for what that lost before: with s' - s the
difference of the streams, G = (s' - s)^T X joins W C, half by half. So errors of early blocks are paid back on the way
instead of adding up.

Worked example with one input and W = 1: H = 2, C1 = 0.5, C2 = 0.3. C H^-1 C = 0.8^2 / 2 = 0.32, C1 H^-1 C2 = 0.15 / 2 =
0.075, so a = 0.3 / 0.32 = 0.94 and the weight 1 becomes 1 + 0.94 * 0.8 / 2 = 1.375. Halves that contradict each other,
0.5 and -0.3, give a = 0.

Source of the aim: Li et al. 2025, "GPTAQ" (arXiv:2504.02692). There a column's share of the step is added when the
sweep reaches it, to later columns only, with a = 0.25 for all; all of it from the start is the least-squares solution.
The choice of a, and G, are ours.
"""

from __future__ import annotations

import torch
from torch import Tensor


def towards_dense(weight: Tensor, cross: Tensor, factor: Tensor, visited: Tensor, gap: Tensor | None = None) -> Tensor:
    """`weight` (N, K) plus the part of (W C + G) H^-1 that the tokens support; fp32.

    cross    C1 and C2, (2, K, K), see `statistics.CrossGram`
    factor   U with H^-1 = U^T U, for columns in the order `visited` (K,)
    gap      G1 and G2, (2, N, K), see `statistics.StreamGap`
    """
    target = weight.float().clone()
    wanted = target @ cross if gap is None else target @ cross + gap
    first, second = (half[:, visited] @ factor.T for half in wanted)
    whole = first + second
    seen = whole.square().sum()
    part = (4 * (first * second).sum() / seen).clamp(0, 1) if seen > 0 else torch.zeros(())
    target[:, visited] += part * whole @ factor
    return target
