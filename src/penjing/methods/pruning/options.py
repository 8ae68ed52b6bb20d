"""How much to prune, as recipe keys: a fraction, or an N:M pattern."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Self

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from penjing.errors import RecipeError
from penjing.methods.base import LinearInput, Options
from penjing.methods.results import pruned
from penjing.numerics.refit import refit
from penjing.representations import Masked, Scheme
from penjing.statistics import Gram, StatisticType


def parse_pattern(pattern: str) -> tuple[int, int]:
    """`"2:4"` -> (2, 4): of every 4 consecutive inputs of an output, 2 become zero.

    N:M counts the *removed* weights, as the code of SparseGPT and Wanda does; others count the kept ones. For 2:4
    and 4:8 it is the same, but `1:4` removes a quarter. Raises RecipeError for anything else than 0 < N < M.
    """
    match = re.fullmatch(r"(\d+):(\d+)", pattern)
    zeros, of = (int(number) for number in match.groups()) if match else (0, 0)
    if not 0 < zeros < of:
        raise RecipeError(f"pattern {pattern!r}: write N:M with 0 < N < M, N of every M removed; for example 2:4")
    return zeros, of


def check_pattern_fits(pattern: str, columns: int) -> tuple[int, int]:
    """`parse_pattern`, and that M divides the number of inputs; raises RecipeError naming both."""
    zeros, of = parse_pattern(pattern)
    if columns % of:
        raise RecipeError(f"pattern {pattern}: the number of inputs must be a multiple of {of}, but is {columns}")
    return zeros, of


class SparsityOptions(Options):
    """Recipe keys of every method that removes weights: one of `sparsity` and `pattern`."""

    sparsity: float | None = Field(None, gt=0, lt=1, description="fraction of the weights to remove")
    pattern: str | None = Field(None, description="N:M, for example 2:4: remove N of every M consecutive inputs")

    @field_validator("pattern", mode="before")
    @classmethod
    def _readable(cls, pattern: object) -> object:
        if isinstance(pattern, int):
            raise ValueError(f'write the pattern in quotes, "2:4": without them YAML reads a number, here {pattern}')
        try:
            if isinstance(pattern, str):
                parse_pattern(pattern)
        except RecipeError as error:
            raise ValueError(str(error)) from error
        return pattern

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if (self.sparsity is None) == (self.pattern is None):
            raise ValueError("give either `sparsity` (a fraction) or `pattern` (N:M), not both and not neither")
        return self

    @property
    def zeros_of(self) -> tuple[int, int] | None:
        """(N, M) of the pattern: N removed of M."""
        return None if self.pattern is None else parse_pattern(self.pattern)

    @property
    def fraction(self) -> float:
        """Fraction of the weights that is removed, whichever key said so."""
        zeros, of = self.zeros_of or (self.sparsity or 0, 1)
        return zeros / of

    def scheme(self, before: Scheme, storage_dtype: torch.dtype) -> Scheme:
        """What an earlier step removed stays removed and counts towards the new fraction."""
        return replace(before, sparsity=max(before.sparsity, self.fraction), pattern=self.zeros_of or before.pattern)


class ProtectOptions(Options):
    """Recipe keys that leave the first and the last blocks as they are."""

    protect_first: int = Field(0, ge=0, description="blocks at the beginning that stay as they are")
    protect_last: int = Field(0, ge=0, description="blocks at the end that stay as they are")

    def free_blocks(self, blocks: int) -> range:
        """The blocks that may change, of so many; ValueError when none may."""
        free = range(self.protect_first, blocks - self.protect_last)
        if not free:
            raise ValueError(
                f"protect_first: {self.protect_first} and protect_last: {self.protect_last} leave none of {blocks} "
                "blocks to change"
            )
        return free


class RefitOptions(SparsityOptions):
    """Recipe keys of methods that only choose a mask: what becomes of the weights it keeps."""

    refit: bool = Field(False, description="move the weights that stay to where the output changes least")
    damping: float = Field(0.01, ge=0, description="for `refit`: added to the Hessian's diagonal, relative to its mean")

    def finish(self, given: LinearInput, mask: Tensor) -> Masked:
        """The weight with `mask`, bool (N, K), refitted where that was asked for."""
        weight = given.weight
        if self.refit:
            weight = refit(weight, given.statistics[Gram].value, mask, damping=self.damping)
        return pruned(weight, mask, given.storage_dtype)


def needs_of_mask(options: RefitOptions, *others: StatisticType) -> tuple[StatisticType, ...]:
    """What the mask needs, and the Gram matrix for `refit`."""
    return (*others, Gram) if options.refit else others


def caution(options: SparsityOptions, parameters: int) -> str:
    """What a plan says of zeros that are scattered."""
    return (
        "zeros make files of format native smaller, not the arithmetic faster: transformers multiplies them like other "
        "numbers"
    )
