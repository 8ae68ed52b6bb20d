"""The tokenizer as GGUF's metadata has it, made from tokenizer.json and the files beside it.

Two kinds are known: byte-level BPE ("gpt2"), for which llama.cpp wants the name of the rule that splits text first, and
BPE over pieces of text with a fallback to bytes, as SentencePiece has it ("llama"), for which it wants a score per
token. Merges come in order of preference, so a token's score is minus the number of the merge that makes it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from penjing.errors import CheckpointError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""Kinds of tokens (`gguf.TokenType`)."""

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SPLITS = {
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_REST}": "llama-bpe",
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_REST}": "qwen2",
}
"""Expression that cuts text into words -> llama.cpp's name for it."""


def tokenizer_keys(files: Mapping[str, bytes], config: Mapping[str, Any]) -> dict[str, Any]:
    """All `tokenizer.*` keys. Raises CheckpointError for a tokenizer that GGUF cannot express."""
    if "tokenizer.json" not in files:
        raise CheckpointError("the model has no tokenizer.json; save its tokenizer with transformers first")
    told, settings = json.loads(files["tokenizer.json"]), json.loads(files.get("tokenizer_config.json", b"{}"))
    model = told["model"]
    if model.get("type") != "BPE":
        raise CheckpointError(f"a tokenizer of kind {model.get('type')} cannot be written as GGUF; BPE can")
    texts, kinds = _tokens(told, int(config["vocab_size"]))
    keys: dict[str, Any] = {"tokens": texts, "token_type": kinds}
    if model.get("byte_fallback"):
        keys |= {"model": "llama", "pre": "default", "scores": _scores(texts, model["merges"])}
        keys["add_space_prefix"] = _adds_space(told)
    else:
        keys |= {"model": "gpt2", "pre": _split_name(told), "merges": [_merge(pair) for pair in model["merges"]]}
    keys |= _special_tokens(told, settings, config, {text: number for number, text in enumerate(texts)})
    template = files["chat_template.jinja"].decode() if "chat_template.jinja" in files else _template(settings)
    keys = {f"ggml.{key}": value for key, value in keys.items()} | ({"chat_template": template} if template else {})
    return {f"tokenizer.{key}": value for key, value in keys.items()}


def _tokens(told: Mapping[str, Any], size: int) -> tuple[list[str], list[int]]:
    """Text and kind of every row of the embedding."""
    vocabulary, unknown = told["model"]["vocab"], told["model"].get("unk_token")
    added = {token["id"]: token for token in told.get("added_tokens", ())}
    largest = max([*vocabulary.values(), *added])
    if largest >= size:
        raise CheckpointError(f"the tokenizer has a token of number {largest} and the embedding only {size} rows")
    texts, kinds = [f"[PAD{number}]" for number in range(size)], [UNUSED] * size
    for text, number in vocabulary.items():
        byte = told["model"].get("byte_fallback") and re.fullmatch(r"<0x[0-9A-F]{2}>", text)
        texts[number], kinds[number] = text, BYTE if byte else NORMAL
    for number, token in added.items():
        texts[number], kinds[number] = token["content"], CONTROL if token["special"] else USER_DEFINED
    if unknown in vocabulary and told["model"].get("byte_fallback"):
        kinds[vocabulary[unknown]] = UNKNOWN
    return texts, kinds


def _merge(pair: str | list[str]) -> str:
    return pair if isinstance(pair, str) else " ".join(pair)


def _scores(texts: list[str], merges: list[Any]) -> list[float]:
    rank: dict[str, int] = {}
    for number, pair in enumerate(merges):
        rank.setdefault("".join(_merge(pair).split(" ")), number)
    return [-float(rank.get(text, 0)) for text in texts]


def _adds_space(told: Mapping[str, Any]) -> bool:
    """Whether text is read as if a space stood before it."""
    parts = [*_parts(told.get("normalizer"), "normalizers"), *_parts(told.get("pre_tokenizer"), "pretokenizers")]
    return any(
        part["type"] == "Prepend" or (part["type"] == "Metaspace" and part.get("prepend_scheme", "always") != "never")
        for part in parts
    )


def _parts(step: Mapping[str, Any] | None, inner: str) -> list[Mapping[str, Any]]:
    if step is None:
        return []
    return list(step[inner]) if step["type"] == "Sequence" else [step]


def _split_name(told: Mapping[str, Any]) -> str:
    """llama.cpp's name for how text is split before merges apply."""
    parts = _parts(told.get("pre_tokenizer"), "pretokenizers")
    if not parts or parts[-1]["type"] != "ByteLevel":
        raise CheckpointError("the tokenizer is neither byte-level nor falls back to bytes; GGUF cannot express it")
    before, bytewise = parts[:-1], parts[-1]
    if bytewise.get("add_prefix_space"):
        raise CheckpointError("the tokenizer puts a space before the text, which llama.cpp's byte-level BPE does not")
    if not before and bytewise.get("use_regex", True):
        return "gpt-2"
    if len(before) == 1 and before[0]["type"] == "Digits" and before[0]["individual_digits"]:
        return "smollm"
    if len(before) == 1 and before[0]["type"] == "Split":
        expression = before[0]["pattern"].get("Regex", "")
        if expression in _SPLITS:
            return _SPLITS[expression]
    raise CheckpointError(
        "llama.cpp has no name known here for how the tokenizer splits text (the `pre_tokenizer` of tokenizer.json); "
        f"known: gpt-2, smollm, {', '.join(_SPLITS.values())}"
    )


def _special_tokens(
    told: Mapping[str, Any], settings: Mapping[str, Any], config: Mapping[str, Any], numbers: Mapping[str, int]
) -> dict[str, Any]:
    """Numbers of the special tokens, and whether a text gets the first and the last of them."""
    keys: dict[str, Any] = {}
    for name, stored in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        token = settings.get(f"{name}_token")
        text = token.get("content") if isinstance(token, dict) else token
        number = numbers.get(text) if isinstance(text, str) else config.get(f"{name}_token_id")
        number = number[0] if isinstance(number, list) else number
        if number is not None:
            keys[f"{stored}_token_id"] = number
    first, last = _added_around(told)
    keys["add_bos_token"] = bool(settings.get("add_bos_token", first))
    keys["add_eos_token"] = bool(settings.get("add_eos_token", last))
    return keys


def _added_around(told: Mapping[str, Any]) -> tuple[bool, bool]:
    """Whether the template of a text begins, and ends, with a special token."""
    for part in _parts(told.get("post_processor"), "processors"):
        if part["type"] == "TemplateProcessing" and part["single"]:
            return "SpecialToken" in part["single"][0], "SpecialToken" in part["single"][-1]
    return False, False


def _template(settings: Mapping[str, Any]) -> str | None:
    template = settings.get("chat_template")
    if isinstance(template, list):
        return next((entry["template"] for entry in template if entry.get("name") == "default"), None)
    return template
