"""`from_pretrained` for the native format: packed parts are decoded while the checkpoint is read.

The loaded model is an ordinary dense model in the dtype that was asked for. Where a scheme quantises inputs, the linear
becomes one that multiplies the codes (`penjing.runtime`), and is never dense in memory; where that cannot be, it stays
dense and a pre-hook rounds its inputs.
"""

from __future__ import annotations

import re
from typing import Any, ClassVar

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from penjing.errors import FormatError
from penjing.formats.base import input_parts
from penjing.formats.native.format import read_schemes
from penjing.formats.native.layout import ALL_PARTS, decode, from_parts, is_packed
from penjing.formats.native.shared_linears import SharedLinears
from penjing.numerics.activations import InputScale
from penjing.representations import Representation, Scheme
from penjing.runtime import RoundInputs, can_run, runner_for

NAME = "penjing"
_SERIALIZED = ["weight", *(f"weight_{part}" for part in ALL_PARTS)]


class PenjingConfig(QuantizationConfigMixin):
    """`quantization_config` as written by the native format."""

    def __init__(self, version: int = 0, schemes: list[dict[str, Any]] | None = None, **ignored: Any) -> None:
        self.quant_method = NAME
        self.version = version
        self.schemes = schemes or []
        self.dequantize = True  # transformers: decode at load time, leave a dense model behind


class DecodeParts(ConversionOps):
    """Packed parts of one module, or of all experts of a block -> dense weights."""

    def __init__(self, hf_quantizer: HfQuantizer) -> None:
        self.hf_quantizer = hf_quantizer  # transformers hands tensors over as stored when an operation has this

    def __deepcopy__(self, memo: dict[int, Any]) -> DecodeParts:
        """transformers copies the operation for every module; what is put aside must come to the one quantizer."""
        return DecodeParts(self.hf_quantizer)

    @torch.no_grad()
    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **context: Any
    ) -> dict[str, Any]:
        """Group what was collected by weight, decode each; names of the result as transformers expects them."""
        model, name = context["model"], context["full_layer_name"]
        parameter = model.get_parameter(name)
        by_weight: dict[str, dict[str, list[Tensor]]] = {}
        for key, tensors in input_dict.items():
            before, weight, part = key.rstrip("$").rpartition("weight")
            by_weight.setdefault(before + weight, {})[part.removeprefix("_")] = (
                tensors if isinstance(tensors, list) else [tensors]
            )
        owner = name.rpartition(".")[0]
        if owner in self.hf_quantizer.coded and list(by_weight) == ["weight"] and "" not in by_weight["weight"]:
            coded = _read_all(by_weight["weight"], name)[0]
            if can_run(model.get_submodule(owner), self.hf_quantizer.coded[owner], coded):
                self.hf_quantizer.kept[owner] = coded
                device = by_weight["weight"]["header"][0].device
                return {name: torch.zeros((), dtype=parameter.dtype, device=device).expand(parameter.shape)}
        result = {weight: _decode_all(parts, name, parameter.dtype) for weight, parts in by_weight.items()}
        if list(result) != ["weight"]:
            return result
        value = result["weight"][0]
        packed = "" not in by_weight["weight"]
        return {name: value.T.contiguous() if packed and _is_transposed(model, name) else value}

    @property
    def reverse_op(self) -> ConversionOps:
        """Saving the loaded model writes it dense."""
        return _AsIs()


class _AsIs(ConversionOps):
    def convert(self, input_dict: dict[str, Any], **context: Any) -> dict[str, Any]:
        return input_dict


class PenjingQuantizer(HfQuantizer):
    """What transformers calls while it loads a native checkpoint."""

    requires_calibration = True
    serialized_names: ClassVar[dict[str, list[str]]] = {"weight": _SERIALIZED}

    def get_load_operations(self) -> dict[str, type[ConversionOps]]:
        """Decoding happens while loading, before transformers merges experts."""
        return {"dequantize": DecodeParts}

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        schemes: dict[str, Scheme] = read_schemes(vars(self.quantization_config))
        _check_stored(schemes, kwargs.get("checkpoint_files") or [])
        self.shared = SharedLinears(model)
        self.coded = _by_live_name(model, schemes)
        self.kept: dict[str, Representation] = {}
        for name, scheme in self.coded.items():
            for part, dtype in input_parts(scheme).items():
                model.get_submodule(name).register_buffer(part, torch.empty(1, dtype=dtype, device="meta"))
        return model

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        for name, scheme in self.coded.items():
            linear = model.get_submodule(name)
            parts = [linear.get_buffer(part) for part in input_parts(scheme)]
            static = InputScale(*parts) if parts else None
            for part in input_parts(scheme):
                del linear._buffers[part]
            if name in self.kept:
                model.set_submodule(name, _runner(linear, scheme, self.kept.pop(name), static))
            elif scheme.activations is not None:
                linear.register_forward_pre_hook(RoundInputs(scheme.activations, static))
        self.shared.finish(model)
        return model

    def is_serializable(self) -> bool:
        """As a dense model."""
        return True

    @property
    def is_trainable(self) -> bool:
        """As any dense model."""
        return True


def register() -> None:
    """Tell transformers about the format; twice does no harm."""
    AUTO_QUANTIZATION_CONFIG_MAPPING[NAME] = PenjingConfig
    AUTO_QUANTIZER_MAPPING[NAME] = PenjingQuantizer


def _decode_all(parts: dict[str, list[Tensor]], name: str, dtype: torch.dtype) -> list[Tensor]:
    if "" in parts:
        if len(parts) > 1:
            raise FormatError(f"{name} is stored both plain and packed; the checkpoint is damaged")
        return [tensor.to(dtype) for tensor in parts[""]]
    return [decode(weight, dtype) for weight in _read_all(parts, name)]


def _read_all(parts: dict[str, list[Tensor]], name: str) -> list[Representation]:
    count = len(parts.get("header", []))
    if any(len(tensors) != count for tensors in parts.values()):
        raise FormatError(f"{name}: some packed tensors are missing; the checkpoint is incomplete")
    return [from_parts({part: tensors[i] for part, tensors in parts.items()}, name)[0] for i in range(count)]


def _by_live_name(model: Any, schemes: dict[str, Scheme]) -> dict[str, Scheme]:
    """The live linears that config.json speaks of. Checkpoints of a base model (GPT-2 on the hub) lack its prefix."""
    prefix = f"{model.base_model_prefix}."
    linears = [name for name, module in model.named_modules() if isinstance(module, _kinds(model))]
    found: dict[str, Scheme] = {}
    for target, scheme in schemes.items():
        names = [name for name in linears if _matches(target, name) or _matches(target, name.removeprefix(prefix))]
        if scheme.activations is not None and not names:
            raise FormatError(f"config.json quantises the inputs of {target}, and the model has no such linear")
        found |= dict.fromkeys(names, scheme)
    return found


def _kinds(model: Any) -> tuple[type[nn.Module], ...]:
    """Modules that may compute with codes. A head tied to the embedding needs the table, so that stays dense."""
    tied = getattr(model.config.get_text_config(), "tie_word_embeddings", False)
    return (nn.Linear, Conv1D) if tied else (nn.Linear, Conv1D, nn.Embedding)


def _runner(linear: nn.Module, scheme: Scheme, weight: Representation, static: InputScale | None) -> nn.Module:
    made = runner_for(linear, scheme, weight, static)
    if made is None:
        raise FormatError(f"{type(linear).__name__} cannot run as {scheme}, though it could before its weight was read")
    return made


def _is_transposed(model: nn.Module, name: str) -> bool:
    return isinstance(model.get_submodule(name.rpartition(".")[0]), Conv1D)


def _matches(target: str, name: str) -> bool:
    return re.match(target[3:], name) is not None if target.startswith("re:") else target == name


def _check_stored(schemes: dict[str, Scheme], files: list[str]) -> None:
    """config.json and the files must agree on which modules are packed."""
    packed = set()
    for path in files:
        with safe_open(path, "pt") as file:
            packed |= {key.removesuffix(".weight_header") for key in file.keys() if key.endswith(".weight_header")}  # noqa: SIM118
    expected = {target: scheme for target, scheme in schemes.items() if is_packed(scheme)}
    absent = [target for target in expected if not any(_matches(target, name) for name in packed)]
    unknown = [name for name in packed if not any(_matches(target, name) for target in expected)]
    if absent or unknown:
        raise FormatError(
            f"config.json and the weights disagree: {', '.join(absent[:4] + sorted(unknown)[:4])} "
            "listed in one and not in the other; the checkpoint is incomplete"
        )
