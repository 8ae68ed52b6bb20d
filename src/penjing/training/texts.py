"""Batches of whole texts and their classes, for encoders.

A file holds records (JSONL or JSON, .gz too) with `text`, and where classes are learnt `label`: the name of a class or
its number. `pair` is a second text that belongs to the first, as in questions about passages.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from penjing.errors import CalibrationError
from penjing.evaluation.text import is_records, records
from penjing.methods.training import Batch
from penjing.training.data import Order

LENGTH = 128
"""Tokens of a text that are read where nobody says how many."""


@dataclass(frozen=True)
class Example:
    """A text as an encoder reads it: int64 (T,) by the names of its inputs; the number of its class, if it has one."""

    inputs: Mapping[str, Tensor]
    label: int | None = None


class Texts:
    """Batches of examples, filled up on the right: inputs (B, T) and, where the examples have any, labels (B,)."""

    def __init__(self, examples: Sequence[Example], padding: int, batch_size: int, micro_batch: int, seed: int) -> None:
        self.examples, self._padding = examples, padding
        self._order = Order(len(examples), batch_size, micro_batch, seed)

    def __call__(self, step: int) -> list[Batch]:
        return [batch_of([self.examples[row] for row in rows], self._padding) for rows in self._order(step)]


def batch_of(examples: Sequence[Example], padding: int) -> Batch:
    """Examples of any lengths as one batch. `padding` is the token that fills up; other inputs are filled with 0."""
    batch = {
        name: torch.nn.utils.rnn.pad_sequence(
            [example.inputs[name] for example in examples],
            batch_first=True,
            padding_value=float(padding if name == "input_ids" else 0),
        )
        for name in examples[0].inputs
    }
    labels = [example.label for example in examples if example.label is not None]
    return batch | ({"labels": torch.tensor(labels)} if labels else {})


def read_texts(
    data: str | Path, tokenizer: Any, classes: Sequence[str] | None, length: int, samples: int | None = None
) -> list[Example]:
    """The first `samples` records of `data`, cut to `length` tokens; without `classes` their labels are passed over.

    Raises CalibrationError naming file and record when there is no text, no label, or one that is no class.
    """
    names = {} if classes is None else {name: number for number, name in enumerate(classes)}
    examples = []
    for where, record in _records(data):
        text, pair = record.get("text"), record.get("pair")
        if not isinstance(text, str) or not isinstance(pair, str | None):
            raise CalibrationError(f"{where}: needs `text` (and may have `pair`), each a string")
        label = None if classes is None else _label(where, record.get("label"), names)
        coded = tokenizer(text, pair, truncation=True, max_length=length)
        inputs = {name: torch.tensor(ids) for name, ids in coded.items()}
        examples.append(Example(inputs, label))
        if len(examples) == samples:
            break
    if not examples:
        raise CalibrationError(f"{data}: holds no records")
    return examples


def texts_of(data: str | Path) -> Iterator[str]:
    """Every text of a file of records. Raises CalibrationError."""
    for where, record in _records(data):
        for key in ("text", "pair"):
            if isinstance(record.get(key), str):
                yield record[key]
            elif key == "text":
                raise CalibrationError(f"{where}: needs `text`, a string")


def _records(data: str | Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if not is_records(data) or not Path(data).is_file():
        raise CalibrationError(f"data {str(data)!r}: encoders learn from a JSONL or JSON file of records with `text`")
    for where, record in records(Path(data)):
        if not isinstance(record, Mapping):
            raise CalibrationError(f"{where}: expected a record with `text` and `label`")
        yield where, record


def _label(where: str, label: object, names: Mapping[str, int]) -> int:
    if isinstance(label, str) and label in names:
        return names[label]
    if isinstance(label, int) and not isinstance(label, bool) and 0 <= label < len(names):
        return label
    raise CalibrationError(f"{where}: `label` is {label!r}; the classes are {', '.join(names)}")
