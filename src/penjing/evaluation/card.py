"""The README.md of an output directory: what it is, how to load it, what was measured, and what was not."""

from __future__ import annotations

import yaml

from penjing.evaluation.classification import Classification
from penjing.evaluation.report import Report
from penjing.evaluation.size import readable_bytes

_TRANSFORMERS = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{path}", dtype="auto")
tokenizer = AutoTokenizer.from_pretrained("{path}")
```"""
_CLASSIFIER = """```python
from transformers import pipeline

classify = pipeline("text-classification", "{path}")
```"""
_NATIVE = """```python
import penjing  # reads the format named "native"
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{path}")
tokenizer = AutoTokenizer.from_pretrained("{path}")
```"""
_VLLM = "```\nvllm serve {path}\n```"
_LLAMA_CPP = "```\nllama-cli -m {path}/MODEL.gguf\nllama-server -m {path}/MODEL.gguf\n```"
_GPTQMODEL = f"transformers (`pip install transformers optimum gptqmodel`):\n\n{_TRANSFORMERS}"
_ONNX = """```python
import onnxruntime

session = onnxruntime.InferenceSession("{path}/model.onnx")
```

Inputs and outputs are those of Hugging Face's exporter: `input_ids`, `attention_mask` and `past_key_values.N.key` and
`.value`, at first with a length of 0; `logits`, and `present.N.key` and `.value` for the next call. The weights are in
the `.safetensors` files, which the graph refers to."""
_LOADING = {
    "dense": f"transformers:\n\n{_TRANSFORMERS}\n\nvLLM:\n\n{_VLLM}",
    "compressed-tensors": (
        f"transformers (`pip install transformers compressed-tensors`):\n\n{_TRANSFORMERS}\n\n"
        f"vLLM, which runs the packed weights with its own kernels:\n\n{_VLLM}"
    ),
    "bitsandbytes": (
        f"transformers (`pip install transformers bitsandbytes accelerate`):\n\n{_TRANSFORMERS}\n\n"
        f"vLLM (`pip install bitsandbytes`):\n\n{_VLLM}"
    ),
    "gguf": f"llama.cpp, with the .gguf file of the repository:\n\n{_LLAMA_CPP}",
    "gptq": f"vLLM or SGLang:\n\n{_VLLM}\n\n{_GPTQMODEL}",
    "gptq-v2": f"vLLM:\n\n{_VLLM}\n\n{_GPTQMODEL}",
    "awq": f"vLLM or SGLang:\n\n{_VLLM}\n\n{_GPTQMODEL}",
    "onnx": f"ONNX Runtime (`pip install onnxruntime tokenizers`):\n\n{_ONNX}",
    "native": f"transformers with Penjing installed (`pip install penjing`):\n\n{_NATIVE}",
}


def model_card(report: Report, *, path: str = "PATH") -> str:
    """The text of README.md. `path` is the directory or hub id that the loading examples show."""
    parts = [
        f"---\n{_front_matter(report)}---",
        f"# {report.summary}",
        _introduction(report),
        f"## How to load it\n\n{_loading(report).format(path=path)}",
        f"## What was measured\n\n{_measured(report)}",
        f"## What to know\n\n{_limits(report)}",
        f"## Recipe\n\n```yaml\n{yaml.safe_dump(report.recipe, sort_keys=False, allow_unicode=True)}```",
        "Everything else (every tensor, its error, the fingerprints of texts and model) is in `report.json`.",
    ]
    return "\n\n".join(parts) + "\n"


def _loading(report: Report) -> str:
    return f"transformers:\n\n{_CLASSIFIER}" if report.classification else _LOADING[report.format]


def _front_matter(report: Report) -> str:
    tags = ["penjing", *dict.fromkeys(report.methods), report.format]
    entries = {
        "base_model": report.source.label,
        "base_model_relation": "quantized" if any(row.bits for row in report.modules) else "finetune",
        "library_name": "gguf" if report.format == "gguf" else "transformers",
        "pipeline_tag": "text-classification" if report.classification else "text-generation",
        "tags": tags,
    }
    return yaml.safe_dump(entries, sort_keys=False, allow_unicode=True)


def _introduction(report: Report) -> str:
    source = report.source
    ratio = source.bytes / max(report.bytes, 1)
    return (
        f"`{source.label}` ({source.model_type}, {source.parameters:,} parameters) compressed with "
        f"{' + '.join(report.methods) or 'no step'} by Penjing {report.software.penjing}: "
        f"{readable_bytes(report.bytes)} instead of {readable_bytes(source.bytes)} ({ratio:.2f} times smaller, "
        f"{report.bits_per_weight:.2f} bits per weight, embeddings and scales included)."
    )


def _measured(report: Report) -> str:
    quality = report.quality
    if found := report.classification:
        return f"Accuracy {found.accuracy:.1%}{_beside(found)}. Protocol: {found.sentence()}."
    if not quality or not report.protocol:
        return "Nothing: the run was asked not to measure. Measure it before you rely on it."
    dense_bits = 8 * report.source.bytes / report.source.parameters
    agreement = "" if quality.top1 is None else f"{quality.top1:.1%}"
    divergence = "" if quality.kl is None else f"{quality.kl:.4f} ± {quality.kl_error or 0:.4f}"
    rows = [
        ("", "dense", "this model"),
        ("---", "---:", "---:"),
        ("weights", readable_bytes(report.source.bytes), readable_bytes(report.bytes)),
        ("bits per weight", f"{dense_bits:.2f}", f"{report.bits_per_weight:.2f}"),
        ("perplexity", _number(quality.reference_perplexity), _number(quality.perplexity)),
        ("KL(dense ‖ this), nats per token", "0", divergence),
        ("same most likely token", "100 %", agreement),
    ]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return f"{table}\n\nProtocol: {report.protocol.sentence()}."


def _beside(found: Classification) -> str:
    """The accuracy of what a classifier was compared with."""
    if found.reference_accuracy is None:
        return ""
    same = f"the same class on {found.agreement:.1%} of the texts"
    return f"; that of the larger model {found.reference_accuracy:.1%}, {same}"


def _limits(report: Report) -> str:
    lines = [
        "These numbers say how close the model stays to the dense one on this text. They do not say how well it does a "
        "task, follows instructions or stays safe: test it on your own use.",
        "What the dense model gets wrong, this one does too. Its licence and its terms apply.",
    ]
    if report.protocol and report.protocol.corpus.startswith("builtin"):
        lines.append(
            "The text is software documentation that most models have seen in training; its perplexity compares with "
            "the dense model's in the same table, not with numbers published elsewhere."
        )
    if report.calibration:
        text = report.calibration
        lines.append(f"Calibrated on {text.corpus}: {text.windows} windows of {text.length} tokens.")
    lines += [f"`{entry.name}`: {entry.reason}." for entry in report.skipped[:20]]
    if len(report.skipped) > 20:
        lines.append(f"{len(report.skipped) - 20} more modules were left as they are; `report.json` lists them.")
    if report.verification.get("passed"):
        lines.append(
            f"After writing, the files were loaded back ({report.verification.get('how', '')}) and gave the logits "
            f"that the model had in memory, up to {report.verification.get('difference', 0.0):.1e} of the largest."
        )
    return "\n".join(f"- {line}" for line in lines)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
