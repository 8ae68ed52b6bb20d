"""What a layout must answer: how the tensors of one matrix lie in the file. Names are those after the module's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from penjing.representations import Quantized

Load = Callable[[str], Tensor]
"""Reads a stored tensor of the module by its local name."""


class Layout(Protocol):
    """One way to store codes and scales."""

    name: str
    """As config.json has it (`format`)."""

    def nbytes(self, shape: tuple[int, ...], grid: Any) -> int:
        """Bytes of what `write` makes of a matrix of `shape`."""

    def write(self, weight: Quantized) -> dict[str, Tensor]:
        """Tensors by local name."""

    def read(self, load: Load, shape: tuple[int, int], grid: Any) -> Quantized:
        """The inverse of `write`, without the library."""

    def decode(self, weight: Quantized, dtype: torch.dtype) -> Tensor:
        """The matrix (N, K) that an engine computes with when it loads the model in `dtype`."""


def scale_once(per_row: Tensor, one: bool) -> Tensor:
    """Scales (N, G) as stored: (1,) where the matrix has one."""
    return per_row[:1, 0] if one else per_row


def for_every_row(stored: Tensor, rows: int) -> Tensor:
    """One stored number (1,) as (N, 1)."""
    return stored.reshape(1, 1).expand(rows, 1).contiguous()
