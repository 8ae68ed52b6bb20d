"""Teaching a new domain to a dense, an NF4 and a 4-bit model; and what LLM-QAT gives back of what rounding loses.

    python benchmarks/tuning.py adapters --training play.txt --evaluation play.test.txt --work build/tuning \\
        --output benchmarks/results/tuning.json
    python benchmarks/tuning.py qat --evaluation wiki.test.raw --work build/tuning \\
        --output benchmarks/results/tuning.json

Every row of `adapters` is trained in a process of its own, whose peak of resident memory counts, on the same windows in
the same order; perplexity is that of other windows. `qat` rounds weights, inputs and cache (4-8-4), measures, trains on
text that the model writes itself, and measures again. A row that the output already holds is not run again, and one
that was killed goes on from its last saved step.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import measured
import torch
from distillation import measure

from penjing import api
from penjing.checkpoint import open_checkpoint
from penjing.evaluation.report import Software
from penjing.evaluation.text import load_documents
from penjing.evaluation.windows import describe, evaluation_windows, leading_token, load_tokenizer
from penjing.methods.quantization import llm_qat
from penjing.methods.training import TrainTask
from penjing.training import Windows, train
from penjing.training.adapters import AdapterOptions, load_base, train_adapter
from penjing.training.models import load_model, save_model
from penjing.training.stage import read_batches
from penjing.training.task_scales import save_task

NF4 = {"type": "nf4", "group_size": 64, "double_quant": True}
GPTQ = {"method": "gptq", "bits": 4, "group_size": 64}
ADAPTED = "adapter_model.safetensors"
ON = {
    "lora": "dense",
    "peqa": "gptq",
    **dict.fromkeys(("qlora", "qlora-residual", "peft"), "nf4"),
    **dict.fromkeys(("qlora, gptq", "qlora-residual, gptq"), "nf4, gptq"),
}
"""What is trained on which base."""


def main() -> None:
    """Parse, run what is missing, write after every row."""
    options = _parsed()
    options.work.mkdir(parents=True, exist_ok=True)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    if options.what in TRAINED:
        TRAINED[options.what](options)
        return
    found = json.loads(options.output.read_text()) if options.output.is_file() else {}
    mine = found.setdefault(options.label, {})
    shown = ("rank", "steps", "batch", "length", "windows", "learning_rate", "scale_rate", "group", "pool")
    setting = {key: getattr(options, key) for key in shown}
    part = mine.setdefault(options.what, {"setting": setting, "software": Software.here().__dict__, "rows": {}})
    wanted = options.rows.split(";") if options.rows else None
    for name, row in (adapters if options.what == "adapters" else qat)(options):
        if wanted is not None and name not in wanted:
            continue
        if name not in part["rows"]:
            part["rows"][name] = row()
            options.output.write_text(json.dumps(found, indent=2) + "\n")
        print(name, part["rows"][name], flush=True)
    part["protocol"] = _evaluation(options)[1]
    options.output.write_text(json.dumps(found, indent=2) + "\n")


def _parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["adapters", "qat", *TRAINED])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--label", default="demo", help="what the rows are kept under")
    parser.add_argument("--training", default="builtin")
    parser.add_argument("--evaluation", default="builtin")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--batch", type=int, default=4, help="windows per step")
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--windows", type=int, default=24, help="that are measured on")
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--scale-rate", type=float, default=2e-3, help="learning rate of PEQA's factors")
    parser.add_argument("--group", type=int, default=None, help="of LLM-QAT's weights; default: a row")
    parser.add_argument("--pool", type=int, default=64, help="windows that LLM-QAT's teacher writes")
    parser.add_argument("--rows", default="", help="names with `;` between them; default: all")
    return parser.parse_args()


def adapters(options: argparse.Namespace) -> list[tuple[str, Callable[[], dict[str, Any]]]]:
    """What is measured of every way to teach the domain."""

    def plain(directory: str) -> dict[str, Any]:
        _prepare(options, directory)
        return {"weights_bytes": _bytes(options.work / directory), **_measure(options, options.work / directory, None)}

    def taught(name: str) -> dict[str, Any]:
        _prepare(options, ON[name])
        cost = _in_its_own_process(name, options)
        result = options.work / name
        if name == "peqa":
            size = save_task(options.work / "gptq", result, options.work / "task.safetensors")
            return {"weights_bytes": _bytes(result), "task_bytes": size, **cost, **_measure(options, result, None)}
        on = options.work / ON[name]
        return {
            "weights_bytes": _bytes(on),
            "task_bytes": (result / ADAPTED).stat().st_size,
            **cost,
            **_measure(options, on, result),
        }

    plains = [(name, lambda name=name: plain(name)) for name in BASES]
    return [*plains, *((name, lambda name=name: taught(name)) for name in TRAINED)]


def _prepare(options: argparse.Namespace, name: str) -> None:
    """A base in a directory that transformers and PEFT load, and the dense model that it is made from."""
    checkpoint = open_checkpoint(options.model)
    dense = options.work / "dense"
    if not dense.is_dir():
        save_model(load_model(checkpoint), checkpoint, dense, torch.float32)
    if name != "dense" and not (options.work / name / "report.json").is_file():
        api.compress(dense, BASES[name](options), options.work / name, evaluated=False)


def _recipe(options: argparse.Namespace, *steps: dict[str, Any]) -> dict[str, Any]:
    text = {"data": options.training, "samples": options.steps * options.batch, "length": options.length}
    return {"version": 1, "steps": list(steps), "calibration": text, "format": "native"}


def _in_its_own_process(name: str, options: argparse.Namespace) -> dict[str, Any]:
    given = {key: value for key, value in vars(options).items() if key not in ("what", "group", "rows")}
    arguments = [part for key, value in given.items() for part in (f"--{key.replace('_', '-')}", str(value))]
    cost = measured.run([sys.executable, __file__, name, *arguments], options.work / f"{name}.log")
    above = cost.peak - measured.import_baseline()
    return {"processor_seconds": round(cost.processor, 1), "peak_above_libraries_bytes": above}


def _settings(options: argparse.Namespace, **keys: Any) -> AdapterOptions:
    return AdapterOptions(
        data=options.training,
        samples=options.steps * options.batch,
        length=options.length,
        steps=options.steps,
        batch_size=options.batch,
        micro_batch=options.batch,
        learning_rate=options.learning_rate,
        rank=options.rank,
        alpha=2.0 * options.rank,
        save_every=8,
        **keys,
    )


def _adapter(options: argparse.Namespace, name: str, start: Literal["zero", "residual"] = "zero") -> None:
    dense = options.work / "dense" if start == "residual" else None
    train_adapter(options.work / ON[name], options.work / name, _settings(options, start=start), dense=dense)


def _peft(options: argparse.Namespace) -> None:
    """QLoRA as PEFT's pages write it, with a bare loop: the same batches, the same optimiser."""
    import peft
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    how = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    base = AutoModelForCausalLM.from_pretrained(
        options.work / "dense", quantization_config=how, dtype=torch.float32, device_map="cpu"
    )
    base = peft.prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
    settings = _settings(options)
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=settings.rank, lora_alpha=settings.alpha, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(base, config).train()
    trained = [value for value in model.parameters() if value.requires_grad]
    adam = torch.optim.AdamW(trained, lr=settings.learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    batches, _ = read_batches(settings, load_tokenizer(options.work / "dense"))
    for step in range(settings.steps):
        for batch in batches(step):
            model(**batch, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        adam.step()
        adam.zero_grad(set_to_none=True)
    model.save_pretrained(options.work / "peft")


def _peqa(options: argparse.Namespace) -> None:
    step = {
        "method": "peqa",
        "iterations": options.steps,
        "batch_size": options.batch,
        "learning_rate": options.scale_rate,
    }
    api.compress(options.work / "dense", _recipe(options, GPTQ, step), options.work / "peqa", evaluated=False)


BASES: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "dense": lambda options: {},
    "nf4": lambda options: {"version": 1, "steps": [{"method": "rtn", **NF4}], "format": "bitsandbytes"},
    "nf4, gptq": lambda options: _recipe(options, {"method": "gptq", **NF4}) | {"format": "bitsandbytes"},
    "gptq": lambda options: _recipe(options, GPTQ),
}

TRAINED: dict[str, Callable[[argparse.Namespace], None]] = {
    "lora": partial(_adapter, name="lora"),
    "qlora": partial(_adapter, name="qlora"),
    "qlora-residual": partial(_adapter, name="qlora-residual", start="residual"),
    "qlora, gptq": partial(_adapter, name="qlora, gptq"),
    "qlora-residual, gptq": partial(_adapter, name="qlora-residual, gptq", start="residual"),
    "peqa": _peqa,
    "peft": _peft,
}


def qat(options: argparse.Namespace) -> list[tuple[str, Callable[[], dict[str, Any]]]]:
    """Perplexity as it is, rounded to 4-8-4, and after training."""
    group: Any = {} if options.group is None else {"group_size": options.group}
    settings = llm_qat.LLMQATOptions(
        **group,
        bits=4,
        inputs=8,
        kv=4,
        pool=options.pool,
        steps=options.steps,
        batch_size=options.batch,
        micro_batch=options.batch,
        learning_rate=options.learning_rate,
        save_every=8,
    )
    windows, _ = _evaluation(options)
    teacher = load_model(open_checkpoint(options.model))

    def rounded() -> Any:
        torch.manual_seed(0)
        return llm_qat.train(TrainTask(load_model(open_checkpoint(options.model)), lambda: teacher), settings)

    def trained() -> dict[str, Any]:
        training = rounded()
        places = Windows(torch.zeros(options.batch, options.length, dtype=torch.long), options.batch, options.batch, 0)
        curve = train(training, places, settings, options.work / f"{options.label}-qat", marks={})
        return {"seconds": round(sum(curve.seconds), 1), **measure(training.model, teacher, windows)}

    return [
        ("as it is", lambda: measure(teacher, teacher, windows)),
        ("rounded to 4-8-4", lambda: measure(rounded().model, teacher, windows)),
        ("LLM-QAT 4-8-4", trained),
    ]


def _evaluation(options: argparse.Namespace) -> tuple[torch.Tensor, str]:
    tokenizer = load_tokenizer(open_checkpoint(options.model).files())
    bos, documents = leading_token(tokenizer), load_documents(options.evaluation, "evaluation")
    windows = evaluation_windows(documents, tokenizer, windows=options.windows, length=options.length, bos=bos)
    return windows, describe(documents, windows, bos=bos).sentence()


def _measure(options: argparse.Namespace, base: Path, adapter: Path | None) -> dict[str, float]:
    """Perplexity on the windows of the evaluation, as transformers and PEFT load base and adapter."""
    model = load_base(base)
    if adapter is not None:
        import peft

        model = peft.PeftModel.from_pretrained(model, adapter).eval()
    return {"perplexity": measure(model, model, _evaluation(options)[0])["perplexity"]}


def _bytes(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.glob("*.safetensors"))


if __name__ == "__main__":
    main()
