"""The format of vLLM and llm-compressor, loaded by stock transformers with the `compressed-tensors` package.

Six layouts, chosen for each scheme; `integer` and `floats` describe them:

    pack-quantized          integers packed to their bit width
    int-quantized           8-bit integers whose inputs are integers too
    float-quantized         FP8 (E4M3) with a scale per row, matrix or block of 128 x 128
    mxfp8-quantized         FP8 in groups of 32 with a power of two
    mxfp4-pack-quantized    FP4 (E2M1) in groups of 32 with a power of two
    nvfp4-pack-quantized    FP4 (E2M1) in groups of 16 with an FP8 scale and one fp32 number per matrix
"""

from penjing.formats.compressed_tensors.format import CompressedTensorsFormat

__all__ = ["CompressedTensorsFormat"]
