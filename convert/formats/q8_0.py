"""Q8_0: 32 int8 with one float16 scale (``block_q8_0``)."""

import numpy as np

from qwen3_moe_jax.convert.formats.base import ArrayFormat, Arrays, BlockFormat, Field, Format, GGMLType


def _dequantize(arrays: Arrays, out: np.ndarray) -> None:
    """``dequantize_row_q8_0``: https://github.com/ggml-org/llama.cpp/blob/0c1e57098/ggml/src/ggml-quants.c"""
    out[...] = arrays["q"]
    out *= arrays["d"].astype(out.dtype)


Q8_0 = Format(
    GGMLType.Q8_0,
    BlockFormat(32, 34, {"d": Field(0, 1, "<f2"), "q": Field(2, 32, "i1")}),
    {"q": ArrayFormat("int8", 1), "d": ArrayFormat("float16", 32)},
    _dequantize,
    subblock=32,
)
