"""TQ1_0 and TQ2_0: weights are -1, 0 or 1 times one scale for 256.

Blocks: https://github.com/ggml-org/ggml/blob/d99724f2b/src/ggml-common.h (``block_tq1_0``, ``block_tq2_0``).
A byte of TQ1_0 holds five weights as digits of base three: 32 bytes for weights 0 to 159, 16 bytes for the
next 80, and 4 bytes of four weights for the rest. They are three arrays here.
"""

# NumPy leaves parts of its functions' types unknown.
# pyright: reportUnknownMemberType=false

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
from qwen3_moe_jax.convert.formats.q2_k import two_bits

POWERS = (1, 3, 9, 27, 81)
"""The n-th digit is the whole part of 3/256 of a byte times the n-th power, modulo 256."""

_SCALE = ArrayFormat("float16", 256)


def _digits(q: np.ndarray, count: int) -> np.ndarray:
    """uint8 [blocks, n] to uint8 [blocks, count * n], 0 to 2: all first digits, then the second."""
    shifted = q[:, None, :] * np.array(POWERS[:count], np.uint8)[:, None]
    return (shifted.astype(np.uint16) * 3 >> 8).astype(np.uint8).reshape(len(q), -1)


def _dequantize_tq1(arrays: Arrays, out: np.ndarray) -> None:
    """``dequantize_row_tq1_0``: https://github.com/ggml-org/ggml/blob/d99724f2b/src/ggml-quants.c"""
    parts = (_digits(arrays["q"], 5), _digits(arrays["q16"], 5), _digits(arrays["qh"], 4))
    out[...] = np.concatenate(parts, axis=1).view(np.int8) - np.int8(1)
    out *= arrays["d"].astype(out.dtype)


def _dequantize_tq2(arrays: Arrays, out: np.ndarray) -> None:
    """``dequantize_row_tq2_0``: https://github.com/ggml-org/ggml/blob/d99724f2b/src/ggml-quants.c"""
    out[...] = two_bits(arrays["q"]).view(np.int8) - np.int8(1)
    out *= arrays["d"].astype(out.dtype)


TQ1_0 = Format(
    GGMLType.TQ1_0,
    BlockFormat(
        SUPERBLOCK,
        54,
        {
            "q": Field(0, 32, "u1"),
            "q16": Field(32, 16, "u1"),  # the rest of ``qs``
            "qh": Field(48, 4, "u1"),
            "d": Field(52, 1, "<f2"),
        },
    ),
    {
        "q": ArrayFormat("uint8", 8),
        "q16": ArrayFormat("uint8", 16),
        "qh": ArrayFormat("uint8", 64),
        "d": _SCALE,
    },
    _dequantize_tq1,
    subblock=256,
)
TQ2_0 = Format(
    GGMLType.TQ2_0,
    BlockFormat(SUPERBLOCK, 66, {"q": Field(0, 64, "u1"), "d": Field(64, 1, "<f2")}),
    {"q": ArrayFormat("uint8", 4), "d": _SCALE},
    _dequantize_tq2,
    subblock=256,
)
