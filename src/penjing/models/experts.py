"""Experts as separate linears.

transformers keeps the experts of a block in two 3-D parameters and multiplies them in one kernel. Checkpoints hold,
and engines quantise, one matrix per expert and projection, and their inputs differ: each expert sees only the tokens
routed to it. The modules here compute the same sums with one `nn.Linear` each.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class Expert(nn.Module):
    """One gated MLP: `down(act(gate(x)) * up(x))`, its linears under the names the checkpoint gives them."""

    def __init__(self, hidden: int, inner: int, names: tuple[str, str, str], act: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self._names = names
        gate, up, down = names
        self.add_module(gate, nn.Linear(hidden, inner, bias=False))
        self.add_module(up, nn.Linear(hidden, inner, bias=False))
        self.add_module(down, nn.Linear(inner, hidden, bias=False))
        self.act = act

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(T, D) -> (T, D)."""
        gate, up, down = (getattr(self, name) for name in self._names)
        return down(self.act(gate(hidden_states)) * up(hidden_states))


class Experts(nn.ModuleList):
    """All experts of a block; called like the fused module of transformers."""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Weighted sum of the chosen experts: (T, D), (T, k) expert numbers, (T, k) weights -> (T, D)."""
        total = torch.zeros_like(hidden_states)
        for number, expert in enumerate(self):
            token, choice = torch.where(top_k_index == number)
            if token.numel():
                output = expert(hidden_states[token]) * top_k_weights[token, choice, None]
                total.index_add_(0, token, output.to(total.dtype))
        return total


def separate_experts(block: nn.Module, path: str, gate: str, up: str, down: str) -> None:
    """Replace the fused experts of `block` at `path`, on the meta device; a block without experts is left alone."""
    parent_name, _, name = path.rpartition(".")
    parent = block.get_submodule(parent_name)
    fused = getattr(parent, name, None)
    if fused is None:
        return
    count, hidden, inner = fused.down_proj.shape
    with torch.device("meta"):
        experts = [Expert(hidden, inner, (gate, up, down), fused.act_fn) for _ in range(count)]
        setattr(parent, name, Experts(experts))
