"""What a quantised key-value cache costs and saves, on the demo model.

    python benchmarks/kv_cache.py --data wiki.test.raw --output benchmarks/results/kv_cache.json

Quality: windows are fed through the cache in chunks, and compared with the same model and a full cache. Speed: tokens
are generated greedily after a prompt of one window, the caches taking turns; the prompt's own time is left out.
`--settings 2 4 4/64/64` names what to try as bits, or bits/group/residual; `--parts speed` leaves the other part of an
existing file as it is.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from penjing.checkpoint import open_checkpoint, write_bytes
from penjing.evaluation.report import Software
from penjing.methods.quantization.kivi import KVCache
from penjing.models import Layout, build_model, fill, find, layout_of
from penjing.pipeline import decoding, measure
from penjing.pipeline.stream import StreamedModel
from penjing.pipeline.text import TextSource
from penjing.pipeline.weights import ModuleSource, Weights
from penjing.runtime.kv_cache import QuantizedCache

ROUNDS = 3


def main() -> None:
    """Parse, measure quality, measure speed, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="builtin")
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--generate", type=int, default=16, help="tokens generated in each round")
    parser.add_argument("--settings", nargs="+", default=["8", "4", "3", "2"])
    parser.add_argument("--parts", nargs="+", default=["quality", "speed"], choices=["quality", "speed"])
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    tried = [settings(words) for words in options.settings]
    checkpoint = open_checkpoint("demo")
    layout = layout_of(checkpoint.config, checkpoint.specs())
    source = Weights(checkpoint, layout).live
    text = TextSource(checkpoint).evaluation(options.data, options.windows, options.length)
    result: dict[str, Any] = json.loads(options.output.read_text()) if options.output.is_file() else {}
    result |= {"software": asdict(Software.here()), "model": checkpoint.label}
    if "quality" in options.parts:
        stream = StreamedModel(checkpoint.config, layout, source)
        result["quality"] = quality(stream, text.tokens, checkpoint.config, tried)
        result["quality protocol"] = text.protocol.sentence()
    if "speed" in options.parts:
        model = whole_model(checkpoint.config, layout, source)
        result["speed"] = speed(model, text.tokens[:1], options.generate, tried)
        result["speed protocol"] = (
            f"float32, one sequence, {options.generate} tokens after a prompt of {options.length}, greedy, "
            f"median of {ROUNDS} rounds in turn, {torch.get_num_threads()} threads"
        )
    write_bytes(options.output, (json.dumps(result, indent=1) + "\n").encode())
    print(json.dumps(result, indent=1))


def settings(words: str) -> KVCache:
    """`4` or `4/64/128`: bits, group, residual."""
    given = [int(word) for word in words.split("/")]
    return KVCache.of(**dict(zip(("bits", "group_size", "residual"), given, strict=False)))


def quality(
    stream: StreamedModel, tokens: torch.Tensor, config: Any, tried: list[KVCache]
) -> dict[str, dict[str, Any]]:
    """Perplexity, KL and agreement of each cache, and what it holds after one window."""
    reference = measure.run(stream, tokens)
    rows: dict[str, dict[str, Any]] = {}
    for cache in tried:
        candidate, held = decoding.run(stream, tokens, cache, decoding.model_dtype(config))
        assert held is not None
        rows[cache.label] = asdict(measure.compare(candidate, tokens, reference).result()) | {"memory": asdict(held)}
    return rows


def whole_model(config: Any, layout: Layout, source: ModuleSource) -> Any:
    """The model with all its weights, in fp32."""
    model = build_model(config, layout)
    for module in layout.modules:
        if module.tensors:
            fill(find(model, module.name), source(module, torch.float32).tensors)
    return model


def speed(model: Any, prompt: torch.Tensor, count: int, tried: list[KVCache]) -> dict[str, dict[str, float]]:
    """Seconds a generated token takes with each cache, and the full cache's over it."""
    caches: dict[str, KVCache | None] = {"full": None, **{cache.label: cache for cache in tried}}
    seconds: dict[str, list[float]] = {name: [] for name in caches}
    for _ in range(ROUNDS):
        for name, cache in caches.items():
            seconds[name].append(timed(model, prompt, count, cache) / count)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    return {name: {"seconds": value, "speed over full": median["full"] / value} for name, value in median.items()}


@torch.no_grad()
def timed(model: Any, prompt: torch.Tensor, count: int, cache: KVCache | None) -> float:
    """Seconds that `count` tokens take after the prompt."""
    from transformers import DynamicCache

    held = DynamicCache(config=model.config) if cache is None else QuantizedCache(model.config, **cache.model_dump())
    token = model(prompt, past_key_values=held, use_cache=True, logits_to_keep=1).logits.argmax(-1)
    start = time.perf_counter()
    for _ in range(count):
        token = model(token, past_key_values=held, use_cache=True).logits.argmax(-1)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
