"""The table of cases of the end-to-end tests: recipes on tiny models, one per line."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from penjing.formats import FORMATS
from penjing.recipe import load_recipe
from tiny_models import FAMILIES

Step = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """A recipe on a tiny model. `exact`: the plan can know the bytes, since no step prunes, keeps a fraction or lets
    sizes follow from frequencies."""

    steps: tuple[Step, ...]
    format: str = "compressed-tensors"
    family: str = "llama"
    model: dict[str, Any] = field(default_factory=dict)
    keys: dict[str, Any] = field(default_factory=dict)
    calibration: dict[str, Any] = field(default_factory=dict)

    @property
    def exact(self) -> bool:
        return not any(
            "sparsity" in step
            or "huffman" in step
            or "rewind" in step
            or step.get("outliers", step["method"] == "spqr")
            for step in self.steps
        )


def step(method: str, **keys: Any) -> Step:
    return {"method": method, **keys}


def four(method: str, **keys: Any) -> Step:
    """Four bits in groups of 32, which divide the tiny models' widths."""
    return step(method, **({"bits": 4, "group_size": 32} | keys))


W8A8 = step("rtn", bits=8, group_size="channel", activations={"bits": 8})


BRIEF = {"steps": 2, "batch_size": 2, "micro_batch": 2}
RECOVER = step("recover", rank=4, **BRIEF)
QAT = step("llm-qat", group_size=32, storage="float32", kv=4, pool=2, **BRIEF)


def static(method: str = "rtn", targets: tuple[str, ...] = ("linear",), **keys: Any) -> Step:
    """8-bit weights and inputs whose scales are measured."""
    activations = {"dynamic": False, **keys}
    return step(method, bits=8, group_size="channel", targets=list(targets), activations=activations)


QUANTISED: dict[str, tuple[Step, ...]] = {
    "rtn": (four("rtn"),),
    "rtn 2 bits": (four("rtn", bits=2, group_size=16),),
    "rtn 3 bits": (four("rtn", bits=3),),
    "rtn 5 bits": (four("rtn", bits=5),),
    "rtn 8 bits": (four("rtn", bits=8),),
    "rtn channel": (four("rtn", group_size="channel"),),
    "rtn tensor": (four("rtn", group_size="tensor"),),
    "rtn asymmetric": (four("rtn", symmetric=False),),
    "rtn channel asymmetric": (four("rtn", group_size="channel", symmetric=False),),
    "rtn narrow": (four("rtn", scale_rule="narrow"),),
    "rtn signed-max": (four("rtn", scale_rule="signed-max"),),
    "rtn W8A8": (W8A8,),
    "gptq": (four("gptq"),),
    "gptq natural": (four("gptq", order="natural"),),
    "gptq natural, late groups": (four("gptq", order="natural", static_groups=False),),
    "gptq by group": (four("gptq", order="group-activation", static_groups=False),),
    "gptq tensor": (four("gptq", group_size="tensor"),),
    "gptq asymmetric calibration": (four("gptq", asymmetric=True, targets=["linear", "lm_head"]),),
    "gptq stream, descent": (four("gptq", asymmetric=True, stream=True, descent=2),),
    "gptq two-sided": (four("gptq", bits=3, two_sided=True),),
    "wanda, gptq two-sided": (step("wanda", sparsity=0.5), four("gptq", two_sided=True, symmetric=False)),
    "smoothquant, gptq two-sided": (step("smoothquant", alpha=0.8), four("gptq", two_sided=True)),
    "wanda, gptq stream, descent": (
        step("wanda", pattern="2:4"),
        four("gptq", asymmetric=True, stream=True, descent=1, symmetric=False),
    ),
    "gptq searched": (four("gptq", bits=3, scale_search="gram", order="group-activation", static_groups=False),),
    "rtn searched": (four("rtn", bits=3, scale_search="diagonal", symmetric=False),),
    "smoothquant, gptq asymmetric calibration": (
        step("smoothquant"),
        four("gptq", asymmetric=True, scale_search="diagonal"),
    ),
    "gptq asymmetric 3 bits": (four("gptq", bits=3, symmetric=False),),
    "gptq W8A8": (step("gptq", bits=8, group_size="channel", activations={"bits": 8}),),
    "awq": (four("awq", steps=4),),
    "awq duo, symmetric, unclipped": (four("awq", steps=4, scaling="duo", symmetric=True, clip=False),),
    "autoround": (four("autoround", iterations=3, batch_size=2),),
    "zeroquant": (four("zeroquant", iterations=3, batch_size=2, learning_rate=1e-3),),
    "gptq, e2e-qp": (four("gptq"), step("e2e-qp", iterations=2, batch_size=2)),
    "wanda, autoround": (step("wanda", sparsity=0.3), four("autoround", iterations=2, symmetric=False)),
    "smoothquant, autoround": (step("smoothquant"), four("autoround", iterations=2)),
    "smoothquant, rtn W8A8": (step("smoothquant"), W8A8),
    "smoothquant, gptq": (step("smoothquant", alpha=0.8), four("gptq")),
    "rotation, gptq": (step("rotation"), four("gptq")),
    "shortgpt, rotation, awq": (step("shortgpt", drop=1), step("rotation"), four("awq", steps=2)),
    "two parts": (four("gptq", targets=["*.mlp.*"]), four("rtn", targets=["*.self_attn.*"])),
    "magnitude, gptq": (step("magnitude", sparsity=0.3), four("gptq")),
    "wanda 2:4, gptq": (step("wanda", pattern="2:4"), four("gptq")),
    "sparsegpt with bits": (four("sparsegpt", sparsity=0.4),),
    "sparsegpt 2:4 with bits": (four("sparsegpt", pattern="2:4", symmetric=False),),
    "shortgpt, wanda, gptq": (step("shortgpt", drop=1), step("wanda", sparsity=0.25), four("gptq")),
    "head": (four("gptq", targets=["linear", "lm_head"]),),
    "embedding and head": (four("rtn", targets=["linear", "embedding", "lm_head"]),),
}
"""What both formats with codes can hold; the dense format writes the same values as plain tensors."""

PRUNED: dict[str, tuple[Step, ...]] = {
    "magnitude": (step("magnitude", sparsity=0.5),),
    "magnitude by row": (step("magnitude", sparsity=0.37, scope="row"),),
    "magnitude 2:4": (step("magnitude", pattern="2:4"),),
    "wanda": (step("wanda", sparsity=0.5),),
    "wanda 4:8": (step("wanda", pattern="4:8"),),
    "sparsegpt": (step("sparsegpt", sparsity=0.5),),
    "sparsegpt 2:4": (step("sparsegpt", pattern="2:4"),),
    "wanda refitted": (step("wanda", sparsity=0.5, refit=True),),
    "alps": (step("alps", sparsity=0.5, rounds=9),),
    "shortgpt": (step("shortgpt", drop=2),),
    "smoothquant": (step("smoothquant"),),
    "rotation": (step("rotation"),),
}

ONLY_NATIVE: dict[str, Case] = {
    "llm-int8": Case((step("llm-int8", threshold=2.0),), "native"),
    "llm-int8, gpt2": Case((step("llm-int8", threshold=2.0),), "native", "gpt2"),
    "smoothquant, gptq static asymmetric": Case(
        (step("smoothquant"), static("gptq", symmetric=False, observer="mse")), "native"
    ),
    "static percentile, head": Case(
        (static(targets=("linear", "lm_head"), observer="percentile", percentile=99.9),), "native", "phi3"
    ),
    "static entropy, opt": Case((static(observer="entropy"),), "native", "opt"),
    "W8A8 asymmetric per tensor": Case(
        (W8A8 | {"activations": {"symmetric": False, "granularity": "tensor"}},), "native", "gpt_neox"
    ),
    "fp8 inputs": Case((W8A8 | {"activations": {"type": "fp8"}},), "native"),
    "W4A4": Case((four("rtn", activations={"bits": 4}),), "native"),
    "gptq scattered groups": Case((four("gptq", static_groups=False),), "native"),
    "owq": Case((step("owq", columns=3, group_size=32, symmetric=False),), "native"),
    "owq with a budget": Case((step("owq", bits=4, target_bits=5.5, group_size="channel"),), "native"),
    "owq, gpt2": Case((step("owq", columns=5, group_size=40),), "native", "gpt2"),
    "owq, experts": Case((step("owq", columns=2, group_size=32),), "native", "qwen3_moe"),
    "spqr": Case((step("spqr", outliers=0.02),), "native"),
    "spqr without outliers": Case((step("spqr", outliers=0, order="natural"),), "native"),
    "spqr with a threshold": Case((step("spqr", threshold=0.2, group_size=20, statistic_group=5),), "native", "gpt2"),
    "spqr, experts": Case((step("spqr", order="group-activation"),), "native", "mixtral"),
    "spqr, dense": Case((step("spqr"),), "dense"),
    "hqq": Case((four("hqq"),), "native"),
    "gptq float zero": Case((four("gptq", symmetric=False, zero="float", scale_search="diagonal"),), "native"),
    "hqq weighted": Case((step("wanda", sparsity=0.3), four("hqq", bits=3, group_size=40, weighted=True)), "native"),
    "smoothquant, hqq": Case((step("smoothquant"), four("hqq", weighted=True)), "native", "gemma2"),
    "bcq": Case((step("bcq", group_size=32),), "native"),
    "bcq offset, gpt2": Case((step("bcq", bits=2, group_size=40, offset=True, turns=1),), "native", "gpt2"),
    "bcq by inputs, experts": Case((step("bcq", group_size="channel", objective="inputs"),), "native", "mixtral"),
    "wanda, bcq": Case((step("wanda", sparsity=0.3), step("bcq", bits=1, group_size=16)), "native", "opt"),
    "bcq uniform": Case((step("bcq", bits=4, levels="uniform", group_size=32, offset=True),), "native", "gpt_neox"),
    "bcq, dense": Case((step("bcq", group_size=32, objective="weights"),), "dense"),
    "svd": Case((step("svd", rank=20),), "native"),
    "svd, head and embedding": Case((step("svd", rank=16, targets=["linear", "embedding", "lm_head"]),), "native"),
    "asvd": Case((step("asvd", ratio=0.7, multiple=1),), "native", "gpt_neox"),
    "svd-llm": Case((step("svd-llm", ratio=0.7),), "native"),
    "svd-llm, bfloat16": Case((step("svd-llm", ratio=0.7),), "native", "qwen2", {"dtype": "bfloat16"}),
    "svd-llm, dense": Case((step("svd-llm", ratio=0.7),), "dense"),
    "svd-llm, gptq two-sided": Case((step("svd-llm", ratio=0.7), four("gptq", two_sided=True)), "native"),
    "svd-llm, gptq": Case((step("svd-llm", ratio=0.7), four("gptq", group_size=16)), "native", "gpt2"),
    "svd, bcq": Case((step("svd", ratio=0.9), step("bcq", group_size="channel", objective="weights")), "native", "opt"),
    "svd-llm, experts, kmeans": Case((step("svd-llm", ratio=0.7), step("kmeans", weighted=False)), "native", "mixtral"),
    "pca": Case((step("pca", ratio=0.7),), "native", "gemma2"),
    "nmf": Case((step("nmf", ratio=0.7, rounds=3),), "native"),
    "nmf split": Case((step("nmf", rank=7, rounds=3, form="split"),), "native", "phi3"),
    "lqer": Case((step("lqer", rank=4, group_size=32),), "native", "qwen3_moe"),
    "lqer on the weights": Case(
        (step("lqer", rank=4, base="rtn", objective="weights", factor_bits=None, rounds=2),), "native", "gpt2"
    ),
    "wanda, lqer": Case((step("wanda", sparsity=0.3), step("lqer", rank=3, group_size=40)), "native"),
    "tensor-train": Case((step("tensor-train", rank=2, targets=["embedding"]),), "native"),
    "tensor-train, tied": Case((step("tensor-train", cores=2, targets=["embedding"]),), "native", "gemma3"),
    "tensor-train-matrix": Case((step("tensor-train-matrix", ratio=0.3, targets=["embedding"]),), "native"),
    "tensor-train-matrix, tied": Case(
        (step("tensor-train-matrix", rank=3, cores=2, targets=["embedding"]),), "native", "gemma3"
    ),
    "tie": Case((step("tie", blocks=1),), "native", "gpt2", {"layers": 3}),
    "tie, kmeans, experts": Case(
        (step("tie", blocks=1, linears=["self_attn.*"], scale="none"), step("kmeans", bits=3)), "native", "mixtral"
    ),
    "kmeans": Case((step("kmeans", bits=3),), "native"),
    "kmeans compensated, groups": Case((step("kmeans", group_size=24, compensate=True),), "native", "gpt2"),
    "kmeans, embedding": Case((step("kmeans", weighted=False, targets=["linear", "lm_head"]),), "native", "qwen3"),
    "deep compression": Case(
        (step("wanda", sparsity=0.7), step("kmeans", bits=5, group_size="tensor", huffman=True)), "native"
    ),
    "aqlm": Case((step("aqlm", book_bits=4, dimension=4, rounds=1),), "native"),
    "aqlm, experts": Case((step("aqlm", books=1, book_bits=5, dimension=5, rounds=1),), "native", "qwen3_moe"),
    "kmeans huffman, experts": Case((step("kmeans", huffman=True),), "native", "mixtral"),
    "xnor": Case((step("xnor", group_size=32, weighted=True),), "native"),
    "wanda, residual binary, gpt2": Case((step("wanda", sparsity=0.3), step("xnor", order=2)), "native", "gpt2"),
    "onebit, opt": Case((step("onebit"),), "native", "opt"),
    "billm, experts": Case((step("billm", block_size=32),), "native", "mixtral"),
    "ternary": Case((step("ternary", group_size=32),), "native"),
    "magnitude, ternary, phi3": Case(
        (step("magnitude", sparsity=0.3), step("ternary", objective="inputs", group_size="channel")), "native", "phi3"
    ),
    "bitnet, gpt2": Case(
        (step("ternary", rule="absmean", objective="weights", group_size="tensor", activations={"bits": 8}),),
        "native",
        "gpt2",
    ),
    "ternary, dense": Case((step("ternary", group_size=32, objective="weights"),), "dense"),
    "ternary, e2e-qp": Case((step("ternary", group_size=32), step("e2e-qp", iterations=2, batch_size=2)), "native"),
    "groups that do not divide": Case((four("rtn", bits=3, group_size=40, targets=["linear", "embedding"]),), "native"),
    "gptq, groups that do not divide": Case((four("gptq", group_size=40),), "native"),
    "embedding on another grid": Case(
        (four("gptq"), step("rtn", targets=["embedding"], bits=8, group_size="channel")), "native"
    ),
}

TRAINED: dict[str, Case] = {
    "wanda, recover": Case((step("wanda", sparsity=0.5), RECOVER), "native"),
    "wanda, recover, gptq": Case((step("wanda", sparsity=0.5), RECOVER, four("gptq")), "native", "mixtral"),
    "gradual, gptq": Case((step("gradual", sparsity=0.5, steps=4, every=1, batch_size=2), four("gptq")), "native"),
    "loraprune, gptq": Case((step("loraprune", sparsity=0.5, every=1, multiple=32, **BRIEF), four("gptq"))),
    "movement": Case((step("movement", sparsity=0.5, steps=4, every=1, batch_size=2),), "native", "mixtral"),
    "taylor, gptq": Case((step("taylor", sparsity=0.5, scope="global"), four("gptq")), "native", "mixtral"),
    "taylor 2:4": Case((step("taylor", pattern="2:4", criterion="taylor", protect_first=1),), "native", "gpt2"),
    "lottery ticket": Case((step("lottery-ticket", steps=2, levels=2, rewind=1),), "native", "gpt2"),
    "gptq, peqa": Case((four("gptq"), step("peqa", iterations=2, batch_size=2)), "native"),
    "lora on NF4, gptq": Case(
        (step("lora", base="nf4", start="loftq", rank=4, **BRIEF), four("gptq")), "native", "gpt2"
    ),
    "shortgpt, recover, gptq": Case((step("shortgpt", drop=1), RECOVER | {"what": "full"}, four("gptq"))),
    "distil, gkd, gptq": Case(
        (step("distil", student={"layers": 1}, **BRIEF), step("gkd", new_tokens=4, **BRIEF), four("gptq")),
        "native",
        "gemma3",
    ),
    "wanda, minillm": Case((step("wanda", sparsity=0.5), step("minillm", new_tokens=4, **BRIEF)), "native"),
    "mutual": Case((step("mutual", students=[{"layers": 1}, {"init": "random"}], **BRIEF),), "dense", "gpt2"),
    "early exits, born again": Case(
        (
            step("early-exits", exits=[1], keep=1, hidden=0.5, **BRIEF),
            step("distil", student={"init": "random"}, teacher="previous", **BRIEF),
        ),
        "dense",
        "gpt_neox",
    ),
    "llm-qat, rtn": Case((QAT, four("rtn", scale_rule="narrow", activations={"bits": 8}))),
}

FLOATS: dict[str, Case] = {
    "rtn fp8, fp8 inputs": Case((step("rtn", type="fp8-e4m3", activations={"type": "fp8"}),)),
    "rtn fp8 tensor, static fp8 inputs": Case(
        (step("rtn", type="fp8-e4m3", group_size="tensor", activations={"type": "fp8", "dynamic": False}),)
    ),
    "rtn W8A8 static": Case((W8A8 | {"activations": {"dynamic": False}},)),
    "rtn W8A8 static asymmetric": Case((W8A8 | {"activations": {"dynamic": False, "symmetric": False}},)),
    "gptq mxfp8": Case((step("gptq", type="mxfp8", static_groups=False, order="natural"),)),
    "awq mxfp4": Case((step("awq", type="mxfp4", scale_rounding="ceil", steps=2),)),
    "gptq nvfp4": Case((step("gptq", type="nvfp4"),)),
    "gptq nvfp4, bfloat16": Case((step("gptq", type="nvfp4"),), model={"dtype": "bfloat16"}),
    "gptq nf4": Case((step("gptq", type="nf4", group_size=32, double_quant=True),), "bitsandbytes"),
    "wanda, rtn fp4": Case(
        (step("wanda", sparsity=0.3), step("rtn", type="fp4", group_size=32)), "bitsandbytes", "gpt_neox"
    ),
    "gptq fp8 block": Case((step("gptq", type="fp8-e5m2", group_size="block"),), "native", "gpt2"),
    "awq nf4": Case((step("awq", type="nf4", double_quant=True, steps=2),), "native", "gemma2"),
    "rtn nvfp4": Case((step("rtn", type="nvfp4", targets=["linear", "embedding"]),), "native", "mixtral"),
}

CUT: dict[str, Case] = {
    "heads, neurons, gptq": Case(
        (step("heads", sparsity=0.5), step("neurons", sparsity=0.3, multiple=32, score="obs"), four("gptq"))
    ),
    "flap": Case((step("flap", sparsity=0.25, heads=False),), "dense"),
    "llm-pruner, experts": Case((step("llm-pruner", sparsity=0.5),), "dense", "qwen3_moe"),
    "channels, rtn": Case((step("channels", sparsity=0.125), four("rtn", group_size=8)), "native", "phi3"),
    "channels as they are": Case((step("channels", sparsity=0.25, basis="own"),), "dense", "gemma3"),
    "angular-layers, replaceme": Case(
        (step("angular-layers", drop=1), step("replaceme", drop=1)), "dense", "gpt2", {"layers": 4}
    ),
    "named-blocks, rtn": Case((step("named-blocks", blocks=[1]), four("rtn")), "native", "qwen2", {"layers": 3}),
    "greedy-layers": Case((step("greedy-layers", drop=1, windows=1),), "dense", "gemma3", {"layers": 3}),
}
"""Smaller models, which load like any other."""

TIED: dict[str, Case] = {
    f"tied, {name}, {format}": Case(steps, format, model={"tied": True})
    for format in ("compressed-tensors", "native")
    for name, steps in {
        "linears": (four("gptq"),),
        "embedding": (four("rtn", targets=["linear", "lm_head"]),),
    }.items()
}

IN_TRANSFORMERS = [name for name in FORMATS if name not in ("gptq", "gptq-v2", "awq", "gguf", "onnx")]
"""Formats that transformers loads without an engine's package; the others have whole runs in tests/formats."""

UNLISTED = {"model_type": "olmo2"}
"""A decoder without a family file: its layout is inferred."""

_IN_FAMILY = {
    "gptq": (four("gptq"),),
    "svd-llm, gptq": (step("svd-llm", ratio=0.7), four("gptq")),
    "awq": (four("awq", steps=2),),
    "autoround": (four("autoround", iterations=2),),
    "smoothquant, W8A8": (step("smoothquant"), W8A8),
    "rotated heads, gptq": (step("rotation", residual=False), four("gptq")),
}

_BY_BLOCK: tuple[tuple[Step, ...], ...] = (
    (four("hqq", weighted=True),),
    (four("owq", columns=2),),
    (four("gptq", asymmetric=True, stream=True, descent=1),),
    (step("spqr", order="group-activation"),),
    (four("zeroquant", iterations=2, batch_size=2),),
    (step("bcq", group_size=32),),
    (step("llm-int8", threshold=2.0),),
    (four("gptq", symmetric=False, zero="float"), step("e2e-qp", iterations=2, batch_size=2)),
    (step("xnor", group_size=32),),
    (step("onebit"),),
    (step("ternary", group_size=32), four("rtn", targets=["lm_head"])),
)
"""Methods that few other cases have, each on a block of its own: one run instead of ten."""


def _by_block(family: str, experts: bool) -> Case:
    blocks = "h" if family == "gpt2" else "layers"
    steps = tuple(
        {"targets": [f"*{blocks}.{number}.*"], "ignore": ["*.gate"] if experts else []} | one
        for number, steps in enumerate(_BY_BLOCK)
        for one in steps
        if not (experts and one["method"] == "llm-int8")  # stacked experts have no place to round inputs
    )
    return Case(steps, "native", family, {"layers": len(_BY_BLOCK)}, calibration={"token_weights": "gradient"})


def _best(family: str) -> Case:
    """The best recipe that comes along, on as little as the other cases."""
    found = load_recipe("best-4bit").as_dict()
    rounding, training = found["steps"]
    steps = rounding | {"group_size": 32}, training | {"iterations": 2}
    text = {key: found["calibration"][key] for key in ("token_weights", "written")}
    return Case(steps, "native" if family == "gpt2" else found["format"], family, calibration=text)


def _families() -> dict[str, Case]:
    cases = {}
    for family in FAMILIES:
        experts = family in ("mixtral", "qwen3_moe")
        for name, steps in _IN_FAMILY.items():
            if experts and "W8A8" in name:
                steps = (step("smoothquant"), four("rtn"))
            cases[f"{family}, {name}, native"] = Case(steps, "native", family)
        if family != "gpt2":
            cases[f"{family}, gptq, compressed-tensors"] = Case((four("gptq"),), "compressed-tensors", family)
        cases[f"{family}, magnitude, dense"] = Case((step("magnitude", sparsity=0.5),), "dense", family)
        cases[f"{family}, best-4bit"] = _best(family)
        cases[f"{family}, a method per block"] = _by_block(family, experts)
    cases["inferred, gptq, compressed-tensors"] = Case((four("gptq"),), model=UNLISTED)
    cases["inferred, shortgpt, native"] = Case((step("shortgpt", drop=1), four("rtn")), "native", model=UNLISTED)
    cases["gemma3, shortgpt, dense"] = Case((step("shortgpt", drop=1),), "dense", "gemma3", {"layers": 3})
    cases["qwen3_moe, shortgpt, native"] = Case((step("shortgpt", drop=1), four("gptq")), "native", "qwen3_moe")
    return cases


def _llama() -> dict[str, Case]:
    cases = {}
    for name, steps in QUANTISED.items():
        cases[f"{name}, compressed-tensors"] = Case(steps)
        cases[f"{name}, native"] = Case(steps, "native")
    for name, steps in PRUNED.items():
        cases |= {f"{name}, {format}": Case(steps, format) for format in IN_TRANSFORMERS}
    cases["rtn 3 bits, dense"] = Case(QUANTISED["rtn 3 bits"], "dense")
    cases["untied, rotation, gptq"] = Case(QUANTISED["rotation, gptq"], "native", model={"tied": True})
    cases["gptq, original inputs"] = Case(QUANTISED["gptq"], keys={"propagate": "original"})
    cases["gptq, bfloat16"] = Case(QUANTISED["gptq"], "native", model={"dtype": "bfloat16"})
    cases["gptq, float16, compressed-tensors"] = Case(QUANTISED["gptq"], keys={"dtype": "float16"})
    return cases


CASES: dict[str, Case] = {**_llama(), **ONLY_NATIVE, **FLOATS, **CUT, **TRAINED, **TIED, **_families()}
