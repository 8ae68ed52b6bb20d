"""Which channels of a linear's input each output of other linears reaches, and the sets that hang together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor

EVERYTHING: Final = "everything"
"""In place of pairs: every output of the producer reaches every input of the consumer."""


class Reach:
    """What arrives at one linear.

    pairs   producer -> (output, input) pairs, int64 (E, 2), or EVERYTHING
    leaves  whether the linear's own outputs reach the output of the block
    adds    whether each of them reaches one channel of it alone, its own: it is added to the residual stream
    """

    def __init__(self) -> None:
        self.pairs: dict[str, Tensor | str] = {}
        self.leaves = False
        self.adds = True

    def leave(self, first: int, mask: Tensor) -> None:
        """Note that the linear's output `first + i` reaches the block's outputs that `mask` (P, D) marks in row i."""
        self.leaves |= bool(mask.any())
        own = torch.arange(first, first + len(mask))
        expected = torch.zeros_like(mask)
        if int(own[-1]) < mask.shape[1]:
            expected[torch.arange(len(mask)), own] = True
        self.adds &= bool(mask.equal(expected) and mask.any())

    def add(self, producer: str, first: int, mask: Tensor) -> None:
        """Note that output `first + i` of the producer reaches the inputs that `mask` (P, K) marks in row i."""
        if not mask.any() or self.pairs.get(producer) is EVERYTHING:
            return
        if mask.shape[1] > 1 and mask.all(1).any():
            self.pairs[producer] = EVERYTHING
            return
        pairs = mask.nonzero()
        pairs[:, 0] += first
        before = self.pairs.get(producer)
        self.pairs[producer] = torch.cat([before, pairs]) if isinstance(before, Tensor) else pairs


def components(
    inputs: int, outputs: Mapping[str, int], pairs: Mapping[str, Tensor]
) -> tuple[Tensor | None, dict[str, Tensor] | None]:
    """Sets of inputs that share a producer's output, with the outputs that reach them.

    inputs   number of inputs of the consumer
    outputs  producer -> number of its outputs
    pairs    producer -> (E, 2) pairs of output and input

    Returns columns (U, S) of each set, ordered by their first, and rows (U, n) of each producer; None where the sets
    are not of equal size, or where an input or an output belongs to none.
    """
    label = torch.arange(inputs)
    while True:
        before = label.clone()
        for name, edges in pairs.items():
            least = torch.full((outputs[name],), inputs).scatter_reduce_(0, edges[:, 0], label[edges[:, 1]], "amin")
            label.scatter_reduce_(0, edges[:, 1], least[edges[:, 0]], "amin")
        if torch.equal(label, before):
            break
    columns = _members(label)
    rows = {}
    for name, edges in pairs.items():
        of_row = torch.full((outputs[name],), inputs).scatter_reduce_(0, edges[:, 0], label[edges[:, 1]], "amin")
        members = _members(of_row)
        if members is None or columns is None or len(members) != len(columns) or (of_row == inputs).any():
            return None, None
        rows[name] = members
    return columns, rows


def _members(label: Tensor) -> Tensor | None:
    """Indices (U, S) that share a label, in the order of the labels; None if some labels have more than others."""
    _, counts = label.unique(return_counts=True)
    if (counts != counts[0]).any():
        return None
    return label.argsort(stable=True).view(len(counts), -1)
