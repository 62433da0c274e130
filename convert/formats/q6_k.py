"""Q6_K: 16 subblocks of 16 weights of 6 bits, with int8 scales (``block_q6_K``)."""

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


def _dequantize(arrays: Arrays, out: np.ndarray) -> None:
    """``dequantize_row_q6_K``: https://github.com/ggml-org/llama.cpp/blob/0c1e57098/ggml/src/ggml-quants.c

    Each half of a superblock holds four groups of 32 weights. Byte l of ``ql``
    has the low bits of groups 0 and 2, byte l + 32 those of groups 1 and 3;
    byte l of ``qh`` has two high bits for each of the four groups.
    """
    ql = arrays["ql"].reshape(-1, 2, 2, 32)
    qh = arrays["qh"].reshape(-1, 2, 32)
    groups = out.reshape(-1, 2, 4, 32)
    for group in range(4):
        low = ql[:, :, group % 2] >> 4 if group >= 2 else ql[:, :, group % 2] & 0x0F
        high = (qh >> (2 * group)) & 0x03
        groups[:, :, group] = (low | (high << 4)).view(np.int8) - np.int8(32)
    apply_scales(arrays, out, 16)


Q6_K = Format(
    GGMLType.Q6_K,
    BlockFormat(
        SUPERBLOCK,
        210,
        {
            "ql": Field(0, 128, "u1"),
            "qh": Field(128, 64, "u1"),
            "scales": Field(192, 16, "i1"),
            "d": Field(208, 1, "<f2"),
        },
    ),
    {
        "ql": ArrayFormat("uint8", 2),
        "qh": ArrayFormat("uint8", 4),
        "scales": ArrayFormat("int8", 16),
        "d": ArrayFormat("float16", 256),
    },
    _dequantize,
    subblock=16,
    is_difference=True,
)
