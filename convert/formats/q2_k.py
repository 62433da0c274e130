"""Q2_K: 16 subblocks of 16 weights of 2 bits, with 4-bit scales and minimums (``block_q2_K``)."""

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


def two_bits(q: np.ndarray) -> np.ndarray:
    """uint8 [blocks, 64] to uint8 [blocks, 256]: bits 2 s of 32 bytes are the s-th 32 weights of 128."""
    shifts = np.array([[0], [2], [4], [6]], np.uint8)
    return (q.reshape(-1, 2, 1, 32) >> shifts & 3).reshape(-1, SUPERBLOCK)


def _dequantize(arrays: Arrays, out: np.ndarray) -> None:
    """``dequantize_row_q2_K``: https://github.com/ggml-org/llama.cpp/blob/0c1e57098/ggml/src/ggml-quants.c"""
    out[...] = two_bits(arrays["q"])
    scales = arrays["scales"]
    subblocks = out.reshape(-1, 16, 16)
    subblocks *= (arrays["d"].astype(out.dtype) * (scales & 0x0F))[:, :, None]
    subblocks -= (arrays["dmin"].astype(out.dtype) * (scales >> 4))[:, :, None]


Q2_K = Format(
    GGMLType.Q2_K,
    BlockFormat(
        SUPERBLOCK,
        84,
        {
            "scales": Field(0, 16, "u1"),  # low four bits the scale, high four the minimum
            "q": Field(16, 64, "u1"),
            "d": Field(80, 1, "<f2"),
            "dmin": Field(82, 1, "<f2"),
        },
    ),
    {
        "q": ArrayFormat("uint8", 4),
        "scales": ArrayFormat("uint8", 16),
        "d": ArrayFormat("float16", 256),
        "dmin": ArrayFormat("float16", 256),
    },
    _dequantize,
    subblock=16,
    is_difference=True,
)
