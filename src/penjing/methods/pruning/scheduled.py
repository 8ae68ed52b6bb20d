"""What pruning while training shares: masks that are part of a run's state, and training held to them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from penjing.methods.adaptation.low_rank_change import matrices
from penjing.methods.training import Batch, Loss, Objective, TrainTask
from penjing.models.layout import Layout
from penjing.representations import Scheme


class HeldMasks(nn.Module):
    """An objective, and masks that some parameters are held to.

    Masks are buffers, so that they are saved with the run and continue with it. A pruned weight has no gradient and is
    put back to zero after each step, because AdamW's moments of the time before still push it.
    """

    def __init__(
        self, objective: Objective, parameters: Mapping[str, nn.Parameter], kept: Mapping[str, Tensor]
    ) -> None:
        super().__init__()
        self.objective = objective
        self._parameters_by_name = dict(parameters)
        for name, parameter in parameters.items():
            mask = kept.get(name, torch.ones_like(parameter, dtype=torch.bool))
            self.register_buffer(_key(name), mask.clone())
            parameter.register_hook(lambda gradient, name=name: gradient * self.mask(name))

    def forward(self, model: nn.Module, batch: Batch) -> Loss:
        """The objective's own loss."""
        return self.objective(model, batch)

    def mask(self, name: str) -> Tensor:
        """bool, of the parameter's shape."""
        return self.get_buffer(_key(name))

    @property
    def held(self) -> Mapping[str, nn.Parameter]:
        """The parameters that have masks, by name."""
        return self._parameters_by_name

    def narrow(self, name: str, kept: Tensor) -> None:
        """Hold a parameter to another mask."""
        self.mask(name).copy_(kept)

    @torch.no_grad()
    def apply_masks(self) -> None:
        """Put pruned weights to zero."""
        for name, parameter in self.held.items():
            parameter.mul_(self.mask(name))


def inside(task: TrainTask) -> dict[str, nn.Parameter]:
    """The matrices of the blocks, by name."""
    return {name: module.get_parameter(own) for name, module, own in matrices(task.model)}


def everywhere(layout: Layout, options: Any) -> dict[str, Scheme]:
    """Schemes of the linears of the blocks, when all together lose the share `options.sparsity`."""
    return {module.name: Scheme(sparsity=options.sparsity) for module in layout.modules if module.kind == "linear"}


def _key(name: str) -> str:
    return "kept " + name.replace(".", "/")
