"""Distillation from a teacher of another vocabulary, on the loop: universal logit distillation (see `uld`).

A batch's rows are turned into text and read by both tokenizers; where both have a boundary at the same character, the
student's next-token distribution is compared with the teacher's:

    L = mean over common boundaries of  alpha ULD(q, p) + (1 - alpha) CE(next token of the student, q)

Sources: Boizard et al. 2024, "Universal Logit Distillation" (arXiv:2402.12030), eq. 5.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from penjing.methods.distillation.sliced import sliced_sum
from penjing.methods.distillation.tokens import cross_entropy
from penjing.methods.distillation.uld import common_positions, matching_tokens, uld
from penjing.methods.training import Batch, Loss, Teacher
from penjing.models.outputs import last_states, logits_of


class AcrossVocabularies(nn.Module):
    """The objective. Both tokenizers must be fast ones, which know the characters of each token."""

    def __init__(self, teacher: nn.Module, own: Any, others: Any, alpha: float) -> None:
        super().__init__()
        self.teacher = Teacher(teacher)
        self.own, self.others, self.alpha = own, others, alpha
        self._matched = matching_tokens(own.get_vocab(), others.get_vocab())

    def forward(self, model: nn.Module, batch: Batch) -> Loss:
        """Mean over the boundaries that both have, but the last, which nothing follows."""
        ours, theirs, labels = [], [], []
        for row in batch["input_ids"]:
            text = self.own.decode(row, skip_special_tokens=True)
            (ids, ends), (other, other_ends) = self._read(self.own, text), self._read(self.others, text)
            at, there = common_positions(ends[:-1], other_ends)
            if not at:
                continue
            ids, other = ids.to(row.device), other.to(row.device)
            ours.append(last_states(model, {"input_ids": ids[None]}).last_hidden_state[0, at])
            with torch.no_grad():
                seen = last_states(self.teacher.model, {"input_ids": other[None]})
            theirs.append(seen.last_hidden_state[0, there])
            labels.append(ids[[position + 1 for position in at]])
        if not ours:
            return Loss(next(model.parameters()).sum() * 0)
        count = sum(map(len, labels))
        tensors = [torch.cat(parts) for parts in (ours, theirs, labels)]
        return Loss(sliced_sum(self._loss(model), tensors) / count, count)

    def _loss(self, model: nn.Module) -> Any:
        def of_slice(student: Tensor, teacher: Tensor, wanted: Tensor) -> Tensor:
            with torch.no_grad():
                target = logits_of(self.teacher.model, teacher)
            logits = logits_of(model, student)
            matched = tuple(ids.to(logits.device) for ids in self._matched)
            soft = uld(logits, target, (matched[0], matched[1]))
            return self.alpha * soft + (1 - self.alpha) * cross_entropy(logits, wanted)

        return of_slice

    @staticmethod
    def _read(tokenizer: Any, text: str) -> tuple[Tensor, list[int]]:
        """Ids of a text, and the character after which each token ends."""
        coded = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
        return torch.tensor(coded["input_ids"]), [end for _, end in coded["offset_mapping"]]
