"""What `evaluate` and `compare` return: everything that was measured of one model."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from penjing.evaluation.classification import Classification
    from penjing.evaluation.metrics import Quality
    from penjing.evaluation.questions import TaskScore
    from penjing.evaluation.windows import Protocol
    from penjing.runtime.memory import CacheMemory


@dataclass(frozen=True)
class ClassifierEvaluation:
    """A measured classifier of texts: the numbers with their protocol, and the model's size."""

    model: str
    against: str | None
    bytes: int
    parameters: int
    classification: Classification

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        measured = asdict(self.classification) | {"sentence": self.classification.sentence()}
        own = {"model": self.model, "against": self.against, "bytes": self.bytes, "parameters": self.parameters}
        return own | {"classification": measured}


@dataclass(frozen=True)
class Evaluation:
    """A measured model: the numbers, the protocol they were measured under, and the model's size.

    kv_cache  what a quantised cache holds after one window, when the model was read through one
    tasks     what it reached on the tasks that it was given, if any
    """

    model: str
    against: str | None
    bytes: int
    parameters: int
    quality: Quality
    protocol: Protocol
    kv_cache: CacheMemory | None = None
    tasks: tuple[TaskScore, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "model": self.model,
            "against": self.against,
            "bytes": self.bytes,
            "bits_per_weight": 8 * self.bytes / self.parameters,
            **asdict(self.quality),
            "kv_cache": None if self.kv_cache is None else asdict(self.kv_cache),
            "tasks": [asdict(score) for score in self.tasks],
            "protocol": asdict(self.protocol) | {"sentence": self.protocol.sentence()},
        }
