"""How a representation lies on disk. One file or folder per format, all behind `formats.base.Format`."""

from __future__ import annotations

from typing import Any

from penjing.errors import FormatError
from penjing.formats.awq import AWQFormat
from penjing.formats.base import Format
from penjing.formats.bitsandbytes import BitsAndBytesFormat
from penjing.formats.compressed_tensors import CompressedTensorsFormat
from penjing.formats.gguf import GGUFFormat
from penjing.formats.gptq import GPTQFormat
from penjing.formats.hf_dense import DenseFormat
from penjing.formats.native import NativeFormat
from penjing.formats.onnx import OnnxFormat

FORMATS: dict[str, Format] = {
    format_.name: format_
    for format_ in (
        DenseFormat(),
        CompressedTensorsFormat(),
        GPTQFormat(1),
        GPTQFormat(2),
        AWQFormat(),
        BitsAndBytesFormat(),
        GGUFFormat(),
        OnnxFormat(),
        NativeFormat(),
    )
}
"""Every format Penjing can write, by the name a recipe uses."""

_READ = {
    "compressed-tensors": "compressed-tensors",
    "gptq": "gptq",
    "awq": "awq",
    "bitsandbytes": "bitsandbytes",
    "penjing": "native",
    "penjing-onnx": "onnx",
}
"""`quant_method` in config.json -> format."""

__all__ = ["FORMATS", "Format", "format_of"]


def format_of(config: dict[str, Any]) -> Format:
    """The format that a written config.json declares; `dense` when it declares none.

    Raises FormatError for a `quant_method` that Penjing does not read.
    """
    declared = config.get("quantization_config")
    if declared is None:
        return FORMATS["dense"]
    method = declared.get("quant_method")
    if method not in _READ:
        raise FormatError(
            f"config.json says quant_method {method!r}; penjing reads {', '.join(_READ)}. "
            "Start from the model that was not quantised"
        )
    second = method == "gptq" and declared.get("checkpoint_format") == "gptq_v2"
    return FORMATS["gptq-v2" if second else _READ[method]]
