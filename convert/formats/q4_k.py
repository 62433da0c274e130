"""Q4_K: eight subblocks of 32 weights of 4 bits, with 6-bit scales and minimums (``block_q4_K``)."""

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

SCALE_ARRAYS = {
    "scales": ArrayFormat("uint8", 32),
    "mins": ArrayFormat("uint8", 32),
    "d": ArrayFormat("float16", 256),
    "dmin": ArrayFormat("float16", 256),
}
"""Of Q4_K and Q5_K: the 12 bytes of 6-bit scales and minimums are spread to one byte each."""

SCALE_FIELDS = {
    "d": Field(0, 1, "<f2"),
    "dmin": Field(2, 1, "<f2"),
    "scales": Field(4, 12, "u1"),  # 8 six-bit scales and 8 six-bit mins
}


def spread_scales(packed: np.ndarray, scales: np.ndarray, mins: np.ndarray) -> None:
    """Spreads the 12 bytes of 6-bit scales and mins of Q4_K and Q5_K to one byte each.

    ``get_scale_min_k4`` in
    https://github.com/ggml-org/llama.cpp/blob/0c1e57098/ggml/src/ggml-quants.c:
    bytes 0-3 and 4-7 hold scales 0-3 and mins 0-3 in their low six bits and the
    top two bits of scales and mins 4-7 above them; bytes 8-11 hold the low four
    bits of both. Four bytes at a time, as the lanes of one 32-bit word.

    Args:
      packed: uint8 [blocks, 12].
      scales: uint8 [blocks, 8], written.
      mins: uint8 [blocks, 8], written.
    """
    low_scales, low_mins, high = np.ascontiguousarray(packed).view("<u4").T
    scale_words, min_words = scales.view("<u4"), mins.view("<u4")
    scale_words[:, 0] = low_scales & 0x3F3F3F3F
    scale_words[:, 1] = (high & 0x0F0F0F0F) | ((low_scales >> 2) & 0x30303030)
    min_words[:, 0] = low_mins & 0x3F3F3F3F
    min_words[:, 1] = ((high >> 4) & 0x0F0F0F0F) | ((low_mins >> 2) & 0x30303030)


def apply_scales_and_mins(arrays: Arrays, out: np.ndarray) -> None:
    """``(d * scale) * q - (dmin * min)`` in place, each product rounded as ggml does."""
    subblocks = out.reshape(-1, 8, 32)
    subblocks *= (arrays["d"].astype(out.dtype) * arrays["scales"])[:, :, None]
    subblocks -= (arrays["dmin"].astype(out.dtype) * arrays["mins"])[:, :, None]


def unpack_scales(blocks: np.ndarray, out: Arrays) -> None:
    """``scales`` and ``mins`` of blocks of Q4_K or Q5_K."""
    first, end = SCALE_FIELDS["scales"].offset, SCALE_FIELDS["scales"].offset + 12
    spread_scales(blocks[:, first:end], out["scales"], out["mins"])


def _dequantize(arrays: Arrays, out: np.ndarray) -> None:
    """``dequantize_row_q4_K``: https://github.com/ggml-org/llama.cpp/blob/0c1e57098/ggml/src/ggml-quants.c"""
    q = arrays["q"].reshape(-1, 4, 32)
    halves = out.reshape(-1, 4, 2, 32)
    halves[:, :, 0] = q & 0x0F
    halves[:, :, 1] = q >> 4
    apply_scales_and_mins(arrays, out)


Q4_K = Format(
    GGMLType.Q4_K,
    BlockFormat(SUPERBLOCK, 144, {**SCALE_FIELDS, "q": Field(16, 128, "u1")}),
    {"q": ArrayFormat("uint8", 2), **SCALE_ARRAYS},
    _dequantize,
    unpack_scales,
    subblock=32,
    is_difference=True,
)
