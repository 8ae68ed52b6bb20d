"""Tasks answered by streamed models: log-likelihoods against lm-eval's own model, accuracies against counted ones."""

import json
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from penjing import api, cli
from penjing.checkpoint import open_checkpoint
from penjing.errors import CalibrationError, MissingDependency, PlanError
from penjing.models import layout_of
from penjing.pipeline import likelihood, tasks
from penjing.pipeline.likelihood import log_likelihoods, padded_length
from penjing.pipeline.stream import StreamedModel
from penjing.pipeline.weights import Weights
from tiny_models import TEXT, tokenizer

pytest.importorskip("lm_eval")

SHORT: dict[str, Any] = {"windows": 1, "length": 32}
PAIRS = [
    ("The old pine stands in a", " shallow pot"),
    ("Water", ", light and patience"),
    ("", "A tree of ninety years"),
    ("ends in a space ", "and goes on"),
    ("<s>begins with the token", " of beginnings"),
    ("a" * 90 + " longer than the model takes", " by far"),
    ("one token", "x"),
    ("one token", "y"),
    (TEXT[1], " " + TEXT[2]),
]


def stream_of(model: Path) -> StreamedModel:
    checkpoint = open_checkpoint(model)
    layout = layout_of(checkpoint.config, checkpoint.specs())
    return StreamedModel(checkpoint.config, layout, Weights(checkpoint, layout).live)


def nothing(done: int, of: int, note: str) -> None:
    pass


def write(path: Path, *records: object) -> str:
    path.write_text("\n".join(map(json.dumps, records)))
    return str(path)


@pytest.fixture
def choices(tmp_path: Path) -> str:
    records = [
        {"query": "Question: What stands in the pine?", "choices": ["the mountain", "a pot", "wire"], "gold": 0},
        {"query": "To make a large thing", "choices": ["small", "a large thing small is to choose"], "gold": 1},
        {"query": "Water, light and\n", "choices": ["patience", "x"], "gold": 0},
    ]
    return write(tmp_path / "choices.jsonl", *records)


@pytest.fixture
def roads(tmp_path: Path) -> str:
    halves = [(text.split()[:4], text.split()[4:6]) for text in TEXT]
    records = [{"context": " ".join(before), "continuation": " ".join(after)} for before, after in halves]
    return write(tmp_path / "roads.jsonl", *records)


@pytest.mark.parametrize(("family", "positions"), [("llama", {}), ("gpt2", {"n_positions": 64})])
@pytest.mark.parametrize("first", [True, False], ids=["bos", "no bos"])
def test_log_likelihoods_are_those_of_lm_eval(
    tiny_model: Callable[..., Path],
    family: str,
    positions: dict[str, int],
    first: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM

    from penjing.pipeline.task_model import StreamedLM

    model = tiny_model(family, **(positions or {"max_position_embeddings": 64}))
    words = tokenizer()
    if first:
        from tokenizers.processors import TemplateProcessing

        words.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    requests = [Instance("loglikelihood", {}, pair, 0, ("pairs", number, 1)) for number, pair in enumerate(PAIRS)]
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    expected = HFLM(pretrained=loaded, tokenizer=words, batch_size=3).loglikelihood(requests, disable_tqdm=True)

    monkeypatch.setattr(likelihood, "PASS_BYTES", 4 * 64 * 150)  # several passes, one input in some
    calls: list[tuple[int, int]] = []
    streamed = StreamedLM(stream_of(model), words, 64, lambda done, of, note: calls.append((done, of)))
    found = streamed.loglikelihood(requests)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], abs=1e-4)
    assert streamed.cut["pairs"] >= 1
    total = calls[0][1]
    assert calls == [(done, total) for done in range(1, total + 1)] and total > 2


def test_what_the_model_would_write_is_found(tiny_model: Callable[..., Path]) -> None:
    stream = stream_of(tiny_model("llama"))
    context = [5, 6, 7, 8]
    logits = whole(stream, torch.tensor([context]))
    best, worst = int(logits[-1].argmax()), int(logits[-1].argmin())
    (good, greedy), (bad, never) = log_likelihoods(stream, [(context, [best]), (context, [worst])], None, nothing)
    assert (greedy, never) == (True, False)
    log_q = logits[-1].log_softmax(0)
    assert [good, bad] == pytest.approx([float(log_q[best]), float(log_q[worst])], abs=1e-5)


def whole(stream: StreamedModel, tokens: torch.Tensor) -> torch.Tensor:
    states = stream.forward(tokens, torch.float32)
    with stream.head(torch.float32) as head:
        return head(states)


def test_lengths_are_few_and_waste_little() -> None:
    padded = [padded_length(length, 1000) for length in range(1, 1001)]
    assert len(set(padded)) <= 40
    assert all(length <= found <= max(length + 8, 1.125 * length + 1) for length, found in enumerate(padded, 1))
    assert padded[-1] == 1000


def test_scores_are_those_counted_by_hand(tiny_model: Callable[..., Path], choices: str, roads: str) -> None:
    model = tiny_model("llama")
    measured = api.evaluate(model, tasks=[choices, roads], **SHORT)
    scores = {(score.name, score.metric): score for score in measured.tasks}
    assert set(scores) == {("choices", "acc"), ("choices", "acc_norm"), ("roads", "acc"), ("roads", "perplexity")}

    stream, words = stream_of(model), tokenizer()

    def value(before: str, after: str) -> tuple[float, bool]:
        before, after = before.rstrip(), before[len(before.rstrip()) :] + after  # as lm-eval: white space is answered
        ids, start = words.encode(before + after), len(words.encode(before))
        logits = whole(stream, torch.tensor([ids]))[start - 1 : -1].log_softmax(1)
        target = torch.tensor(ids[start:])
        return float(logits.gather(1, target[:, None]).sum()), bool((logits.argmax(1) == target).all())

    right, normed = [], []
    for line in Path(choices).read_text().splitlines():
        record = json.loads(line)
        before = record["query"] + ("\nAnswer:" if record["query"].startswith("Question") else "")
        space = "" if before.endswith("\n") else " "
        values = [value(before, space + choice)[0] for choice in record["choices"]]
        lengths = [len(choice) for choice in record["choices"]]
        right.append(values.index(max(values)) == record["gold"])
        shares = [each / length for each, length in zip(values, lengths, strict=True)]
        normed.append(shares.index(max(shares)) == record["gold"])
    accuracy = scores["choices", "acc"]
    assert accuracy.value == pytest.approx(sum(right) / 3)
    assert scores["choices", "acc_norm"].value == pytest.approx(sum(normed) / 3)
    assert accuracy.stderr == pytest.approx(math.sqrt(accuracy.value * (1 - accuracy.value) / 2))
    assert (accuracy.questions, accuracy.shots) == (3, 0)
    assert accuracy.chance == pytest.approx((1 / 3 + 1 / 2 + 1 / 2) / 3)
    assert "file choices [sha256 " in accuracy.protocol and "no BOS token" in accuracy.protocol

    records = map(json.loads, Path(roads).read_text().splitlines())
    found = [value(record["context"], " " + record["continuation"]) for record in records]
    nll = -sum(each for each, _ in found) / len(found)
    assert scores["roads", "perplexity"].value == pytest.approx(math.exp(nll), rel=1e-4)
    assert scores["roads", "perplexity"].stderr is not None
    assert scores["roads", "acc"].value == sum(greedy for _, greedy in found) / len(found)
    assert scores["roads", "acc"].chance is None


def test_compare_on_the_command_line(
    tiny_model: Callable[..., Path], choices: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    models = [str(tiny_model("llama")), str(tiny_model("llama", seed=1))]
    arguments = ["--windows", "1", "--length", "32", "--tasks", choices, "--limit", "2"]
    assert cli.main(["compare", *models, *arguments, "--json"]) == 0
    captured = capsys.readouterr()
    results = json.loads(captured.out)
    assert [score["metric"] for score in results[1]["tasks"]] == ["acc", "acc_norm"]
    assert all(score["questions"] == 2 for result in results for score in result["tasks"])
    assert "the first 2 of 3 questions" in results[0]["tasks"][0]["protocol"]
    assert cli.main(["compare", *models, *arguments]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"\([+-]\d+\.\d\)", shown), "the difference to the first model"
    assert "guessing" in shown and "41.7%" in shown
    assert "file choices [sha256" in shown


def named(folder: Path, name: str, **entries: object) -> Any:
    """An index of lm-eval with one task that reads a file beside it."""
    from lm_eval.tasks import TaskManager

    data = write(folder / "data.jsonl", {"question": "The sky is", "answers": ["blue", "square"], "label": 0})
    config = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": data}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "answers",
        "doc_to_target": "label",
    }
    (folder / "index").mkdir()
    (folder / "index" / f"{name}.yaml").write_text(json.dumps(config | entries))  # JSON is YAML
    return TaskManager(include_defaults=False, include_path=str(folder / "index"))


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def put(name: str, **entries: object) -> None:
        manager = named(tmp_path, name, **entries)
        monkeypatch.setattr(tasks, "_manager", lambda: manager)

    return put


def test_a_task_by_its_name(tiny_model: Callable[..., Path], index: Callable[..., None]) -> None:
    index("skies")
    scores = api.evaluate(tiny_model("gpt2"), tasks=["skies"], **SHORT).tasks
    assert {(score.name, score.metric, score.questions, score.chance) for score in scores} == {
        ("skies", "acc", 1, 0.5),
        ("skies", "acc_norm", 1, 0.5),
    }
    assert scores[0].stderr is None, "one question has no spread"
    assert scores[0].protocol.startswith("lm-eval's skies: 1 of 1 questions, 0 examples in the prompt")


@pytest.mark.parametrize(
    ("kind", "words"),
    [("generate_until", "text that the model writes"), ("loglikelihood_rolling", "the perplexity of texts")],
)
def test_tasks_that_ask_for_something_else(index: Callable[..., None], kind: str, words: str) -> None:
    index("other", output_type=kind, doc_to_choice=None, doc_to_target="{{question}}")
    with pytest.raises(PlanError, match=rf"'other' asks for {words} .*multiple_choice and loglikelihood work"):
        tasks.load(["other"])


def test_data_that_the_hub_does_not_give(index: Callable[..., None]) -> None:
    index("far", dataset_path="nobody/nothing", dataset_kwargs=None)
    with pytest.raises(CalibrationError, match=r"'far': lm-eval cannot load it .*comes from the hub; .*a \.jsonl file"):
        tasks.load(["far"])


def test_a_name_that_is_none(index: Callable[..., None]) -> None:
    index("skies")
    with pytest.raises(PlanError, match=r"'skis': lm-eval has none of that name \(skies are similar\); `lm-eval ls"):
        tasks.load(["skis"])
    with pytest.raises(PlanError, match=r"a file of questions ends in \.jsonl"):
        tasks.load(["questions.csv"])


def test_what_is_refused_before_a_model_is_opened(choices: str, tmp_path: Path) -> None:
    nowhere = tmp_path / "no model"
    for wrong, words in [
        ({"tasks": [str(tmp_path / "none.jsonl")]}, "no such file"),
        ({"tasks": [choices, choices]}, "two tasks are called the same"),
        ({"tasks": [choices], "limit": 0}, "limit 0"),
        ({"limit": 5}, "needs tasks"),
    ]:
        with pytest.raises((CalibrationError, PlanError), match=words):
            api.evaluate(nowhere, **wrong)


def test_a_quantised_cache_answers_no_tasks(choices: str) -> None:
    with pytest.raises(PlanError, match="full KV cache"):
        tasks.load([choices], full_cache=False)


def test_an_encoder_answers_no_tasks(choices: str) -> None:
    tasks.refuse_for_encoders(tasks.NO_TASKS, "bert")
    with pytest.raises(PlanError, match="bert is an encoder"):
        tasks.refuse_for_encoders(tasks.load([choices]), "bert")


def test_without_lm_eval(choices: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(MissingDependency, match=r"pip install 'penjing\[tasks\]'"):
        tasks.load([choices])
