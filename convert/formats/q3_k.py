"""Q3_K: 16 subblocks of 16 weights of 3 bits, with 6-bit signed scales (``block_q3_K``).

The 12 bytes of scales are spread to 16 int8, which is 3.6 % more than the file has.
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
from qwen3_moe_jax.convert.formats.q2_k import two_bits


def _unpack(blocks: np.ndarray, out: Arrays) -> None:
    """``scales``: 32 less than the file's six bits, whose upper two lie in bytes 8 to 11."""
    packed = Q3_K.block.field(blocks, "scales")
    low, high = packed[:, None, :8], packed[:, None, 8:]
    low = (low >> np.array([[0], [4]], np.uint8) & 0x0F).reshape(-1, 16)
    high = (high >> np.array([[0], [2], [4], [6]], np.uint8) & 0x03).reshape(-1, 16)
    out["scales"][...] = (low | high << 4).view(np.int8) - np.int8(32)


def _dequantize(arrays: Arrays, out: np.ndarray) -> None:
    """``dequantize_row_q3_K``: https://github.com/ggml-org/llama.cpp/blob/0c1e57098/ggml/src/ggml-quants.c

    Bit j of byte l of ``qh`` is the third bit of weight l of the j-th 32; without it a weight is 4 lower.
    """
    bits = arrays["qh"][:, None] >> np.arange(8, dtype=np.uint8)[:, None] & 1
    quants = two_bits(arrays["q"]) | (bits << 2).reshape(-1, SUPERBLOCK)
    out[...] = quants.view(np.int8) - np.int8(4)
    apply_scales(arrays, out, 16)


Q3_K = Format(
    GGMLType.Q3_K,
    BlockFormat(
        SUPERBLOCK,
        110,
        {
            "qh": Field(0, 32, "u1"),  # ``hmask``
            "q": Field(32, 64, "u1"),
            "scales": Field(96, 12, "u1"),
            "d": Field(108, 1, "<f2"),
        },
    ),
    {
        "q": ArrayFormat("uint8", 4),
        "qh": ArrayFormat("uint8", 8),
        "scales": ArrayFormat("int8", 16),
        "d": ArrayFormat("float16", 256),
    },
    _dequantize,
    _unpack,
    subblock=16,
    is_difference=True,
)
