"""Losses of logits that are never in memory all at once.

For a vocabulary of 150,000 the logits of 4,096 tokens take 2.4 GB in fp32, once per model and again for the gradient.
Here tokens are cut into slices; a slice's logits are made from the last hidden states, give their part of the loss and
are dropped. In the backward pass they are made again: one more product with the head, which is a few per cent of a
model, for memory of `tokens` x V instead of T x V.

    L = sum over slices of  sum_t loss(head(h_t), teacher_t)            only for t that are to be learnt

Source: the usual exchange of memory for arithmetic (Chen et al. 2016, arXiv:1604.06174), applied to the head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

TOKENS = 256
"""Tokens whose logits are in memory at once."""


def sliced_sum(loss: Callable[..., Tensor], tensors: Sequence[Tensor], tokens: int = TOKENS) -> Tensor:
    """Sum of `loss(*slices)` over slices of `tokens` rows of all `tensors` (T, ...), differentiable in them and in
    the parameters that `loss` uses. `loss` turns slices (t, ...) into values per token (t,).

    A scalar in the dtype of the values; 0 for no tokens. Raises ValueError when the tensors differ in T.
    """
    rows = {len(tensor) for tensor in tensors}
    if len(rows) != 1:
        raise ValueError(f"tensors of {sorted(rows)} rows cannot be cut into the same slices")
    total = tensors[0].new_zeros((), dtype=torch.float32)
    for pieces in zip(*(tensor.split(tokens) for tensor in tensors), strict=True):
        if len(pieces[0]):
            total = total + checkpoint(lambda *parts: loss(*parts).sum(), *pieces, use_reentrant=False)
    return total
