"""MXFP4: four bits choose one of 16 values of E2M1, and 32 weights share a power of two (``block_mxfp4``).

Block: https://github.com/ggml-org/ggml/blob/d99724f2b/src/ggml-common.h (``block_mxfp4``, ``kvalues_fp4``).
"""

# NumPy leaves parts of its functions' types unknown.
# pyright: reportUnknownMemberType=false

import numpy as np

from qwen3_moe_jax.convert.formats.base import ArrayFormat, Arrays, BlockFormat, Field, Format, GGMLType
from qwen3_moe_jax.convert.formats.legacy import nibbles

FP4_VALUES = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
"""E2M1 times two, so that they are integers; the scale is half of E8M0's."""

MAX_EXPONENT = 252
"""The largest ``e`` whose weights are finite: 255 is E8M0's NaN, and 12 times the scale of 253 overflows."""

_TABLE = np.array(FP4_VALUES, np.int8)


def half_power(e: np.ndarray) -> np.ndarray:
    """float32 ``2^(e - 128)`` of uint8 (``ggml_e8m0_to_fp32_half`` in ``src/ggml-impl.h``)."""
    wide = e.astype(np.uint32)
    bits = np.where(wide < 2, np.uint32(0x00200000) << np.minimum(wide, 1), (np.maximum(wide, 1) - 1) << 23)
    return bits.astype(np.uint32).view(np.float32)


def _dequantize(arrays: Arrays, out: np.ndarray) -> None:
    """``dequantize_row_mxfp4``: https://github.com/ggml-org/ggml/blob/d99724f2b/src/ggml-quants.c"""
    out[...] = _TABLE[nibbles(arrays["q"])]
    out *= half_power(arrays["e"]).astype(out.dtype)


MXFP4 = Format(
    GGMLType.MXFP4,
    BlockFormat(32, 17, {"e": Field(0, 1, "u1"), "q": Field(1, 16, "u1")}),
    {"q": ArrayFormat("uint8", 2), "e": ArrayFormat("uint8", 32)},
    _dequantize,
    subblock=32,
)
