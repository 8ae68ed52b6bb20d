"""A streamed model as lm-eval sees one: it answers log-likelihood requests, all of them in a few passes.

Imports lm-eval, so nothing imports this module before `tasks.load` has found that library.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.task import ConfigurableTask

from penjing.errors import CalibrationError, PlanError
from penjing.evaluation.questions import Questions, joint, prompt
from penjing.pipeline.likelihood import Request, log_likelihoods
from penjing.pipeline.stream import StreamedModel

KINDS = "tasks of kind multiple_choice and loglikelihood work: choices or continuations whose probability is asked"


class StreamedLM(TemplateLM):
    """Answers requests of lm-eval with a model of which one block is in memory at a time.

    tokenizer  as transformers loads it; it puts a BOS token first, or does not, as it does by default
    limit      tokens that the model takes; longer requests lose their beginning, and `cut` counts them by task
    """

    def __init__(
        self, stream: StreamedModel, tokenizer: Any, limit: int | None, progress: Callable[[int, int, str], None]
    ) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.cut: Counter[str] = Counter()
        self._stream = stream
        self._limit = limit
        self._progress = progress
        self._asked_by: list[str] = []
        beginnings = (tokenizer.bos_token_id, tokenizer.eos_token_id)
        self._beginning: int | None = next((each for each in beginnings if each is not None), None)
        self._written = "" if self._beginning is None else tokenizer.decode([self._beginning])

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What an empty context becomes. Raises CalibrationError when the tokenizer has no BOS and no EOS token."""
        if self._beginning is None:
            raise CalibrationError("a task has an empty context, and the tokenizer no token to begin a text with")
        return self._beginning

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        # A text that begins with the BOS token as it is written must not get a second one.
        if add_special_tokens is None and self._written and string.startswith(self._written):
            add_special_tokens = False
        chosen = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return self.tokenizer.encode(string, **chosen)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """In nats, and whether the model itself would have written that; in the order of `requests`."""
        self._asked_by = [str(request.task_name) for request in requests]
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        tokens: list[Request] = []
        for task, (texts, context, continuation) in zip(self._asked_by, requests, strict=True):
            self._require_askable(task, texts, context, continuation)
            self.cut[task] += self._limit is not None and len(context) + len(continuation) - 1 > self._limit
            tokens.append((context, continuation))
        return log_likelihoods(self._stream, tokens, self._limit, self._progress)

    def _require_askable(
        self, task: str, texts: tuple[str, str], context: Sequence[int], continuation: Sequence[int]
    ) -> None:
        where = f"task {task}, {texts[1]!r} after {texts[0][-60:]!r}"
        if not context or not continuation:
            raise CalibrationError(f"{where}: the tokenizer has no token that belongs to one of the two alone")
        if self._limit is not None and len(continuation) > self._limit:
            raise CalibrationError(f"{where}: {len(continuation)} tokens; the model takes {self._limit}")

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> NoReturn:
        """Refused, as `tasks.load` does before."""
        raise PlanError(KINDS)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> NoReturn:
        """Refused, as `tasks.load` does before."""
        raise PlanError(KINDS)


class FileTask(ConfigurableTask):
    """A file of questions as a task of lm-eval; its measures are lm-eval's own."""

    def __init__(self, questions: Questions) -> None:
        self._questions = questions
        measures = {"acc": "mean", "acc_norm": "mean"} if questions.multiple_choice else {"acc": "mean"}
        if not questions.multiple_choice:
            measures["perplexity"] = "perplexity"
        super().__init__(
            config={
                "task": questions.name,
                "output_type": "multiple_choice" if questions.multiple_choice else "loglikelihood",
                "test_split": "test",
                "doc_to_text": prompt,
                "doc_to_target": "gold" if questions.multiple_choice else "continuation",
                "doc_to_choice": "choices" if questions.multiple_choice else None,
                "num_fewshot": 0,
                "metric_list": [
                    {"metric": name, "aggregation": how, "higher_is_better": name != "perplexity"}
                    for name, how in measures.items()
                ],
            }
        )

    def download(self, *args: Any, **kwargs: Any) -> None:
        """The records, in memory: `datasets` would leave a copy of the file in its cache."""
        from datasets import Dataset

        self.dataset = {"test": Dataset.from_list([dict(record) for record in self._questions.records])}

    def construct_requests(self, doc: Any, ctx: str, **kwargs: Any) -> list[Instance]:
        """A request for each choice: lm-eval has one delimiter for all questions of a task, a file may need several."""
        answers = doc["choices"] if self._questions.multiple_choice else [doc["continuation"]]
        return [
            Instance("loglikelihood", doc, (ctx, joint(ctx, answer) + answer), number, kwargs["metadata"])
            for number, answer in enumerate(answers)
        ]
