"""A dense linear that sees its inputs as an integer engine would: rounded, and back in floating point."""

from __future__ import annotations

from typing import Any

from torch import nn

from penjing.numerics.activations import Activations, InputScale, round_inputs


class RoundInputs:
    """Forward pre-hook of a linear.

    static  the scale of inputs that are not quantised dynamically
    """

    def __init__(self, how: Activations, static: InputScale | None = None) -> None:
        self.how, self.static = how, static

    def __call__(self, module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        inputs = arguments[0]
        static = self.static
        if static is not None and static.scale.device != inputs.device:
            zero = None if static.zero is None else static.zero.to(inputs.device)
            static = InputScale(static.scale.to(inputs.device), zero)
        return (round_inputs(inputs, self.how, static), *arguments[1:])
