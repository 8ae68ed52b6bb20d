"""Tasks of lm-eval, and files of questions, answered by streamed models.

    tasks = load(["hellaswag", "questions.jsonl"], limit=100)     # before any model is opened
    scores = run(tasks, stream, tokenizer, positions, progress)   # for each model

Prompts, examples and measures are lm-eval's; the model behind its requests is streamed.
"""

from __future__ import annotations

import difflib
import functools
import importlib.util
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from importlib import metadata
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from penjing.errors import CalibrationError, MissingDependency, PlanError
from penjing.evaluation.questions import Questions, TaskScore, is_file_of_questions, read_questions
from penjing.evaluation.windows import leading_token

if TYPE_CHECKING:
    from penjing.pipeline.stream import StreamedModel

FEWSHOT_SEED = 1234
"""Seed with which lm-eval itself draws the examples of a prompt."""

RESAMPLES = 1000
"""Draws behind the standard error of a measure that is no mean, such as perplexity."""

_ANSWERED = ("multiple_choice", "loglikelihood")


@dataclass(frozen=True)
class Tasks:
    """Tasks with their questions, ready to be asked.

    loaded  what `TaskManager.load` of lm-eval returns      limit  questions asked of each task, None for all
    files   the questions that came from a file, by name
    """

    loaded: Mapping[str, Any]
    files: Mapping[str, Questions]
    limit: int | None


NO_TASKS = Tasks({"tasks": {}, "groups": {}}, {}, None)


def load(names: Sequence[str | Path], limit: int | None = None, *, full_cache: bool = True) -> Tasks:
    """Tasks by lm-eval's names, groups and tags too, or by files that end in .jsonl or .jsonl.gz; none for no names.

    full_cache  whether the model is to read its past in full: tasks are not answered otherwise

    Raises CalibrationError for a file that cannot be used and for data that the hub does not give, PlanError for names
    that lm-eval does not know, tasks of a kind that is not answered and a limit of nothing, MissingDependency without
    lm-eval.
    """
    if limit is not None and (limit < 1 or not names):
        raise PlanError(f"limit {limit}: it is the number of questions of each task, at least 1, and needs tasks")
    if not names:
        return NO_TASKS
    if not full_cache:
        raise PlanError("tasks are answered with a full KV cache; measure a quantised one without tasks")
    given = [str(name) for name in names]
    files = [read_questions(Path(name).expanduser()) for name in given if is_file_of_questions(name)]
    _require_library()
    from penjing.pipeline.task_model import FileTask

    specs: list[Any] = [FileTask(questions) for questions in files]
    tasks = {task.task_name: task for task in specs}
    groups: dict[str, Any] = {}
    known = [name for name in given if not is_file_of_questions(name)]
    if len(tasks) < len(files) or len(set(known)) < len(known):
        raise PlanError(f"two tasks are called the same: {', '.join(given)}; name each once, or rename a file")
    for name in known:
        found = _from_library(name)
        if twice := found["tasks"].keys() & tasks.keys():
            raise PlanError(f"task {name!r}: {', '.join(sorted(twice))} is among the tasks already; name each once")
        tasks |= found["tasks"]
        groups |= found.get("groups", {})
    for name, task in tasks.items():
        _require_answered(name, task)
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
    return Tasks({"tasks": tasks, "groups": groups}, {each.name: each for each in files}, limit)


def refuse_for_encoders(tasks: Tasks, model: str) -> None:
    """Raise PlanError when a model that classifies is asked to continue texts."""
    if tasks.loaded["tasks"]:
        raise PlanError(f"{model} is an encoder, which continues no text; measure it without tasks")


def run(
    tasks: Tasks,
    stream: StreamedModel,
    tokenizer: Any,
    positions: int | None,
    progress: Callable[[int, int, str], None],
) -> tuple[TaskScore, ...]:
    """A score for each task and measure, in the order of the tasks; of a group with a mean, that mean alone.

    positions  tokens that the model takes    progress  called with blocks done, of how many, and a note

    Raises CalibrationError when the model's logits are not finite, or its perplexity is beyond any number.
    """
    if not tasks.loaded["tasks"]:
        return ()
    from lm_eval.evaluator import evaluate

    from penjing.pipeline.task_model import StreamedLM

    model = StreamedLM(stream, tokenizer, positions, progress)
    for task in tasks.loaded["tasks"].values():
        task.set_fewshot_seed(seed=FEWSHOT_SEED)  # every model gets the same examples
    try:
        with _quietly():
            found = evaluate(model, tasks.loaded, limit=tasks.limit, bootstrap_iters=RESAMPLES, log_samples=False)
    except OverflowError as error:
        raise CalibrationError(
            f"the perplexity of a task ({', '.join(tasks.loaded['tasks'])}) is larger than any number"
        ) from error
    bos = leading_token(tokenizer)
    first = "no BOS token" if bos is None else f"BOS token {bos} first"
    return tuple(_scores(tasks, found, model.cut, first))


def _scores(tasks: Tasks, found: Mapping[str, Any], cut: Mapping[str, int], first: str) -> Iterator[TaskScore]:
    summarised = found.get("groups", {})
    groups = tasks.loaded["groups"]
    inner = {name for group in summarised for name in (*_members(groups[group]), *_subgroups(groups[group]))}
    for name, measured in (found["results"] | summarised).items():
        if name in inner:
            continue
        task = tasks.loaded["tasks"].get(name)
        asked = (name,) if task is not None else _members(groups[name])
        questions = sum(found["n-samples"][each]["effective"] for each in asked)
        shots = max(found["n-shot"][each] for each in asked)
        protocol = _protocol(tasks, name, asked, found, sum(cut.get(each, 0) for each in asked), first)
        chance = None if task is None else _chance(task)
        for key, value in measured.items():
            metric, _, how = key.partition(",")
            if not how or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = measured.get(f"{metric}_stderr,{how}")
            label = metric if how == "none" else f"{metric} ({how})"
            yield TaskScore(
                name=name,
                metric=label,
                value=float(value),
                stderr=float(error) if isinstance(error, int | float) else None,
                questions=questions,
                shots=shots,
                chance=chance if metric in ("acc", "acc_norm") else None,
                protocol=protocol,
            )


def _protocol(tasks: Tasks, name: str, asked: Sequence[str], found: Mapping[str, Any], cut: int, first: str) -> str:
    """One line that stands beside the scores of a task."""
    source = f"lm-eval's {name}" if name not in tasks.files else f"file {name} [sha256 {tasks.files[name].digest[:8]}]"
    counts = [found["n-samples"][each] for each in asked]
    some, all_of = (sum(each[key] for each in counts) for key in ("effective", "original"))
    which = f"{'the first ' if some < all_of and len(asked) == 1 else ''}{some:,} of {all_of:,} questions"
    shots = max(found["n-shot"][each] for each in asked)
    lost = f", {cut} requests longer than the model takes without their beginning" if cut else ""
    library = metadata.version("lm-eval")
    return f"{source}: {which}, {shots} examples in the prompt, {first}, float32{lost}; lm-eval {library}"


def _chance(task: Any) -> float | None:
    """What guessing reaches on the questions that were asked, when they have choices."""
    if task.OUTPUT_TYPE != "multiple_choice":
        return None
    docs = {instance.doc_id: instance.doc for instance in task.instances}
    return sum(1 / len(task.doc_to_choice(doc)) for doc in docs.values()) / len(docs)


def _members(group: Any) -> list[str]:
    return [task.task_name for task in group.get_all_tasks()]


def _subgroups(group: Any) -> list[str]:
    return [each.name for each in group.get_all_groups()]


@functools.cache
def _manager() -> Any:
    """The index of lm-eval's tasks: thousands of files, which takes some ten seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _from_library(name: str) -> Mapping[str, Any]:
    """What lm-eval's own loader makes of a name; it downloads the data."""
    if Path(name).suffix in (".json", ".gz", ".yaml", ".csv") or "/" in name:
        raise PlanError(f"task {name!r}: a file of questions ends in .jsonl or .jsonl.gz; tasks have plain names")
    manager = _manager()
    if name not in manager.task_index:
        near = difflib.get_close_matches(name, manager.all_tasks, n=3)
        similar = f" ({', '.join(near)} are similar)" if near else ""
        raise PlanError(f"task {name!r}: lm-eval has none of that name{similar}; `lm-eval ls tasks` lists them")
    try:
        return manager.load([name])
    except Exception as error:  # every kind of network, hub and schema error of two libraries
        reason = (str(error).strip().splitlines() or [""])[0]
        raise CalibrationError(
            f"task {name!r}: lm-eval cannot load it ({type(error).__name__}: {reason}). Its data comes from the hub; "
            "where that is out of reach, give a .jsonl file of its questions instead of the name"
        ) from error


def _require_answered(name: str, task: Any) -> None:
    """Refuse a task whose requests are of another kind than log-likelihoods."""
    kind = task.OUTPUT_TYPE
    if kind not in _ANSWERED:
        from penjing.pipeline.task_model import KINDS

        wants = {"generate_until": "text that the model writes", "loglikelihood_rolling": "the perplexity of texts"}
        raise PlanError(f"task {name!r} asks for {wants.get(kind, kind)} ({kind}); {KINDS}")


def _require_library() -> None:
    if importlib.util.find_spec("lm_eval") is None:
        raise MissingDependency("tasks need lm-eval: pip install 'penjing[tasks]'")


@contextmanager
def _quietly() -> Iterator[None]:
    """lm-eval draws a bar for every task and prints while it resamples, and has no switch for either."""
    from tqdm import tqdm

    drawn = tqdm.__init__
    before = os.environ.get("DISABLE_MULTIPROC")
    os.environ["DISABLE_MULTIPROC"] = "1"  # it would fork a process for each core beside torch's threads
    tqdm.__init__ = functools.partialmethod(drawn, disable=True)
    try:
        with redirect_stdout(StringIO()):
            yield
    finally:
        tqdm.__init__ = drawn
        if before is None:
            del os.environ["DISABLE_MULTIPROC"]
        else:
            os.environ["DISABLE_MULTIPROC"] = before
