"""From documents to token windows, and the sentence that must stand beside every number measured on them.

Documents are joined with a blank line and tokenised once, as one text, without special tokens. Calibration takes
windows spread at random over it; evaluation takes windows from its start, one after the other, as GPTQ's and most
papers' perplexity does (stride = length, the tail that fills no window is dropped).
"""

from __future__ import annotations

import hashlib
import random
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from penjing.errors import CalibrationError, CheckpointError
from penjing.evaluation.text import Documents

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Fingerprint:
    """SHA-256 hex digests of the text and of the token windows (int64, little-endian)."""

    text: str
    tokens: str


@dataclass(frozen=True)
class Protocol:
    """How a number was measured: what makes two perplexities comparable.

    corpus     label of the text                    windows  how many
    text_hash  SHA-256 of the joined text           length   tokens in a window
    stride     tokens from one window to the next   scored   tokens predicted in all: windows * (length - 1)
    bos        token id put first in every window, None without
    dtype      of the forward pass                  batch    windows per forward pass
    kv_cache   how the cache that past tokens are read from is quantised, "" for none
    """

    corpus: str
    text_hash: str
    token_hash: str
    windows: int
    length: int
    stride: int
    scored: int
    bos: int | None
    dtype: str
    batch: int = 1
    join: str = "blank line"
    kv_cache: str = ""

    def sentence(self) -> str:
        """One line for tables and pages."""
        bos = "no BOS token" if self.bos is None else f"BOS token {self.bos} first in each"
        cache = f", past read through a quantised KV cache ({self.kv_cache})" if self.kv_cache else ""
        return (
            f"{self.corpus} [sha256 {self.text_hash[:8]}], documents joined with a {self.join}, "
            f"{self.windows} windows of {self.length} tokens, stride {self.stride}, {bos}, "
            f"{self.dtype}, batch {self.batch}{cache}: {self.scored:,} tokens scored"
        )


def describe(
    documents: Documents, windows: Tensor, *, bos: int | None = None, dtype: str = "float32", batch: int = 1
) -> Protocol:
    """The protocol of an evaluation on `windows` (W, L) cut from `documents`."""
    count, length = windows.shape
    fingerprint = data_fingerprint(documents, windows)
    stride = length if bos is None else length - 1
    return Protocol(
        corpus=documents.label,
        text_hash=fingerprint.text,
        token_hash=fingerprint.tokens,
        windows=count,
        length=length,
        stride=stride,
        scored=count * (length - 1),
        bos=bos,
        dtype=dtype,
        batch=batch,
    )


def data_fingerprint(documents: Documents, windows: Tensor) -> Fingerprint:
    """Digests that change when the text, or its tokens, or the choice of windows changes."""
    text = hashlib.sha256(documents.joined().encode("utf-8", "surrogatepass")).hexdigest()
    return Fingerprint(text, token_digest(windows))


def token_digest(windows: Tensor) -> str:
    """SHA-256 hex digest of token windows, as little-endian int64."""
    return hashlib.sha256(windows.contiguous().numpy().astype("<i8").tobytes()).hexdigest()


def load_tokenizer(source: str | Path | Iterable[tuple[str, bytes]]) -> Any:
    """The tokenizer of a model directory, or made from (file name, content) pairs such as `Checkpoint.files()`.

    Raises CalibrationError when there is none. Importing transformers takes seconds; it happens here and not before.
    """
    if not isinstance(source, str | Path):
        with tempfile.TemporaryDirectory(prefix="penjing-tokenizer-") as folder:
            for name, content in source:
                path = Path(folder) / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
            return _tokenizer_in(folder, "the model")
    return _tokenizer_in(str(source), str(source))


def _tokenizer_in(folder: str, owner: str) -> Any:
    """`owner` is whose tokenizer it is, for the error: the folder may be gone when it is read."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, ImportError, KeyError) as error:
        said = " ".join(str(error).replace(folder, owner).split())
        raise CalibrationError(
            f"{owner}: no tokenizer that transformers can load; put its tokenizer files, such as tokenizer.json, "
            f"beside config.json (transformers: {said})"
        ) from error


def leading_token(tokenizer: Any) -> int | None:
    """The BOS token id if this tokenizer puts one before every text by itself (Gemma, Llama), else None."""
    bos = getattr(tokenizer, "bos_token_id", None)
    ids = tokenizer("a")["input_ids"]
    return bos if bos is not None and len(ids) > 1 and ids[0] == bos else None


def render_chats(documents: Documents, tokenizer: Any) -> Documents:
    """Conversations turned into texts by the tokenizer's own chat template; the first text is the one to show.

    Raises CalibrationError when the tokenizer has no template or the template refuses a conversation.
    """
    if not documents.chats:
        raise CalibrationError(f"{documents.label}: `chat_template` is set but no record holds messages")
    if not getattr(tokenizer, "chat_template", None):
        raise CalibrationError("the model's tokenizer has no chat template; drop `chat_template` from the recipe")
    texts = []
    for number, chat in enumerate(documents.chats, 1):
        try:
            texts.append(tokenizer.apply_chat_template([dict(message) for message in chat], tokenize=False))
        except Exception as error:  # a template is a program: it raises what it likes
            raise CalibrationError(
                f"{documents.label}: conversation {number} does not fit the model's chat template: {error}"
            ) from error
    return Documents(documents.label, tuple(texts), (), documents.truncated)


def token_windows(
    documents: Documents, tokenizer: Any, *, samples: int, length: int, seed: int = 0, bos: int | None = None
) -> Tensor:
    """Calibration: `samples` windows of `length` tokens that do not overlap, chosen by `seed`. int64 (samples, length).

    The text is cut into windows from a random offset, and windows are drawn without replacement. With `bos`, that
    token id comes first in each window and counts towards its length. Raises CalibrationError when the text is too
    short, saying what would fit.
    """
    import torch

    tokens = _tokenise(documents, tokenizer)
    body = length if bos is None else length - 1
    slots = len(tokens) // body
    if slots < samples:
        raise CalibrationError(_too_short(documents, len(tokens), samples, length, body))
    generator = random.Random(seed)
    offset = generator.randint(0, len(tokens) - slots * body)
    starts = [offset + body * slot for slot in sorted(generator.sample(range(slots), samples))]
    chosen = torch.stack([tokens[start : start + body] for start in starts])
    return _with_bos(chosen, bos)


def evaluation_windows(
    documents: Documents, tokenizer: Any, *, windows: int | None, length: int, bos: int | None = None
) -> Tensor:
    """Evaluation: the first `windows` windows of `length` tokens, all of them for None. int64 (windows, length).

    Windows follow one another without overlap and the tail is dropped. With `bos`, that token id comes first in each
    window and counts towards its length. Raises CalibrationError when the text is too short.
    """
    tokens = _tokenise(documents, tokenizer)
    body = length if bos is None else length - 1
    count = len(tokens) // body if windows is None else windows
    if count == 0 or len(tokens) < count * body:
        raise CalibrationError(_too_short(documents, len(tokens), max(count, 1), length, body))
    return _with_bos(tokens[: count * body].view(count, body), bos)


def _tokenise(documents: Documents, tokenizer: Any) -> Tensor:
    import torch

    try:
        encoded = tokenizer(documents.joined(), add_special_tokens=False, return_attention_mask=False, verbose=False)
    except Exception as error:  # the tokenizers library raises nothing narrower
        raise CheckpointError(f"the model's tokenizer cannot encode {documents.label}: {error}") from error
    return torch.tensor(encoded["input_ids"], dtype=torch.long)


def _with_bos(windows: Tensor, bos: int | None) -> Tensor:
    import torch

    if bos is None:
        return windows.clone()
    return torch.cat([torch.full((len(windows), 1), bos), windows], 1)


def _too_short(documents: Documents, found: int, samples: int, length: int, body: int) -> str:
    fitting = []
    if found >= body:
        fitting.append(f"{found // body} windows of {length}")
    longest = found // samples + length - body
    if longest >= 2:
        fitting.append(f"{samples} windows of {longest}")
    advice = f"What fits: {', or '.join(fitting)}" if fitting else "Give a longer text"
    needed = f"{samples * body:,} needed for {samples} windows of {length}"
    return f"{documents.label}: {found:,} tokens found, {needed}. {advice}"
