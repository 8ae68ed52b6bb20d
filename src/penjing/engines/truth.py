"""What is known of engines, by trying: `truth.json`, written by scripts/truth.py, and what a plan concludes from it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cache
from importlib import resources
from typing import Any

from penjing.engines.table import ENGINES
from penjing.errors import EngineError, PlanError

FILE = "truth.json"


@dataclass(frozen=True)
class Fact:
    """One combination that was run.

    version       of the engine
    architecture  family of the model ("llama")
    scheme        of its linears, as a plan says it ("W4 g32 symmetric")
    loads         whether the engine took the files
    verified      whether its logits were those of the model on disk, within the engine's arithmetic; None without a run
    kl            of the engine's logits from those, nats per token
    prefill       tokens per second over those of the dense fp32 model in transformers, 128 tokens; None if not timed
    decode        the same for decoding at batch 1
    reason        what the engine said when it did not load, or what differed
    date          of the run, ISO 8601
    """

    engine: str
    version: str
    architecture: str
    format: str
    scheme: str
    loads: bool
    verified: bool | None
    kl: float | None
    prefill: float | None
    decode: float | None
    reason: str
    date: str

    @property
    def key(self) -> tuple[str, str, str, str]:
        """What the fact is about."""
        return (self.engine, self.architecture, self.format, self.scheme)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@cache
def known() -> tuple[Fact, ...]:
    """Every fact on file."""
    text = (resources.files("penjing.engines") / FILE).read_text(encoding="utf-8")
    return tuple(Fact(**entry) for entry in json.loads(text))


def judge(engine: str, architecture: str, format: str, schemes: Iterable[str]) -> list[str]:
    """What to warn of before a model is made for an engine.

    schemes  of the linears that are compressed, as a plan describes them
    Raises PlanError when the engine is known not to run such a model, EngineError for an unknown engine.
    """
    if engine not in ENGINES:
        raise EngineError(f"no engine called {engine!r}; there are {', '.join(ENGINES)}")
    loads = ENGINES[engine].formats
    if format not in loads:
        raise PlanError(f"{engine} does not load format {format}; it loads {', '.join(sorted(loads))}")
    warnings = []
    facts = {fact.key: fact for fact in known()}
    for scheme in dict.fromkeys(schemes):
        fact = facts.get((engine, architecture, format, scheme))
        if fact is None:
            warnings.append(
                f"{engine} was never tried on {architecture} as {format} {scheme}: run `penjing verify OUT --engine "
                f"{engine}` before you rely on it"
            )
        elif not fact.loads or fact.verified is False:
            raise PlanError(
                f"{engine} {fact.version} does not run {architecture} as {format} {scheme}: {fact.reason} ({fact.date})"
            )
        elif fact.decode is not None and fact.prefill is not None and max(fact.decode, fact.prefill) < 1:
            warnings.append(
                f"{engine} {fact.version} is not faster with {format} {scheme} than dense fp32: {fact.prefill:.2f} "
                f"times at prefill, {fact.decode:.2f} times at decode ({fact.date})"
            )
    return warnings
