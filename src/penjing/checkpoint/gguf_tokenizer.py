"""Tokenizer files of a GGUF file: converted by transformers, with the digit rule that its converter leaves out."""

from __future__ import annotations

import tempfile
from pathlib import Path

from penjing.checkpoint.gguf_header import GGUFHeader
from penjing.errors import CheckpointError

SINGLE_DIGITS = frozenset({"smollm", "starcoder", "refact", "command-r", "codeshell"})
"""Values of tokenizer.ggml.pre that mean: every digit is a piece of its own, and the rest is split as in GPT-2."""


def tokenizer_files(path: Path, header: GGUFHeader) -> dict[str, bytes]:
    """tokenizer.json, tokenizer_config.json and the chat template, by name. Raises CheckpointError."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    except Exception as error:  # whatever a converter of foreign metadata may raise
        raise CheckpointError(f"{path}: the tokenizer in the metadata cannot be converted: {error}") from error
    if header.keys.get("tokenizer.ggml.pre") in SINGLE_DIGITS:
        from tokenizers import pre_tokenizers

        digits = pre_tokenizers.Digits(individual_digits=True)
        bytewise = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, bytewise])
    with tempfile.TemporaryDirectory() as directory:
        tokenizer.save_pretrained(directory)
        return {file.name: file.read_bytes() for file in sorted(Path(directory).iterdir()) if file.is_file()}
