"""llama.cpp inside this process, through llama-cpp-python's bindings of its C interface.

The bindings are used below their `Llama` class: that one reads one sequence at a time and copies every logit it sees.
"""

from __future__ import annotations

import ctypes
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from penjing.checkpoint.gguf_header import read_gguf_header
from penjing.engines.base import LoadedModel, LoadRequest, SteppingModel
from penjing.errors import EngineError

if TYPE_CHECKING:
    import numpy as np

_MICRO_BATCH = 512
"""Tokens that are computed at once, llama.cpp's own default."""

_LOG_ERROR, _LINES = 3, 20


class LlamaCpp:
    """One GGUF file."""

    name = "llamacpp"
    summary = "llama.cpp through llama-cpp-python; GGUF files"
    install = "pip install 'penjing[llamacpp]'"
    formats = frozenset({"gguf"})
    tolerance = 0.02  # inputs of quantised weights are rounded to 8 bits in blocks of 32 or 256

    def version(self) -> str | None:
        """Of llama-cpp-python; the library inside has no other name."""
        try:
            return metadata.version("llama-cpp-python")
        except metadata.PackageNotFoundError:
            return None

    def refusal(self, path: Path) -> str | None:
        """Anything but a GGUF file."""
        return gguf_refusal(path, "llama.cpp")

    def load(self, request: LoadRequest) -> LoadedModel:
        """Map the file. Raises EngineError when llama.cpp does not take it."""
        return LlamaCppModel(request)


def gguf_refusal(path: Path, engine: str) -> str | None:
    """Why `path` is no GGUF file for `engine`."""
    if path.suffix == ".gguf":
        return None
    return f"{engine} loads GGUF files; {path} is none: `penjing export {path} --to gguf -o OUT`"


class LlamaCppModel(SteppingModel):
    """A context of llama.cpp with `request.batch` sequences of `request.context` tokens."""

    def __init__(self, request: LoadRequest) -> None:
        lib = _library()
        self._lib, self._said = lib, _Log(lib)
        header = read_gguf_header(request.path)  # a damaged file may not reach C code
        self._model = lib.llama_model_load_from_file(str(request.path).encode(), lib.llama_model_default_params())
        if not self._model:
            raise EngineError(f"{request.path}: llama.cpp cannot load it: {self._said.reason()}")
        settings = lib.llama_context_default_params()
        settings.n_ctx = request.context * request.batch
        settings.n_seq_max = request.batch
        settings.n_batch = request.context * request.batch
        settings.n_ubatch = min(_MICRO_BATCH, settings.n_batch)
        settings.n_threads = settings.n_threads_batch = request.threads
        settings.kv_unified = False
        settings.offload_kqv = False
        self._context = lib.llama_init_from_model(self._model, settings)
        if not self._context:
            raise EngineError(f"{request.path}: llama.cpp makes no context: {self._said.reason()}")
        self.vocabulary = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self._model))
        self._capacity = request.context * request.batch
        self._batch = lib.llama_batch_init(self._capacity, 0, 1)
        self.read_per_token = gguf_read_per_token(header.keys, {n: t.nbytes for n, t in header.tensors.items()})

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        """One window after the other."""
        import numpy as np

        return np.stack([_LlamaSession(self, window[None], every=True).logits for window in tokens])

    def begin(self, tokens: np.ndarray) -> _LlamaSession:
        """Forget what was read and read prompts (B, T)."""
        return _LlamaSession(self, tokens, every=False)

    def forget(self) -> None:
        """Empty the cache."""
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)

    def decode(self, tokens: np.ndarray, first: int, every: bool) -> np.ndarray:
        """Append (B, T) at position `first`: logits (B, V), or of one sequence (T, V) with `every`."""
        import numpy as np

        count, length = tokens.shape
        if count * length > self._capacity or (first + length) * count > self._capacity:
            raise EngineError(f"{count} x {first + length} tokens do not fit a context of {self._capacity}")
        batch, wanted = self._batch, []
        for place, (sequence, offset) in enumerate(np.ndindex(count, length)):
            batch.token[place] = int(tokens[sequence, offset])
            batch.pos[place] = first + offset
            batch.n_seq_id[place] = 1
            batch.seq_id[place][0] = sequence
            asked = every or offset == length - 1
            batch.logits[place] = asked
            if asked:
                wanted.append(place)
        batch.n_tokens = count * length
        if code := self._lib.llama_decode(self._context, batch):
            raise EngineError(
                f"llama.cpp failed to decode {count} x {length} tokens (code {code}): {self._said.reason()}"
            )
        rows = [self._lib.llama_get_logits_ith(self._context, place) for place in wanted]
        return np.stack([np.ctypeslib.as_array(row, (self.vocabulary,)) for row in rows])

    def close(self) -> None:
        """Free context, batch and model."""
        if self._context:
            self._lib.llama_batch_free(self._batch)
            self._lib.llama_free(self._context)
            self._lib.llama_model_free(self._model)
            self._context = None


class _LlamaSession:
    """Sequences of equal length in the cache."""

    def __init__(self, model: LlamaCppModel, tokens: np.ndarray, every: bool) -> None:
        self._model, self._length = model, tokens.shape[1]
        model.forget()
        self.logits = model.decode(tokens, 0, every)

    def step(self, tokens: np.ndarray) -> None:
        """See `Session`."""
        self.logits = self._model.decode(tokens[:, None], self._length, every=False)
        self._length += 1


class _Log:
    """What llama.cpp says, kept instead of printed."""

    def __init__(self, lib: Any) -> None:
        self._lines: list[str] = []

        def note(level: int, text: bytes, _: object) -> None:
            if level == _LOG_ERROR and len(self._lines) < _LINES:
                self._lines.append(text.decode("utf-8", "replace").strip())

        self._callback = lib.llama_log_callback(note)
        lib.llama_log_set(self._callback, ctypes.c_void_p(0))

    def reason(self) -> str:
        """The first error, which is the cause; later ones say that loading failed."""
        return next(iter(self._lines), "it does not say why")


def gguf_read_per_token(keys: dict[str, Any], sizes: dict[str, int]) -> int | None:
    """Bytes of a GGUF file's tensors that every decoded token reads: a separate input embedding is only looked up."""
    if any(key.endswith(".expert_count") for key in keys):
        return None
    untied = "output.weight" in sizes
    return sum(size for name, size in sizes.items() if not (untied and name == "token_embd.weight"))


@cache
def _library() -> Any:
    """The bindings, with the backend started once."""
    from llama_cpp import llama_cpp

    llama_cpp.llama_backend_init()
    return llama_cpp
