"""A place in every attention layer of a live transformers model where its queries, keys and values can be seen.

transformers hands each layer's query, key and value, after the rotary embedding and before heads are repeated, to a
function chosen by name. Under a name of our own stands a function that shows them to a watcher, which may change them,
and then calls what the model used before (`sdpa` or `eager`). So the same few lines serve every architecture.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from penjing.errors import PlanError

Watcher = Callable[[int, Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor, Tensor]]
"""(layer, query (B, H, T, d), key and value (B, H_kv, T', d), factor on Q K^T) -> what attention works on instead."""

_WATCHER = "_penjing_watcher"
_NAME = "_penjing_name"
_PREFIX = "penjing_"


def watch_attention(model: nn.Module, watcher: Watcher) -> Callable[[], None]:
    """Have every attention layer of a transformers model show its tensors to `watcher`; returns what ends it.

    It stands beside the layers as a plain attribute: parameters and their names stay as they are. Raises PlanError for
    a kind of attention that is neither sdpa nor eager.
    """
    watched: Any = model
    before = str(watched.config._attn_implementation)
    if before not in ("sdpa", "eager"):
        raise PlanError(f"attention of kind {before!r} cannot be watched; load the model with sdpa or eager")
    _register(before)
    watched.set_attn_implementation(_PREFIX + before)
    for name, module in model.named_modules():
        object.__setattr__(module, _WATCHER, watcher)
        object.__setattr__(module, _NAME, name)

    def end() -> None:
        watched.set_attn_implementation(before)
        for module in model.modules():
            module.__dict__.pop(_WATCHER, None)
            module.__dict__.pop(_NAME, None)

    return end


@contextmanager
def attention_watched(model: nn.Module, watcher: Watcher) -> Iterator[None]:
    """The same for as long as the block lasts."""
    end = watch_attention(model, watcher)
    try:
        yield
    finally:
        end()


def _register(kind: str) -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    AttentionInterface.register(_PREFIX + kind, _attend)
    AttentionMaskInterface.register(_PREFIX + kind, ALL_MASK_ATTENTION_FUNCTIONS[kind])


def _attend(module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Shows the tensors and attends as the model would have."""
    scaling = kwargs.get("scaling")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    watcher: Watcher = getattr(module, _WATCHER)
    query, key, value = watcher(_layer(module), query, key, value, scaling)
    return _own(module)(module, query, key, value, *args, **kwargs)


def _layer(module: Any) -> int:
    """The number of a layer; where the module does not know it, the first number in its name."""
    known = getattr(module, "layer_idx", None)
    return int(known if known is not None else next(filter(str.isdigit, getattr(module, _NAME).split("."))))


def _own(module: Any) -> Callable[..., Any]:
    kind = module.config._attn_implementation.removeprefix(_PREFIX)
    if kind == "eager":
        return sys.modules[type(module).__module__].eager_attention_forward
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    return ALL_ATTENTION_FUNCTIONS[kind]
