"""Adaptation: what is trained after a compression."""

from __future__ import annotations

from penjing.methods.adaptation import classify, peqa, recover, task_lora
from penjing.methods.base import Method
from penjing.methods.training import Trained

TABLE: tuple[Method, ...] = (
    Method(
        name="peqa",
        summary="teach a quantised model the recipe's text by its scales alone; codes stay bit for bit",
        paper="arXiv:2305.14152",
        options=peqa.PEQAOptions,
        tune=peqa.tune,
        passes=lambda options, windows: 5 * options.iterations * min(options.batch_size, windows) / windows,
    ),
    Method(
        name="recover",
        summary="train a compressed model towards the dense model's logits, by LoRA or whole; zeros stay",
        paper="arXiv:2407.14679",
        options=recover.RecoverOptions,
        remake=Trained(start=recover.train),
    ),
    Method(
        name="classify",
        summary="train an encoder on labelled texts, with a fresh head for their classes",
        paper="arXiv:1810.04805",
        options=classify.ClassifyOptions,
        reads="encoder",
        remake=Trained(start=classify.train, config=lambda config, layout, options: options.config(config, layout)),
    ),
    Method(
        name="lora",
        summary="teach a model a text or pairs by LoRA, rsLoRA or DoRA, on dense or NF4 weights (QLoRA), then merge",
        paper="arXiv:2106.09685",
        options=task_lora.LoRAOptions,
        remake=Trained(start=task_lora.train),
    ),
)
