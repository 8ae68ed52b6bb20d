"""Sharing across layers: linears of a block compute with the weights of an earlier block, scaled to fit.

    y_n = c_n (W_s x)_n        W_s of the block that owns it, c of the block that borrows it
    c_n = w_n G s_n^T / s_n G s_n^T        w_n and s_n rows of the borrower's own weight and the owner's,
                                           G = X X^T of the borrower's inputs

c minimises |(W - diag(c) W_s) X|^2 row by row; where two rows have nothing in common it is close to 0, and the
borrower says little rather than something wrong. The matrices of a borrower are not stored: only c and its norms are.

Which block borrows from which is measured. Every pair within `reach` is tried in the dense model, by how far the
borrower's output moves; the `candidates` that move it least are then tried in the whole model with all earlier ties,
and the one with the least KL divergence from the dense model stays. That is repeated until enough blocks borrow. A
block that owns does not borrow, and one that borrows does not own.

The papers train with shared weights from the start. Blocks of a model that was trained without need not be alike:
compare with removing as many.

Worked example, G = I: w = [2, 2], s = [1, 0]: c = 2, and the error falls from |[1, 2]|^2 = 5 to 4.

Source: Lan et al. 2020, "ALBERT" (arXiv:1909.11942), which trains with one block for all; Liu et al. 2024, "MobileLLM"
(arXiv:2402.14905), which shares between neighbours. Partners by measurement and the scales are least squares.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from penjing.methods.base import Options, Remake
from penjing.models.layout import Layout, ModuleSpec
from penjing.models.sharing import sharing_entry

Ties = Mapping[int, int]
"""Block that borrows -> block that owns, which comes before it."""


class TieOptions(Options):
    """Recipe keys of sharing across layers."""

    blocks: int = Field(ge=1, description="how many blocks, a third of all at most, borrow the weights of another")
    linears: tuple[str, ...] = Field(
        ("*",), min_length=1, description="which linears of a block, by name inside it (`mlp.*`); all others stay"
    )
    scale: Literal["output", "none"] = Field("output", description="a fitted factor per output of each borrower, or 1")
    reach: int = Field(8, ge=1, description="how many blocks before it a block may borrow from")
    candidates: int = Field(
        6, ge=1, description="pairs whose KL divergence is measured in each round; 1: output errors alone decide"
    )
    windows: int = Field(4, ge=1, description="calibration windows that all is measured on, from the first")


@dataclass(frozen=True, kw_only=True)
class Tie(Remake):
    """A model in which some blocks compute with the weights of others."""


def fitted_scale(weight: Tensor, owned: Tensor, gram: Tensor) -> Tensor:
    """Factors c (N,) that bring diag(c) `owned` closest to `weight`, both (N, K), on inputs of `gram` (K, K): fp32."""
    seen = (owned @ gram).double()
    shared, size = (seen * weight).sum(1), (seen * owned).sum(1)
    return torch.where(size > 0, shared / size.clamp(min=torch.finfo(torch.float64).tiny), 0).float()


def choose(
    errors: Mapping[tuple[int, int], float], options: TieOptions, divergence: Callable[[Sequence[Ties]], list[float]]
) -> dict[int, int]:
    """Ties, `options.blocks` of them.

    errors      how far the output of block t moves when it borrows from block s, by (t, s)
    divergence  of the whole model from the dense one, under each of several sets of ties
    """
    ties: dict[int, int] = {}
    while len(ties) < options.blocks:
        possible = [
            (borrower, owner)
            for borrower, owner in sorted(errors, key=lambda pair: (errors[pair], pair))
            if borrower not in ties and borrower not in ties.values() and owner not in ties
        ][: options.candidates]
        trials = [{**ties, borrower: owner} for borrower, owner in possible]
        found = divergence(trials) if len(trials) > 1 else [0.0]
        ties = trials[min(range(len(trials)), key=lambda number: found[number])]
    return ties


def shared_linears(layout: Layout, index: int, options: TieOptions) -> list[ModuleSpec]:
    """The linears of block `index` that `options` name."""
    prefix = f"{layout.block_name(index)}."
    return [
        module
        for module in layout.of_block(index)
        if module.kind == "linear"
        and any(fnmatch.fnmatchcase(module.name.removeprefix(prefix), pattern) for pattern in options.linears)
    ]


def alike(layout: Layout, options: TieOptions) -> list[list[int]]:
    """Blocks whose linears have the same names and shapes, in order; ValueError where nothing can be shared."""
    kinds: dict[tuple[Any, ...], list[int]] = {}
    for index in range(layout.blocks):
        found, prefix = shared_linears(layout, index, options), f"{layout.block_name(index)}."
        if expert := next((module.name for module in found if module.expert), None):
            raise ValueError(
                f"{expert} cannot be shared, because transformers fuses the experts of a block into one tensor; name "
                "other linears: `linears: ['self_attn.*']`"
            )
        if found:
            kinds.setdefault(tuple((each.name.removeprefix(prefix), each.shape) for each in found), []).append(index)
    if not kinds:
        raise ValueError(f"no linear of a block is called {' or '.join(options.linears)}")
    # However partners fall out: with k that borrow, k others own at most, and each of the rest but the first follows
    # a block that borrows.
    most = sum((len(blocks) + 1) // 3 for blocks in kinds.values())
    if options.blocks > most:
        raise ValueError(
            f"blocks: {options.blocks} of {layout.blocks} may find no partners left that own; {most} can borrow at most"
        )
    return list(kinds.values())


def owners(layout: Layout, options: TieOptions, ties: Ties) -> dict[str, str]:
    """Linear -> the linear whose weight it borrows, by full name."""
    found = {}
    for borrower, owner in ties.items():
        prefix, other = f"{layout.block_name(borrower)}.", f"{layout.block_name(owner)}."
        for module in shared_linears(layout, borrower, options):
            found[module.name] = other + module.name.removeprefix(prefix)
    return found


def tied_config(config: Mapping[str, Any], layout: Layout, options: TieOptions, ties: Ties) -> dict[str, Any]:
    """`config` of the model with these ties."""
    return {**config, **sharing_entry(owners(layout, options, ties), scaled=options.scale == "output")}


def _planned(config: Mapping[str, Any], layout: Layout, options: TieOptions) -> Mapping[str, Any]:
    """As if the last blocks of each kind borrowed from its first: which they are is measured, how large it is known."""
    possible = [(block, kind[0]) for kind in alike(layout, options) for block in kind[1:]]
    return tied_config(config, layout, options, dict(sorted(possible)[-options.blocks :]))


TIE = Tie(config=_planned, keeps_zeros=lambda options: True)
