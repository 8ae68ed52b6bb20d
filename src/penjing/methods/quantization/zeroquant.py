"""ZeroQuant: fine-grained rounding to nearest, and layer-by-layer distillation to win back what it lost.

Weights are rounded in groups with `wide` scales (s = max|w| / 2**(bits-1)), inputs token by token when the step asks
for `activations`. Layer-by-layer distillation then trains the weights W of one block at a time, all others left alone:

    minimise  mean (block(x; Q(W)) - block(x; W_0))^2        by AdamW

where x is what the *dense* model sends into the block, so that no block waits for another, and the gradient of Q is
that of the identity. Set `propagate: original` in the recipe for that: otherwise x is what the compressed blocks before
it send, which distils the errors of earlier blocks away as well but is not the paper's method.

Worked example. W = [0.30], scale 1 (wide, from a neighbour), W rounds to 0. If the output asks for more, the gradient
reaches W as if it had not been rounded; once W > 0.5 it rounds to 1.

Source: Yao et al. 2022, "ZeroQuant" (arXiv:2206.01861), sections 4.1 and 4.2.
"""

from __future__ import annotations

import torch
from pydantic import Field

from penjing.methods.base import BlockTask, GridOptions
from penjing.methods.learning import StraightThrough, batches, block_loss
from penjing.methods.quantization.rtn import rtn
from penjing.numerics.grids import ScaleRule
from penjing.representations import Masked, Quantized


class ZeroQuantOptions(GridOptions):
    """Recipe keys of ZeroQuant."""

    scale_rule: ScaleRule = Field("wide", description="how a symmetric scale follows from the largest weight")
    iterations: int = Field(100, ge=0, description="steps of distillation per block; 0 rounds only")
    batch_size: int = Field(32, ge=1, description="windows per step")
    learning_rate: float = Field(5e-6, gt=0, description="of AdamW")
    seed: int = Field(0, ge=0, description="chooses the windows of each step")


def zeroquant(task: BlockTask, options: ZeroQuantOptions) -> dict[str, Quantized | Masked]:
    """Distil a block into its rounded self, and round."""
    grid = options.grid(task.storage_dtype)
    trained = {name: weight.clone().requires_grad_() for name, weight in task.weights.items()}
    optimizer = torch.optim.AdamW(list(trained.values()), lr=options.learning_rate, weight_decay=0.0)
    for batch in batches(len(task.inputs), options.batch_size, options.iterations, options.seed):
        rounded = {
            name: StraightThrough.apply(weight, rtn(weight.detach(), grid, kept=task.kept.get(name)).dense())
            for name, weight in trained.items()
        }
        block_loss(task, rounded, batch)
        optimizer.step()
        optimizer.zero_grad()
    return {name: rtn(weight.detach(), grid, kept=task.kept.get(name)) for name, weight in trained.items()}


def learn(task: BlockTask, options: ZeroQuantOptions) -> dict[str, Quantized | Masked]:
    """The method's `learn` shape."""
    with torch.enable_grad():
        return zeroquant(task, options)
