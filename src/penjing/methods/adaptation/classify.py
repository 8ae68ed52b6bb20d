"""A classifier made of an encoder: a fresh head on its first token, and every weight trained on labelled texts.

    L = mean over texts of  -log softmax(z)_label            z (C,) logits of the classes

An encoder that classifies already keeps its head when its classes are those asked for; any other gets a new one, in the
form that its architecture has in transformers (BERT: pooler and linear; RoBERTa and DistilBERT: two linears).

Worked example: two classes, z = (1, 0), label 0: L = log(1 + e^-1) = 0.3133, gradient (-0.2689, 0.2689).

Source: Devlin et al. 2019, "BERT" (arXiv:1810.04805), section 4.1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from penjing.methods.training import Batch, Loss, Training, TrainOptions, TrainTask
from penjing.models.families import classes_of, classifies
from penjing.models.layout import Layout


class EncoderOptions(TrainOptions):
    """Recipe keys that every step which trains an encoder has."""

    data: str = Field(description="records with `text` and `label` to train on: JSONL or JSON")
    batch_size: int = Field(32, ge=1, description="texts per step, over all devices")
    micro_batch: int = Field(32, ge=1, description="of those, how many go through the model at once")
    weight_decay: float = Field(0.01, ge=0, description="of matrices; vectors are left alone")
    warm_up: float = Field(0.1, ge=0, lt=1, description="share of the steps in which the rate rises; then a cosine")


class ClassifyOptions(EncoderOptions):
    """Recipe keys of fine-tuning."""

    classes: tuple[str, ...] = Field(min_length=2, description="names of the classes, in the order of the logits")
    head_rate: float = Field(10.0, gt=0, description="factor on the learning rate of the head, which begins fresh")

    def config(self, config: Mapping[str, Any], layout: Layout) -> Mapping[str, Any]:
        """config.json of the classifier. Raises ValueError for names that are not unique."""
        if len(set(self.classes)) < len(self.classes):
            raise ValueError(f"the classes {', '.join(self.classes)} are not unique")
        from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES as NAMES

        named = {str(number): name for number, name in enumerate(self.classes)}
        return {key: value for key, value in config.items() if key != "num_labels"} | {
            "architectures": [NAMES[config["model_type"]]],
            "id2label": named,
            "label2id": {name: int(number) for number, name in named.items()},
            "problem_type": "single_label_classification",
        }


class ClassLabels(nn.Module):
    """The objective: cross entropy of the classes."""

    def forward(self, model: nn.Module, batch: Batch) -> Loss:
        """Its mean over the texts."""
        logits, labels = class_logits(model, batch), batch["labels"]
        right = (logits.detach().argmax(-1) == labels).float().mean()
        return Loss(functional.cross_entropy(logits, labels), len(labels), {"accuracy": right})


def class_logits(model: nn.Module, batch: Batch) -> Tensor:
    """fp32 (B, C) of a classifier."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    logits: Tensor = model(**inputs).logits
    return logits.float()


def train(task: TrainTask, options: ClassifyOptions) -> Training:
    """The method's `train` shape."""
    model = with_classes(task.model, options.classes, options.seed)
    model.requires_grad_(True)
    return Training(model, ClassLabels(), finish=lambda: model, rates={"*classifier*": options.head_rate})


def with_classes(model: Any, classes: Sequence[str], seed: int = 0) -> Any:
    """The classifier of these classes on the body of a live encoder; its head is kept where it is of these classes."""
    before = model.config.to_dict()
    if classifies(before) and classes_of(before) == tuple(classes):
        return model
    config = type(model.config).from_dict({**before, "id2label": dict(enumerate(classes)), "label2id": {}})
    config._attn_implementation = model.config._attn_implementation
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = type(model)(config).float()
    own = made.state_dict()
    body = {name: value for name, value in model.state_dict().items() if own[name].shape == value.shape}
    made.load_state_dict({**own, **body})
    return made.eval().requires_grad_(False)
