"""IQ1_S and IQ1_M: eight weights have one point of a grid of -1, 0 and 1, all moved by an eighth.

Blocks: https://github.com/ggml-org/ggml/blob/d99724f2b/src/ggml-common.h (``block_iq1_s``, ``block_iq1_m``).
IQ1_M spreads its float16 scale over the top four bits of four words. It is an array of its own here, beside
the words: 3.6 % more than the file has.
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
from qwen3_moe_jax.convert.formats.grids import GRIDS
from qwen3_moe_jax.convert.formats.iq3 import half_bytes, scaled

DELTA = 0.125
"""``IQ1S_DELTA`` and ``IQ1M_DELTA``."""

_SCALE = ArrayFormat("float16", 256)


def _moved_points(index: np.ndarray, is_down: np.ndarray, out: np.ndarray) -> np.ndarray:
    """``grid + delta`` [blocks, 256] of indices [blocks, 32], and whether each point is moved down."""
    delta = np.where(is_down, -DELTA, DELTA).astype(out.dtype)
    return (GRIDS["IQ1"][index] + delta[:, :, None]).reshape(out.shape)


def _dequantize_s(arrays: Arrays, out: np.ndarray) -> None:
    """``dequantize_row_iq1_s``: https://github.com/ggml-org/ggml/blob/d99724f2b/src/ggml-quants.c

    A word of ``qh``: three upper bits of four indices, three bits of scale, and whether delta is negative.
    """
    words = arrays["qh"]
    high = (words[:, :, None] >> np.array([0, 3, 6, 9], np.uint16) & 7).reshape(-1, 32) << 8
    points = _moved_points(arrays["q"] | high, np.repeat(words >> 15 != 0, 4, axis=1), out)
    scaled(out, points, arrays["d"].astype(out.dtype) * (2 * (words >> 12 & 7) + 1))


def _unpack_m(blocks: np.ndarray, out: Arrays) -> None:
    """``d``: the top four bits of the four words of scales, the first word's lowest (``iq1m_scale_t``)."""
    words = IQ1_M.block.field(blocks, "scales").view("<u2")
    fours = words >> 12 << np.arange(0, 16, 4, dtype=np.uint16)
    out["d"][...] = np.bitwise_or.reduce(fours, axis=1, keepdims=True).view(np.float16)


def three_bit_scales(scales: np.ndarray) -> np.ndarray:
    """uint16 [blocks, 16] of IQ1_M's bytes uint8 [blocks, 8]: four times three bits of each word."""
    words = np.ascontiguousarray(scales).view("<u2")
    return (words[:, :, None] >> np.array([0, 3, 6, 9], np.uint16) & 7).reshape(len(scales), -1)


def _dequantize_m(arrays: Arrays, out: np.ndarray) -> None:
    """``dequantize_row_iq1_m``: https://github.com/ggml-org/ggml/blob/d99724f2b/src/ggml-quants.c

    Four bits of ``qh`` are three upper bits of an index, and whether its delta is negative.
    """
    fours = half_bytes(arrays["qh"])
    points = _moved_points(arrays["q"] | (fours & 7).astype(np.uint16) << 8, fours >> 3 != 0, out)
    scaled(out, points, arrays["d"].astype(out.dtype) * (2 * three_bit_scales(arrays["scales"]) + 1))


IQ1_S = Format(
    GGMLType.IQ1_S,
    BlockFormat(
        SUPERBLOCK,
        50,
        {"d": Field(0, 1, "<f2"), "q": Field(2, 32, "u1"), "qh": Field(34, 8, "<u2")},
    ),
    {"q": ArrayFormat("uint8", 8), "qh": ArrayFormat("uint16", 32), "d": _SCALE},
    _dequantize_s,
    subblock=32,
)
IQ1_M = Format(
    GGMLType.IQ1_M,
    BlockFormat(
        SUPERBLOCK,
        56,
        {"q": Field(0, 32, "u1"), "qh": Field(32, 16, "u1"), "scales": Field(48, 8, "u1")},
    ),
    {
        "q": ArrayFormat("uint8", 8),
        "qh": ArrayFormat("uint8", 16),
        "scales": ArrayFormat("uint8", 32),
        "d": _SCALE,
    },
    _dequantize_m,
    _unpack_m,
    subblock=16,
)
