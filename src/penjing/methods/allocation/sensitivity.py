"""What rounding one matrix costs the model: three estimates, from cheap to measured.

A linear's output changes by `D x`, with `D = W - Q` and an input x. Summed over calibration tokens, the change of
output i has the square

    e_i = (D H D^T)_ii        H = sum x x^T

**Relative output error**: `sum_i e_i / sum_i (W H W^T)_ii`. Says how damaged an output is, not whether anyone cares.

**Gradient**: the KL divergence of the model's predictions is, to second order, half the Fisher information in the
direction of the change. With g the gradient of `log p(y | context)` by the linear's output, y drawn from the model's
own predictions, and changes of different outputs and tokens taken as unrelated,

    KL per token  =  1/2 mean over tokens of  sum_i g_i^2 (D x)_i^2

The squares are split into a share per output and a sum per token, g_i^2 = r_i a, so that one matrix is enough:

    KL per token  =  1/(2 tokens) sum_i r_i (D H_a D^T)_ii        H_a = sum a x x^T        sum_i r_i = 1

(Means of g_i^2 and of (D x)_i^2 apart would be wrong by much: tokens with huge activations have tiny gradients, since
the norms after them divide by those activations.)

**Measured**: the KL divergence itself, with one unit replaced, for one choice. It grows with the square of the change,
so the other choices follow by the ratio of their output errors.

All three add up losses of single matrices: what errors in one block do to the inputs of the next is left out.

Worked example: D = [[0.1, 0], [0, 0.2]], tokens x = [2, 0] and [0, 1] with sums a = 1 and 4, shares r = [0.2, 0.8].
H_a = [[4, 0], [0, 4]], so (D H_a D^T)_ii = [0.04, 0.16], and the estimate is (0.2 * 0.04 + 0.8 * 0.16) / (2 * 2) =
0.034 nats per token, nearly all of it by the second output.

Source: the weighting is Fisher information as in Kim et al. 2024, SqueezeLLM (arXiv:2306.07629), per output and per
token instead of per weight. As in K-FAC (Martens, Grosse 2015, arXiv:1503.05671), inputs and gradients are kept apart,
but for the sum over outputs, which stays with its token.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def output_errors(difference: Tensor, gram: Tensor) -> Tensor:
    """Squared change of every output, summed over tokens: `difference` (N, K), `gram` (K, K) -> fp64 (N,)."""
    return ((difference @ gram) * difference).sum(1, dtype=torch.float64).clamp(min=0)


def relative_error(weight: Tensor, compressed: Tensor, gram: Tensor) -> float:
    """Squared change of all outputs over their squares, for matrices (N, K); 0 when all outputs are 0."""
    lost, total = (float(output_errors(part, gram).sum()) for part in (weight - compressed, weight))
    return lost / total if total else 0.0


def expected_kl(errors: Tensor, shares: Tensor, tokens: int) -> float:
    """Second-order KL divergence in nats per token.

    errors  (N,): squared change of every output, summed over `tokens` that count as much as their squared gradients
    shares  (N,): of each output in the squared gradients
    """
    return float(errors.double() @ shares.double()) / (2 * tokens)


def extrapolated(measured: float, at: int, errors: Sequence[float]) -> list[float]:
    """Losses of all choices from the one `measured` for choice `at`, in proportion to their output `errors`.

    Where the choice measured changes nothing, losses are those errors themselves.
    """
    if not errors[at]:
        return list(errors)
    return [max(measured, 0.0) * error / errors[at] for error in errors]
