"""A stage whose model has a smaller vocabulary: rows of the embedding, and the tokenizer's own files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from penjing.checkpoint import write_bytes
from penjing.errors import PlanError
from penjing.evaluation.windows import load_tokenizer
from penjing.methods.pruning.vocabulary import VocabularyOptions, count, kept_tokens, trimmed_tokenizer
from penjing.training.models import load_model, save_model
from penjing.training.texts import texts_of

if TYPE_CHECKING:
    from penjing.pipeline.stages import RemakeTask

TOKENIZER, WORDS = "tokenizer.json", "vocab.txt"
_IDS = ("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id", "mask_token_id")


def trim_vocabulary(task: RemakeTask) -> Mapping[str, Any]:
    """Write the model with the tokens that stay; what it says is their number and the share of the data they cover.

    Raises PlanError for a tokenizer that is not made of word pieces, CalibrationError for data without texts.
    """
    options = task.step.options
    assert isinstance(options, VocabularyOptions)
    files = dict(task.source.files())
    if TOKENIZER not in files:
        raise PlanError(f"{task.source.label} has no {TOKENIZER}; save its tokenizer with transformers first")
    stored = json.loads(files[TOKENIZER])
    tokenizer = load_tokenizer(task.source.files())
    tokenizer.model_max_length = 10**9  # whole texts are counted, however long
    seen = count([tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts_of(options.data)])
    special = [token["id"] for token in stored.get("added_tokens", ())]
    try:
        keep = kept_tokens(stored["model"]["vocab"], special, seen, options.keep)
        trimmed = trimmed_tokenizer(stored, keep)
    except ValueError as error:
        raise PlanError(f"{task.step.label}: {error}") from error
    place = {old: new for new, old in enumerate(keep)}
    ids = {key: place[task.config[key]] for key in _IDS if isinstance(task.config.get(key), int)}
    model = load_model(task.source)
    embedding = model.get_input_embeddings()
    padding = None if embedding.padding_idx is None else place[embedding.padding_idx]
    rows = nn.Embedding.from_pretrained(embedding.weight[torch.tensor(keep)].clone(), padding_idx=padding)
    model.set_input_embeddings(rows)
    save_model(model, task.source, task.directory, model.dtype, {**task.config, **ids})
    write_bytes(task.directory / TOKENIZER, json.dumps(trimmed, ensure_ascii=False).encode())
    if WORDS in files:
        pieces = sorted(trimmed["model"]["vocab"], key=trimmed["model"]["vocab"].__getitem__)
        write_bytes(task.directory / WORDS, ("\n".join(pieces) + "\n").encode())
    _renumber_settings(task, files, place)
    covered = sum(times for number, times in seen.items() if number in place)
    return {"tokens": len(keep), "covered": covered / max(1, seen.total())}


def _renumber_settings(task: RemakeTask, files: Mapping[str, bytes], place: Mapping[int, int]) -> None:
    """Special tokens are listed by number in tokenizer_config.json too."""
    name = "tokenizer_config.json"
    settings = json.loads(files.get(name, b"{}"))
    if listed := settings.get("added_tokens_decoder"):
        settings["added_tokens_decoder"] = {str(place[int(number)]): token for number, token in listed.items()}
        write_bytes(task.directory / name, (json.dumps(settings, indent=2) + "\n").encode())
