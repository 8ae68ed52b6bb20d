"""Tiny random encoders of the BERT family with a word-piece tokenizer, and a task that they can learn. Offline."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch

WORDS = {
    "water": ["river", "rain", "lake", "wave", "boat"],
    "fire": ["flame", "smoke", "ember", "spark", "candle"],
}
"""Classes and the words by which they are told apart."""

FILLING = ["the", "old", "a", "small", "is", "near", "and", "quiet", "garden"]
CLASSES = list(WORDS)
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
_CHARACTERS = "abcdefghijklmnopqrstuvwxyz"
PIECES = [
    *SPECIAL,
    *_CHARACTERS,
    *(f"##{character}" for character in _CHARACTERS),
    *FILLING,
    *(word for words in WORDS.values() for word in words),
    *(f"unused{number}" for number in range(300)),
]

_BERT: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
}
ENCODERS: dict[str, dict[str, Any]] = {
    "bert": {"model_type": "bert", **_BERT},
    "distilbert": {
        "model_type": "distilbert",
        "dim": 32,
        "n_layers": 4,
        "n_heads": 4,
        "hidden_dim": 64,
        "max_position_embeddings": 64,
    },
    "roberta": {"model_type": "roberta", **_BERT, "max_position_embeddings": 66, "pad_token_id": 0},
}


def build(family: str, directory: Path, *, bare: bool = True, **overrides: Any) -> Path:
    """Save a tiny encoder: without a head, or as a classifier of two classes with a random one."""
    from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification

    entries = {**ENCODERS[family], "vocab_size": len(PIECES), **overrides}
    config = AutoConfig.for_model(entries.pop("model_type"), **entries)
    if not bare:
        config.id2label = dict(enumerate(CLASSES))
        config.label2id = {name: number for number, name in enumerate(CLASSES)}
    torch.manual_seed(0)
    (AutoModel if bare else AutoModelForSequenceClassification).from_config(config).save_pretrained(directory)
    tokenizer().save_pretrained(directory)
    return directory


def tokenizer() -> Any:
    """Word pieces with [CLS] and [SEP] around a text."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordPiece({piece: number for number, piece in enumerate(PIECES)}, unk_token="[UNK]"))
    inner.normalizer = normalizers.BertNormalizer()
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    return PreTrainedTokenizerFast(tokenizer_object=inner, **dict(zip(names, SPECIAL, strict=True)))


def labelled(path: Path, count: int = 64, seed: int = 0) -> Path:
    """Records of texts and their classes, one word of the class in each text."""
    draw = random.Random(seed)
    lines = []
    for number in range(count):
        label = CLASSES[number % 2]
        words = [*draw.sample(FILLING, 4), draw.choice(WORDS[label])]
        draw.shuffle(words)
        lines.append(json.dumps({"text": " ".join(words), "label": label}))
    path.write_text("\n".join(lines), encoding="utf-8")
    return path
