"""Moving a per-channel scale from the inputs of linears into what produces them; the block computes the same function.

    linear(x) = W x = (W diag(s)) (x / s)

The division goes into the module before: the weight and bias of a norm, or the output rows of a linear.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence

from torch import Tensor

from penjing.models.layout import InputGroup, Layout, ModuleSpec

BlockTensors = MutableMapping[str, Tensor]
"""Parameters of one block in fp32, by name inside the block ("self_attn.q_proj.weight"), linears as (out, in)."""


def foldable(group: InputGroup, modules: Mapping[str, ModuleSpec]) -> bool:
    """Whether the source has one output per input channel of the linears (not so for grouped-query v -> o)."""
    if group.source is None:
        return False
    return modules[group.source].shape[0] == modules[group.linears[0]].shape[1]


def fold(group: InputGroup, scale: Tensor, tensors: BlockTensors, layout: Layout) -> None:
    """Divide the source by `scale` (K,) and multiply the linears' input columns by it, in place."""
    weight, bias = f"{group.source}.weight", f"{group.source}.bias"
    if tensors[weight].ndim == 1:
        tensors[weight] = (tensors[weight] + layout.norm_offset) / scale - layout.norm_offset
    else:
        tensors[weight] = tensors[weight] / scale.unsqueeze(1)
    if bias in tensors:
        tensors[bias] = tensors[bias] / scale
    for linear in group.linears:
        tensors[f"{linear}.weight"] = tensors[f"{linear}.weight"] * scale


def rescale_gradients(grams: Sequence[Tensor], scale: Tensor) -> None:
    """The outputs of a source were divided by `scale` (N,), so gradients by them are that much larger: correct blocks
    (n, n) along the diagonal of their Gram matrix, in place."""
    for gram, own in zip(grams, scale.split([len(gram) for gram in grams]) if grams else (), strict=True):
        gram.mul_(own.unsqueeze(1) * own)
