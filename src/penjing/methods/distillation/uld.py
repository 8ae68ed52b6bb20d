"""Student and teacher of different vocabularies: distributions compared by shape, where both read the same text.

Token ids of two vocabularies mean different things, so no KL can be formed. Universal logit distillation compares the
sorted probabilities: the likeliest token of one with the likeliest of the other, whatever they are, the shorter list
filled up with zeros. That is the Wasserstein distance when moving mass between any two tokens costs 1:

    L_t = sum_i | sorted(p)_i - sorted(q)_i |

Where a piece of text is one token in both vocabularies it is the same choice in both, and can be compared as such:
`matched` moves these tokens out of the sorted part and takes their difference directly.

Distributions are compared only at positions that follow the same text: both tokenisations have a boundary at the same
character. Between them the models predict the next token of different beginnings.

Worked example: p = (0.7, 0.3), q = (0.2, 0.5, 0.3): sorted p = (0.7, 0.3, 0), q = (0.5, 0.3, 0.2), L = 0.2 + 0 + 0.2.

Sources: Boizard et al. 2024, "Universal Logit Distillation" (arXiv:2402.12030), eq. 4-5; shared tokens and boundaries
in text follow Patiño et al. 2025, "GOLD" (https://huggingface.co/spaces/HuggingFaceH4/on-policy-distillation).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from penjing.methods.distillation.tokens import log_probabilities


def uld(student: Tensor, teacher: Tensor, matched: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """The distance above per token: logits (..., V_s) and (..., V_t) -> (...).

    matched  ids int64 (M,) of the same pieces of text in the student's and the teacher's vocabulary
    """
    q, p = log_probabilities(student).exp(), log_probabilities(teacher.detach()).exp()
    direct: Tensor | float = 0.0
    if matched is not None and len(matched[0]):
        ours, theirs = matched
        direct = (q[..., ours] - p[..., theirs]).abs().sum(-1)
        q, p = _without(q, ours), _without(p, theirs)
    width = max(q.shape[-1], p.shape[-1])
    q, p = (pad(x.sort(-1, descending=True).values, (0, width - x.shape[-1])) for x in (q, p))
    return (q - p).abs().sum(-1) + direct


def _without(values: Tensor, ids: Tensor) -> Tensor:
    kept = torch.ones(values.shape[-1], dtype=torch.bool, device=values.device)
    kept[ids] = False
    return values[..., kept]


def matching_tokens(student: Mapping[str, int], teacher: Mapping[str, int]) -> tuple[Tensor, Tensor]:
    """Ids of the pieces that both vocabularies hold, in the order of the student's ids."""
    shared = sorted(student.keys() & teacher.keys(), key=student.__getitem__)
    return torch.tensor([student[piece] for piece in shared]), torch.tensor([teacher[piece] for piece in shared])


def common_positions(student: Sequence[int], teacher: Sequence[int]) -> tuple[list[int], list[int]]:
    """Positions whose predictions follow the same text.

    student, teacher  for each token, the character its piece of text ends at (ascending)

    Returns positions of both, as long and paired. Two tokens that end at the same character: the last one counts.
    """
    ends_of_student = {end: position for position, end in enumerate(student)}
    ends_of_teacher = {end: position for position, end in enumerate(teacher)}
    shared = sorted(ends_of_student.keys() & ends_of_teacher.keys())
    return [ends_of_student[end] for end in shared], [ends_of_teacher[end] for end in shared]
