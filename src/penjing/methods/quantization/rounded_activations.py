"""A live model whose linears see their inputs rounded, and whose attention sees keys and values rounded, in training.

    x' = round(x / s) s        one s per token, over all its channels; for keys and values over all heads together

The forward pass has x', the gradient is that of the identity.

Worked example, 4 bits: keys of a token [0.7, -0.2, 0.31]: s = 0.7 / 7, x' = [0.7, -0.2, 0.3].

Source: Liu et al. 2023, "LLM-QAT" (arXiv:2305.17888), section 2.2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import Tensor, nn

from penjing.errors import PlanError
from penjing.models.attention import watch_attention
from penjing.numerics.activations import Activations, round_inputs
from penjing.numerics.fake_quantisation import rounded_to_range

Matrix = tuple[nn.Module, str]
"""A module and the name of its weight."""


def round_linear_inputs(weights: Iterable[Matrix], bits: int) -> list[Callable[[], None]]:
    """Let linears see their inputs rounded, per token, with straight-through gradients; returns what ends it.

    Raises PlanError for stacks of experts, whose inputs cannot be seen from outside.
    """
    how = Activations(bits)

    def before(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        inputs = args[0]
        return (inputs + (round_inputs(inputs.detach(), how) - inputs.detach()), *args[1:])

    ends = []
    for module, name in weights:
        if module.get_parameter(name).ndim > 2:
            raise PlanError(f"inputs of {type(module).__name__}, a stack of experts, cannot be rounded in training")
        ends.append(module.register_forward_pre_hook(before).remove)
    return ends


def round_cache(model: nn.Module, bits: int) -> Callable[[], None]:
    """Let attention see keys and values (B, H, T, d) rounded, one range per token; returns what ends it."""

    def per_token(states: Tensor) -> Tensor:
        joined = states.transpose(1, 2).flatten(2)
        return rounded_to_range(joined, bits, joined.dtype).unflatten(2, (states.shape[1], -1)).transpose(1, 2)

    def watch(layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> tuple[Tensor, Tensor, Tensor]:
        return query, per_token(key), per_token(value)

    return watch_attention(model, watch)
