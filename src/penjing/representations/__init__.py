"""What a weight becomes. Every representation answers the same questions:

dense()             the matrix it stands for, (N, K): N outputs, K inputs, as in `torch.nn.Linear`
nbytes()            the information it needs on disk when codes are packed to their bit width (a format may need
                    more and says so)
rows(start, stop)   the same for some of the outputs
"""

from __future__ import annotations

from penjing.numerics.activations import Activations
from penjing.representations.bilevel import Bilevel
from penjing.representations.binary_coded import BinaryCoded
from penjing.representations.codebook import Codebook
from penjing.representations.dense import Dense, Masked
from penjing.representations.low_rank import Corrected, LowRank
from penjing.representations.patched import Columns, Outliers, Patched
from penjing.representations.quantized import Coded, Quantized
from penjing.representations.scheme import Scheme
from penjing.representations.tensor_train import TensorTrain, TensorTrainMatrix
from penjing.representations.vector_coded import VectorCoded

Representation = Dense | Masked | Coded | Patched | LowRank | Corrected | TensorTrain | TensorTrainMatrix

__all__ = [
    "Activations",
    "Bilevel",
    "BinaryCoded",
    "Codebook",
    "Coded",
    "Columns",
    "Corrected",
    "Dense",
    "LowRank",
    "Masked",
    "Outliers",
    "Patched",
    "Quantized",
    "Representation",
    "Scheme",
    "TensorTrain",
    "TensorTrainMatrix",
    "VectorCoded",
]
