"""Distillation as the loop sees it: losses of whole models against sums written out, every architecture, training."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from penjing.errors import PlanError
from penjing.methods.distillation import distil, on_policy
from penjing.methods.distillation.attention import visible_pairs
from penjing.methods.distillation.objective import Distillation, Transfer, look
from penjing.methods.distillation.self_written import GREEDY, SelfWritten, self_written
from penjing.methods.distillation.student import Student, blocks_of, make_student
from penjing.methods.training import IGNORED, TrainTask
from penjing.models.attention import attention_watched
from penjing.models.outputs import last_states, logits_of
from penjing.models.reading import Written, write
from penjing.training import Windows, train
from tiny_models import FAMILIES, token_windows

pytest.importorskip("accelerate")

PADDED = torch.tensor([[1] * 16, [1] * 11 + [0] * 5])


def load(directory: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory).eval().requires_grad_(False)


def batch(length: int = 16) -> dict[str, torch.Tensor]:
    """Two rows of which the second is padded; the first five tokens are a prompt."""
    ids = token_windows(2, length)
    labels = ids.masked_fill(PADDED == 0, IGNORED)
    labels[:, :5] = IGNORED
    return {"input_ids": ids, "attention_mask": PADDED, "labels": labels}


@pytest.fixture
def teacher(tiny_model: Any) -> Any:
    return load(tiny_model("llama"))


@pytest.fixture
def student(tiny_model: Any) -> Any:
    """The teacher's first layer, a little off."""
    model = load(tiny_model("llama"))
    model.model.layers = model.model.layers[:1]
    model.config.num_hidden_layers = 1
    return model.requires_grad_(True)


@pytest.mark.parametrize("family", FAMILIES)
def test_halves_of_a_model_and_watched_attention_are_the_model(family, tiny_model):
    model, given = load(tiny_model(family)), batch()
    inputs = {"input_ids": given["input_ids"], "attention_mask": given["attention_mask"]}
    wanted = model(**inputs).logits
    seen = []
    with attention_watched(model, lambda layer, q, k, v, s: (seen.append(layer), (q, k, v))[1]):
        states = last_states(model, given).last_hidden_state
    assert seen == [0, 1]
    assert torch.equal(model(**inputs).logits, wanted), "nothing is left behind"
    for row in range(2):
        assert torch.allclose(logits_of(model, states[row]), wanted[row], atol=1e-5)


@pytest.mark.parametrize("alpha", [1.0, 0.4])
def test_labels_are_the_mean_over_what_is_learnt(student, teacher, alpha):
    given = batch()
    loss = Distillation(teacher, alpha=alpha)(student, given)
    inputs = {"input_ids": given["input_ids"], "attention_mask": given["attention_mask"]}
    q, p = (model(**inputs).logits.double().log_softmax(-1) for model in (student, teacher))
    slow, count = 0.0, 0
    for row, length in enumerate((16, 11)):
        for at in range(4, length - 1):
            kl = (p[row, at].exp() * (p[row, at] - q[row, at])).sum()
            slow += alpha * kl - (1 - alpha) * q[row, at, given["input_ids"][row, at + 1]]
            count += 1
    assert loss.count == count and torch.allclose(loss.value.double(), slow / count, rtol=1e-5)
    loss.value.backward()
    assert all(value.grad is None for value in teacher.parameters())
    assert student.lm_head.weight.grad is not None or student.model.embed_tokens.weight.grad is not None


def test_transfer_is_zero_between_equal_models_and_reaches_the_layers(student, teacher):
    everything = Transfer(hidden=1.0, attention=1.0, relations=1.0, relation_heads=4)
    same = Distillation(teacher, transfer=everything)(teacher, batch())
    assert same.value.abs() < 1e-5 and set(same.parts) == {"labels", "hidden", "attention", "relations"}
    objective = Distillation(teacher, transfer=everything)
    objective.labels_count = False
    loss = objective(student, batch())
    assert set(loss.parts) == {"hidden", "attention", "relations"}
    loss.value.backward()
    assert student.model.layers[0].self_attn.k_proj.weight.grad.abs().max() > 0
    assert torch.allclose(loss.value, sum(loss.parts.values()))


def test_padding_does_not_reach_a_loss(student, teacher):
    objective = Distillation(teacher, transfer=Transfer(1.0, 1.0, 1.0, 4))
    given = batch()
    other = dict(given, input_ids=given["input_ids"].masked_fill(PADDED == 0, 7))
    assert torch.allclose(objective(student, given).value, objective(student, other).value, rtol=1e-5)


def test_what_attention_saw_gives_its_weights(tiny_model):
    from penjing.methods.distillation.attention import attention_scores

    model, given = load(tiny_model("llama")), batch()
    model.set_attn_implementation("eager")
    inputs = {"input_ids": given["input_ids"], "attention_mask": given["attention_mask"]}
    weights = model(**inputs, output_attentions=True).attentions
    seen = look(model, given, everything=True)
    pairs = visible_pairs(PADDED.bool(), causal=True)[:, None]
    for layer, wanted in enumerate(weights):
        found = attention_scores(seen.attended[layer]).masked_fill(~pairs, -1e9).softmax(-1)
        rows = PADDED.bool()[:, None, :, None]
        assert torch.allclose(found * rows, wanted * rows, atol=1e-6)


def test_a_narrower_student_learns_a_projection(tiny_model, teacher):
    narrow = load(tiny_model("llama", hidden_size=32, head_dim=16)).requires_grad_(True)
    objective = Distillation(teacher, transfer=Transfer(hidden=1.0, relations=1.0, relation_heads=4))
    objective.fit(narrow)
    objective(narrow, batch()).value.backward()
    assert objective.projection.grad.abs().max() > 0
    with pytest.raises(PlanError, match="300 tokens and the teacher 301"):
        distil.same_vocabulary(narrow, load(tiny_model("llama", vocab_size=301)))


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (distil.train, distil.DistilOptions(loss="jsd", temperature=2.0, alpha=0.7)),
        (distil.train, distil.DistilOptions(loss="skewed-reverse-kl")),
        (distil.train, distil.DistilOptions(hidden=1, attention=0.01, transfer_first=0.5)),
        (on_policy.train_gkd, on_policy.GKDOptions(own=0.5, new_tokens=6)),
        (on_policy.train_minillm, on_policy.MiniLLMOptions(new_tokens=6)),
    ],
    ids=lambda value: getattr(value, "loss", ""),
)
def test_training_moves_the_student_and_repeats_itself(student, tiny_model, tmp_path, make, options):
    import copy

    options = options.model_copy(update={"steps": 6, "batch_size": 4, "micro_batch": 2, "learning_rate": 3e-3})
    curves = []
    for turn in range(2):
        model = copy.deepcopy(student).requires_grad_(False)
        training = make(TrainTask(model, lambda: load(tiny_model("llama"))), options)
        windows = Windows(token_windows(8, 16), 4, 2, 0)
        curves.append(train(training, windows, options, tmp_path / str(turn), marks={}).losses)
    assert curves[0] == curves[1]
    if make is distil.train and not options.transfer_first:
        assert curves[0][-1] < curves[0][0]


@pytest.mark.parametrize("family", FAMILIES)
def test_writing_token_by_token_is_reading_it_at_once(family, tiny_model):
    model = load(tiny_model(family))
    prompts, attention = token_windows(2, 6), torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]])
    written = write([model], prompts, attention, 5, lambda number, logits: logits[0].argmax(-1))
    for row, start in enumerate((0, 2)):
        ids = torch.cat([prompts[row, start:], written.tokens[row]])[None]
        logits = model(input_ids=ids).logits[0, 5 - start : -1]
        assert torch.equal(logits.argmax(-1), written.tokens[row])


def test_an_end_token_ends_its_row_alone():
    from penjing.models import reading

    class Counting(torch.nn.Module):
        def forward(self, **given: Any) -> Any:
            from types import SimpleNamespace

            return SimpleNamespace(logits=torch.zeros(2, 1, 9), past_key_values=())

    order = [torch.tensor([4, 5]), torch.tensor([2, 6]), torch.tensor([7, 2]), torch.tensor([8, 8])]
    written = reading.write(
        [Counting()],
        torch.ones(2, 3, dtype=torch.long),
        torch.ones(2, 3, dtype=torch.long),
        9,
        lambda number, logits: order[number],
        ends=[2],
    )
    assert written.tokens.tolist() == [[4, 2, 2], [5, 6, 2]]
    assert written.mask.tolist() == [[True, True, False], [True, True, True]]


def test_prompts_and_their_continuations_keep_their_places():
    given = batch()
    prompts, attention = on_policy.prompts_of({**given, "labels": given["labels"].masked_fill(PADDED == 0, IGNORED)})
    assert prompts.shape == (2, 5) and attention.all()
    whole = {"input_ids": given["input_ids"], "labels": given["input_ids"]}
    assert on_policy.prompts_of(whole)[0].shape == (2, 8), "half of a window of plain text"
    attention = torch.tensor([[1, 1, 1], [0, 1, 1]])
    prompts = torch.tensor([[3, 4, 5], [0, 6, 7]])
    written = Written(torch.tensor([[8, 2], [9, 9]]), torch.tensor([[True, False], [True, True]]))
    made = on_policy.continued(prompts, attention, written)
    assert made["input_ids"].tolist() == [[3, 4, 5, 8], [6, 7, 9, 9]]
    assert made["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 1]]
    assert made["labels"].tolist() == [[IGNORED, IGNORED, IGNORED, 8], [IGNORED, IGNORED, 9, 9]]


def test_minillm_of_models_is_that_of_their_logits(student, teacher):
    from penjing.methods.distillation.minillm import minillm

    prompts, attention = token_windows(2, 4), torch.ones(2, 4, dtype=torch.long)
    written = Written(token_windows(2, 5, seed=3), torch.tensor([[True] * 5, [True] * 3 + [False] * 2]))
    made = on_policy.continued(prompts, attention, written)
    objective = on_policy.MiniLLM(teacher, on_policy.MiniLLMOptions())
    value, divergence = objective._policy(student, made)
    inputs = {key: made[key] for key in ("input_ids", "attention_mask")}
    q, p = (model(**inputs).logits[:, 3:8] for model in (student, teacher))
    assert torch.allclose(value, minillm(q, p, made["input_ids"][:, 4:], written.mask), rtol=1e-4)
    assert torch.isfinite(divergence)


def test_a_model_writes_its_own_data(teacher):
    teacher.config.eos_token_id = None
    tokens, mask = self_written(teacher, 3, 12, seed=5)
    assert torch.equal(tokens, self_written(teacher, 3, 12, seed=5).tokens) and mask.all()
    logits = teacher(input_ids=tokens).logits
    first = min(GREEDY)
    assert torch.equal(logits[:, :first].argmax(-1), tokens[:, 1 : first + 1]), "the beginning is greedy"
    assert not torch.equal(logits[:, first + 2 : -1].argmax(-1), tokens[:, first + 3 :]), "the rest is drawn"
    seen = []
    objective = SelfWritten(lambda model, batch: seen.append(batch), teacher, pool=2, seed=0)
    for _ in range(4):
        objective(teacher, {"input_ids": tokens, "labels": tokens})
    assert len({tuple(row) for part in seen for row in part["input_ids"].tolist()}) == 2


def test_text_after_an_early_end_is_not_learnt(teacher):
    teacher.config.eos_token_id = list(range(300))
    batches = []
    objective = SelfWritten(lambda model, batch: batches.append(batch), teacher, pool=2, seed=0)
    objective(teacher, {"input_ids": torch.zeros(2, 8, dtype=torch.long)})
    labels = batches[0]["labels"]
    assert labels.shape == (2, 8) and (labels[:, 2:] == IGNORED).all() and (labels[:, :2] != IGNORED).all()


def test_a_text_may_begin_with_a_given_token_and_go_on_after_an_end(teacher):
    teacher.config.eos_token_id = list(range(300))
    numbers = []
    tokens, mask = self_written(teacher, 2, 8, seed=0, bos=7, told=numbers.append)
    assert mask.all() and (tokens[:, 0] == 7).all() and numbers == list(range(6))
    free = self_written(teacher, 2, 2, seed=0).tokens
    assert torch.equal(tokens[:, 1], free[:, 0]), "the token drawn first is the same"
    assert self_written(teacher, 2, 2, seed=0, bos=7).tokens.shape == (2, 2)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_student_begins_as_layers_of_its_teacher(family, tiny_model):
    from penjing.checkpoint import open_checkpoint
    from penjing.models import layout_of

    directory = tiny_model(family, layers=3)
    model = load(directory)
    made = make_student(model, Student(layers=2))
    path, count = blocks_of(made)
    assert count == 2 and blocks_of(model) == (path, 3)
    state, before = made.state_dict(), model.state_dict()
    assert state.keys() < before.keys()
    for name, value in state.items():
        old = name.replace(f"{path}.1.", f"{path}.2.")
        assert torch.equal(value, before[old]), name
    assert torch.isfinite(made(token_windows(1, 8)).logits).all()
    checkpoint = open_checkpoint(directory)
    planned = Student(layers=2).config(checkpoint.config, layout_of(checkpoint.config))
    assert getattr(made.config, "layer_types", None) == planned.get(
        "layer_types", getattr(made.config, "layer_types", None)
    )
    fresh = make_student(model, Student(layers=2, init="random"), seed=1)
    assert not torch.equal(fresh.get_input_embeddings().weight, model.get_input_embeddings().weight)
    again = make_student(model, Student(layers=2, init="random"), seed=1)
    assert torch.equal(fresh.get_input_embeddings().weight, again.get_input_embeddings().weight)
    with pytest.raises(ValueError, match="4 layers cannot be taken out of 3"):
        make_student(model, Student(layers=4))
