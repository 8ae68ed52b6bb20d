"""Weight sharing: values, or vectors of them, from small tables."""

from __future__ import annotations

from penjing.methods.base import Method
from penjing.methods.weight_sharing import aqlm, kmeans, tie
from penjing.statistics import Gram

TABLE: tuple[Method, ...] = (
    Method(
        name="kmeans",
        summary="every weight one of a few values, in the best tables there are; Huffman codes on request",
        paper="arXiv:1510.00149",
        options=kmeans.KMeansOptions,
        linear=kmeans.linear,
        needs=kmeans.needs,
        row_wise=lambda options: options.group_size != "tensor",
    ),
    Method(
        name="aqlm",
        summary="a few consecutive weights as a sum of vectors from books, fitted to the output; for 2 bits and less",
        paper="arXiv:2401.06118",
        options=aqlm.AQLMOptions,
        linear=aqlm.linear,
        needs=lambda options: (Gram,),
        row_wise=lambda options: False,
    ),
    Method(
        name="tie",
        summary="blocks that compute with the weights of another block, which is found by trying",
        paper="arXiv:1909.11942",
        options=tie.TieOptions,
        remake=tie.TIE,
        passes=lambda options, windows: (
            min(options.windows, windows) / windows * (options.reach + options.blocks * options.candidates)
        ),
    ),
)
