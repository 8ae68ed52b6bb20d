"""A decoder block in small, for methods that learn: two linears with something curved between them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from penjing.methods.base import BlockTask


def task(seed: int = 0, kept: Tensor | None = None) -> BlockTask:
    """Two linears with something curved between them, correlated inputs, and outputs of the dense weights."""
    generator = torch.Generator().manual_seed(seed)
    weights = {"up": torch.randn(24, 16, generator=generator), "down": torch.randn(16, 24, generator=generator)}
    mixing = torch.eye(16) + 0.6 * torch.randn(16, 16, generator=generator)
    inputs = torch.randn(6, 32, 16, generator=generator) @ mixing

    def run(states: Tensor, given: Mapping[str, Tensor]) -> Tensor:
        used = {**weights, **given}
        return states + torch.nn.functional.silu(states @ used["up"].T) @ used["down"].T

    return BlockTask(
        weights=weights,
        statistics={},
        run=run,
        inputs=inputs,
        targets=run(inputs, {}),
        kept={} if kept is None else {"up": kept},
        storage_dtype=torch.float32,
    )


def error(given: BlockTask, weights: Mapping[str, Tensor]) -> float:
    return float((given.run(given.inputs, weights) - given.targets).square().mean())
