"""A matrix plus a change of low rank, which disappears into the matrix at the end; zeros of the matrix stay zeros.

    W' = W + s (B A) * M        B (N, r), first zero; A (r, K), first random; s = alpha / r, or alpha / sqrt(r) (rsLoRA)

with M the mask of an earlier pruning (all ones without one). The mask is part of what is trained, not only of what is
merged: the model that is trained is, number for number, the model that is written.

Worked example. W = [[1, 0]], kept [[1, 0]], B = [[2]], A = [[3, 5]], s = 1/2: W' = [[1 + 3, 0]].

Source: Hu et al. 2021, "LoRA" (arXiv:2106.09685), section 4.1; Kalajdzievski 2023, rsLoRA (arXiv:2312.03732). The mask
inside the change as in Lu et al. 2024, "SPP: Sparsity-Preserved Parameter-Efficient Fine-Tuning" (arXiv:2405.16057).
Magnitudes: Liu et al. 2024, DoRA (arXiv:2402.09353), equation 5.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.nn.utils import parametrize
from torch.utils.hooks import RemovableHandle

_BRANCH = "low_rank_change"


class LowRankChange(nn.Module):
    """The parametrisation of one matrix (N, K), or of a stack of them (E, N, K)."""

    kept: Tensor | None

    def __init__(self, weight: Tensor, rank: int, scale: float, kept: Tensor | None = None) -> None:
        super().__init__()
        *stack, rows, columns = weight.shape
        rank = min(rank, rows, columns)
        bound = 1 / math.sqrt(columns)
        self.up = nn.Parameter(torch.zeros(*stack, rows, rank))
        self.down = nn.Parameter(torch.empty(*stack, rank, columns).uniform_(-bound, bound))
        self.scale = scale
        self.register_buffer("kept", kept, persistent=False)
        self.hook: RemovableHandle | None = None

    @property
    def beside(self) -> bool:
        """Whether the change can be a branch beside a linear: it adds to the outputs, whatever the matrix is."""
        return self.kept is None

    def change(self) -> Tensor:
        """s (B A) * M, of the matrix's shape, in fp32."""
        change = self.up @ self.down * self.scale
        return change if self.kept is None else change * self.kept

    def branch(self, inputs: Tensor) -> Tensor:
        """What the change adds to a linear's outputs (..., N), for its inputs (..., K); only without a mask."""
        return linear(linear(inputs, self.down.to(inputs.dtype)), self.up.to(inputs.dtype)) * self.scale

    def forward(self, weight: Tensor) -> Tensor:
        """The matrix with its change, in its own dtype."""
        return weight + self.change().to(weight.dtype)


class Directed(LowRankChange):
    """DoRA: the changed matrix gives the direction of each row, and a trained magnitude (N,) its length.

    axis  of the inputs in the matrix
    """

    def __init__(self, weight: Tensor, rank: int, scale: float, kept: Tensor | None = None, axis: int = -1) -> None:
        super().__init__(weight, rank, scale, kept)
        self.axis = axis
        self.magnitude = nn.Parameter(weight.new_empty(0, dtype=torch.float32))
        self.measure(weight)

    @torch.no_grad()
    def measure(self, weight: Tensor) -> None:
        """Let the magnitudes be the lengths of the rows of the changed matrix, so that nothing changes."""
        self.magnitude.data = (weight.float() + self.change()).norm(dim=self.axis, keepdim=True)

    @property
    def beside(self) -> bool:
        """It cannot: the length of a row depends on the matrix."""
        return False

    def forward(self, weight: Tensor) -> Tensor:
        """The matrix with its change, in its own dtype. The norm is a constant for the gradient (section 4.3)."""
        changed = weight.float() + self.change()
        norm = changed.detach().norm(dim=self.axis, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        return (changed * (self.magnitude / norm)).to(weight.dtype)


def scale_of(alpha: float, rank: int, rank_stabilised: bool = False) -> float:
    """s, which keeps the size of the change when the rank is another."""
    return alpha / (math.sqrt(rank) if rank_stabilised else rank)


def matrices(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """(full name, module, name in it) of every weight that multiplies hidden states, in decoder blocks.

    Embeddings and the head are left out; stacks of experts are one parameter of three dimensions.
    """
    head = model.get_output_embeddings()  # type: ignore[operator]
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) or module is head:
            continue
        for own, parameter in module.named_parameters(recurse=False):
            if parameter.ndim >= 2:
                yield f"{name}.{own}", module, own


def attach(module: nn.Module, name: str, change: LowRankChange) -> None:
    """Let `module` compute with its parameter `name` plus `change`; the parameter itself is not trained.

    A linear without a mask, of values or of codes, multiplies its inputs by A and by B, which never asks for the
    gradient of a whole matrix. Everything else adds the two matrices first.
    """
    if change.beside and name == "weight" and (isinstance(module, nn.Linear) or name not in module._parameters):
        module.add_module(_BRANCH, change)
        change.hook = module.register_forward_hook(_add_branch)
    else:
        parametrize.register_parametrization(module, name, change)


def _add_branch(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    change = module.get_submodule(_BRANCH)
    assert isinstance(change, LowRankChange)
    return output + change.branch(args[0])


def merge(model: nn.Module) -> nn.Module:
    """Put every change into its matrix, which is then a plain parameter again."""
    for module in list(model.modules()):
        for name in list(getattr(module, "parametrizations", {})):
            parametrize.remove_parametrizations(module, name, leave_parametrized=True)
        change = module._modules.get(_BRANCH)
        if isinstance(change, LowRankChange):
            assert change.hook is not None
            change.hook.remove()
            del module._modules[_BRANCH]
            weight = module.get_parameter("weight")
            weight.data = change(weight).detach()
    return model.requires_grad_(False)
