"""Tokens per second of written ONNX models beside the dense model in transformers, in turns, on one machine.

    python benchmarks/onnx_decode.py demo build/onnx-int4 build/onnx-int8 [--threads 2] [--rounds 5] [--cpu]

On a machine that does other things, `--cpu` counts the seconds that the process had a processor, with one thread.

Prefill reads 512 tokens and computes the logits of the last one; decode appends 32 tokens one by one after 64. Every
round runs all models; the medians and the ratio to the dense model of the same round are printed.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from penjing.checkpoint import open_checkpoint
from penjing.formats.onnx import GRAPH, session

PROMPT, LONG, STEPS = 64, 512, 32
_CLOCK: list[Callable[[], float]] = [time.perf_counter]


def onnx_model(directory: Path, threads: int) -> Callable[[np.ndarray, int], tuple[float, float]]:
    """Seconds of a prefill and per step of decoding."""
    import onnxruntime

    opened = session.open_graph(directory / GRAPH, threads=threads)
    names = [output.name for output in opened.get_outputs()]
    value = onnxruntime.OrtValue.ortvalue_from_numpy

    def step(ids: np.ndarray, cache: dict[str, Any], length: int) -> tuple[np.ndarray, dict[str, Any]]:
        given = {
            "input_ids": value(ids),
            "attention_mask": value(np.ones((1, length + ids.shape[1]), dtype=np.int64)),
            "num_logits_to_keep": value(np.ones(1, dtype=np.int64)),
        }
        found = opened.run_with_ort_values(names, given | cache)
        past = {name.replace("present", "past_key_values"): one for name, one in zip(names[1:], found[1:], strict=True)}
        return found[0].numpy()[:, -1], past

    def run(ids: np.ndarray, steps: int) -> tuple[float, float]:
        start = _CLOCK[0]()
        logits, cache = step(ids, {name: value(array) for name, array in session.empty_cache(opened, 1).items()}, 0)
        read = _CLOCK[0]()
        for done in range(steps):
            logits, cache = step(logits.argmax(-1, keepdims=True), cache, ids.shape[1] + done)
        return read - start, (_CLOCK[0]() - read) / max(steps, 1)

    return run


def dense_model(source: str) -> Callable[[np.ndarray, int], tuple[float, float]]:
    """The same in transformers, fp32."""
    from transformers import AutoModelForCausalLM

    path = open_checkpoint(source).path
    where = (str(path.parent), {"gguf_file": path.name}) if path.suffix == ".gguf" else (str(path), {})
    model = AutoModelForCausalLM.from_pretrained(where[0], dtype=torch.float32, **where[1]).eval()

    @torch.no_grad()
    def run(ids: np.ndarray, steps: int) -> tuple[float, float]:
        start = _CLOCK[0]()
        found = model(torch.from_numpy(ids), use_cache=True, logits_to_keep=1)
        read = _CLOCK[0]()
        for _ in range(steps):
            following = found.logits[:, -1].argmax(-1, keepdim=True)
            found = model(following, past_key_values=found.past_key_values, use_cache=True)
        return read - start, (_CLOCK[0]() - read) / max(steps, 1)

    return run


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dense")
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cpu", action="store_true", help="count processor seconds, with one thread")
    given = parser.parse_args()
    if given.cpu:
        given.threads, _CLOCK[0] = 1, time.process_time
    torch.set_num_threads(given.threads)
    runs = {"dense": dense_model(given.dense)} | {path.name: onnx_model(path, given.threads) for path in given.models}
    tokens = np.random.default_rng(0).integers(100, 40000, (1, LONG))
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for round_ in range(-1, given.rounds):
        for name, run in runs.items():  # the first round warms up
            prefill, decode = run(tokens, 0)[0], run(tokens[:, :PROMPT], STEPS)[1]
            if round_ >= 0:
                seconds[name].append((prefill, decode))
    print(f"{'':24}{'prefill tok/s':>14}{'x dense':>9}{'decode tok/s':>14}{'x dense':>9}")
    for name, measured in seconds.items():
        line = f"{name:24}"
        for which, count in ((0, LONG), (1, 1)):
            speed = count / statistics.median(times[which] for times in measured)
            ratios = [dense[which] / one[which] for dense, one in zip(seconds["dense"], measured, strict=True)]
            line += f"{speed:14.1f}{statistics.median(ratios):9.2f}"
        print(line)


if __name__ == "__main__":
    main()
