"""Windows, fingerprints and the protocol sentence."""

from __future__ import annotations

import hashlib
import itertools
import json

import pytest
import torch

from penjing.errors import CalibrationError, CheckpointError
from penjing.evaluation.text import Documents
from penjing.evaluation.windows import (
    data_fingerprint,
    describe,
    evaluation_windows,
    leading_token,
    load_tokenizer,
    render_chats,
    token_windows,
)

TEXT = Documents("a text", ("abcdefghij" * 10, "0123456789" * 10))  # 202 bytes when joined


def test_evaluation_takes_all_windows_from_the_start_and_drops_the_tail(tokenizers):
    tokenizer = tokenizers.Byte(bos=1)
    windows = evaluation_windows(TEXT, tokenizer, windows=None, length=25)
    assert windows.shape == (8, 25) and windows.dtype == torch.int64
    assert bytes(windows.flatten().tolist()).decode() == TEXT.joined()[:200]
    assert tokenizer.calls == 1
    assert torch.equal(evaluation_windows(TEXT, tokenizer, windows=3, length=25), windows[:3])


def test_bos_is_put_first_and_no_text_is_lost(tokenizers):
    windows = evaluation_windows(TEXT, tokenizers.Byte(), windows=None, length=21, bos=1)
    assert windows.shape == (10, 21) and (windows[:, 0] == 1).all()
    assert bytes(windows[:, 1:].flatten().tolist()).decode() == TEXT.joined()[:200]


def test_calibration_windows_do_not_overlap(tokenizers):
    text = Documents("numbers", ("".join(chr(33 + index % 90) + chr(33 + index // 90) for index in range(2000)),))
    ids = torch.tensor(list(text.joined().encode()))
    windows = token_windows(text, tokenizers.Byte(), samples=30, length=100, seed=3)
    assert windows.shape == (30, 100)
    starts = [int((ids.unfold(0, 100, 1) == window).all(1).nonzero()[0]) for window in windows]
    assert all(later - earlier >= 100 for earlier, later in itertools.pairwise(starts))


def test_calibration_depends_on_the_seed_and_on_nothing_else(tokenizers):
    def cut(seed):
        return token_windows(TEXT, tokenizers.Byte(), samples=4, length=20, seed=seed)

    torch.manual_seed(0)
    first = cut(7)
    torch.manual_seed(1)
    assert torch.equal(first, cut(7))
    assert any(not torch.equal(first, cut(seed)) for seed in range(8, 12))


def test_exact_fit_and_one_token_short(tokenizers):
    text = Documents("exact", ("x" * 40,))
    assert token_windows(text, tokenizers.Byte(), samples=4, length=10).shape == (4, 10)
    text = Documents("short", ("x" * 39,))
    message = "short: 39 tokens found, 40 needed for 4 windows of 10. What fits: 3 windows of 10, or 4 windows of 9"
    with pytest.raises(CalibrationError, match=message):
        token_windows(text, tokenizers.Byte(), samples=4, length=10)
    with pytest.raises(CalibrationError, match=message):
        evaluation_windows(text, tokenizers.Byte(), windows=4, length=10)


def test_nothing_fits(tokenizers):
    with pytest.raises(CalibrationError, match=r"tiny: 1 tokens found, 50 needed.*Give a longer text"):
        evaluation_windows(Documents("tiny", ("x",)), tokenizers.Byte(), windows=5, length=10)
    with pytest.raises(CalibrationError, match="tiny: 1 tokens found"):
        evaluation_windows(Documents("tiny", ("x",)), tokenizers.Byte(), windows=None, length=10)


def test_unicode_survives(tokenizers):
    text = Documents("unicode", ("盆景 🌱 zażółć " * 5,))
    windows = evaluation_windows(text, tokenizers.Byte(), windows=None, length=2)
    assert bytes(windows.flatten().tolist()).decode(errors="ignore").startswith("盆景 🌱")


def test_fingerprint_is_sha256_of_text_and_tokens(tokenizers):
    windows = evaluation_windows(TEXT, tokenizers.Byte(), windows=2, length=10)
    found = data_fingerprint(TEXT, windows)
    assert found.text == hashlib.sha256(TEXT.joined().encode()).hexdigest()
    raw = b"".join(token.to_bytes(8, "little") for token in windows.flatten().tolist())
    assert found.tokens == hashlib.sha256(raw).hexdigest()


def test_protocol_says_what_makes_numbers_comparable(tokenizers):
    windows = evaluation_windows(TEXT, tokenizers.Byte(), windows=2, length=10, bos=1)
    protocol = describe(TEXT, windows, bos=1, dtype="bfloat16")
    assert protocol.scored == 18 and protocol.stride == 9
    sentence = protocol.sentence()
    for words in (
        "a text",
        protocol.text_hash[:8],
        "blank line",
        "2 windows of 10",
        "stride 9",
        "BOS token 1",
        "bfloat16",
    ):
        assert words in sentence
    assert "no BOS token" in describe(TEXT, windows).sentence()


def test_leading_token(tokenizers):
    assert leading_token(tokenizers.Byte(bos=2)) == 2
    assert leading_token(tokenizers.Byte()) is None


def test_chats_are_rendered_with_the_models_template(tokenizers):
    chat = ({"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"})
    documents = Documents("chats", (), (chat, chat))
    assert render_chats(documents, tokenizers.Chat()).texts == ("<user>Hi<assistant>Yo",) * 2
    with pytest.raises(CalibrationError, match="has no chat template"):
        render_chats(documents, tokenizers.Byte())
    with pytest.raises(CalibrationError, match="no record holds messages"):
        render_chats(TEXT, tokenizers.Chat())
    refused = Documents("chats", (), (chat, ({"role": "system", "content": ""},)))
    with pytest.raises(CalibrationError, match=r"conversation 2 .* system role not supported"):
        render_chats(refused, tokenizers.Chat())


def test_a_tokenizer_that_cannot_encode():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    broken = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="<unk>")))
    with pytest.raises(CheckpointError, match="tokenizer cannot encode prose"):
        evaluation_windows(Documents("prose", ("b",)), broken, windows=1, length=4)


def test_a_directory_without_a_tokenizer(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CalibrationError, match="no tokenizer that transformers can load"):
        load_tokenizer(tmp_path)
    with pytest.raises(CalibrationError, match=r"^the model: [^\n]*beside config.json[^\n]*$") as told:
        load_tokenizer([("config.json", b"{}")])
    assert "penjing-tokenizer" not in str(told.value)


def test_fast_tokenizer_from_files(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"?": 0, "one": 1, "two": 2}, unk_token="?"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    files = [
        ("tokenizer.json", words.to_str().encode()),
        ("tokenizer_config.json", json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}).encode()),
    ]
    windows = evaluation_windows(
        Documents("words", ("one two", "two six")), load_tokenizer(files), windows=None, length=2
    )
    assert windows.tolist() == [[1, 2], [2, 0]]
