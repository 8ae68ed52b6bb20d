"""Linears that share weights, while transformers loads a model: empty holders first, then `SharedLinear`.

transformers compares what a model has with what the files hold. A linear that borrows is therefore replaced, before
anything is read, by a holder of what it does have on disk, and after that by what computes with its owner.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from penjing.errors import FormatError
from penjing.models.sharing import CONFIG_KEY, SCALE
from penjing.runtime.shared import SharedLinear


class SharedLinears:
    """Those of one model that is being loaded: live names, borrower -> owner."""

    def __init__(self, model: Any) -> None:
        entry: Mapping[str, Any] = getattr(model.config, CONFIG_KEY, None) or {"linears": {}, "scaled": False}
        self._owners = {_live(model, name): _live(model, owner) for name, owner in entry["linears"].items()}
        for name, owner in self._owners.items():
            linear, like = model.get_submodule(name), model.get_submodule(owner).weight
            holder = nn.Module()
            scale = torch.empty(_outputs(linear), dtype=like.dtype, device=like.device)
            holder.register_parameter(SCALE, nn.Parameter(scale, requires_grad=False) if entry["scaled"] else None)
            holder.register_parameter("bias", linear.bias)
            holder.__dict__["weight"] = torch.empty(
                0
            )  # for code that initialises a linear by its name, as GPT-2's does
            model.set_submodule(name, holder)

    def finish(self, model: nn.Module) -> None:
        """Put the linears in the holders' places, once their owners are what they will be."""
        for name, owner in self._owners.items():
            scale, bias = map(model.get_submodule(name)._parameters.get, (SCALE, "bias"))
            found = (None if each is None else each.detach() for each in (scale, bias))
            model.set_submodule(name, SharedLinear(model.get_submodule(owner), *found))


def _outputs(linear: Any) -> int:
    outputs: int = linear.out_features if isinstance(linear, nn.Linear) else linear.nf
    return outputs


def _live(model: Any, name: str) -> str:
    """A module as the live model calls it; a base model lacks its own prefix."""
    for candidate in (name, name.removeprefix(f"{model.base_model_prefix}.")):
        try:
            model.get_submodule(candidate)
        except AttributeError:
            continue
        return candidate
    raise FormatError(f"config.json shares the weight of {name}, and the model has no such linear")
