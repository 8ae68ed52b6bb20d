"""The graph of a decoder of the Llama kind: prefill and decode, with the key-value cache outside.

    input_ids (B, S), attention_mask (B, P + S), past_key_values.N.key and .value (B, kv_heads, P, head_dim)
        -> logits (B, S, V), present.N.key and .value (B, kv_heads, P + S, head_dim)

for S new tokens after P cached ones; names and shapes are those of Hugging Face's exporter. `num_logits_to_keep` (1,)
may be given as well: logits of so many last positions only, of all for 0, which it is when it is not given.

The mask may hold zeros anywhere, as padding on the left does. Positions are places in the mask: rotary embeddings see
only differences of positions, so padding on the left shifts nothing that matters. After cached tokens, ONNX Runtime's
attention takes one new token for each of several sequences, or several for one.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from penjing.formats.onnx.builder import CONTRIB, FLOAT, Builder
from penjing.formats.onnx.facts import Facts, facts_of
from penjing.formats.onnx.linears import Linears
from penjing.models.layout import Layout
from penjing.representations import Scheme

if TYPE_CHECKING:
    import onnx

_MASKED = np.float32(-1e38)
_LAST = np.int64(2**63 - 1)


def decoder(
    directory: Path, layout: Layout, config: Mapping[str, Any], schemes: Mapping[str, Scheme]
) -> onnx.ModelProto:
    """The graph over the shards in `directory`. Raises FormatError when they lack a tensor."""
    return _Decoder(directory, layout, config, schemes).model()


class _Decoder:
    """Builds the graph from the token ids to the logits."""

    def __init__(
        self, directory: Path, layout: Layout, config: Mapping[str, Any], schemes: Mapping[str, Scheme]
    ) -> None:
        self.layout = layout
        self.facts: Facts = facts_of(layout, config)
        self.graph = Builder(directory)
        self.linears = Linears(self.graph, layout, schemes)
        self._caches: list[onnx.ValueInfoProto] = []
        self._presents: list[onnx.ValueInfoProto] = []

    def model(self) -> onnx.ModelProto:
        """All of it."""
        from onnx import TensorProto, helper

        attended = self._attended()
        stream, delta = self._scaled(self.linears.rows(self.layout.embedding.name, "input_ids")), None
        for index in range(self.layout.blocks):
            stream, delta = self._block(index, stream, delta, attended)
        final = next(module for module in self.layout.modules if module.kind == "norm" and module.block is None)
        states, _ = self._norm(final.name, stream, delta)
        head = self.layout.embedding if self.layout.tied else self.layout.head
        logits = self._capped(self.linears.product(self._kept(states), [head.name]))
        self.graph.nodes("Identity", [logits], ["logits"])
        integer, number = TensorProto.INT64, TensorProto.FLOAT
        inputs = [
            helper.make_tensor_value_info("input_ids", integer, ["batch", "sequence"]),
            helper.make_tensor_value_info("attention_mask", integer, ["batch", "total"]),
            *self._caches,
            helper.make_tensor_value_info("num_logits_to_keep", integer, [1]),
        ]
        rows = self.layout.embedding.shape[0]
        output = helper.make_tensor_value_info("logits", number, ["batch", "kept", rows])
        return self.graph.model(self.layout.model_type, inputs, [output, *self._presents])

    def _attended(self) -> list[str]:
        """What every attention is given of the mask: last index of the cache per sequence, its length, and the bias."""
        graph = self.graph
        shape = graph.node("Shape", ["attention_mask"])
        total = graph.node("Cast", [graph.node("Gather", [shape, graph.constant("index_1", np.int64(1))])], to=6)
        one = graph.constant("int32_1", np.int32(1))
        batch = graph.node("Shape", ["attention_mask"], start=0, end=1)
        lengths = graph.node("Expand", [graph.node("Sub", [total, one]), batch])
        new = graph.node("Shape", ["input_ids"], start=1, end=2)
        length = graph.node("Shape", ["attention_mask"], start=1, end=2)
        singleton = graph.constant("shape_1", np.array([1], dtype=np.int64))
        full = graph.node("Concat", [batch, singleton, new, length], axis=0)
        mask = graph.node("Cast", ["attention_mask"], to=FLOAT)
        hidden = graph.node("Sub", [graph.constant("one", np.float32(1)), mask])
        bias = graph.node("Mul", [hidden, graph.constant("masked", _MASKED)])
        axes = graph.constant("axes_1_2", np.array([1, 2], dtype=np.int64))
        return [lengths, total, graph.node("Expand", [graph.node("Unsqueeze", [bias, axes]), full])]

    def _block(self, index: int, stream: str, delta: str | None, attended: list[str]) -> tuple[str, str]:
        """One block: the residual stream (B, S, D) before it, and what its two halves add to it."""
        graph, block = self.graph, self.layout.block_name(index)
        states, stream = self._norm(f"{block}.input_layernorm", stream, delta)
        mixed = self._attention(index, f"{block}.self_attn", states, attended)
        delta = self.linears.product(mixed, [f"{block}.self_attn.o_proj"])
        before, after = f"{block}.post_attention_layernorm", ""
        if f"{block}.pre_feedforward_layernorm" in self.layout.by_name:  # Gemma: norms on both sides
            delta, _ = self._norm(before, delta, None)
            before, after = f"{block}.pre_feedforward_layernorm", f"{block}.post_feedforward_layernorm"
        states, stream = self._norm(before, stream, delta)
        gate, up = self._gate_and_up(states, f"{block}.mlp")
        delta = self.linears.product(graph.node("Mul", [self._act(gate), up]), [f"{block}.mlp.down_proj"])
        return stream, self._norm(after, delta, None)[0] if after else delta

    def _act(self, gate: str) -> str:
        if self.facts.act == "gelu":
            return self.graph.node("Gelu", [gate], approximate="tanh")
        return self.graph.node("QuickGelu", [gate], domain=CONTRIB, alpha=1.0)

    def _scaled(self, rows: str) -> str:
        """Rows of the embedding as the blocks get them."""
        scale = self.facts.embedding_scale
        if scale == 1:
            return rows
        return self.graph.node("Mul", [rows, self.graph.constant("embedding_scale", np.float32(scale))])

    def _capped(self, logits: str) -> str:
        """`cap * tanh(logits / cap)`, where a family wants it."""
        if not self.facts.logit_softcap:
            return logits
        cap = self.graph.constant("logit_softcap", np.float32(self.facts.logit_softcap))
        return self.graph.node("Mul", [self.graph.node("Tanh", [self.graph.node("Div", [logits, cap])]), cap])

    def _gate_and_up(self, states: str, name: str) -> list[str]:
        """Outputs of the two linears before the gate; Phi-3 stores them as one."""
        if f"{name}.gate_up_proj" in self.layout.by_name:
            both = self.linears.product(states, [f"{name}.gate_up_proj"])
            return self.graph.nodes("Split", [both], 2, axis=-1, num_outputs=2)
        return self._side_by_side(states, [f"{name}.gate_proj", f"{name}.up_proj"])

    def _side_by_side(self, x: str, names: list[str]) -> list[str]:
        """Outputs of linears that read the same input; one product where they are alike."""
        if not self.linears.alike(names):
            return [self.linears.product(x, [name]) for name in names]
        sizes = np.array([self.layout.by_name[name].shape[0] for name in names], dtype=np.int64)
        split = self.graph.constant("split_" + "_".join(map(str, sizes)), sizes)
        return self.graph.nodes("Split", [self.linears.product(x, names), split], len(names), axis=-1)

    def _norm(self, name: str, stream: str, delta: str | None) -> tuple[str, str]:
        """The normalised stream, after `delta` is added to it, and the stream."""
        weight, epsilon = self.graph.in_fp32(f"{name}.weight"), self.facts.epsilon
        if self.facts.norm_offset:
            offset = self.graph.constant("norm_offset", np.float32(self.facts.norm_offset))
            weight = self.graph.node("Add", [weight, offset])
        if delta is None:
            normed = self.graph.node(
                "SimplifiedLayerNormalization", [stream, weight], axis=-1, epsilon=epsilon, stash_type=1
            )
            return normed, stream
        outputs = [f"{name}:out", "", "", f"{name}:sum"]
        self.graph.nodes(
            "SkipSimplifiedLayerNormalization", [stream, delta, weight], outputs, domain=CONTRIB, epsilon=epsilon
        )
        return outputs[0], outputs[3]

    def _projected(self, name: str, states: str) -> list[str]:
        """Query, key and value; or all three side by side, and two empty names."""
        if f"{name}.qkv_proj" in self.layout.by_name:
            return [self.linears.product(states, [f"{name}.qkv_proj"]), "", ""]
        names, normed = [f"{name}.{part}_proj" for part in "qkv"], f"{name}.q_norm" in self.layout.by_name
        if self.linears.alike(names) and not normed:
            return [self.linears.product(states, names), "", ""]
        query, key, value = self._side_by_side(states, names)
        if normed:
            query = self._head_norm(f"{name}.q_norm", query, self.facts.heads)
            key = self._head_norm(f"{name}.k_norm", key, self.facts.kv_heads)
        return [query, key, value]

    def _attention(self, index: int, name: str, states: str, attended: list[str]) -> str:
        """Attention over cache and new tokens: (B, S, heads * head_dim)."""
        facts, graph = self.facts, self.graph
        given = self._projected(name, states)
        cache = [f"past_key_values.{index}.{part}" for part in ("key", "value")]
        present = [f"present.{index}.{part}" for part in ("key", "value")]
        self._declare(cache, present)
        lengths, total, bias = attended
        kind = facts.rotary[index]
        rotary = [graph.constant(f"{kind}{part}", getattr(facts.angles[kind], part)) for part in ("cos", "sin")]
        mixed = f"{name}:out"
        graph.nodes(
            "GroupQueryAttention",
            [*given, *cache, lengths, total, *rotary, "", bias],
            [mixed, *present],
            domain=CONTRIB,
            num_heads=facts.heads,
            kv_num_heads=facts.kv_heads,
            local_window_size=facts.windows[index] or -1,
            scale=facts.scale,
            softcap=facts.softcap,
            do_rotary=1,
        )
        return mixed

    def _head_norm(self, name: str, x: str, heads: int) -> str:
        """A norm over every head (B, S, heads * head_dim), as Qwen 3 has it."""
        graph = self.graph
        split = graph.constant(f"heads_{heads}", np.array([0, 0, heads, self.facts.head_dim], dtype=np.int64))
        normed, _ = self._norm(name, graph.node("Reshape", [x, split]), None)
        return graph.node("Reshape", [normed, graph.constant("joined", np.array([0, 0, -1], dtype=np.int64))])

    def _declare(self, cache: list[str], present: list[str]) -> None:
        from onnx import TensorProto, helper

        kv_heads, width = self.facts.kv_heads, self.facts.head_dim
        for names, declared, length in ((cache, self._caches, "past"), (present, self._presents, "total")):
            dims: list[str | int | None] = ["batch", kv_heads, length, width]
            declared += [helper.make_tensor_value_info(name, TensorProto.FLOAT, dims) for name in names]

    def _kept(self, states: str) -> str:
        """The last `num_logits_to_keep` positions: a slice that begins at minus that number, so 0 keeps all."""
        graph = self.graph
        graph.constant("num_logits_to_keep", np.zeros(1, dtype=np.int64))
        bounds = [
            graph.node("Neg", ["num_logits_to_keep"]),
            graph.constant("the_end", np.array([_LAST])),
            graph.constant("axis_1", np.array([1], dtype=np.int64)),
        ]
        return graph.node("Slice", [states, *bounds])
