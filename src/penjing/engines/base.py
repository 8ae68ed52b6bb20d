"""What an inference engine must answer, so that a model can be checked, timed and talked to in it.

An engine is a row of the table `ENGINES`: what it is called, how to install it, which files it takes. What it loads is
a `LoadedModel`. Tokens and logits are numpy arrays, so that an engine without torch is measured without torch.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class LoadRequest:
    """What to load and how.

    path     a model directory, or a file
    dtype    "auto" (as stored), "float32", "bfloat16", "float16"; engines of quantised files have no choice
    threads  of the engine's own pool
    context  tokens that prompt and answer may take together, for each of
    batch    sequences at once
    """

    path: Path
    dtype: str = "auto"
    threads: int = 1
    context: int = 2048
    batch: int = 1
    trust_remote_code: bool = False


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen: the likeliest at temperature 0, else drawn from the likeliest that make up `top_p`."""

    tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[int, ...] = ()


@dataclass(frozen=True)
class Timing:
    """Seconds from prompts to the logits of their next tokens, and per step of one token for each sequence."""

    prefill: float
    step: float


class Engine(Protocol):
    """One way to run a model."""

    name: str
    summary: str
    install: str
    """The command that installs it."""
    formats: frozenset[str]
    """Penjing's formats that it loads."""
    tolerance: float
    """Mean KL in nats per token that its arithmetic may add to a model it loads correctly."""

    def version(self) -> str | None:
        """Version of the engine on this machine; None when it is not installed."""

    def refusal(self, path: Path) -> str | None:
        """Why it cannot load what lies at `path`, from file names and config alone; None if it may."""

    def load(self, request: LoadRequest) -> LoadedModel:
        """Load a model. Raises EngineError saying what the engine said."""


class LoadedModel(ABC):
    """A model in an engine.

    vocabulary      number of logits
    read_per_token  bytes of weights that one decoded token reads: all but the rows of an untied input embedding that
                    are not looked up; None where only some experts are read
    """

    vocabulary: int
    read_per_token: int | None

    @abstractmethod
    def logits(self, tokens: np.ndarray) -> np.ndarray:
        """Token windows int64 (B, T) -> fp32 (B, T, V), up to a constant per position."""

    @abstractmethod
    def generate(self, prompt: Sequence[int], sampling: Sampling) -> Iterator[int]:
        """Tokens of the answer, one by one as they are made; a stop token ends it and is not given out."""

    @abstractmethod
    def time(self, tokens: np.ndarray, steps: int) -> Timing:
        """Read prompts (B, T), nothing cached, then append `steps` tokens to each, one by one."""

    def process_id(self) -> int | None:
        """The process that holds the weights, when it is not this one."""
        return None

    def close(self) -> None:  # noqa: B027 - most engines have nothing to give back
        """Give back what the engine holds."""


class Session(Protocol):
    """Prompts that were read, and what may follow."""

    logits: np.ndarray
    """Of the next token: fp32 (B, V)."""

    def step(self, tokens: np.ndarray) -> None:
        """Append one token (B,) to each sequence and compute `logits` anew."""


class SteppingModel(LoadedModel):
    """A model that can be driven token by token."""

    @abstractmethod
    def begin(self, tokens: np.ndarray) -> Session:
        """Read prompts (B, T)."""

    def generate(self, prompt: Sequence[int], sampling: Sampling) -> Iterator[int]:
        """See `LoadedModel`."""
        import numpy as np

        draw = np.random.default_rng(sampling.seed)
        session = self.begin(np.asarray([prompt], dtype=np.int64))
        for position in range(sampling.tokens):
            token = choose(session.logits[0], sampling, draw)
            if token in sampling.stop:
                return
            yield token
            if position + 1 < sampling.tokens:
                session.step(np.array([token]))

    def time(self, tokens: np.ndarray, steps: int) -> Timing:
        """See `LoadedModel`. The likeliest token follows, as in greedy decoding."""
        started = time.perf_counter()
        session = self.begin(tokens)
        read = time.perf_counter()
        for _ in range(steps):
            session.step(session.logits.argmax(-1))
        return Timing(read - started, (time.perf_counter() - read) / steps)


def choose(logits: np.ndarray, sampling: Sampling, draw: np.random.Generator) -> int:
    """One token from logits (V,)."""
    import numpy as np

    if sampling.temperature == 0:
        return int(logits.argmax())
    scaled = (logits - logits.max()).astype(np.float64) / sampling.temperature
    order = np.argsort(-scaled, kind="stable")
    mass = np.exp(scaled[order])
    mass /= mass.sum()
    kept = int(np.searchsorted(mass.cumsum(), sampling.top_p)) + 1
    return int(draw.choice(order[:kept], p=mass[:kept] / mass[:kept].sum()))
