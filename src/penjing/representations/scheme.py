"""What a plan promises that a weight will become."""

from __future__ import annotations

from dataclasses import dataclass

from penjing.numerics.activations import Activations
from penjing.numerics.grids import Grid


@dataclass(frozen=True)
class Scheme:
    """What a weight will become: enough to size it, to refuse it and to describe it on disk.

    grid         the points its values may take; None keeps them free
    sparsity     fraction of weights removed; 0 keeps all
    pattern      (zeros, of) for N:M sparsity: 2:4 removes 2 of every 4 consecutive inputs
    activations  how the inputs are quantised at run time; None without
    ordered      columns are grouped out of order and need a stored group index
    columns      whole columns stored beside the grid, in the storage dtype
    outliers     fraction of single weights stored beside the grid, in the storage dtype; the true count is up to the
                 method and may differ
    """

    grid: Grid | None = None
    sparsity: float = 0.0
    pattern: tuple[int, int] | None = None
    activations: Activations | None = None
    ordered: bool = False
    columns: int = 0
    outliers: float = 0.0

    @property
    def dense(self) -> bool:
        """Nothing is done to the weight."""
        return self == Scheme()
