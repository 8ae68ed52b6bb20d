"""A teacher's next-token distributions on disk: computed once, read as often as students are trained.

A directory holds the windows, and for every token the `k` likeliest next tokens with their log-probabilities in half
precision and the logarithm of what is left (see `methods.distillation.top_k`), in arrays that are mapped into memory
rather than read. It belongs to one teacher and one tokenizer and refuses others; filling it goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from penjing.checkpoint import write_bytes
from penjing.errors import TeacherError
from penjing.methods.distillation.sliced import sliced_sum
from penjing.methods.distillation.tokens import predictions
from penjing.methods.distillation.top_k import TopK, top_k, top_k_kl
from penjing.methods.training import Batch, Loss
from penjing.models.outputs import last_states, logits_of

_ARRAYS = {"tokens": "<i4", "logs": "<f2", "tail": "<f2"}
_HEADER, _DONE = "header.json", "done.json"


class LogitCache:
    """Distributions for windows int64 (S, T) by the teacher called `teacher`; `tokenizer` is any mark of the tokenizer.

    Raises TeacherError naming what differs when `directory` holds a cache of something else.
    """

    def __init__(self, directory: Path, windows: Tensor, teacher: str, tokenizer: str, k: int = 128) -> None:
        self.directory, self.windows, self.k = directory, windows, k
        marks = {"teacher": teacher, "tokenizer": tokenizer, "windows": _digest(windows), "k": k}
        header = directory / _HEADER
        before = json.loads(header.read_text(encoding="utf-8")) if header.is_file() else marks
        if differs := [key for key in marks if before.get(key) != marks[key]]:
            raise TeacherError(f"{directory} holds logits of another {' and '.join(differs)}; choose another directory")
        write_bytes(header, json.dumps(marks).encode())
        self._rows = {_digest(row): number for number, row in enumerate(windows)}
        self._arrays = {name: self._array(name, dtype) for name, dtype in _ARRAYS.items()}

    @property
    def done(self) -> int:
        """Windows whose distributions are there."""
        file = self.directory / _DONE
        return int(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else 0

    @torch.no_grad()
    def fill(self, model: nn.Module, slice_size: int = 256) -> None:
        """Compute what is missing, window by window, with no more than `slice_size` tokens' logits in memory."""
        for number in range(self.done, len(self.windows)):
            states = last_states(model, {"input_ids": self.windows[number][None]}).last_hidden_state[0]
            pieces = [top_k(logits_of(model, piece), self.k) for piece in states.split(slice_size)]
            for name, array in self._arrays.items():
                array[number] = torch.cat([getattr(piece, name) for piece in pieces]).numpy()
                array.flush()
            write_bytes(self.directory / _DONE, json.dumps(number + 1).encode())

    def of(self, windows: Tensor) -> TopK:
        """The distributions of windows (B, T) of this cache: (B, T, k), (B, T, k), (B, T). TeacherError for others."""
        rows = [self._rows.get(_digest(row.cpu())) for row in windows]
        if any(row is None or row >= self.done for row in rows):
            raise TeacherError(f"{self.directory} has no logits for a window; fill it, or train on its windows")
        found = {name: torch.from_numpy(np.array(array[rows])) for name, array in self._arrays.items()}
        return TopK(*(found[name].to(windows.device) for name in TopK._fields))

    def _array(self, name: str, dtype: str) -> Any:
        shape = (*self.windows.shape, self.k) if name != "tail" else tuple(self.windows.shape)
        path = self.directory / f"{name}.npy"
        mode = "r+" if path.is_file() else "w+"
        return np.lib.format.open_memmap(path, mode=mode, dtype=dtype, shape=None if mode == "r+" else shape)


class CachedDistillation(nn.Module):
    """The objective of distillation from a cache: KL to the cut distributions at the tokens that are learnt."""

    def __init__(self, look_up: Callable[[Tensor], TopK]) -> None:
        super().__init__()
        self.look_up = look_up

    def forward(self, model: nn.Module, batch: Batch) -> Loss:
        """Its mean over those tokens."""
        at, labels = predictions(batch["labels"])
        states = last_states(model, batch).last_hidden_state[at]
        wanted = [part[at] for part in self.look_up(batch["input_ids"])]

        def of_slice(state: Tensor, *target: Tensor) -> Tensor:
            return top_k_kl(logits_of(model, state), TopK(*target))

        count = max(1, len(labels))
        return Loss(sliced_sum(of_slice, (states, *wanted)) / count, count)


def _digest(tokens: Tensor) -> str:
    return hashlib.sha256(tokens.contiguous().numpy().astype("<i8").tobytes()).hexdigest()
