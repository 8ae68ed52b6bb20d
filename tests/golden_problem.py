"""The seeded layer on which authors' code was run once, outside the project, for the numbers in golden tests."""

from __future__ import annotations

import numpy
import torch
from torch import Tensor

SAMPLED = ((0, 0), (5, 7), (40, 100), (95, 255), (60, 130))
"""Entries of a weight whose values are stored, beside sums."""


def golden_problem() -> tuple[Tensor, Tensor]:
    """A weight (96, 256) and correlated inputs (1024, 256), one ten times larger; numpy's legacy stream is frozen."""
    random = numpy.random.RandomState(0)
    weight = (random.standard_normal((96, 256)) * 0.05).astype(numpy.float32)
    inputs = random.standard_normal((1024, 256))
    inputs = inputs @ (numpy.eye(256) + 0.15 * random.standard_normal((256, 256)))
    inputs[:, 1] *= 10
    return torch.from_numpy(weight), torch.from_numpy(inputs.astype(numpy.float32))


def sampled(matrix: Tensor) -> list[float]:
    """The entries of a weight at the places `SAMPLED`."""
    return [float(matrix[place]) for place in SAMPLED]
