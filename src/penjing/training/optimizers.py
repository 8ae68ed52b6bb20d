"""AdamW in 32 or 8 bits, its parameter groups, and the course of the learning rate."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from fnmatch import fnmatch

import torch
from torch import nn

from penjing.errors import MissingDependency, TrainingError
from penjing.methods.training import TrainOptions


def share_of_rate(step: int, steps: int, warm_up: float) -> float:
    """Share of the highest learning rate in step `step` of `steps`, counted from 0: a linear rise, a cosine to zero."""
    rising = round(warm_up * steps)
    if step < rising:
        return (step + 1) / (rising + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))


def make_optimizer(
    parameters: Iterable[tuple[str, nn.Parameter]], options: TrainOptions, rates: Mapping[str, float]
) -> torch.optim.Optimizer:
    """The optimiser of named parameters. Each group has `factor`, its share of the learning rate.

    Weight decay touches matrices only. Raises MissingDependency for 8-bit moments without bitsandbytes, TrainingError
    for paged ones without CUDA.
    """
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in parameters:
        factor = next((factor for glob, factor in rates.items() if fnmatch(name, glob)), 1.0)
        groups.setdefault((factor, parameter.ndim >= 2), []).append(parameter)
    listed = [
        {"params": group, "factor": factor, "weight_decay": options.weight_decay if decays else 0.0}
        for (factor, decays), group in groups.items()
    ]
    if options.optimizer == "adamw":
        return torch.optim.AdamW(listed, lr=options.learning_rate, betas=(0.9, 0.95), fused=True)
    try:
        import bitsandbytes
    except ImportError as error:
        raise MissingDependency(
            f"optimizer {options.optimizer} needs bitsandbytes: pip install 'penjing[bitsandbytes]'"
        ) from error
    paged = options.optimizer.startswith("paged")
    if paged and not torch.cuda.is_available():
        raise TrainingError(
            "paged-adamw-8bit moves moments between the memory of a GPU and the machine's, and there is no CUDA device "
            "here; use adamw-8bit or adamw"
        )
    kind = bitsandbytes.optim.PagedAdamW8bit if paged else bitsandbytes.optim.AdamW8bit
    return kind(listed, lr=options.learning_rate, betas=(0.9, 0.95))


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every group its share of `rate`."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["factor"]
