"""What a model computes when it reads its past through a quantised key-value cache, streamed block by block.

Windows go through a block in chunks, and the block's own layer of the cache stands between them, as it does when a
model generates. A chunk is a group of tokens long, and attends to itself at full precision: keys are then read exactly
as in decoding token by token (they are coded a residual at a time, and chunks divide the residual), and a query sees
the newest `residual` to `residual + group_size - 1` values at full precision, where decoding sees `residual`.

How the model calls its blocks for each chunk is recorded beforehand with a cache that has lengths and no contents.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from penjing.costs import BATCH_TOKENS
from penjing.evaluation.windows import Protocol
from penjing.methods.quantization.kivi import KVCache
from penjing.pipeline import measure
from penjing.pipeline.measure import Candidate
from penjing.pipeline.stream import BlockCall, StreamedModel, run_call
from penjing.runtime.memory import NOTHING, CacheMemory

_CACHED_TOKENS = 8 * BATCH_TOKENS
"""Tokens whose keys and values are held, and decoded, at one time; a chunk of every window runs together."""


def run(
    stream: StreamedModel,
    tokens: Tensor,
    settings: KVCache | None,
    dtype: torch.dtype,
    on_block: Callable[[int], None] | None = None,
) -> tuple[Candidate, CacheMemory | None]:
    """All windows (S, T) through all blocks in fp32, and what the cache holds after one window.

    Scales and minima are rounded to `dtype`, in which the model is used, and bytes are counted in it. Without settings
    nothing is cached.
    """
    if settings is None:
        return measure.run(stream, tokens, on_block), None
    from penjing.runtime.kv_cache import QuantizedCache

    states = stream.embed(tokens, torch.float32)
    chunks = tokens[:1].split(settings.group_size, 1)
    calls, recorded_with = _calls(stream, chunks)
    held = NOTHING
    for index in range(stream.layout.blocks):
        with torch.no_grad(), stream.block(index, torch.float32) as block:
            for batch in states.split(max(1, _CACHED_TOKENS // tokens.shape[1])):
                cache = QuantizedCache(stream.model.config, **settings.model_dump(), scale_dtype=dtype)
                for piece, call in zip(batch.split(settings.group_size, 1), calls, strict=True):
                    piece.copy_(run_call(block, _with(call[index], recorded_with, cache), piece, {}))
        cache.batch_select_indices(torch.tensor([0]))
        held += cache.memory(dtype)
        if on_block:
            on_block(index)
    return Candidate(stream, states), held


def model_dtype(config: Mapping[str, Any]) -> torch.dtype:
    """The dtype in which a model's config says it is used, and so the dtype of its cache; fp32 when it does not say."""
    name = str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")
    dtype = getattr(torch, name, None)
    return dtype if isinstance(dtype, torch.dtype) and dtype.is_floating_point else torch.float32


def require_cacheable(config: Mapping[str, Any], settings: KVCache | None, *, trust_remote_code: bool) -> None:
    """Raise PlanError when the layers of a model hold something that such a cache cannot."""
    if settings is not None:
        from penjing.models.build import build_meta
        from penjing.runtime.kv_cache import QuantizedCache

        QuantizedCache(build_meta(config, trust_remote_code=trust_remote_code).config, **settings.model_dump())


def describe(protocol: Protocol, settings: KVCache | None) -> Protocol:
    """The protocol of windows that were read through the cache, if there is one."""
    if settings is None:
        return protocol
    return replace(protocol, kv_cache=f"{settings.label}, chunks of {settings.group_size} tokens")


def _calls(stream: StreamedModel, chunks: tuple[Tensor, ...]) -> tuple[list[list[BlockCall]], Any]:
    """For each chunk, how every block is called, and the stand-in for the cache that those calls name."""
    from transformers import DynamicCache

    lengths = DynamicCache(config=stream.model.config)
    calls = []
    for chunk, call in zip(
        chunks, stream.calls(chunks, torch.float32, past_key_values=lengths, use_cache=True), strict=True
    ):
        calls.append(call)
        nothing = torch.empty(1, 1, chunk.shape[1], 1, device="meta")
        for layer in lengths.layers:
            layer.update(nothing, nothing)
    return calls, lengths


def _with(call: BlockCall, stand_in: Any, cache: Any) -> BlockCall:
    """The call with the cache where the stand-in was."""

    def put(value: Any) -> Any:
        return cache if value is stand_in else value

    kwargs: Mapping[str, Any] = {key: put(value) for key, value in call.kwargs.items()}
    return BlockCall(tuple(map(put, call.args)), kwargs)
