"""Every engine computes the same whole, token by token, and for several sequences at once."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from penjing.engines import ENGINES, LoadRequest, Sampling
from penjing.engines.base import SteppingModel, choose

BuildTiny = Callable[..., Path]
Opened = tuple[SteppingModel, Callable[[np.ndarray], np.ndarray]]


def _transformers(tiny_model: BuildTiny, folder: Path) -> Opened:
    directory = tiny_model("qwen3")
    return _load("transformers", directory), _reference(directory)


def _llamacpp(tiny_model: BuildTiny, folder: Path) -> Opened:
    pytest.importorskip("llama_cpp")
    from tiny_engines import write_gguf

    directory = tiny_model("qwen3")
    return _load("llamacpp", write_gguf(directory, folder / "tiny.gguf")), _reference(directory)


def _onnxruntime(tiny_model: BuildTiny, folder: Path) -> Opened:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    from tiny_engines import write_onnx

    table, head = write_onnx(folder / "model.onnx")
    return _load("onnxruntime", folder), lambda tokens: table[tokens].cumsum(1) @ head


def _load(engine: str, path: Path) -> SteppingModel:
    loaded = ENGINES[engine].load(LoadRequest(path, "auto", 1, 64, 2))
    assert isinstance(loaded, SteppingModel)
    return loaded


def _reference(directory: Path) -> Callable[[np.ndarray], np.ndarray]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()

    def logits(tokens: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return model(input_ids=torch.from_numpy(tokens), use_cache=False).logits.numpy()

    return logits


@pytest.fixture(params=[_transformers, _llamacpp, _onnxruntime], ids=["transformers", "llamacpp", "onnxruntime"])
def opened(request: pytest.FixtureRequest, tiny_model: BuildTiny, tmp_path: Path) -> Iterator[Opened]:
    model, reference = request.param(tiny_model, tmp_path)
    yield model, reference
    model.close()


def _tokens(model: SteppingModel, windows: int, length: int) -> np.ndarray:
    return np.random.default_rng(1).integers(3, model.vocabulary, (windows, length), dtype=np.int64)


def _same(found: np.ndarray, expected: np.ndarray) -> None:
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-2 * np.abs(expected).max())  # llama.cpp's cache is fp16


def test_logits_of_windows(opened: Opened) -> None:
    model, reference = opened
    tokens = _tokens(model, 2, 9)
    _same(model.logits(tokens), reference(tokens))


def test_token_by_token_is_all_at_once(opened: Opened) -> None:
    model, reference = opened
    tokens = _tokens(model, 2, 9)
    expected = reference(tokens)
    session = model.begin(tokens[:, :5])
    _same(session.logits, expected[:, 4])
    for place in range(5, 9):
        session.step(tokens[:, place])
        _same(session.logits, expected[:, place])


def test_a_new_session_knows_nothing_of_the_last(opened: Opened) -> None:
    model, reference = opened
    tokens = _tokens(model, 1, 6)
    model.begin(tokens[:, ::-1].copy())
    _same(model.begin(tokens).logits, reference(tokens)[:, -1])


def test_greedy_answer_and_stop_token(opened: Opened) -> None:
    model, reference = opened
    sequence = _tokens(model, 1, 4).tolist()
    answer = list(model.generate(sequence[0], Sampling(tokens=6)))
    for token in answer:
        assert token == int(reference(np.array(sequence))[0, -1].argmax())
        sequence[0].append(token)
    stopped = list(model.generate(sequence[0][:4], Sampling(tokens=6, stop=(answer[-1],))))
    assert stopped == answer[: answer.index(answer[-1])]


def test_times_are_positive(opened: Opened) -> None:
    model, _ = opened
    timing = model.time(_tokens(model, 2, 8), 2)
    assert timing.prefill > 0
    assert timing.step > 0


def test_bytes_per_token_leave_out_an_untied_embedding(tiny_model: BuildTiny) -> None:
    sizes = {}
    for tied in (True, False):
        loaded = ENGINES["transformers"].load(LoadRequest(tiny_model("qwen3", tied=tied)))
        sizes[tied] = loaded.read_per_token
    assert sizes[True] == sizes[False]


def test_sampling_stays_within_the_mass_and_follows_the_seed() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], dtype=np.float32))
    draw = np.random.default_rng(0)
    seen = [choose(logits, Sampling(temperature=1.0, top_p=0.7), draw) for _ in range(400)]
    assert set(seen) == {0, 1}
    assert 0.5 < seen.count(0) / len(seen) < 0.75
    assert choose(logits, Sampling(), draw) == 0
