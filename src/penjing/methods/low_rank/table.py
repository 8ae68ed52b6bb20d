"""Low rank: products of thin matrices."""

from __future__ import annotations

from penjing.methods.base import Method
from penjing.methods.low_rank import asvd, nmf, pca, residual, svd, svd_llm, tensor_train, tensor_train_matrix
from penjing.methods.low_rank.options import RankOptions
from penjing.statistics import Gram, MeanAbs

TABLE: tuple[Method, ...] = (
    Method(
        name="svd",
        summary="two thin factors in place of a matrix, the closest of their rank; no calibration",
        paper="baseline of arXiv:2403.07378",
        options=RankOptions,
        linear=svd.linear,
        row_wise=lambda options: False,
    ),
    Method(
        name="asvd",
        summary="two thin factors, columns weighted by how large their inputs are",
        paper="arXiv:2312.05821",
        options=asvd.ASVDOptions,
        linear=asvd.linear,
        needs=lambda options: (MeanAbs,),
        row_wise=lambda options: False,
    ),
    Method(
        name="svd-llm",
        summary="two thin factors whose outputs are closest to the matrix's",
        paper="arXiv:2403.07378",
        options=RankOptions,
        linear=svd_llm.linear,
        needs=lambda options: (Gram,),
        row_wise=lambda options: False,
    ),
    Method(
        name="pca",
        summary="two thin factors, of which the right one keeps the directions in which the inputs vary most",
        paper="arXiv:2401.15024",
        options=RankOptions,
        linear=pca.linear,
        needs=lambda options: (Gram,),
        row_wise=lambda options: False,
    ),
    Method(
        name="nmf",
        summary="two thin factors without negative entries, or one of them; to look at, worse than svd by nature",
        paper="https://doi.org/10.1109/TPAMI.2008.277",
        options=nmf.NMFOptions,
        linear=nmf.linear,
        row_wise=lambda options: False,
    ),
    Method(
        name="lqer",
        summary="round, then add a product of low rank that makes up for part of the error",
        paper="arXiv:2402.02446",
        options=residual.ResidualOptions,
        linear=residual.linear,
        needs=residual.needs,
        row_wise=lambda options: False,
    ),
    Method(
        name="tensor-train",
        summary="every row of an embedding as a chain of small cores (TensorGPT); no calibration",
        paper="arXiv:2307.00526",
        options=tensor_train.TensorTrainOptions,
        linear=tensor_train.linear,
    ),
    Method(
        name="tensor-train-matrix",
        summary="a whole embedding as one tensor train over rows and columns; no calibration",
        paper="arXiv:1901.10787",
        options=tensor_train_matrix.TrainMatrixOptions,
        linear=tensor_train_matrix.linear,
        row_wise=lambda options: False,
    ),
)
