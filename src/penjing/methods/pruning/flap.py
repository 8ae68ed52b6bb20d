"""FLAP: remove inputs that hardly fluctuate, and put their mean into a bias.

An input that is almost the same for every token can be replaced by that constant. With m_j and v_j the mean and the
variance of input j over tokens,

    score_j = v_j ||W_:j||_2^2            b += W[:, removed] m[removed]

The score of a head is the mean over its channels. The paper standardises scores and compares them across blocks, which
gives every block another width; config.json has one width for all, so here units compete within a block. Variance is
the true one: the published code forms (x - m)^2 with the mean already updated, which is 2 % off.

Worked example: W = [[1, 3]], inputs of three tokens [[5, 0], [5, 1], [5, -1]]

    m = [5, 0], v = [0, 2/3]      scores = [0, 6]      the first goes, b = 1 * 5, and the outputs are what they were

Source: An et al. 2024, "Fluctuation-based Adaptive Structured Pruning for Large Language Models" (arXiv:2312.11983),
eq. 5 (WIFV) and 8.
"""

from __future__ import annotations

from torch import Tensor


def variance(power: Tensor, mean: Tensor, tokens: int) -> Tensor:
    """Variance over tokens, fp64, from the sum of squares, the mean, and the number of tokens."""
    return (power.double() / max(tokens, 1) - mean.double().square()).clamp(min=0)


def flap(columns: Tensor, power: Tensor, mean: Tensor, tokens: int) -> Tensor:
    """Scores fp64 (U,) from columns (U, N, S), and power and mean (U, S) of the inputs."""
    return (variance(power, mean, tokens) * columns.double().square().sum(1)).mean(1)


def compensation(weight: Tensor, removed: Tensor, mean: Tensor) -> Tensor:
    """What the removed inputs add on average, fp32 (N,): weight (N, K), indices of inputs, their means (K,)."""
    return (weight.double()[:, removed] @ mean.double()[removed]).float()
