"""Distributions on disk: the same loss as with the teacher at hand, other teachers refused, filling resumed."""

import pytest
import torch

from penjing.errors import TeacherError
from penjing.methods.distillation.objective import Distillation
from penjing.teachers.logit_cache import CachedDistillation, LogitCache
from tiny_models import token_windows


def test_a_cache_replaces_the_teacher(tiny_model, tmp_path):
    from transformers import AutoModelForCausalLM

    teacher = AutoModelForCausalLM.from_pretrained(tiny_model("llama")).eval()
    student = AutoModelForCausalLM.from_pretrained(tiny_model("llama", seed=1)).eval()
    windows = token_windows(3, 12)
    cache = LogitCache(tmp_path / "c", windows, "llama", "tok", k=300)
    with pytest.raises(TeacherError, match="no logits for a window"):
        cache.of(windows)
    cache.fill(teacher, slice_size=5)
    again = LogitCache(tmp_path / "c", windows, "llama", "tok", k=300)
    assert again.done == 3
    again.fill(None)
    batch = {"input_ids": windows[[2, 0]], "labels": windows[[2, 0]]}
    found = CachedDistillation(again.of)(student, batch)
    wanted = Distillation(teacher)(student, batch)
    assert found.count == wanted.count and torch.allclose(found.value, wanted.value, rtol=2e-3)
    small = LogitCache(tmp_path / "s", windows, "llama", "tok", k=20)
    small.fill(teacher)
    assert 0 < CachedDistillation(small.of)(student, batch).value < wanted.value
    for keys, told in [(("other", "tok"), "another teacher"), (("llama", "t"), "another tokenizer")]:
        with pytest.raises(TeacherError, match=told):
            LogitCache(tmp_path / "c", windows, *keys, k=300)
    with pytest.raises(TeacherError, match="another windows and k"):
        LogitCache(tmp_path / "c", windows + 1, "llama", "tok", k=7)
    with pytest.raises(TeacherError, match="no logits"):
        again.of(windows + 1)
