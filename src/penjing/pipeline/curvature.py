"""What errors of linears cost the model's predictions, by the gradients that reach their outputs.

The error of a linear's output that costs predictions the same need not have the same size at every token, nor at every
output, nor is that of two outputs the sum of both. With g the gradients of the model's own predictions by the outputs,
the expected change of the predictions is, to second order, close to

    sum_t (g_t^T (W - W') x_t)^2

Of that, two factors are taken. A Gram matrix of weighted inputs knows which tokens matter,

    H = sum_t a_t x_t x_t^T        a_t = |g_t|^2

and the Gram matrix of the gradients which outputs do, alone and together: G = sum_t g_t g_t^T. a_t is over its mean,
cut at `LARGEST`, plus `LEAST`, and scaled to a mean of 1; G is cut in the same way, and as much of it as is chance is
replaced by its mean diagonal (see `penjing.numerics.shrinkage`): where few tokens have nearly all of the gradient, as
in value projections, that is most of it.

G of all linears is larger than the model: they lie in a folder until the walk has read them.

Sources: Kim et al. 2025, "GuidedQuant" (arXiv:2505.07004), with one group of outputs, and with labels drawn from the
model instead of those of the text, for H; Tseng, Sun, De Sa 2025, "Model-Preserving Adaptive Rounding"
(arXiv:2505.22988), for both.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from penjing.checkpoint import write_shard
from penjing.costs import windows_at_once
from penjing.numerics.shrinkage import shrunk
from penjing.pipeline.gradients import LARGEST, SquaredGradients, by_block
from penjing.pipeline.stream import StreamedModel
from penjing.progress import Progress

LEAST = 0.1

_SEEN = " seen"
"""Ends the name of what lies beside a Gram matrix: how many gradients, and the sum of their lengths' fourth powers."""


@dataclass(frozen=True)
class Curvature:
    """What gradients say of the linears of a model.

    token_weights  fp32 (S T,) of the tokens of all windows, by the full name of a linear; linears that read the same
                   inputs share theirs. One that not every token goes through, such as an expert, has none: in the
                   compressed model other tokens may. None: all tokens count alike
    """

    token_weights: Mapping[str, Tensor] | None = None
    folder: Path | None = None

    def output_grams(self, index: int) -> dict[str, list[Tensor]]:
        """Of a block's linears, by the name inside it: blocks along the diagonal of G, fp32 (n, n), first to last.

        What is chance in them is taken out.
        """
        path = None if self.folder is None else _file(self.folder, index)
        grams: dict[str, list[Tensor]] = {}
        if path is not None and path.is_file():
            found = load_file(path)
            for key in sorted(key for key in found if not key.endswith(_SEEN)):
                vectors, fourth = found[key + _SEEN].tolist()
                grams.setdefault(key.split(" ")[1], []).append(shrunk(found[key], vectors, fourth))
        return grams


def curvature(
    stream: StreamedModel,
    tokens: Tensor,
    linears: Mapping[int, Sequence[str]],
    dtype: torch.dtype,
    progress: Progress,
    *,
    folder: Path | None = None,
    together: Container[str] = (),
) -> Curvature:
    """One pass there and back over token windows (S, T).

    linears   block -> names inside it
    dtype     of the arithmetic
    folder    for the Gram matrices of gradients; what lies in it is replaced
    together  linears, by full name, that have such
    """
    windows, length = tokens.shape
    of_window = length * stream.layout.embedding.shape[1] * dtype.itemsize
    parts = tokens.split(windows_at_once(windows, of_window, stream.layout.blocks))
    squares: dict[str, list[Tensor]] = {}
    for number, part in enumerate(parts):
        told = partial(_told, progress, number, len(parts))
        blocks = by_block(stream, part, linears, told, dtype=dtype, seed=number, together=together)
        for index, found in blocks:
            _add_squares(squares, f"{stream.layout.block_name(index)}.", found)
            if folder is not None:
                _add_grams(_file(folder, index), found, is_first=number == 0)
    weights = {name: torch.cat(found) for name, found in squares.items()}
    weights = {name: _weights(found) for name, found in weights.items() if len(found) == tokens.numel()}
    return Curvature(weights, folder)


def _add_squares(squares: dict[str, list[Tensor]], prefix: str, found: Mapping[str, SquaredGradients]) -> None:
    """Of every linear the sum over those that read the same inputs."""
    sums: dict[str, Tensor] = {}
    for each in found.values():
        sums[each.leader] = sums[each.leader] + each.tokens if each.leader in sums else each.tokens
    for name, each in found.items():
        squares.setdefault(prefix + name, []).append(sums[each.leader])


def _file(folder: Path, index: int) -> Path:
    return folder / f"{index:05d}.safetensors"


def _add_grams(path: Path, found: Mapping[str, SquaredGradients], *, is_first: bool) -> None:
    """Write those of a block, plus those of the parts of the text before."""
    sums = {}
    for name, each in found.items():
        for number, gram in enumerate(each.grams):
            sums[f"{number:05d} {name}"] = gram.value
            sums[f"{number:05d} {name}{_SEEN}"] = torch.tensor([gram.tokens, gram.fourth], dtype=torch.float64)
    if sums and not is_first:
        before = load_file(path)
        sums = {key: gram + before[key] for key, gram in sums.items()}
    if sums:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_shard(path, sums)


def _told(progress: Progress, part: int, parts: int, stage: str, done: int, of: int, detail: str) -> None:
    progress(stage, part * of + done, parts * of, detail)


def _weights(squares: Tensor) -> Tensor:
    """Mean 1; all alike where no gradient arrives."""
    mean = squares.mean()
    if not mean > 0:
        return torch.ones_like(squares)
    weights = (squares / mean).clamp(max=LARGEST) + LEAST
    return weights / weights.mean()
