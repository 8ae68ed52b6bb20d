"""SmoothQuant: move the outliers of activations into the weights, so that both fit 8 bits.

For input channel j of the linears that read one norm,

    s_j = max|x_j|**alpha / max|W_:j|**(1 - alpha)        x_j -> x_j / s_j        W_:j -> s_j W_:j

The function does not change: the norm's weight is divided by s, the columns of all its readers are multiplied. Both
maxima then meet in the middle: alpha = 0.5 makes them equal, sqrt(max|x_j| max|W_:j|), and alpha = 1 flattens the
activations.

Worked example, alpha = 0.5: max|x| = [16, 1], max|W| over all readers = [1, 4]

    s = [4 / 1, 1 / 2] = [4, 0.5]      max|x / s| = [4, 2]      max|W s| = [4, 2]

Only the smoothing is here; a later step rounds (`rtn` with 8 bits, `group_size: channel`, and `activations`).
The authors use alpha 0.5 for OPT and 0.8 to 0.9 for Llama and Mistral.

Source: Xiao et al. 2023, "SmoothQuant" (arXiv:2211.10438), eq. 4.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from penjing.methods.base import BlockInput, Options, Scales
from penjing.numerics.modules import is_linear, weight_of
from penjing.statistics import AbsMax

SMALLEST = 1e-5
"""Maxima of weights and scales are not allowed below this, as in the authors' code."""


class SmoothQuantOptions(Options):
    """Recipe keys of SmoothQuant."""

    alpha: float = Field(0.5, ge=0, le=1, description="how much of the difficulty moves from activations to weights")


def smoothquant(activation_max: Tensor, weight_max: Tensor, alpha: float = 0.5) -> Tensor:
    """Smoothing scale (K,) from the largest magnitude of each input (K,) and of each weight column (K,).

    A channel whose activations or weights are all zero has nothing to balance and gets scale 1.
    """
    scale = activation_max.float() ** alpha / weight_max.float().clamp(min=SMALLEST) ** (1 - alpha)
    dead = (activation_max == 0) | (weight_max == 0)
    return scale.clamp(min=SMALLEST).masked_fill(dead, 1)


def transform(block: BlockInput, options: SmoothQuantOptions) -> Scales:
    """Scales for the groups of a block that read a norm; groups fed by a linear are left alone."""
    scales: Scales = {}
    for group in block.groups:
        if group.source is None or is_linear(block.module.get_submodule(group.source)):
            continue
        columns = [weight_of(block.module.get_submodule(name)).abs().amax(0).float() for name in group.linears]
        activation_max = block.statistics[group.linears[0]][AbsMax].value
        scales[group] = smoothquant(activation_max, torch.stack(columns).amax(0), options.alpha)
    return scales
