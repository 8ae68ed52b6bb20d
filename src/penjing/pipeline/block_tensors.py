"""Parameters of one block while steps change them, and how far a weight is from what it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping, Sequence

import torch
from torch import Tensor

from penjing.models.layout import ModuleSpec
from penjing.statistics import Gram, Statistics


class BlockTensors(MutableMapping[str, Tensor]):
    """Parameters of one block in fp32 by name inside the block, linears as (out, in); read from disk when asked for.

    Only tensors that a step has changed are kept in memory.
    """

    def __init__(self, load: Callable[[str], Tensor], modules: Sequence[ModuleSpec], prefix: str) -> None:
        self._load = load
        self._source = {
            name.removeprefix(prefix): (name, module.transposed and key == "weight")
            for module in modules
            for key, name in zip(module.tensors, module.tensor_names(), strict=True)
        }
        self.changed: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        if name in self.changed:
            return self.changed[name]
        full, transposed = self._source[name]
        tensor = self._load(full)
        return (tensor.T.contiguous() if transposed else tensor).float()

    def as_stored(self, name: str) -> Tensor:
        """A parameter that no step has changed, in the dtype and orientation of the checkpoint."""
        return self._load(self._source[name][0])

    def __setitem__(self, name: str, value: Tensor) -> None:
        self.changed[name] = value

    def __delitem__(self, name: str) -> None:
        del self.changed[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._source)

    def __len__(self) -> int:
        return len(self._source)


ERROR_WEIGHTS = 1 << 22
"""Of a matrix, on which its output error is measured: more would cost as much as the compression itself."""


def relative_error(weight: Tensor, compressed: Tensor, statistics: Statistics | None) -> tuple[float, str]:
    """||(W - W')X|| / ||WX|| when a Gram matrix of the inputs is at hand, else ||W - W'|| / ||W||; both (N, K) fp32.

    The output error of a matrix with more than `ERROR_WEIGHTS` entries is that of evenly spaced rows with as many.
    """
    gram = statistics.get(Gram) if statistics else None
    if gram is None:
        tiny = torch.finfo(torch.float32).tiny
        return float((weight - compressed).norm() / weight.norm().clamp(min=tiny)), "weight"
    step = -(-weight.numel() // ERROR_WEIGHTS)
    weight, difference = weight[::step], (weight - compressed)[::step]
    lost = ((difference @ gram.value) * difference).sum(dtype=torch.float64)
    total = ((weight @ gram.value) * weight).sum(dtype=torch.float64)
    return float((lost.clamp(min=0) / total.clamp(min=1e-30)).sqrt()), "output"
