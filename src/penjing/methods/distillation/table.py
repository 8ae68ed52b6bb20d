"""Distillation: students that learn from a teacher."""

from __future__ import annotations

from penjing.methods.base import Method
from penjing.methods.distillation import distil, encoder, mutual, on_policy, self_distillation
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
        name="mutual",
        summary="train several students side by side, each on the text and on what the others say; keep the first",
        paper="arXiv:1706.00384",
        options=mutual.MutualOptions,
        remake=Trained(
            start=mutual.train,
            config=lambda config, layout, options: options.config(config, layout),
            keeps_zeros=lambda options: False,
        ),
    ),
    Method(
        name="early-exits",
        summary="let a model's last layer teach its earlier ones, and keep as many blocks as an exit needs",
        paper="arXiv:1905.08094",
        options=self_distillation.ExitOptions,
        remake=Trained(
            start=self_distillation.train,
            config=lambda config, layout, options: options.config(config, layout),
            keeps_zeros=lambda options: False,
        ),
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
