"""Is the written model the model that was in memory? Read it back, run a few tokens, compare the logits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from penjing.checkpoint import Checkpoint, open_checkpoint, single_gguf, write_bytes
from penjing.errors import CheckpointError, VerificationError
from penjing.formats import format_of
from penjing.models import layout_of
from penjing.models.families import classifies, is_encoder
from penjing.pipeline import load_probe, onnx_check
from penjing.pipeline.journal import FOLDER, digest
from penjing.pipeline.stream import StreamedModel
from penjing.pipeline.weights import Weights
from penjing.training.models import load_model

TOLERANCE = 1e-4
"""Largest |logit difference| allowed, relative to the largest |logit|. Both sides compute in fp32 on the same decoded
weights; what remains is the order of additions in another process."""

_MILLIONTH, _DRAWS, _BLOCKS_ROUND_TOO = 1e-6, 3, 4

_PROBE = "probe.safetensors"
_KEPT_POSITIONS = 8
_ONLY_READ_BACK = ("gptq", "gptq-v2", "awq")
"""Formats that transformers runs with kernels of gptqmodel: in half precision, on CPUs for some group sizes only."""


@dataclass(frozen=True)
class Verification:
    """The outcome of reading a model back.

    how         "transformers": loaded in a fresh process with from_pretrained; "onnxruntime": run there too;
                "streamed": read back by Penjing only
    tensors     number of stored tensors, all of which were consumed
    positions   logit vectors compared
    difference  largest |logit difference| over the largest |logit|
    tolerance   the largest difference that passes
    kl          mean KL in nats per token that the engine's own rounding of inputs adds; None where it adds none
    """

    directory: str
    how: str
    tensors: int
    positions: int
    difference: float
    tolerance: float = TOLERANCE
    kl: float | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"passed": True}


def save_probe(directory: Path, tokens: Tensor, logits: Tensor, files: Iterable[str]) -> None:
    """Keep what the model in memory answered, so that the directory can be verified at any time.

    The files that hold the model are kept as digests: a flipped bit may change the logits by less than `TOLERANCE`.
    """
    kept = {"tokens": tokens.contiguous(), "logits": logits[-_KEPT_POSITIONS:].contiguous()}
    digests = {name: digest(directory / name) for name in sorted(files)}
    write_bytes(directory / FOLDER / _PROBE, save(kept, {"sha256": json.dumps(digests)}))


def verify(directory: Path, *, engine: bool, trust_remote_code: bool = False) -> Verification:
    """Compare a written directory with the model it was written from.

    engine  also load it through transformers in a fresh process, which needs memory for the whole model in fp32.
    Raises VerificationError naming what differs; CheckpointError when the directory was not written by Penjing.
    """
    path = directory / FOLDER / _PROBE
    if not path.is_file():
        raise CheckpointError(
            f"{directory} holds no {FOLDER}/{_PROBE}: it was not written by penjing, or the run did not finish. "
            "To compare two models use `penjing eval MODEL --against MODEL`"
        )
    _check_files(directory, path)
    probe = load_file(path)
    tensors, logits = _read_back(directory, probe["tokens"], trust_remote_code)
    answers = {"read back block by block": logits}
    how, kl = _engine_for(directory) if engine else "streamed", None
    if how == "transformers":
        answers["loaded with transformers"] = _through_transformers(directory, path, trust_remote_code)
    if how == "onnxruntime":
        found = onnx_check.full_precision(directory, probe["tokens"], probe["logits"])
        if found is not None:
            answers["run by ONNX Runtime"] = found
        kl = onnx_check.as_written(directory, probe["tokens"], probe["logits"])
    differences = {reader: _difference(answer, probe["logits"]) for reader, answer in answers.items()}
    tolerance = TOLERANCE
    if not all(difference <= TOLERANCE for difference in differences.values()):
        tolerance = max(TOLERANCE, _own_noise(directory, probe["tokens"], logits, trust_remote_code))
    for reader, difference in differences.items():
        if not difference <= tolerance:
            raise VerificationError(
                f"{reader}, the model's logits differ from those in memory by {difference:.2e} of the largest "
                f"(limit {tolerance:.0e})"
            )
    return Verification(str(directory), how, tensors, len(probe["logits"]), max(differences.values()), tolerance, kl)


def _engine_for(directory: Path) -> str:
    """The engine that can be compared with the model in memory; "streamed" when there is none besides Penjing."""
    if single_gguf(directory) is not None:  # transformers would read the same values the same way
        return "streamed"
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    name = format_of(config).name
    if name == "onnx":
        return "onnxruntime"
    rounds_twice = config.get("quantization_config", {}).get("load_in_8bit")  # bitsandbytes, inputs to fp16 first
    return "streamed" if name in _ONLY_READ_BACK or rounds_twice else "transformers"


def fits_in_memory(parameters: int) -> bool:
    """Whether loading a model of this size in fp32 takes at most a quarter of the memory that can be had now."""
    return 6 * parameters < available_memory() // 4


def available_memory() -> int:
    """Bytes that a process can get without swapping: unused ones, and where Linux tells, cached files it would drop."""
    with suppress(OSError):
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _check_files(directory: Path, probe: Path) -> None:
    """The files are those that were written, to the bit, and no other weights lie beside them."""
    with safe_open(probe, "pt") as file:
        digests = json.loads(file.metadata()["sha256"])
    for name, expected in digests.items():
        if not (directory / name).is_file():
            raise VerificationError(f"{directory / name} is missing")
        if digest(directory / name) != expected:
            raise VerificationError(f"{directory / name} was changed after it was written (its SHA-256 differs)")
    kinds = {Path(name).suffix for name in digests} & {".safetensors", ".gguf"}
    added = sorted(path.name for kind in kinds for path in directory.glob(f"*{kind}") if path.name not in digests)
    if added:
        raise VerificationError(f"{directory} holds weights that penjing did not write: {', '.join(added)}")


def _read_back(directory: Path, tokens: Tensor, trust_remote_code: bool) -> tuple[int, Tensor]:
    """Number of tensors and logits through Penjing's own reader: an encoder whole, a decoder block by block."""
    checkpoint = open_checkpoint(directory, trust_remote_code=trust_remote_code)
    if not is_encoder(checkpoint.config):
        return _streamed(directory, tokens, trust_remote_code)
    return len(checkpoint.specs()), whole_answer(checkpoint, tokens)


@torch.no_grad()
def whole_answer(checkpoint: Checkpoint, tokens: Tensor) -> Tensor:
    """What an encoder makes of texts (B, T), fp32: logits (B, C), without a head the states (B, D) of first tokens."""
    model = load_model(checkpoint)
    if classifies(checkpoint.config):
        logits: Tensor = model(input_ids=tokens).logits
        return logits.float()
    states: Tensor = model.base_model(input_ids=tokens).last_hidden_state[:, 0]
    return states.float()


def _head_of(config: Mapping[str, Any]) -> str:
    """What `load_probe` asks a model for."""
    if not is_encoder(config):
        return "next-token"
    return "classes" if classifies(config) else "none"


def _streamed(directory: Path, tokens: Tensor, trust_remote_code: bool) -> tuple[int, Tensor]:
    """Logits through Penjing's own reader; every stored tensor must be consumed."""
    stream, stored, consumed = _open_stream(directory, trust_remote_code)
    logits = _logits(stream, stream.embed(tokens, torch.float32))
    unused = sorted(stored - consumed)
    if unused:
        raise VerificationError(f"{directory}: tensors that no module reads: {', '.join(unused[:8])}")
    return len(consumed), logits


def _open_stream(directory: Path, trust_remote_code: bool) -> tuple[StreamedModel, set[str], set[str]]:
    """The model, the names of its stored tensors, and those read so far."""
    checkpoint = open_checkpoint(directory, trust_remote_code=trust_remote_code)
    consumed: set[str] = set()

    def load(name: str) -> Tensor:
        consumed.add(name)
        return checkpoint.load(name)

    layout = layout_of(checkpoint.config, trust_remote_code=trust_remote_code)
    weights = Weights(checkpoint, layout, load)
    stream = StreamedModel(checkpoint.config, layout, weights.live, trust_remote_code=trust_remote_code)
    return stream, set(checkpoint.specs()), consumed


def _logits(stream: StreamedModel, states: Tensor) -> Tensor:
    """What a model makes of the inputs of its first block (1, T, D), which are overwritten: logits (T, V)."""
    states = stream.through(states)
    with stream.head(torch.float32) as head:
        return head(states)


def _own_noise(directory: Path, tokens: Tensor, logits: Tensor, trust_remote_code: bool) -> float:
    """By how much rounding alone may move this model's `logits` of `tokens`, relative to the largest.

    A model that was compressed beyond use can turn the last bit of a sum into the third digit of a logit. Its inputs
    are moved by a millionth, which is what sums of some hundred fp32 products are off by, a few times over; as every
    block rounds anew, some times the largest move is allowed. Encoders are read whole and hold 0.
    """
    if is_encoder(open_checkpoint(directory, trust_remote_code=trust_remote_code).config):
        return 0.0
    stream, _, _ = _open_stream(directory, trust_remote_code)
    states = stream.embed(tokens, torch.float32)
    draws = torch.Generator().manual_seed(0)
    moved = [1 + _MILLIONTH * torch.randn(states.shape, generator=draws) for _ in range(_DRAWS)]
    return _BLOCKS_ROUND_TOO * max(_difference(_logits(stream, states * change), logits) for change in moved)


def _through_transformers(directory: Path, probe: Path, trust_remote_code: bool) -> Tensor:
    """Logits of a fresh process that only calls from_pretrained."""
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    modules = ["penjing"] if format_of(config).name == "native" else []
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "logits.safetensors"
        command = [sys.executable, load_probe.__file__, str(directory), str(probe), str(output)]
        command += ["own-code" if trust_remote_code else "no-code", _head_of(config), *modules]
        environment = os.environ | {"HF_HUB_OFFLINE": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise VerificationError(f"{directory} does not load with transformers: {reason}")
        with safe_open(output, "pt") as file:
            found = json.loads(file.metadata()["found"])
            logits = file.get_tensor("logits")
    for kind, names in found.items():
        if names:
            raise VerificationError(f"{directory}: transformers reports {kind}: {', '.join(names[:8])}")
    return logits


def _difference(logits: Tensor, expected: Tensor) -> float:
    """Largest |difference| over the largest |expected|, of the last positions."""
    return float((logits[-len(expected) :] - expected).abs().max() / expected.abs().max())
