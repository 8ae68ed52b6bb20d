"""vLLM, through its public `LLM` class. Needs the hardware that vLLM needs.

vLLM schedules on its own and cannot be driven token by token: prefill is timed as the answer of one token, decode as
what longer answers take beyond that. Logits come as log-probabilities, which differ from them by a constant.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from penjing.checkpoint.directory import read_config
from penjing.engines.base import LoadedModel, LoadRequest, Sampling, Timing
from penjing.errors import EngineError

if TYPE_CHECKING:
    import numpy as np


class VLLM:
    """Model directories: dense, compressed-tensors, bitsandbytes."""

    name = "vllm"
    summary = "vLLM; dense and compressed-tensors directories"
    install = "pip install vllm"
    formats = frozenset({"dense", "compressed-tensors", "bitsandbytes", "gptq", "gptq-v2", "awq"})
    tolerance = 0.01  # bfloat16 arithmetic

    def version(self) -> str | None:
        """Of vllm."""
        try:
            return metadata.version("vllm")
        except metadata.PackageNotFoundError:
            return None

    def refusal(self, path: Path) -> str | None:
        """Files, and Penjing's own format."""
        if not path.is_dir() or not any(path.glob("*.safetensors")):
            return f"vLLM loads directories of safetensors; {path} is none"
        declared = read_config(path, trust_remote_code=True).get("quantization_config") or {}
        if declared.get("quant_method") == "penjing":
            return f"vLLM does not know the native format: `penjing export {path} --to compressed-tensors -o OUT`"
        return None

    def load(self, request: LoadRequest) -> LoadedModel:
        """An `LLM` with as much memory as vLLM takes by default."""
        return VLLMModel(request)


class VLLMModel(LoadedModel):
    """An `LLM`."""

    read_per_token = None

    def __init__(self, request: LoadRequest) -> None:
        import vllm

        self._vllm = vllm
        try:
            self._llm: Any = vllm.LLM(
                model=str(request.path),
                dtype=request.dtype,
                max_model_len=request.context,
                max_num_seqs=request.batch,
                max_logprobs=-1,
                enable_prefix_caching=False,
                trust_remote_code=request.trust_remote_code,
            )
        except Exception as error:  # engine processes fail in many ways
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise EngineError(f"{request.path}: vLLM cannot load it: {reason}") from error
        self.vocabulary = self._llm.get_tokenizer().vocab_size

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        """Log-probabilities of every token at every position."""
        import numpy as np

        wanted = self._vllm.SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=-1, logprobs=-1)
        windows = []
        for answer in self._llm.generate(_prompts(tokens), wanted, use_tqdm=False):
            rows = [*answer.prompt_logprobs[1:], answer.outputs[0].logprobs[0]]
            self.vocabulary = max(self.vocabulary, *(max(row) + 1 for row in rows))
            window = np.full((len(rows), self.vocabulary), -np.inf, dtype=np.float32)
            for place, row in enumerate(rows):
                window[place, list(row)] = [entry.logprob for entry in row.values()]
            windows.append(window)
        return np.stack(windows)

    def generate(self, prompt: Sequence[int], sampling: Sampling) -> Iterator[int]:
        """All at once: `LLM` does not stream."""
        wanted = self._vllm.SamplingParams(
            max_tokens=sampling.tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            seed=sampling.seed,
            stop_token_ids=list(sampling.stop),
        )
        answer = self._llm.generate([{"prompt_token_ids": list(prompt)}], wanted, use_tqdm=False)[0]
        yield from (token for token in answer.outputs[0].token_ids if token not in sampling.stop)

    def time(self, tokens: np.ndarray, steps: int) -> Timing:
        """See `LoadedModel`."""
        prefill = self._time(tokens, 1)
        return Timing(prefill, (self._time(tokens, steps + 1) - prefill) / steps)

    def _time(self, tokens: np.ndarray, count: int) -> float:
        wanted = self._vllm.SamplingParams(max_tokens=count, min_tokens=count, temperature=0, ignore_eos=True)
        started = time.perf_counter()
        self._llm.generate(_prompts(tokens), wanted, use_tqdm=False)
        return time.perf_counter() - started


def _prompts(tokens: np.ndarray) -> list[dict[str, list[int]]]:
    return [{"prompt_token_ids": window.tolist()} for window in tokens]
