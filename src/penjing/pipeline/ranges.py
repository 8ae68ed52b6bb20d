"""What the inputs of some linears are distributed like, while a block runs. One histogram per distinct input."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from penjing.models import find
from penjing.numerics.histogram import Histogram


@torch.no_grad()
def input_histograms(
    block: nn.Module, names: Sequence[str], forwards: Iterable[Callable[[], object]]
) -> dict[str, Histogram]:
    """Histograms of the inputs that the linears `names` of `block` get from `forwards`; those never called are absent.

    Linears called one after the other with the same tensor (q, k and v) share a histogram, and hence a scale.
    """
    seen: dict[str, Histogram] = {}
    last: tuple[Tensor, Histogram] | None = None

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def see(module: nn.Module, args: tuple[Any, ...]) -> None:
            nonlocal last
            inputs = args[0]
            shared = last[1] if last is not None and last[0] is inputs else None
            histogram = seen.setdefault(name, shared or Histogram(inputs.shape[-1]))
            if histogram is not shared:
                histogram.update(inputs.reshape(-1, inputs.shape[-1]))
            last = inputs, histogram

        return see

    with ExitStack() as undo:
        for name in names:
            undo.callback(find(block, name).register_forward_pre_hook(hook(name)).remove)
        for forward in forwards:
            forward()
            last = None
    return seen
