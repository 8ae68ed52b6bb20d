"""One recipe step that trains: a dense checkpoint in, a dense checkpoint out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from penjing.checkpoint import Checkpoint, open_checkpoint
from penjing.evaluation.text import load_documents
from penjing.evaluation.windows import evaluation_windows, leading_token, load_tokenizer
from penjing.methods.training import PREVIOUS, TrainFunction, TrainOptions, TrainTask
from penjing.models.families import classes_of, is_encoder
from penjing.progress import Progress
from penjing.training.data import Batches, Pairs, Windows, holds_pairs, padding_of, read_pairs
from penjing.training.log import Curve
from penjing.training.loop import train
from penjing.training.models import load_model, save_model, zeros_of
from penjing.training.texts import LENGTH, Texts, read_texts


@dataclass(frozen=True)
class TrainStage:
    """What a step that trains works on.

    source    the dense checkpoint it starts from
    original  the dense model: the teacher, unless the options name another
    tokens    int64 (S, T), windows of the recipe's text; trained on unless the options name `data`
    config    config.json of the result
    dtype     in which the result is written
    sparse    the source's zeros are those of an earlier pruning, and stay
    """

    source: Checkpoint
    original: Checkpoint
    tokens: Tensor
    config: Mapping[str, Any]
    dtype: torch.dtype
    sparse: bool = True
    trust_remote_code: bool = False

    def run(
        self,
        name: str,
        method: TrainFunction,
        options: TrainOptions,
        directory: Path,
        work: Path,
        progress: Progress = lambda stage, done, total, detail: None,
    ) -> Curve:
        """Train and write the model to `directory`; state and log lie in `work`, from which a killed run continues.

        Raises CalibrationError, CheckpointError and what the loop raises.
        """
        batches, seen = self.batches(options)
        model = load_model(self.source, trust_remote_code=self.trust_remote_code)
        task = TrainTask(
            model=model,
            teacher=lambda: self.teacher(options),
            kept=zeros_of(model) if self.sparse else {},
            config=self.source.config,
            tokenizers=lambda: (load_tokenizer(self.source.files()), load_tokenizer(self.learnt_from(options).files())),
        )
        torch.manual_seed(options.seed)
        training = method(task, options)
        marks = {"method": name, "model": self.source.fingerprint(), "data": seen}
        with torch.enable_grad():
            curve = train(training, batches, options, work, marks=marks, progress=progress, name=name)
        finished = model if training.finish is None else training.finish()
        save_model(finished, self.source, directory, self.dtype, self.config)
        return curve

    def teacher(self, options: TrainOptions) -> Any:
        """The model to learn from."""
        return load_model(self.learnt_from(options), trust_remote_code=self.trust_remote_code)

    def learnt_from(self, options: TrainOptions) -> Checkpoint:
        """The checkpoint of the teacher."""
        if options.teacher in (None, PREVIOUS):
            return self.original if options.teacher is None else self.source
        return open_checkpoint(options.teacher, trust_remote_code=self.trust_remote_code)

    def batches(self, options: TrainOptions) -> tuple[Batches, str]:
        """What to train on, and its digest."""
        if is_encoder(self.source.config):
            return self.texts(options)
        if options.data is None:
            return Windows(self.tokens, *_sizes(options)), _digest(self.tokens.tolist())
        return read_batches(options, load_tokenizer(self.source.files()), self.tokens.shape[1])

    def texts(self, options: TrainOptions) -> tuple[Batches, str]:
        """Texts with the classes that the result knows, and their digest; texts alone for a step that needs no more."""
        assert options.data is not None
        tokenizer = load_tokenizer(self.source.files())
        classes = classes_of(self.config) if getattr(options, "stage", "task") == "task" else None
        length = min(options.length or LENGTH, self.config.get("max_position_embeddings", LENGTH))
        examples = read_texts(options.data, tokenizer, classes, length, options.samples)
        seen = _digest([(example.inputs["input_ids"].tolist(), example.label) for example in examples])
        return Texts(examples, padding_of(tokenizer), *_sizes(options)), seen


def read_batches(options: TrainOptions, tokenizer: Any, length: int = 512) -> tuple[Batches, str]:
    """Batches of `options.data` in windows or pairs of `options.length` (or `length`) tokens, and their digest."""
    assert options.data is not None
    length = options.length or length
    if holds_pairs(options.data):
        pairs = read_pairs(options.data, tokenizer, length, options.samples)
        seen = _digest([(pair.ids.tolist(), pair.learnt.tolist()) for pair in pairs])
        return Pairs(pairs, padding_of(tokenizer), *_sizes(options)), seen
    documents = load_documents(options.data, "calibration")
    bos = leading_token(tokenizer)
    tokens = evaluation_windows(documents, tokenizer, windows=options.samples, length=length, bos=bos)
    return Windows(tokens, *_sizes(options)), _digest(tokens.tolist())


def _sizes(options: TrainOptions) -> tuple[int, int, int]:
    return options.batch_size, min(options.micro_batch, options.batch_size), options.seed


def _digest(content: object) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
