"""Every method Penjing knows, in one table. A method is a function; this says which, and what it needs."""

from __future__ import annotations

from penjing.methods.base import GridOptions, Method, Selection
from penjing.methods.pruning import magnitude, shortgpt, sparsegpt, wanda
from penjing.methods.pruning.options import SparsityOptions
from penjing.methods.quantization import awq, gptq, rtn, smoothquant
from penjing.statistics import AbsMax, ColumnNorm, CosineChange, Gram, MeanAbs, TokenSample


def _rounds_row_by_row(options: GridOptions | sparsegpt.SparseGPTOptions) -> bool:
    """A scale of the whole matrix ties its rows together."""
    return options.group_size != "tensor"


_TABLE = (
    Method(
        name="rtn",
        summary="round every weight to the nearest point of its grid; no calibration",
        paper="baseline of arXiv:2210.17323",
        options=GridOptions,
        linear=rtn.linear,
        row_wise=_rounds_row_by_row,
    ),
    Method(
        name="gptq",
        summary="round column by column, the remaining columns make up for the error",
        paper="arXiv:2210.17323",
        options=gptq.GPTQOptions,
        linear=gptq.linear,
        needs=lambda options: (Gram,),
        row_wise=_rounds_row_by_row,
    ),
    Method(
        name="awq",
        summary="scale up the input channels that carry large activations, clip, round",
        paper="arXiv:2306.00978",
        options=awq.AWQOptions,
        transform=awq.transform,
        linear=awq.linear,
        needs=lambda options: (MeanAbs, TokenSample) if options.clip else (MeanAbs,),
    ),
    Method(
        name="smoothquant",
        summary="move outliers of activations into the weights, so that both fit 8 bits; rounds nothing itself",
        paper="arXiv:2211.10438",
        options=smoothquant.SmoothQuantOptions,
        transform=smoothquant.transform,
        needs=lambda options: (AbsMax,),
    ),
    Method(
        name="magnitude",
        summary="remove the smallest weights; no calibration",
        paper="arXiv:1506.02626",
        options=magnitude.MagnitudeOptions,
        linear=magnitude.linear,
        row_wise=lambda options: options.scope == "row" or options.pattern is not None,
    ),
    Method(
        name="wanda",
        summary="remove weights that are small and see small inputs",
        paper="arXiv:2306.11695",
        options=SparsityOptions,
        linear=wanda.linear,
        needs=lambda options: (ColumnNorm,),
    ),
    Method(
        name="sparsegpt",
        summary="remove weights column by column, the remaining ones make up for it; can quantise in the same pass",
        paper="arXiv:2301.00774",
        options=sparsegpt.SparseGPTOptions,
        linear=sparsegpt.linear,
        needs=lambda options: (Gram,),
        row_wise=lambda options: options.pattern is not None and not (options.bits and options.group_size == "tensor"),
    ),
    Method(
        name="shortgpt",
        summary="remove the decoder blocks that change the hidden state least",
        paper="arXiv:2403.03853",
        options=shortgpt.ShortGPTOptions,
        select=Selection(CosineChange, shortgpt.select),
    ),
)

METHODS: dict[str, Method] = {method.name: method for method in _TABLE}
