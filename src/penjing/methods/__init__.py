"""Every method Penjing knows, in one table. A method is a function; this says which, and what it needs."""

from __future__ import annotations

from penjing.methods.base import Method, Selection
from penjing.methods.pruning import magnitude, shortgpt, sparsegpt, wanda
from penjing.methods.pruning.options import SparsityOptions
from penjing.methods.quantization import (
    autoround,
    awq,
    bcq,
    e2e_qp,
    gptq,
    hqq,
    llm_int8,
    owq,
    rotation,
    rtn,
    smoothquant,
    spqr,
    zeroquant,
)
from penjing.methods.typed_grid import SearchedGridOptions
from penjing.statistics import AbsMax, ColumnNorm, CosineChange, CrossGram, Gram, MeanAbs, TokenSample

_TABLE = (
    Method(
        name="rtn",
        summary="round every weight to the nearest point of its grid; no calibration",
        paper="baseline of arXiv:2210.17323",
        options=SearchedGridOptions,
        linear=rtn.linear,
        needs=rtn.needs,
        row_wise=lambda options: options.row_wise,
    ),
    Method(
        name="gptq",
        summary="round column by column, the remaining columns make up for the error",
        paper="arXiv:2210.17323",
        options=gptq.GPTQOptions,
        linear=gptq.linear,
        needs=lambda options: (Gram, CrossGram) if options.asymmetric else (Gram,),
        row_wise=lambda options: options.row_wise,
    ),
    Method(
        name="hqq",
        summary="move zero points, any numbers, until most weights are close; without calibration unless weighted",
        paper="Badri, Shaji 2023, https://mobiusml.github.io/hqq_blog",
        options=hqq.HQQOptions,
        linear=hqq.linear,
        needs=lambda options: (ColumnNorm,) if options.weighted else (),
    ),
    Method(
        name="awq",
        summary="scale up the input channels that carry large activations, clip, round",
        paper="arXiv:2306.00978",
        options=awq.AWQOptions,
        transform=awq.transform,
        linear=awq.linear,
        needs=lambda options: (MeanAbs, TokenSample) if options.clip else (MeanAbs,),
        row_wise=lambda options: options.row_wise,
    ),
    Method(
        name="owq",
        summary="keep the few columns that hurt most dense and let them make up for the others, rounded as in gptq",
        paper="arXiv:2306.02272",
        options=owq.OWQOptions,
        linear=owq.linear,
        needs=lambda options: (Gram,),
        row_wise=lambda options: False,
    ),
    Method(
        name="spqr",
        summary="very small groups with quantised scales, single outliers kept dense, rounded as in gptq",
        paper="arXiv:2306.03078",
        options=spqr.SpQROptions,
        linear=spqr.linear,
        needs=lambda options: (Gram,),
        row_wise=lambda options: False,
    ),
    Method(
        name="autoround",
        summary="learn whether each weight rounds up or down, so that the block's output stays",
        paper="arXiv:2309.05516",
        options=autoround.AutoRoundOptions,
        learn=autoround.learn,
        passes=lambda options, windows: 3 * options.iterations * min(options.batch_size, windows) / windows,
    ),
    Method(
        name="zeroquant",
        summary="round group by group, then distil every block into its rounded self",
        paper="arXiv:2206.01861",
        options=zeroquant.ZeroQuantOptions,
        learn=zeroquant.learn,
        passes=lambda options, windows: 3 * options.iterations * min(options.batch_size, windows) / windows,
    ),
    Method(
        name="e2e-qp",
        summary="train the scales of a quantised model, and its norms, towards the dense model's logits",
        paper="arXiv:2407.11062",
        options=e2e_qp.E2EOptions,
        tune=e2e_qp.tune,
        passes=lambda options, windows: 2 + 5 * options.iterations * min(options.batch_size, windows) / windows,
    ),
    Method(
        name="bcq",
        summary="signed sums of a few scales per group, which multiply by table look-up (LUT-GEMM)",
        paper="arXiv:2206.09557",
        options=bcq.BCQOptions,
        linear=bcq.linear,
        needs=bcq.needs,
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
        name="llm-int8",
        summary="8-bit weights and inputs; input columns with outliers are multiplied as they are; no calibration",
        paper="arXiv:2208.07339",
        options=llm_int8.LLMInt8Options,
        linear=llm_int8.linear,
    ),
    Method(
        name="rotation",
        summary="turn the residual stream and the value heads so that no channel sticks out; rounds nothing itself",
        paper="arXiv:2404.00456",
        options=rotation.RotationOptions,
        rewrite=rotation.rewrite,
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
