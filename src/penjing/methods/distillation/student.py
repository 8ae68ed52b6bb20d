"""Making a student of a model: the same architecture with fewer blocks, begun from the teacher's own or from nothing.

Source: Sanh et al. 2019, "DistilBERT" (arXiv:1910.01108), section 3, "student initialization"; with fresh weights in
the teacher's own shape a born-again network (Furlanello et al. 2018, arXiv:1805.04770).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import Field
from torch import nn

from penjing.methods.base import Options
from penjing.methods.distillation.layer_map import LayerChoice, select_layers
from penjing.models.layout import Layout
from penjing.models.shorter import shortened


class Student(Options):
    """Recipe keys of the student's shape and first weights."""

    layers: int | None = Field(None, ge=1, description="how many decoder blocks it has; default: as many as there are")
    choice: LayerChoice = Field("spread", description="which blocks it begins with")
    init: Literal["select", "random"] = Field("select", description="weights of those blocks, or fresh ones everywhere")

    def blocks(self, there: int) -> list[int]:
        """Numbers of the blocks it begins with. Raises ValueError for more than there are."""
        return select_layers(there, self.layers or there, self.choice)

    def config(self, config: Mapping[str, Any], layout: Layout) -> Mapping[str, Any]:
        """config.json of the student. Raises ValueError."""
        return shortened(config, layout.blocks, self.blocks(layout.blocks))


def make_student(model: Any, student: Student, seed: int = 0) -> Any:
    """The student of a live transformers model, fp32, without gradients; the model itself is not changed.

    Fresh weights are drawn as the model class does, from `seed`.
    """
    path, there = blocks_of(model)
    keep = student.blocks(there)
    settings = shortened(model.config.to_dict(), there, keep)
    config = type(model.config).from_dict(settings)
    config._attn_implementation = model.config._attn_implementation
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    made = type(model)(config).float()
    torch.set_rng_state(state)
    if student.init == "select":
        made.load_state_dict(_renumbered(model.state_dict(), path, keep))
    return made.eval().requires_grad_(False)


def blocks_of(model: nn.Module) -> tuple[str, int]:
    """Name and number of the decoder blocks: the longest list of modules. Raises ValueError when there is none."""
    lists = [(name, len(module)) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    if not lists:
        raise ValueError(f"{type(model).__name__} has no list of blocks")
    return max(lists, key=lambda found: found[1])


def _renumbered(tensors: Mapping[str, Any], path: str, keep: list[int]) -> dict[str, Any]:
    inside = re.compile(rf"{re.escape(path)}\.(\d+)\.(.*)")
    place = {old: new for new, old in enumerate(keep)}
    renumbered = {}
    for name, tensor in tensors.items():
        match = inside.fullmatch(name)
        if match is None:
            renumbered[name] = tensor
        elif int(match[1]) in place:
            renumbered[f"{path}.{place[int(match[1])]}.{match[2]}"] = tensor
    return renumbered
