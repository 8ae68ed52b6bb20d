"""Calibration windows that the dense model writes itself, among those that are given or in their place.

What a model writes covers what it was trained on, in about the shares that it was trained on them, while a text at hand
covers one domain: what is learnt from both holds elsewhere, too. Texts are short and several fill a window, one after
the other as in pretraining; all of a batch are written at once, because a token of each costs hardly more than one.

Source: Liu et al. 2023, "LLM-QAT" (arXiv:2305.17888), section 2.1, for how a text begins and goes on.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from penjing.checkpoint.base import Checkpoint
from penjing.costs import WRITTEN_LENGTH, WRITTEN_TOGETHER
from penjing.memory import give_back
from penjing.methods.distillation.self_written import self_written
from penjing.numerics.precision import compute_dtype
from penjing.pipeline.text import Text, TextSource
from penjing.progress import Progress
from penjing.recipe import Calibration
from penjing.training.models import load_model


def calibration_text(
    checkpoint: Checkpoint, wanted: Calibration, progress: Progress, *, trust_remote_code: bool = False
) -> Text:
    """All windows that a recipe asks for, given and written."""
    source = TextSource(checkpoint)
    given = source.calibration(wanted)
    if not wanted.own_windows:
        return given
    written = write_windows(source, wanted, compute_dtype(), progress, trust_remote_code=trust_remote_code)
    return source.joined(given, written)


def write_windows(
    source: TextSource,
    wanted: Calibration,
    dtype: torch.dtype,
    progress: Progress,
    *,
    trust_remote_code: bool = False,
) -> Tensor:
    """Token windows int64 (n, length) that the model of `source` writes, as many of them as the recipe says.

    dtype  of the arithmetic

    Raises CheckpointError when the model holds packed codes.
    """
    length = min(WRITTEN_LENGTH, wanted.length)
    texts = wanted.own_windows * -(-wanted.length // length)
    model = load_model(source.checkpoint, dtype, trust_remote_code=trust_remote_code)
    parts = []
    for start in range(0, texts, WRITTEN_TOGETHER):
        count = min(WRITTEN_TOGETHER, texts - start)
        told = partial(_told, progress, start, count, length, texts)
        parts.append(self_written(model, count, length, wanted.seed + start, bos=source.bos, told=told).tokens)
    progress("write text", texts, texts, "")
    del model
    give_back()
    return torch.cat(parts).view(wanted.own_windows, -1)[:, : wanted.length].clone()


def _told(progress: Progress, before: int, count: int, length: int, texts: int, number: int) -> None:
    progress("write text", before + count * number // length, texts, "")
