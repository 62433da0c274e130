"""Q5_K: as Q4_K, with a fifth bit for every weight (``block_q5_K``)."""

import numpy as np

from qwen3_moe_jax.convert.formats.base import (
    SUPERBLOCK,
    ArrayFormat,
    Arrays,
    BlockFormat,
    Field,
    Format,
    GGMLType,
)
from qwen3_moe_jax.convert.formats.q4_k import (
    SCALE_ARRAYS,
    SCALE_FIELDS,
    apply_scales_and_mins,
    unpack_scales,
)


def _dequantize(arrays: Arrays, out: np.ndarray) -> None:
    """``dequantize_row_q5_K``: https://github.com/ggml-org/llama.cpp/blob/0c1e57098/ggml/src/ggml-quants.c"""
    q = arrays["q"].reshape(-1, 4, 32)
    halves = out.reshape(-1, 4, 2, 32)
    # Bit j of high byte l is the fifth bit of weight l of subblock j.
    for pair in range(4):
        halves[:, pair, 0] = (q[:, pair] & 0x0F) | ((arrays["qh"] >> (2 * pair) & 1) << 4)
        halves[:, pair, 1] = (q[:, pair] >> 4) | ((arrays["qh"] >> (2 * pair + 1) & 1) << 4)
    apply_scales_and_mins(arrays, out)


Q5_K = Format(
    GGMLType.Q5_K,
    BlockFormat(SUPERBLOCK, 176, {**SCALE_FIELDS, "qh": Field(16, 32, "u1"), "q": Field(48, 128, "u1")}),
    {"q": ArrayFormat("uint8", 2), "qh": ArrayFormat("uint8", 8), **SCALE_ARRAYS},
    _dequantize,
    unpack_scales,
    subblock=32,
    is_difference=True,
)
