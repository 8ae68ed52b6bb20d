"""What a plan promises that a weight will become."""

from __future__ import annotations

from dataclasses import dataclass, replace

from penjing.numerics.activations import Activations
from penjing.numerics.grids import Grid
from penjing.numerics.tensor_trains import Train
from penjing.numerics.train_matrices import TrainMatrix


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
    rank         the weight is a product of (N, rank) and (rank, K), and `grid` is that of both factors; 0: it is not
    correction   rank of a product that is added to the weight on its grid; 0 without
    correction_grid  of the factors of that product; None keeps them free
    train        every row is a tensor train, or the whole matrix is one; None: neither
    """

    grid: Grid | None = None
    sparsity: float = 0.0
    pattern: tuple[int, int] | None = None
    activations: Activations | None = None
    ordered: bool = False
    columns: int = 0
    outliers: float = 0.0
    rank: int = 0
    correction: int = 0
    correction_grid: Grid | None = None
    train: Train | TrainMatrix | None = None

    @property
    def dense(self) -> bool:
        """Nothing is done to the weight."""
        return self == Scheme()

    @property
    def factor(self) -> Scheme:
        """What each factor of a product is."""
        return Scheme(grid=self.grid)

    @property
    def base(self) -> Scheme:
        """What a product is added to."""
        return replace(self, correction=0, correction_grid=None)

    @property
    def added(self) -> Scheme:
        """The product that is added."""
        return Scheme(grid=self.correction_grid, rank=self.correction)
