"""Adapters beside a model: trained by the one loop, saved in PEFT's format; several on one model, in turn.

The base may be dense, pruned, or in NF4 codes as bitsandbytes loads them (QLoRA: `penjing compress -r nf4`, then an
adapter on all its linears); it is never written again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, ValidationError
from torch import Tensor, nn

from penjing.checkpoint import open_checkpoint
from penjing.errors import CheckpointError, FormatError, MissingDependency, RecipeError
from penjing.evaluation.windows import load_tokenizer
from penjing.methods.adaptation.lora import Adapter, merge
from penjing.methods.adaptation.residual import residual_change
from penjing.methods.training import NextToken, Training, TrainOptions
from penjing.models.build import quiet
from penjing.progress import Progress
from penjing.representations import Dense, Masked
from penjing.training.log import Curve
from penjing.training.loop import train
from penjing.training.models import load_model
from penjing.training.peft_files import read_adapter
from penjing.training.stage import read_batches


class AdapterOptions(TrainOptions):
    """How an adapter is shaped and trained. `data` is what it learns."""

    data: str = Field(description="text or instruction pairs to learn")
    length: int = Field(512, ge=2, description="tokens per window or pair")
    rank: int = Field(16, ge=1, description="of the change of each linear")
    alpha: float = Field(32.0, gt=0, description="its scale: alpha / rank")
    rank_stabilised: bool = Field(False, description="scale by alpha / sqrt(rank) instead (rsLoRA)")
    magnitudes: bool = Field(False, description="train the norm of each row apart from its direction (DoRA)")
    dropout: float = Field(0.0, ge=0, lt=1, description="of the inputs of the change")
    start: Literal["zero", "residual"] = Field(
        "zero", description="`residual`: begin with what quantisation lost, from the SVD of dense minus quantised"
    )
    learning_rate: float = Field(2e-4, gt=0, description="at its highest")


KINDS: Mapping[str, Mapping[str, bool]] = {
    "lora": {},
    "rslora": {"rank_stabilised": True},
    "dora": {"magnitudes": True},
}


def adapter_options(kind: str, **keys: Any) -> AdapterOptions:
    """Options of an adapter of a kind (a key of KINDS). Raises RecipeError naming what is not known or out of range."""
    if kind not in KINDS:
        raise RecipeError(f"{kind} is no kind of adapter; there are {', '.join(KINDS)}")
    try:
        return AdapterOptions(**KINDS[kind], **keys)
    except ValidationError as error:
        first = error.errors()[0]
        raise RecipeError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from error


def train_adapter(
    model: str | Path,
    output: Path,
    options: AdapterOptions,
    *,
    dense: str | Path | None = None,
    progress: Progress = lambda stage, done, total, detail: None,
) -> Curve:
    """Train an adapter on every linear of `model` but the head and write it to `output` in PEFT's format.

    `dense` is the model that `start: residual` compares with. A killed run continues. Raises CheckpointError,
    CalibrationError, MissingDependency, and what the loop raises.
    """
    peft = _peft()
    config = peft.LoraConfig(
        r=options.rank,
        lora_alpha=options.alpha,
        use_rslora=options.rank_stabilised,
        use_dora=options.magnitudes,
        lora_dropout=options.dropout,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(options.seed)
    base = load_base(model)
    if getattr(base, "is_quantized", False):
        base = peft.prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
    wrapped = peft.get_peft_model(base, config)
    if options.start == "residual":
        if dense is None:
            raise CheckpointError("`start: residual` compares with the dense model; say where it is")
        start_from_residual(wrapped, open_checkpoint(dense).load)
    batches, seen = read_batches(options, load_tokenizer(open_checkpoint(model).files()))
    marks = {"model": open_checkpoint(model).fingerprint(), "data": seen}
    work = output / ".training"
    training = Training(wrapped, NextToken())
    curve = train(training, batches, options, work, marks=marks, progress=progress, name="adapter")
    wrapped.save_pretrained(output)
    return curve


def load_base(model: str | Path) -> Any:
    """A model to put adapters on, in evaluation mode and without gradients.

    Plain tensors, of any checkpoint that Penjing reads, are held in fp32; a model of codes as transformers loads it,
    what is not coded in fp32. Raises CheckpointError.
    """
    checkpoint = open_checkpoint(model)
    if "quantization_config" not in checkpoint.config:
        plain = load_model(checkpoint)
        plain.name_or_path = str(checkpoint.path)  # PEFT notes it beside the adapter
        return plain
    from transformers import AutoModelForCausalLM

    with quiet():
        loaded = AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype=torch.float32)
    for value in loaded.parameters():
        if value.is_floating_point():  # some loaders of codes keep what is beside them in the checkpoint's dtype
            value.data = value.data.float()
    return loaded.eval().requires_grad_(False)


def start_from_residual(model: nn.Module, load: Callable[[str], Tensor]) -> None:
    """Give every change of a PEFT model the best approximation of dense minus present weight as its first value."""
    from peft.tuners.lora import LoraLayer

    for name, layer in model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        [adapter] = layer.active_adapters
        dense = load(name.removeprefix("base_model.model.") + ".weight").float()
        transposed = type(layer.get_base_layer()).__name__ == "Conv1D"
        lost = dense - decoded(layer.get_base_layer()).float()
        up, down = residual_change(lost.T if transposed else lost, len(layer.lora_A[adapter].weight))
        with torch.no_grad():
            layer.lora_A[adapter].weight.copy_(down)
            layer.lora_B[adapter].weight.copy_(up / layer.scaling[adapter])


def decoded(layer: nn.Module) -> Tensor:
    """The values of a linear's weight, decoded where bitsandbytes holds codes."""
    weight = layer.get_parameter("weight")
    state = getattr(weight, "quant_state", None)
    if state is None:
        return weight.detach()
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(weight.data, state)


class Adapters:
    """Several adapters on one live model: merged in turn, and taken out again without a trace.

    The weights that adapters touch are kept as they were, so that un-merging is exact. Pruned weights stay pruned.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._known: dict[str, dict[str, Adapter]] = {}
        self._before: dict[str, Tensor] = {}

    def add(self, name: str, directory: Path) -> None:
        """Read an adapter and call it `name`. Raises CheckpointError, or FormatError for a base of codes."""
        adapters = read_adapter(directory)
        for module in adapters:
            weight = self._weight(module)
            if not weight.is_floating_point() or hasattr(weight, "quant_state"):
                raise FormatError(
                    f"{module} holds codes: an adapter cannot be merged into it; use PEFT to put it beside"
                )
        self._known[name] = adapters

    def linears(self, name: str) -> list[str]:
        """The modules that an adapter changes."""
        return list(self._known[name])

    def pruned(self, name: str) -> list[str]:
        """Those of them whose weights hold zeros, which stay zero whatever is merged."""
        return [module for module in self._known[name] if bool((self._weight(module) == 0).any())]

    @torch.no_grad()
    def use(self, *names: str) -> None:
        """The base with these adapters merged, one after another, and no others; with none, the base as it was."""
        for module, before in self._before.items():
            self._weight(module).copy_(before)
        self._before.clear()
        for name in names:
            for module, adapter in self._known[name].items():
                weight = self._weight(module)
                before = self._before.setdefault(module, weight.clone())
                transposed = type(self.model.get_submodule(module)).__name__ == "Conv1D"
                values = weight.T if transposed else weight
                kept = (before.T if transposed else before) != 0
                whole = Dense(values) if kept.all() else Masked(Dense(values), kept)
                merged = merge(module, whole, adapter).dense()
                weight.copy_(merged.T if transposed else merged)

    def _weight(self, module: str) -> nn.Parameter:
        try:
            return self.model.get_submodule(module).get_parameter("weight")
        except AttributeError as error:
            raise CheckpointError(f"the adapter changes {module}, which the model does not have") from error


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise MissingDependency("adapters need peft: pip install 'penjing[adapters]'") from error
    return peft
