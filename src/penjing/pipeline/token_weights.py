"""How much each calibration token counts: by the gradients that reach a linear through it.

The error of a linear's output that costs predictions the same need not have the same size at every token. With g the
gradients of the model's own predictions by the linear's outputs, expected change of the predictions is, to second
order, close to the sum over tokens of |g|^2 |(W - W') x|^2, and a Gram matrix of weighted inputs measures that:

    minimise  sum_t a_t |(W - W') x_t|^2 = tr((W - W') H (W - W')^T)        H = sum_t a_t x_t x_t^T

a_t is |g_t|^2 over its mean, cut at `LARGEST`, plus `LEAST`, and scaled to a mean of 1: a gradient comes from one label
drawn per token, and single ones are chance.

Source: Kim et al. 2025, "GuidedQuant" (arXiv:2505.07004), with one group of outputs, and with labels drawn from the
model instead of those of the text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from penjing.costs import windows_at_once
from penjing.pipeline.gradients import Progress, squared_gradients
from penjing.pipeline.stream import StreamedModel

LARGEST, LEAST = 20.0, 0.1


def token_weights(
    stream: StreamedModel,
    tokens: Tensor,
    linears: Mapping[int, Sequence[str]],
    dtype: torch.dtype,
    progress: Progress,
) -> dict[str, Tensor]:
    """Weights fp32 (S T,) of the tokens of all windows (S, T), by the full name of each linear.

    linears  block -> names inside it
    dtype    of the arithmetic

    Linears that read the same inputs get the same weights, from the sum of their squares. One that not every token goes
    through, such as an expert, gets none: in the compressed model other tokens may.
    """
    windows, length = tokens.shape
    of_window = length * stream.layout.embedding.shape[1] * dtype.itemsize
    parts = tokens.split(windows_at_once(windows, of_window, stream.layout.blocks))
    squares: dict[str, list[Tensor]] = {}
    for number, part in enumerate(parts):
        told = partial(_told, progress, number, len(parts))
        found = squared_gradients(stream, part, linears, told, dtype=dtype, seed=number)
        for index, names in linears.items():
            prefix = f"{stream.layout.block_name(index)}."
            sums: dict[str, Tensor] = {}
            for each in (found[prefix + name] for name in names):
                sums[each.leader] = sums[each.leader] + each.tokens if each.leader in sums else each.tokens
            for name in names:
                squares.setdefault(prefix + name, []).append(sums[found[prefix + name].leader])
    weights = {name: torch.cat(found) for name, found in squares.items()}
    return {name: _weights(found) for name, found in weights.items() if len(found) == tokens.numel()}


def _told(progress: Progress, part: int, parts: int, stage: str, done: int, of: int, detail: str) -> None:
    progress(stage, part * of + done, parts * of, detail)


def _weights(squares: Tensor) -> Tensor:
    """Mean 1; all alike where no gradient arrives."""
    mean = squares.mean()
    if not mean > 0:
        return torch.ones_like(squares)
    weights = (squares / mean).clamp(max=LARGEST) + LEAST
    return weights / weights.mean()
