"""F32, F16 and BF16: a weight is a number."""

import numpy as np

from qwen3_moe_jax.convert.formats.base import ArrayFormat, Arrays, BlockFormat, Field, Format, GGMLType


def _dequantize_float(arrays: Arrays, out: np.ndarray) -> None:
    """F32 and F16: a plain conversion."""
    out[...] = arrays["w"]


def _dequantize_bf16(arrays: Arrays, out: np.ndarray) -> None:
    """``ggml_compute_bf16_to_fp32``: https://github.com/ggml-org/llama.cpp/blob/0c1e57098/ggml/src/ggml-impl.h"""
    out[...] = (arrays["w"].astype(np.uint32) << 16).view(np.float32)


F32 = Format(
    GGMLType.F32,
    BlockFormat(1, 4, {"w": Field(0, 1, "<f4")}),
    {"w": ArrayFormat("float32", 1)},
    _dequantize_float,
)
F16 = Format(
    GGMLType.F16,
    BlockFormat(1, 2, {"w": Field(0, 1, "<f2")}),
    {"w": ArrayFormat("float16", 1)},
    _dequantize_float,
)
BF16 = Format(
    GGMLType.BF16,
    BlockFormat(1, 2, {"w": Field(0, 1, "<u2")}),
    {"w": ArrayFormat("uint16", 1)},
    _dequantize_bf16,
)
