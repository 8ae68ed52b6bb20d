"""Grids whose scales and zeros are themselves quantised: affordable statistics for very small groups (SpQR).

First level, per row and group of inputs, unsigned codes and a real zero z that is added before rounding:

    code = clamp(round(w / s + z), 0, 2**bits - 1)        w_hat = s * (code - z)

with s = (high - low) / (2**bits - 1) and z = -low / s for the range [low, high] of the group. Zero need not lie in the
range, and z is no whole number.

Second level: the scales of one group of inputs, taken over consecutive rows, are a small vector that is quantised in
the same spirit, and so are the zeros,

    s = bottom + step * code        step = (max - min) / (2**statistic_bits - 1)        bottom = min

with one step and one bottom per `statistic_group` rows. At the sizes of the paper (16 inputs, 16 rows, 3 bits) a weight
costs 3 bits for its code, 2 * 3 / 16 for scale and zero, and 4 * 16 / 256 for the second level: 3.625 bits.

Worked example, one row, 2 bits: weights [-0.2, 0.1, 0.4] have s = 0.6 / 3 = 0.2 and z = 1; the codes are [0, 2, 3]
(0.1 / 0.2 + 1 = 1.5 is a tie and goes to the even code) and decode to [-0.2, 0.2, 0.4].

Source: Dettmers et al. 2024, "SpQR" (arXiv:2306.03078), section 4.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from penjing.numerics.grids import Grouped

SMALLEST_SCALE = 1e-30
"""What a scale of zero is divided by: any code then decodes to zero."""


@dataclass(frozen=True)
class Statistics:
    """Numbers of N rows, quantised over R groups of consecutive rows; before them, kinds and groups of inputs.

    codes   uint8 (..., N)
    step    (..., R) in the storage dtype
    bottom  (..., R) in the storage dtype: the value of code 0
    size    rows that share `step` and `bottom`; the last row group may be shorter
    """

    codes: Tensor
    step: Tensor
    bottom: Tensor
    size: int

    @classmethod
    def stack(cls, parts: Sequence[Statistics]) -> Statistics:
        """Those of several groups: (2, N) each -> (2, G, N)."""
        codes, step, bottom = (
            torch.stack([getattr(part, name) for part in parts], -2) for name in ("codes", "step", "bottom")
        )
        return cls(codes, step, bottom, parts[0].size)

    def values(self) -> Tensor:
        """The numbers, fp32 (..., N)."""
        owner = torch.arange(self.codes.shape[-1]) // self.size
        return self.bottom.float()[..., owner] + self.step.float()[..., owner] * self.codes


@dataclass(frozen=True)
class BilevelGrid(Grouped):
    """2**bits levels per group of `group_size` consecutive inputs, with quantised scales and zeros.

    The last group of a row may be shorter, and so may the last `statistic_group` rows. Second-level numbers are rounded
    to `scale_dtype`, the type they are stored in, before codes are computed.
    """

    bits: int = 3
    group_size: int = 16
    statistic_bits: int = 3
    statistic_group: int = 16
    scale_dtype: torch.dtype = torch.bfloat16

    @property
    def label(self) -> str:
        """Group and how its statistics are stored: "g16 with 3-bit scales g16"."""
        return f"g{self.group_size} with {self.statistic_bits}-bit scales g{self.statistic_group}"

    @property
    def high(self) -> int:
        """The largest code; the smallest is 0."""
        return 2**self.bits - 1

    def row_groups(self, rows: int) -> int:
        """Row groups in a matrix of `rows` outputs, counting a shorter last one."""
        return -(-rows // self.statistic_group)

    def fit(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """First-level scale and zero, before they are quantised, of groups that range from `low` to `high`; any shape.

        A range far from zero is widened to half of its larger end: beyond that the zero would be so large that rows
        which share a second level with it could not be told apart. A group of zeros gets scale 0.
        """
        low, high = torch.minimum(low, high / 2), torch.maximum(high, low / 2)
        scale = (high - low) / self.high
        return scale, torch.where(scale == 0, self.high / 2, -low / scale)

    def encode(self, weight: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """Codes as floats, same shape as `weight`; `scale` and `zero` broadcast against it."""
        return (weight / scale.clamp(min=SMALLEST_SCALE)).add_(zero).round_().clamp_(0, self.high)

    def decode(self, codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """Values of `codes` on the grid."""
        return (codes - zero) * scale

    def code_statistics(self, values: Tensor) -> Statistics:
        """Quantise numbers `values` (..., N), one per row."""
        rows, size = values.shape[-1], self.statistic_group
        members = torch.arange(self.row_groups(rows) * size).clamp_(max=rows - 1)
        groups = values[..., members].unflatten(-1, (-1, size))
        bottom = groups.amin(-1).to(self.scale_dtype)
        span = (groups.amax(-1) - bottom.float()).clamp_(min=0)
        step = (span / (2**self.statistic_bits - 1)).to(self.scale_dtype)
        width = torch.where(step == 0, torch.ones_like(step), step).float()
        codes = ((groups - bottom.float().unsqueeze(-1)) / width.unsqueeze(-1)).round_()
        codes = codes.clamp_(0, 2**self.statistic_bits - 1).flatten(-2)[..., :rows]
        return Statistics(codes.to(torch.uint8), step, bottom, size)


def savings(members: Tensor, harm: Tensor, grid: BilevelGrid) -> Tensor:
    """By how much the damage of a group falls when one weight is left out of its range and of the sum.

    members  (m, N): m inputs of one group, N rows; each row on its own
    harm     (m, 1): the damage of rounding is the square of the change times this

    Returns (m, N). The statistics of the grids compared are not quantised. Only the smallest and the largest weight
    of a row can change the range; every other one saves just its own damage.
    """

    def damage(low: Tensor, high: Tensor) -> Tensor:
        scale, zero = grid.fit(low, high)
        return (members - grid.decode(grid.encode(members, scale, zero), scale, zero)).square_().mul_(harm)

    if len(members) < 2:
        return torch.zeros_like(members)
    (low, next_low), lowest = members.topk(2, 0, largest=False)
    (high, next_high), highest = members.topk(2, 0)
    saved = damage(low, high)
    total = saved.sum(0)
    for place, refitted in ((lowest[:1], damage(next_low, high)), (highest[:1], damage(low, next_high))):
        saved.scatter_(0, place, total - refitted.sum(0) + refitted.gather(0, place))
    return saved
