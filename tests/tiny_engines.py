"""Tiny models in the files that engines other than transformers read, written with those projects' own libraries."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

ONNX_VOCABULARY, ONNX_WIDTH = 32, 8


def write_gguf(directory: Path, file: Path) -> Path:
    """The tiny qwen3 in `directory` (see tiny_models) as fp32 in `file`, by the gguf package's names."""
    import gguf
    from safetensors.numpy import load_file

    config = json.loads((directory / "config.json").read_text())
    writer = gguf.GGUFWriter(file, "qwen3")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    model = json.loads((directory / "tokenizer.json").read_text())["model"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(sorted(model["vocab"], key=model["vocab"].get))
    writer.add_token_types([3] * 3 + [1] * (len(model["vocab"]) - 3))
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(False)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, config["num_hidden_layers"])
    for name, tensor in load_file(directory / "model.safetensors").items():
        writer.add_tensor(names.get_name(name, (".weight", ".bias")), tensor.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def write_onnx(file: Path) -> tuple[np.ndarray, np.ndarray]:
    """A decoder whose logits are the sum of the embeddings so far times a matrix; returns embedding and matrix."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    draw = np.random.default_rng(0)
    table = draw.normal(size=(ONNX_VOCABULARY, ONNX_WIDTH)).astype(np.float32)
    head = draw.normal(size=(ONNX_WIDTH, ONNX_VOCABULARY)).astype(np.float32)
    constants = {
        "table": table,
        "head": head,
        "one": np.array([1]),
        "two": np.array([2]),
        "axis": np.array(2),
        "end": np.array([2**31 - 1]),
    }
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["embedded"]),
        helper.make_node("Unsqueeze", ["embedded", "one"], ["now"]),
        helper.make_node("Concat", ["past_key_values.0.key", "now"], ["present.0.key"], axis=2),
        helper.make_node("Concat", ["past_key_values.0.value", "now"], ["present.0.value"], axis=2),
        helper.make_node("CumSum", ["present.0.key", "axis"], ["sums"]),
        helper.make_node("Shape", ["input_ids"], ["count"], start=1),
        helper.make_node("Neg", ["count"], ["first"]),
        helper.make_node("Slice", ["sums", "first", "end", "two"], ["newest"]),
        helper.make_node("Squeeze", ["newest", "one"], ["states"]),
        helper.make_node("MatMul", ["states", "head"], ["logits"]),
    ]
    cache = ["batch", 1, "past", ONNX_WIDTH]
    inputs = [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "count"])]
    inputs += [
        helper.make_tensor_value_info(f"past_key_values.0.{name}", TensorProto.FLOAT, cache)
        for name in ("key", "value")
    ]
    outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", "count", ONNX_VOCABULARY])]
    outputs += [
        helper.make_tensor_value_info(f"present.0.{name}", TensorProto.FLOAT, ["batch", 1, "all", ONNX_WIDTH])
        for name in ("key", "value")
    ]
    tensors = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "decoder", inputs, outputs, tensors)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), file)
    return table, head
