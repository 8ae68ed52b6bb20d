"""Distillation: students that learn from a teacher."""

from __future__ import annotations

from penjing.methods.base import Method
from penjing.methods.distillation import distil, encoder, on_policy
from penjing.methods.training import Trained

TABLE: tuple[Method, ...] = (
    Method(
        name="distil",
        summary="train a student, made of the model's layers or at hand, on its teacher's logits, states and attention",
        paper="arXiv:1503.02531",
        options=distil.DistilOptions,
        remake=Trained(
            start=distil.train,
            config=lambda config, layout, options: options.config(config, layout),
            keeps_zeros=lambda options: options.student is None,
        ),
    ),
    Method(
        name="gkd",
        summary="train a student on what it writes itself, by a divergence from the teacher at every token",
        paper="arXiv:2306.13649",
        options=on_policy.GKDOptions,
        remake=Trained(start=on_policy.train_gkd),
    ),
    Method(
        name="minillm",
        summary="train a student by policy gradient towards sequences its teacher finds likely (reverse KL)",
        paper="arXiv:2306.08543",
        options=on_policy.MiniLLMOptions,
        remake=Trained(start=on_policy.train_minillm),
    ),
    Method(
        name="distil-encoder",
        summary="train a smaller classifier of texts on its teacher's classes, states, attention and relations",
        paper="arXiv:1909.10351",
        options=encoder.EncoderDistilOptions,
        reads="encoder",
        remake=Trained(
            start=encoder.train,
            config=lambda config, layout, options: options.config(config, layout),
            keeps_zeros=lambda options: options.student is None,
        ),
    ),
)
