"""Is a written graph the model that was in memory? Run it in ONNX Runtime on the tokens of the probe, in two ways.

With inputs of products in fp32 the logits must be those of the model in memory: every code, scale and node is right. As
it is written, the graph rounds inputs to 8 bits, and what that costs is measured.
"""

from __future__ import annotations

import json
from pathlib import Path

from torch import Tensor
from torch.nn.functional import kl_div

from penjing.errors import VerificationError
from penjing.formats import declared_schemes
from penjing.formats.onnx import GRAPH, session
from penjing.models import layout_of

KL_LIMIT = 0.1
"""Nats per token that inputs of 8 bits may cost. Tiny random models come to 0.02, trained ones stay well below."""


def full_precision(directory: Path, tokens: Tensor, expected: Tensor) -> Tensor | None:
    """The last logits (P, V) for tokens (1, T) with inputs of products in fp32.

    None where the recipe itself rounds inputs: one between two codes may fall to either side.
    """
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    schemes = declared_schemes(config, layout_of(config).modules)
    if any(scheme.activations for scheme in schemes.values()):
        return None
    return session.logits(directory / GRAPH, tokens, exact=True)[0, -len(expected) :]


def as_written(directory: Path, tokens: Tensor, expected: Tensor) -> float:
    """Mean KL in nats per token to the logits (P, V) that the model in memory gave last for tokens (1, T).

    Raises VerificationError above `KL_LIMIT`.
    """
    found = session.logits(directory / GRAPH, tokens)[0, -len(expected) :]
    kl = float(
        kl_div(found.log_softmax(-1), expected.log_softmax(-1), reduction="none", log_target=True).sum(-1).mean()
    )
    if not kl <= KL_LIMIT:
        raise VerificationError(
            f"run by ONNX Runtime, the model differs from the one in memory by a KL of {kl:.3f} nats per token "
            f"(limit {KL_LIMIT})"
        )
    return max(kl, 0.0)
