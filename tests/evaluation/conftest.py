"""A tokenizer without a vocabulary file, and a realistic report."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest

from penjing.evaluation.metrics import Quality
from penjing.evaluation.report import ModuleRow, Report, Skipped, Software, Source
from penjing.evaluation.windows import Protocol


class ByteTokenizer:
    """One token per UTF-8 byte; `bos` is put first as Gemma's tokenizer does when special tokens are asked for."""

    chat_template = None

    def __init__(self, bos: int | None = None) -> None:
        self.bos_token_id = bos
        self.calls = 0

    def __call__(self, text: str, *, add_special_tokens: bool = True, **_: object) -> dict[str, list[int]]:
        self.calls += 1
        leading = [self.bos_token_id] if add_special_tokens and self.bos_token_id is not None else []
        return {"input_ids": leading + list(text.encode())}


class ChatTokenizer(ByteTokenizer):
    """Renders messages as `<role>content` and refuses a system message."""

    chat_template = "a template"

    def apply_chat_template(self, messages: list[dict[str, str]], *, tokenize: bool) -> str:
        assert not tokenize
        if messages[0]["role"] == "system":
            raise ValueError("system role not supported")
        return "".join(f"<{message['role']}>{message['content']}" for message in messages)


@pytest.fixture
def tokenizers() -> SimpleNamespace:
    return SimpleNamespace(Byte=ByteTokenizer, Chat=ChatTokenizer)


@pytest.fixture
def protocol() -> Protocol:
    return Protocol("wiki.test.raw", "17" * 32, "ab" * 32, 8, 2048, 2048, 8 * 2047, None, "float32")


@pytest.fixture
def report(protocol: Protocol) -> Report:
    """Three blocks of two linears; one linear was left dense, one carries a note with characters HTML must escape."""
    rows = [ModuleRow("model.embed_tokens", "embedding", None, (100, 64), (), "dense", None, 12800, 12800)]
    for block in range(3):
        for role, error in (("self_attn.q_proj", 0.01), ("mlp.down_proj", 0.3)):
            name = f"model.layers.{block}.{role}"
            common = (name, "linear", block, (64, 64))
            if (block, role) == (1, "mlp.down_proj"):
                rows.append(ModuleRow(*common, (), "dense", None, 8192, 8192, notes=("left dense: 64 % 48 != 0",)))
            else:
                notes = ("damping <raised> & more",) if block == 2 else ()
                scheme = "W4 g64 symmetric"
                rows.append(
                    ModuleRow(*common, ("gptq",), scheme, 4, 2176, 2176, error * (block + 1), "output", 512, notes)
                )
    total = sum(row.bytes for row in rows)
    return Report(
        recipe={"version": 1, "steps": [{"method": "gptq", "bits": 4}], "format": "compressed-tensors"},
        format="compressed-tensors",
        source=Source("demo", "9f" * 32, "llama", 30976, 61952, "bfloat16"),
        modules=tuple(rows),
        predicted_bytes=total,
        bytes=total + 120,
        software=Software("0.1.0", "2.13.0", "5.23.0", "3.11.7", "Linux", "a processor, 2 cores", 2),
        calibration=protocol,
        sample="Once upon a time",
        quality=Quality(8 * 2047, 17.9, math.log(17.9), 0.087, 0.0015, 0.862, 16.4, math.log(16.4)),
        protocol=protocol,
        block_errors=(0.01, 0.02, 0.03),
        skipped=(Skipped("model.layers.1.mlp.down_proj", "64 % 48 != 0"),),
        peak_memory=600_000_000,
        seconds={"calibrate": 41.2, "compress": 183.7},
        verification={"passed": True, "how": "transformers", "difference": 3.1e-6},
    )
