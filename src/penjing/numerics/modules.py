"""Reading the weight of a linear module, whichever way round it is stored."""

from __future__ import annotations

from torch import Tensor, nn


def is_linear(module: nn.Module) -> bool:
    """Whether `module` multiplies by a matrix (`nn.Linear`, GPT-2's `Conv1D`) rather than scaling, like a norm."""
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.dim() == 2 and not isinstance(module, nn.Embedding)


def weight_of(module: nn.Module) -> Tensor:
    """A view (N, K), outputs by inputs, of the module's weight; writing to it writes to the module.

    `Conv1D` stores (K, N); every other linear stores (N, K).
    """
    weight = module.get_parameter("weight").detach()
    return weight if isinstance(module, nn.Linear) else weight.T
