"""PEQA: teach a quantised model a task by its scales alone.

Every weight stays s (code - zero) with its code and zero as they are; only the scales s are trained, to make the text
likely:

    dL/ds_n = sum_k dL/dW_nk (code_nk - zero_n)          minimise   mean of  -log q(next token)

The model keeps its size and its engines, and a task is a set of scales: a few hundredths of the model, swapped in a
moment (`training/task_scales.py`).

Worked example. One weight, code 3, s = 0.5 and dL/dW = 2: dL/ds = 6.

Source: Kim et al. 2023, "Memory-Efficient Fine-Tuning of Compressed Large Language Models via sub-4-bit Integer
Quantization" (arXiv:2305.14152), section 3.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from pydantic import Field

from penjing.methods.base import ModelTask, Tuned
from penjing.methods.quantization import e2e_qp


class PEQAOptions(e2e_qp.E2EOptions):
    """Recipe keys of PEQA. The recipe's calibration text is the task."""

    norms: bool = Field(False, description="also train the weights of norms inside the blocks")


def tune(task: ModelTask, options: PEQAOptions, report: Callable[[int, float], None]) -> Tuned:
    """The method's `tune` shape: training of scales as in E2E-QP, towards the text instead of the dense model."""
    return e2e_qp.tune(replace(task, loss=task.told), options, report)
