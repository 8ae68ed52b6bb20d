"""LoRA, rsLoRA and DoRA as they lie in PEFT's files, and what merging them into a weight means.

    LoRA    W' = W + s B A                   s = alpha / r,  rsLoRA: alpha / sqrt(r)      A (r, K), B (N, r)
    DoRA    W' = m * (W + s B A) / |W + s B A|     norms over the inputs, one per row;  m (N,)

Into a dense weight a change is merged as it is. Into a pruned one it is merged under its mask, or zeros would be lost.
Into codes it is not: the sum lies on no grid, and rounding it again loses what was learnt. Keep the adapter beside such
a base, or merge it into the dense model and quantise then.

Worked example. W = [[1, 0]], B = [[2]], A = [[3, 5]], alpha = 1, r = 1: W' = [[7, 10]]; pruned, with kept
[[1, 0]]: [[7, 0]].

Source: Hu et al. 2021 (arXiv:2106.09685); Kalajdzievski 2023 (arXiv:2312.03732); Liu et al. 2024, DoRA
(arXiv:2402.09353), equation 5.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from penjing.errors import FormatError
from penjing.representations import Dense, Masked, Representation


@dataclass(frozen=True)
class Adapter:
    """The change of one weight (N, K).

    down (r, K), up (N, r), scale s; magnitude (N,) for DoRA
    """

    down: Tensor
    up: Tensor
    scale: float
    magnitude: Tensor | None = None

    def merged(self, weight: Tensor) -> Tensor:
        """W' (N, K) fp32."""
        changed = weight.float() + self.scale * (self.up.float() @ self.down.float())
        if self.magnitude is None:
            return changed
        return changed * (self.magnitude.float() / changed.norm(dim=1))[:, None]


def merge(name: str, weight: Representation, adapter: Adapter) -> Representation:
    """`weight` with the change in it: dense stays dense, pruned stays pruned. FormatError, with why, for codes."""
    if isinstance(weight, Dense):
        return Dense(adapter.merged(weight.values).to(weight.values.dtype))
    if isinstance(weight, Masked) and isinstance(weight.values, Dense):
        values = adapter.merged(weight.dense()) * weight.kept
        return Masked(Dense(values.to(weight.values.values.dtype)), weight.kept)
    raise FormatError(
        f"{name} is stored as codes, and a weight with an adapter in it lies on no grid; keep the adapter beside the "
        "model, or merge it into the dense model and quantise that"
    )
