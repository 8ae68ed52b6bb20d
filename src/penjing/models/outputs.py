"""A live causal language model in two halves: tokens to last hidden states, and hidden states to logits.

Losses of logits need not have them all in memory when they can make them slice by slice. The second half runs the
model's own forward around a body that returns given states, so soft caps and scales of logits are the model's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def last_states(model: nn.Module, batch: Mapping[str, Tensor], **arguments: Any) -> Any:
    """The body's output, `last_hidden_state` (B, T, D) after the last norm; labels are left out, nothing is cached.

    `arguments` such as `output_hidden_states` are passed on.
    """
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    return body_of(model)(**inputs, **{"use_cache": False, **arguments})


def logits_of(model: nn.Module, states: Tensor) -> Tensor:
    """Logits (t, V) of last hidden states (t, D), differentiable in them and in the head."""
    body = body_of(model)
    nothing = torch.zeros((1, 1), dtype=torch.long, device=states.device)
    given = _Given(states[None])
    body.forward = lambda *args, **kwargs: given
    try:
        return model(input_ids=nothing, use_cache=False).logits[0]
    finally:
        del body.forward


def body_of(model: Any) -> Any:
    """The part of a transformers model that ends before the head."""
    return model.get_decoder()


class _Given:
    """A body's output that holds states and nothing else, whatever a model class asks it for."""

    def __init__(self, states: Tensor) -> None:
        self.last_hidden_state = states

    def __getitem__(self, index: int) -> Tensor:
        return (self.last_hidden_state,)[index]

    def __getattr__(self, name: str) -> None:
        return None
