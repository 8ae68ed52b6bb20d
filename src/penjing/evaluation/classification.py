"""What a classifier of texts is worth: how many it gets right, and how close it stays to another one.

accuracy   share of the texts whose likeliest class is their label
nll        mean of -log q(label), in nats
agreement  share of the texts on which both name the same class
kl         mean KL(reference || model) of the classes, in nats
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div


@dataclass(frozen=True)
class Classification:
    """The measures above, the reference's own accuracy, and how they were taken: texts, tokens read of each, data."""

    accuracy: float
    nll: float
    texts: int
    length: int
    data: str
    agreement: float | None = None
    kl: float | None = None
    reference_accuracy: float | None = None

    def sentence(self) -> str:
        """The protocol in words."""
        return f"{self.data}: {self.texts} labelled texts, the first {self.length} tokens of each, float32"


def measured(
    logits: Tensor, labels: Tensor, *, length: int, data: str, reference: Tensor | None = None
) -> Classification:
    """From logits fp32 (S, C), labels int64 (S,), and a reference's logits on the same texts."""
    found = logits.argmax(-1)
    others: dict[str, Any] = {}
    if reference is not None:
        own, other = logits.log_softmax(-1), reference.log_softmax(-1)
        others = {
            "agreement": (found == reference.argmax(-1)).double().mean().item(),
            "kl": kl_div(own, other, reduction="batchmean", log_target=True).item(),
            "reference_accuracy": (reference.argmax(-1) == labels).double().mean().item(),
        }
    return Classification(
        accuracy=(found == labels).double().mean().item(),
        nll=cross_entropy(logits, labels).item(),
        texts=len(labels),
        length=length,
        data=data,
        **others,
    )
