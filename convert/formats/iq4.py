"""IQ4_NL and IQ4_XS: four bits choose one of 16 values that are closer together near zero.

``block_iq4_nl`` has a float16 scale for 32 weights; ``block_iq4_xs`` has 6-bit signed
scales under one float16 for 256, which are spread to 8 int8: 1.5 % more than the file has.
"""

import numpy as np

from qwen3_moe_jax.convert.formats.base import (
    SUPERBLOCK,
    ArrayFormat,
    Arrays,
    BlockFormat,
    Field,
    Format,
    GGMLType,
    apply_scales,
)
from qwen3_moe_jax.convert.formats.legacy import nibbles

VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
"""``kvalues_iq4nl``: https://github.com/ggml-org/llama.cpp/blob/0c1e57098/ggml/src/ggml-common.h"""

_TABLE = np.array(VALUES, np.int8)


def _dequantize_nl(arrays: Arrays, out: np.ndarray) -> None:
    """``dequantize_row_iq4_nl``: https://github.com/ggml-org/llama.cpp/blob/0c1e57098/ggml/src/ggml-quants.c"""
    out[...] = _TABLE[nibbles(arrays["q"])]
    out *= arrays["d"].astype(out.dtype)


def _unpack_xs(blocks: np.ndarray, out: Arrays) -> None:
    """``scales``: 32 less than the file's six bits, whose upper two are pairs of bits of a word."""
    low, high = (IQ4_XS.block.field(blocks, name) for name in ("scales_l", "scales_h"))
    low = (low[:, :, None] >> np.array([0, 4], np.uint8) & 0x0F).reshape(-1, 8)
    high = (high >> np.arange(0, 16, 2, dtype=np.uint16) & 0x03).astype(np.uint8)
    out["scales"][...] = (low | high << 4).view(np.int8) - np.int8(32)


def _dequantize_xs(arrays: Arrays, out: np.ndarray) -> None:
    """``dequantize_row_iq4_xs``: https://github.com/ggml-org/llama.cpp/blob/0c1e57098/ggml/src/ggml-quants.c"""
    out.reshape(-1, 32)[...] = _TABLE[nibbles(arrays["q"].reshape(-1, 16))]
    apply_scales(arrays, out, 32)


IQ4_NL = Format(
    GGMLType.IQ4_NL,
    BlockFormat(32, 18, {"d": Field(0, 1, "<f2"), "q": Field(2, 16, "u1")}),
    {"q": ArrayFormat("uint8", 2), "d": ArrayFormat("float16", 32)},
    _dequantize_nl,
    subblock=32,
)
IQ4_XS = Format(
    GGMLType.IQ4_XS,
    BlockFormat(
        SUPERBLOCK,
        136,
        {
            "d": Field(0, 1, "<f2"),
            "scales_h": Field(2, 1, "<u2"),
            "scales_l": Field(4, 4, "u1"),
            "q": Field(8, 128, "u1"),
        },
    ),
    {
        "q": ArrayFormat("uint8", 2),
        "scales": ArrayFormat("int8", 32),
        "d": ArrayFormat("float16", 256),
    },
    _dequantize_xs,
    _unpack_xs,
    subblock=32,
)
