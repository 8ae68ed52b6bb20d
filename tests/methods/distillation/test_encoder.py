"""Objectives of encoders against sums written out; vocabularies; students side by side; exits of live models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from penjing.methods.distillation import mutual, self_distillation
from penjing.methods.distillation.across_vocabularies import AcrossVocabularies
from penjing.methods.distillation.encoder import EncoderDistillation, EncoderDistilOptions, read
from penjing.methods.distillation.hidden_states import hidden_state_loss
from penjing.methods.distillation.objective import Transfer
from penjing.methods.distillation.soft_labels import soft_labels
from penjing.methods.distillation.student import Student, make_student
from penjing.methods.distillation.uld import matching_tokens, uld
from penjing.methods.pruning.vocabulary import kept_tokens, trimmed_tokenizer
from penjing.methods.training import TrainTask
from penjing.training.texts import Example, batch_of
from tiny_encoders import ENCODERS, build
from tiny_models import token_windows, tokenizer

MASK = torch.tensor([[1] * 12, [1] * 7 + [0] * 5])


@pytest.fixture(params=ENCODERS)
def classifier(request, tmp_path) -> Any:
    from transformers import AutoModelForSequenceClassification

    path = build(request.param, tmp_path / "model", bare=False)
    return AutoModelForSequenceClassification.from_pretrained(path).eval().requires_grad_(False)


def texts() -> dict[str, torch.Tensor]:
    ids = token_windows(2, 12, seed=3).masked_fill(MASK == 0, 0)
    return {"input_ids": ids, "attention_mask": MASK, "labels": torch.tensor([0, 1])}


def test_the_objective_is_its_sum_written_out(classifier):
    given = texts()
    student = make_student(classifier, Student(layers=2)).requires_grad_()
    transfer = Transfer(hidden=0.5, attention=0.25)
    loss = EncoderDistillation(classifier, lambda q, p: soft_labels(q, p, 2.0), 0.7, transfer)(student, given)
    q, ours = read(student, given, everything=True)
    p, theirs = read(classifier, given, everything=True)
    assert torch.equal(q, student(given["input_ids"], given["attention_mask"]).logits), "watching changes nothing"
    kl = 4 * ((p / 2).softmax(-1) * ((p / 2).log_softmax(-1) - (q / 2).log_softmax(-1))).sum(-1)
    wanted = (0.7 * kl + 0.3 * cross_entropy(q, given["labels"], reduction="none")).mean()
    seen = MASK.bool()
    for own, other in ((0, 0), (1, 2), (2, 4)):
        wanted = wanted + 0.5 * (ours.states[own] - theirs.states[other])[seen].square().mean(-1).mean()
    pairs = seen[:, None, :, None] & seen[:, None, None, :]
    for own, other in ((0, 1), (1, 3)):
        scores = [
            each.query @ each.key.transpose(-1, -2) * each.scaling
            for each in (ours.attended[own], theirs.attended[other])
        ]
        wanted = wanted + 0.25 * (scores[0] - scores[1])[pairs.expand_as(scores[0])].square().mean()
    assert loss.count == 2 and torch.allclose(loss.value, wanted, rtol=1e-5)
    loss.value.backward()
    assert all(parameter.grad is not None for name, parameter in student.named_parameters() if "layer.0" in name)


def test_padding_changes_no_loss(classifier):
    student = make_student(classifier, Student(layers=2))
    objective = EncoderDistillation(classifier, soft_labels, 0.9, Transfer(1.0, 0.1, 0.1, 4))
    given = texts()
    alone = [{name: value[row : row + 1] for name, value in given.items()} for row in (0, 1)]
    alone[1] = {name: value[:, :7] if value.ndim == 2 else value for name, value in alone[1].items()}
    apart = [objective(student, row) for row in alone]
    together = objective(student, given)
    label = (apart[0].parts["labels"] + apart[1].parts["labels"]) / 2
    assert torch.allclose(together.parts["labels"], label, rtol=1e-5)
    hidden = (12 * apart[0].parts["hidden"] + 7 * apart[1].parts["hidden"]) / 19
    assert torch.allclose(together.parts["hidden"], hidden, rtol=1e-4)


def test_relative_differences_do_not_see_scales():
    given = [torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(seed)).double() for seed in (0, 1)]
    seen = torch.ones(2, 5, dtype=torch.bool)
    once = hidden_state_loss([given[0]], [given[1]], seen, measure="relative")
    scales = 10.0 ** torch.arange(10).view(2, 5, 1)
    again = hidden_state_loss([given[0] * scales], [given[1] * scales], seen, measure="relative")
    assert torch.allclose(once, again)
    slow = ((given[0] - given[1]).square().sum(-1) / given[1].square().sum(-1)).mean()
    assert torch.allclose(once, slow)
    small = [torch.tensor([[[1.0, 0.0]]])], [torch.tensor([[[0.0, 2.0]]])]
    assert hidden_state_loss(*small, seen[:1, :1], measure="relative").item() == pytest.approx(1.25)


def test_kept_tokens_by_hand():
    pieces = {"[PAD]": 0, "play": 1, "##ing": 2, "playing": 3, "a": 4, "##y": 5, "rare": 6}
    assert kept_tokens(pieces, [0], {3: 2, 1: 1}, 4) == [0, 3, 4, 5]
    assert kept_tokens(pieces, [0], {3: 2, 1: 1}, 5) == [0, 1, 3, 4, 5]
    with pytest.raises(ValueError, match="alone are 3"):
        kept_tokens(pieces, [0], {}, 2)
    with pytest.raises(ValueError, match="Unigram"):
        trimmed_tokenizer({"model": {"type": "Unigram"}}, [0])


def test_texts_of_any_lengths_make_a_batch():
    examples = [
        Example({"input_ids": torch.arange(1, length + 1), "attention_mask": torch.ones(length).long()}, 1)
        for length in (3, 1)
    ]
    batch = batch_of(examples, 9)
    assert batch["input_ids"].tolist() == [[1, 2, 3], [1, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [1, 1]


def decoder(tiny_model: Any, family: str) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_model(family)).eval().requires_grad_(False)


def windows() -> dict[str, torch.Tensor]:
    ids = token_windows(2, 16)
    return {"input_ids": ids, "labels": ids}


def test_students_learn_side_by_side(tiny_model):
    model = decoder(tiny_model, "llama")
    options = mutual.MutualOptions(students=[{"layers": 1}, {"init": "random"}])
    training = mutual.train(TrainTask(model, lambda: model), options)
    loss = training.objective(training.model, windows())
    students = [training.model, *training.objective.peers]
    logits = [student(windows()["input_ids"]).logits[:, :-1].flatten(0, 1) for student in students]
    wanted = torch.stack(mutual.mutual_losses(logits, windows()["labels"][:, 1:].flatten())).sum(0).mean()
    assert torch.allclose(loss.value, wanted, rtol=1e-5)
    loss.value.backward()
    assert all(next(student.parameters()).grad is not None for student in students)
    assert training.finish() is training.model and len(training.model.model.layers) == 1


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "opt", "gemma2"])
def test_an_exit_is_the_model_cut_there(family, tiny_model):
    model = decoder(tiny_model, family)
    options = self_distillation.ExitOptions(exits=[1], keep=1, alpha=0.0, hidden=1.0)
    training = self_distillation.train(TrainTask(model, lambda: model), options)
    cut = training.finish()
    whole, early = (each(windows()["input_ids"]).logits[:, :-1].flatten(0, 1) for each in (model, cut))
    labels = windows()["labels"][:, 1:].flatten()
    loss = training.objective(model, windows())
    wanted = cross_entropy(whole, labels) + cross_entropy(early, labels)
    assert torch.allclose(loss.parts["labels"], wanted, rtol=1e-5) and loss.parts["hidden"] > 0


def test_a_teacher_of_another_vocabulary_is_compared_where_both_read_the_same(tiny_model):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    own = tokenizer()
    letters = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    inner = Tokenizer(models.BPE(letters, []))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    others = PreTrainedTokenizerFast(tokenizer_object=inner)
    student = decoder(tiny_model, "llama").requires_grad_()
    config = type(student.config).from_dict(student.config.to_dict() | {"vocab_size": len(letters)})
    teacher = AutoModelForCausalLM.from_config(config)
    ids = torch.tensor([own("the old pine stands in a shallow pot")["input_ids"]])
    loss = AcrossVocabularies(teacher, own, others, alpha=1.0)(student, {"input_ids": ids, "labels": ids})
    assert loss.count == ids.shape[1] - 1, "letters have a boundary wherever pieces have one"
    text = own.decode(ids[0])
    spelled = torch.tensor([others(text)["input_ids"]])
    ends = [end - 1 for _, end in own(text, return_offsets_mapping=True)["offset_mapping"]][:-1]
    matched = matching_tokens(own.get_vocab(), others.get_vocab())
    wanted = uld(student(ids).logits[0, :-1], teacher.eval()(spelled).logits[0, ends], matched).mean()
    assert torch.allclose(loss.value, wanted, rtol=1e-5)


def test_options_of_encoders_hold_for_their_distillation():
    options = EncoderDistilOptions(data="x")
    assert (options.batch_size, options.micro_batch, options.weight_decay, options.alpha) == (32, 32, 0.01, 0.9)
