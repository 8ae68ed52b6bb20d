"""Does an engine compute what Penjing means? The same tokens through both, and what differs."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from penjing.checkpoint import Checkpoint, open_checkpoint
from penjing.engines import Engine, EngineProcess, LoadRequest, Sampling, engine_for, model_path
from penjing.engines.onnxruntime import onnx_file
from penjing.engines.process import default_threads
from penjing.errors import CheckpointError, VerificationError
from penjing.evaluation.metrics import Comparison
from penjing.models import layout_of
from penjing.pipeline.stream import StreamedModel
from penjing.pipeline.text import TextSource, positions
from penjing.pipeline.weights import Weights
from penjing.progress import Progress

WINDOWS, LENGTH = 2, 128
"""Of the built-in text; windows are shorter where the model has fewer positions."""

_GENERATED = 32
_LISTED = 5
_NO_LOGITS = ("llama-server",)
_OWN_ROUNDING = 0.02
"""Tolerance in nats where a library rounds inputs to 8 bits in a way of its own (bitsandbytes), whatever the engine."""

_MARGIN = 0.5
"""How far below the likeliest a token's logit may be that an engine without logits chose as the likeliest."""


@dataclass(frozen=True)
class Difference:
    """A position where engine and reference rank another token first.

    probability  that the reference gives its own choice, and the engine's
    """

    window: int
    position: int
    expected: int
    found: int
    probability: tuple[float, float]


@dataclass(frozen=True)
class EngineCheck:
    """One model in one engine beside the same weights read by Penjing in fp32.

    against      whose weights were read
    positions    predictions compared
    kl           mean KL(Penjing || engine), nats per token; None when the engine gives no logits
    top1         share of positions with the same likeliest token
    largest      largest |logit difference| over the largest |logit|, both centred; None likewise
    differences  the first few positions with another likeliest token
    tolerance    mean KL that the engine's arithmetic may add
    """

    model: str
    engine: str
    version: str
    against: str
    positions: int
    kl: float | None
    top1: float
    largest: float | None
    differences: tuple[Difference, ...]
    tolerance: float

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"passed": True}


def check(
    model: str | Path,
    engine: str,
    *,
    against: str | Path | None = None,
    threads: int | None = None,
    progress: Progress,
    trust_remote_code: bool = False,
) -> EngineCheck:
    """Compare an engine's logits with those that Penjing computes, block by block in fp32, from the weights on disk.

    against  the model to read when `model` itself is in a form that Penjing does not read (ONNX)
    Raises VerificationError when they differ by more than the engine's arithmetic explains, EngineError when the
    engine does not load the model.
    """
    path = model_path(model, trust_remote_code=trust_remote_code)
    chosen = engine_for(path, engine)
    reference = _reference(path, against, trust_remote_code)
    tokens = _tokens(reference)
    prompt = tokens.shape[1]
    request = LoadRequest(
        path,
        "float32" if chosen.name == "transformers" else "auto",
        threads or default_threads(),
        prompt + _GENERATED,
        len(tokens),
        trust_remote_code,
    )
    progress("verify", 0, 2, f"load in {chosen.name}")
    with EngineProcess(chosen.name, request) as process:
        if chosen.name in _NO_LOGITS:
            tokens, logits = _continued(process, tokens), None
        else:
            logits = torch.from_numpy(process.logits(tokens.numpy()))
    progress("verify", 1, 2, "compute the same with Penjing")
    expected = _streamed(reference, tokens, trust_remote_code)
    progress("verify", 2, 2, "")
    facts = (str(model), chosen.name, chosen.version() or "", reference.label)
    if logits is None:
        result = _by_choices(facts, tokens, expected, prompt)
    else:
        result = _by_logits(facts, tokens, logits, expected, _tolerance(chosen, reference))
    _require(result)
    return result


def _tolerance(engine: Engine, reference: Checkpoint) -> float:
    """Mean KL that the arithmetic of an engine may add for such a model."""
    told = reference.config.get("quantization_config") or {}
    return max(engine.tolerance, _OWN_ROUNDING if told.get("load_in_8bit") else 0.0)


def _reference(path: Path, against: str | Path | None, trust_remote_code: bool) -> Checkpoint:
    if against is None and onnx_file(path) is not None and not any(path.glob("*.safetensors")):
        raise CheckpointError("Penjing does not read ONNX back; name the model it was made from: --against MODEL")
    return open_checkpoint(against or path, trust_remote_code=trust_remote_code)


def _tokens(reference: Checkpoint) -> Tensor:
    length = min(LENGTH, positions(reference.config) or LENGTH)
    return TextSource(reference).evaluation("builtin", WINDOWS, length).tokens


def _streamed(checkpoint: Checkpoint, tokens: Tensor, trust_remote_code: bool) -> Tensor:
    """Logits (S, T, V) fp32."""
    layout = layout_of(checkpoint.config, checkpoint.specs(), trust_remote_code=trust_remote_code)
    weights = Weights(checkpoint, layout)
    stream = StreamedModel(checkpoint.config, layout, weights.live, trust_remote_code=trust_remote_code)
    states = stream.forward(tokens, torch.float32)
    with stream.head(torch.float32) as head:
        return torch.stack([head(window[None]) for window in states])


def _by_logits(
    facts: tuple[str, str, str, str], tokens: Tensor, logits: Tensor, expected: Tensor, tolerance: float
) -> EngineCheck:
    vocabulary = expected.shape[-1]
    if logits.shape[-1] < vocabulary:
        raise VerificationError(f"{facts[1]} gives {logits.shape[-1]} logits, the model has {vocabulary} tokens")
    logits = logits[..., :vocabulary]  # engines may pad
    comparison = Comparison()
    for window, found, wanted in zip(tokens, logits, expected, strict=True):
        comparison.update(found[:-1], window[1:], wanted[:-1])
    quality = comparison.result()
    centred = [values - values.mean(-1, keepdim=True) for values in (logits, expected)]
    largest = float((centred[0] - centred[1]).abs().max() / centred[1].abs().max())
    differences = _differences(logits.argmax(-1), expected)
    assert quality.kl is not None and quality.top1 is not None
    return EngineCheck(*facts, quality.tokens, quality.kl, quality.top1, largest, differences, tolerance)


def _continued(process: EngineProcess, tokens: Tensor) -> Tensor:
    """The first window with what the engine writes after it, greedily."""
    prompt = tokens[0].tolist()
    answer = list(process.generate(prompt, Sampling(tokens=_GENERATED)))
    return torch.tensor([prompt + answer])


def _by_choices(facts: tuple[str, str, str, str], tokens: Tensor, expected: Tensor, prompt: int) -> EngineCheck:
    """Every token that the engine chose must be the likeliest, or nearly so, given the tokens before it."""
    chosen, logits = tokens[:, prompt:], expected[:, prompt - 1 : -1]
    best = logits.max(-1).values
    behind = best - logits.gather(-1, chosen.unsqueeze(-1)).squeeze(-1)
    agreed = float((behind < _MARGIN).float().mean())
    return EngineCheck(*facts, chosen.numel(), None, agreed, None, _differences(chosen, logits), 0.0)


def _differences(found: Tensor, expected: Tensor) -> tuple[Difference, ...]:
    """Where the likeliest tokens `found` (S, T) are not those of `expected` (S, T, V)."""
    wanted = expected.argmax(-1)
    result = []
    for window, position in (found != wanted).nonzero()[:_LISTED].tolist():
        probability = expected[window, position].softmax(-1)
        ours, theirs = int(wanted[window, position]), int(found[window, position])
        chances = (round(float(probability[ours]), 4), round(float(probability[theirs]), 4))
        result.append(Difference(window, position, ours, theirs, chances))
    return tuple(result)


def _require(result: EngineCheck) -> None:
    if result.kl is None:
        if result.top1 < 1:
            raise VerificationError(
                f"{result.engine} writes other tokens than {result.model} means: {_listed(result.differences)}"
            )
        return
    if not result.kl <= result.tolerance:
        raise VerificationError(
            f"{result.model} in {result.engine} {result.version} is not the model on disk: KL {result.kl:.4g} nats a "
            f"token, {result.tolerance} allowed for its arithmetic; {result.top1:.1%} of {result.positions} positions "
            f"have the same likeliest token. First others: {_listed(result.differences)}"
        )


def _listed(differences: tuple[Difference, ...]) -> str:
    return "; ".join(
        f"position {each.position} of window {each.window}: token {each.found} (p {each.probability[1]}) for "
        f"{each.expected} (p {each.probability[0]})"
        for each in differences
    )
