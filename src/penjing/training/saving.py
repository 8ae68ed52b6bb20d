"""The point from which a killed run continues: one file, written whole or not at all.

It holds what is trained, the optimiser's moments, the number of steps done, and a fingerprint of all that decides the
course of the run. The number of steps is also the position in the data, in the schedule and in the random numbers: each
step's batch and seed are functions of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from penjing.checkpoint.writing import write_atomically
from penjing.errors import ResumeError


def trained(module: nn.Module) -> dict[str, Tensor]:
    """What a run changes, by name: parameters that require a gradient, and persistent buffers."""
    state = {name: value for name, value in module.named_parameters() if value.requires_grad}
    lasting = module.state_dict(keep_vars=True).keys()
    return {**state, **{name: value for name, value in module.named_buffers() if name in lasting}}


def fingerprint(module: nn.Module, given: Mapping[str, str]) -> dict[str, str]:
    """`given`, and the names and shapes of what is trained."""
    shapes = {name: list(value.shape) for name, value in trained(module).items()}
    return {**given, "trained parameters": str(shapes)}


def save(path: Path, done: int, module: nn.Module, optimizer: torch.optim.Optimizer, marks: Mapping[str, str]) -> None:
    """Write the state after `done` steps. Raises OutputError when it cannot be written."""
    values = {name: value.detach() for name, value in trained(module).items()}
    state = {"done": done, "marks": dict(marks), "trained": values, "optimizer": optimizer.state_dict()}
    size = sum(value.nbytes for value in values.values())
    write_atomically(path, 3 * size, lambda temporary: torch.save(state, temporary))


def restore(path: Path, module: nn.Module, optimizer: torch.optim.Optimizer, marks: Mapping[str, str]) -> int:
    """Put a saved state in place; the number of steps it had done, 0 when there is none.

    Raises ResumeError when something that decides the course has changed, or when the file is damaged.
    """
    if not path.is_file():
        return 0
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        before = state["marks"]
    except Exception as error:  # the unpickler raises what it likes
        raise ResumeError(f"{path} is damaged ({error}); remove it and start again") from error
    changed = [key for key in {**before, **marks} if before.get(key) != marks.get(key)]
    if changed:
        told = "; ".join(f"{key} was {_short(before.get(key))}, is {_short(marks.get(key))}" for key in changed)
        raise ResumeError(f"{path} holds an unfinished training with another {' and '.join(changed)}: {told}")
    with torch.no_grad():
        for name, value in trained(module).items():
            value.copy_(state["trained"][name])
    optimizer.load_state_dict(state["optimizer"])
    return state["done"]


def _short(value: str | None) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
