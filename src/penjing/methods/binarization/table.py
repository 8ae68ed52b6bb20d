"""Binarisation: one bit or three values per weight."""

from __future__ import annotations

from penjing.methods.base import Method
from penjing.methods.binarization import billm, onebit, ternary, xnor
from penjing.methods.binarization.caution import untrained
from penjing.statistics import Gram

TABLE: tuple[Method, ...] = (
    Method(
        name="xnor",
        summary="signs and a scale per row or group; a higher order adds signs of what is left",
        paper="arXiv:1603.05279",
        options=xnor.XNOROptions,
        linear=xnor.linear,
        needs=xnor.needs,
        caution=untrained,
    ),
    Method(
        name="onebit",
        summary="signs between a value per output and a value per input",
        paper="arXiv:2402.11295",
        options=onebit.OneBitOptions,
        linear=onebit.linear,
        needs=onebit.needs,
        caution=untrained,
        row_wise=lambda options: False,
    ),
    Method(
        name="billm",
        summary="two signs for salient columns, a bell-shaped split into two scales for the others, errors compensated",
        paper="arXiv:2402.04291",
        options=billm.BiLLMOptions,
        linear=billm.linear,
        needs=lambda options: (Gram,),
        caution=untrained,
        row_wise=lambda options: False,
    ),
    Method(
        name="ternary",
        summary="-1, 0 or +1 times a scale, 1.6 bits on disk: BitNet b1.58's rule, least squares, or with GPTQ",
        paper="arXiv:2402.17764",
        options=ternary.TernaryOptions,
        linear=ternary.linear,
        needs=ternary.needs,
        caution=untrained,
        row_wise=lambda options: options.group_size != "tensor",
    ),
)
