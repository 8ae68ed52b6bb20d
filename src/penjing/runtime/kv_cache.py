"""A key-value cache for transformers that keeps past tokens in 2, 3, 4 or 8 bits (KIVI, arXiv:2402.02750).

    cache = penjing.QuantizedCache(model.config, bits=4)
    model.generate(**inputs, past_key_values=cache)
    cache.memory()

A forward pass attends to the tokens it brings at full precision (so a prompt is read exactly), to the newest tokens
before them at full precision, and to all others as their codes decode. Only then are tokens coded, so what is held
after n tokens does not depend on how they came in.

Layers with a sliding window are coded as well, and forget whole groups that left the window; where the window is no
longer than the residual there is nothing to code, and the layer is transformers' own. Padding tokens lie in groups like
any other token. Layers that hold something else than keys and values (state-space layers) are refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import (
    DYNAMIC_LAYER_TYPE_MAPPING,
    Cache,
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    get_layer_types_and_kwargs,
)

from penjing.errors import PlanError
from penjing.methods.quantization.kivi import (
    CONFIG_KEY,
    KVCache,
    Packed,
    dequantise_keys,
    dequantise_values,
    packed_width,
    quantise_keys,
    quantise_values,
)
from penjing.runtime.memory import NOTHING, CacheMemory


class _Half:
    """The keys, or the values, of one layer: coded tokens and then `recent` ones (B, H, t, D) as they came."""

    def __init__(self, settings: KVCache, like: Tensor, scale_dtype: torch.dtype | None, *, keys: bool) -> None:
        self.settings, self.keys = settings, keys
        self.channels = like.shape[-1]
        self.scale_dtype = scale_dtype or like.dtype
        self.recent = like[..., :0, :].clone()
        self.packed: Packed | None = None

    @property
    def per_scale(self) -> int:
        """Tokens that share a scale: what is cut off the coded part goes in multiples of it."""
        return self.settings.group_size if self.keys else 1

    @property
    def coded(self) -> int:
        """Number of coded tokens."""
        return 0 if self.packed is None else self.packed.codes.shape[-2]

    @property
    def tokens(self) -> int:
        """Number of tokens held."""
        return self.coded + self.recent.shape[-2]

    def decoded(self, newer: Tensor) -> Tensor:
        """All tokens and then the newer ones (B, H, t, D) at full precision, the coded ones as they decode."""
        coded = [] if self.packed is None else [self._decode(self.packed)]
        return torch.cat([*coded, self.recent, newer], -2)

    def settle(self) -> None:
        """Code what is no longer recent: keys once a residual's worth has gathered, values beyond the residual."""
        held, residual = self.recent.shape[-2], self.settings.residual
        ready = held // residual * residual if self.keys else held - residual
        if ready > 0:
            quantise = quantise_keys if self.keys else quantise_values
            old = self.recent[..., :ready, :]
            newer = quantise(old, self.settings.bits, self.settings.group_size, self.scale_dtype)
            self.packed = newer if self.packed is None else self.packed.joined(newer)
            self.recent = self.recent[..., ready:, :].clone()  # a view would keep the coded tokens alive

    def forget(self, needed: int) -> None:
        """Drop the oldest coded tokens, in whole groups, as long as `needed` tokens are left."""
        gone = min(max(self.tokens - needed, 0) // self.per_scale * self.per_scale, self.coded)
        if gone and self.packed is not None:
            kept = self.coded - gone
            self.packed = self.packed.tokens(gone, self.coded, self.per_scale) if kept else None

    def crop(self, count: int) -> None:
        """Drop the newest `count` tokens; what is left of a coded group that was cut is recent again, as decoded."""
        beyond = count - self.recent.shape[-2]
        self.recent = self.recent[..., : max(-beyond, 0), :].clone()
        if beyond <= 0 or self.packed is None:
            return
        left = self.coded - beyond
        whole = left // self.per_scale * self.per_scale
        if whole < left:
            cut = self.packed.tokens(whole, whole + self.per_scale, self.per_scale)
            self.recent = self._decode(cut)[..., : left - whole, :].clone()
        self.packed = self.packed.tokens(0, whole, self.per_scale) if whole else None

    def each(self, change: Callable[[Tensor], Tensor]) -> None:
        """Replace every tensor by what `change` makes of it."""
        self.recent = change(self.recent)
        if self.packed is not None:
            self.packed = Packed(*map(change, self.packed.tensors))

    def memory(self, seen: int, kept: int, dtype: torch.dtype | None) -> CacheMemory:
        """Bytes held after `seen` tokens, of which a full cache would keep `kept`; full precision is `dtype`."""
        size = (dtype or self.recent.dtype).itemsize
        rows = self.recent.shape[0] * self.recent.shape[1]
        groups = self.channels / self.per_scale if self.keys else -(-self.channels // self.settings.group_size)
        codes = packed_width(self.channels, self.settings.bits)
        return CacheMemory(
            tokens=seen,
            bytes=self.recent.numel() * size
            + sum(part.nbytes for part in (self.packed.tensors if self.packed else ())),
            full_bytes=rows * self.channels * size * kept,
            token_bytes=rows * (codes + 2 * groups * self.scale_dtype.itemsize),
            full_token_bytes=rows * self.channels * size,
        )

    def _decode(self, packed: Packed) -> Tensor:
        bits, dtype = self.settings.bits, self.recent.dtype
        if self.keys:
            return dequantise_keys(packed, bits, self.channels, dtype)
        return dequantise_values(packed, bits, self.channels, dtype, self.settings.group_size)


class QuantizedLayer(CacheLayerMixin):
    """One attention layer's keys and values; states are (B, H, t, D), keys and values may differ in D.

    window  tokens that a query of a sliding layer sees, itself included; None: all
    """

    is_compileable = False
    is_croppable = True
    is_sliding = False

    def __init__(self, settings: KVCache, scale_dtype: torch.dtype | None = None, window: int | None = None) -> None:
        super().__init__()
        self.settings, self.scale_dtype = settings, scale_dtype
        self.sliding_window = window
        self.is_sliding = window is not None
        self.cumulative_length = 0
        self.record_past = False
        self._halves: tuple[_Half, ...] = ()

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Learn dtype, device and widths from the first states."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self._halves = (
            _Half(self.settings, key_states, self.scale_dtype, keys=True),
            _Half(self.settings, value_states, self.scale_dtype, keys=False),
        )
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take in t new tokens; returns what their queries attend to: the past as it decodes, the new ones as given."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        seen = []
        for half, states in zip(self._halves, (key_states, value_states), strict=True):
            visible = self.get_mask_sizes(states.shape[-2])[0]
            seen.append(half.decoded(states)[..., -visible:, :])
            half.recent = torch.cat([half.recent, states], -2)
        self.cumulative_length += key_states.shape[-2]
        if not self.record_past:
            self._settle()
        return seen[0], seen[1]

    def _settle(self) -> None:
        for half in self._halves:
            half.settle()
            if self.sliding_window is not None:
                half.forget(self.sliding_window - 1)

    def get_seq_length(self) -> int:
        """Tokens seen so far."""
        return self.cumulative_length

    def get_max_length(self) -> int:
        """The window of a sliding layer; -1: no limit."""
        return -1 if self.sliding_window is None else self.sliding_window

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(tokens that `update` will return for `query_length` new ones, position of the first of them)."""
        past = self.cumulative_length
        if self.sliding_window is not None:
            past = min(past, self.sliding_window - 1)
        return past + query_length, self.cumulative_length - past

    def activate_past_recording(self) -> None:
        """Code nothing before the next `crop`, so that a guess that turned out wrong is taken back without a trace."""
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the newest tokens, given as a negative number. Tokens that shared a scale with them stay as they decode.

        Raises ValueError for a positive number, and when a window has forgotten what would be needed again.
        """
        count = -tokens_to_remove
        if count < 0:
            raise ValueError(f"crop takes minus the number of tokens to remove, not {tokens_to_remove}")
        forgot = self.sliding_window is not None and self.cumulative_length >= self.sliding_window
        if count and forgot and not self.record_past:
            raise ValueError("a sliding layer past its window cannot be cropped without `activate_past_recording`")
        self.cumulative_length -= min(count, self.cumulative_length)
        for half in self._halves:
            half.crop(min(count, half.tokens))
        self._settle()

    def reset(self) -> None:
        """Forget everything."""
        self._halves = ()
        self.is_initialized = False
        self.cumulative_length = 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Sequences in the order that beam search chose."""
        self._each(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every sequence `repeats` times."""
        self._each(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Only the sequences at `indices`."""
        self._each(lambda tensor: tensor[indices])

    def offload(self) -> None:
        """Everything to the CPU."""
        self._each(lambda tensor: tensor.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Everything back to its device."""
        self._each(lambda tensor: tensor.to(self.device, non_blocking=True))

    def memory(self, dtype: torch.dtype | None = None) -> CacheMemory:
        """Bytes held, and those of a full cache. `dtype` is that of full precision; None: the dtype of the states."""
        seen = kept = self.cumulative_length
        if self.sliding_window is not None:
            kept = min(seen, self.sliding_window - 1)
        return sum((half.memory(seen, kept, dtype) for half in self._halves), NOTHING)

    def _each(self, change: Callable[[Tensor], Tensor]) -> None:
        for half in self._halves:
            half.each(change)


class QuantizedCache(Cache):
    """A cache for `model.generate(..., past_key_values=cache)` or for a model's forward. One per generation.

    config       of the model (`model.config`)
    bits         2, 3, 4 or 8
    group_size   tokens (keys) and channels (values) that share a scale and a minimum
    residual     newest tokens kept at full precision, a multiple of `group_size`
    scale_dtype  of scales and minima; None: that of the keys and values

    Raises PlanError when the settings do not fit together, or a layer holds something else than keys and values.
    """

    def __init__(
        self,
        config: Any,
        bits: int = 4,
        group_size: int = 32,
        residual: int = 128,
        scale_dtype: torch.dtype | None = None,
    ) -> None:
        settings = KVCache.of(bits=bits, group_size=group_size, residual=residual)
        types, options = get_layer_types_and_kwargs(config.get_text_config(decoder=True))
        super().__init__(
            layers=[
                _layer(kind, keys.get("sliding_window"), settings, scale_dtype)
                for kind, keys in zip(types, options, strict=True)
            ]
        )

    @classmethod
    def from_config(cls, config: Any) -> QuantizedCache:
        """The cache that a model was made and measured for, from its config.json. Raises PlanError without one."""
        written = getattr(config, CONFIG_KEY, None)
        if not isinstance(written, dict):
            raise PlanError(f"config.json has no `{CONFIG_KEY}`: compress with a recipe that has such a section")
        return cls(config, **KVCache.of(**written).model_dump())

    def memory(self, dtype: torch.dtype | None = None) -> CacheMemory:
        """Bytes that all layers hold now, and what a full cache would hold.

        dtype  of full precision; None: the dtype of the keys and values as they came
        """
        return sum((_memory(layer, dtype) for layer in self.layers), NOTHING)


def _layer(kind: str, window: int | None, settings: KVCache, scale_dtype: torch.dtype | None) -> CacheLayerMixin:
    stock = DYNAMIC_LAYER_TYPE_MAPPING.get(kind)
    if stock is DynamicLayer:
        return QuantizedLayer(settings, scale_dtype)
    if stock is not DynamicSlidingWindowLayer or window is None:
        raise PlanError(f"a layer of type {kind!r} holds more than keys and values; its cache cannot be quantised")
    if window - 1 <= settings.residual:
        return DynamicSlidingWindowLayer(sliding_window=window)
    return QuantizedLayer(settings, scale_dtype, window)


def _memory(layer: Any, dtype: torch.dtype | None) -> CacheMemory:
    """Of a layer of ours, or of transformers' own, which holds everything in full."""
    if isinstance(layer, QuantizedLayer):
        return layer.memory(dtype)
    if not layer.is_initialized:
        return NOTHING
    elements = layer.keys.numel() + layer.values.numel()
    size = (dtype or layer.keys.dtype).itemsize
    held = elements * size
    a_token = held / max(layer.keys.shape[-2], 1)
    return CacheMemory(layer.get_seq_length(), held, held, a_token, a_token)
