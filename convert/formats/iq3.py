"""IQ3_S and IQ3_XXS: four weights have one point of a grid, a sign each, and 32 share a scale.

Blocks: https://github.com/ggml-org/ggml/blob/d99724f2b/src/ggml-common.h (``block_iq3_s``,
``block_iq3_xxs``).
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
)
from qwen3_moe_jax.convert.formats.grids import GRIDS, SIGNS, spread_signs

_SCALE = ArrayFormat("float16", 256)


def half_bytes(packed: np.ndarray) -> np.ndarray:
    """uint8 [blocks, n] to uint8 [blocks, 2 n]: of each byte the low half, then the high one."""
    return (packed[:, :, None] >> np.array([0, 4], np.uint8) & 0x0F).reshape(len(packed), -1)


def shared_signs(words: np.ndarray) -> np.ndarray:
    """Sign bytes uint8 [blocks, 32] of words uint32 [blocks, 8]: four times seven bits each."""
    seven = words[:, :, None] >> np.array([0, 7, 14, 21], np.uint32) & 0x7F
    return SIGNS[seven.reshape(len(words), -1)]


def signed_points(grid: np.ndarray, index: np.ndarray, signs: np.ndarray) -> np.ndarray:
    """int8 [blocks, 256]: points of a grid by index, with sign bytes uint8 [blocks, 32]."""
    return grid[index].reshape(len(index), -1) * spread_signs(signs)


def scaled(out: np.ndarray, points: np.ndarray, scales: np.ndarray) -> None:
    """``out = points * scales``, each scale for as many weights; in ``out``'s dtype."""
    out[...] = points
    out.reshape(*scales.shape, -1)[...] *= scales[:, :, None]


def odd_halves(arrays: Arrays, scales: np.ndarray, dtype: np.dtype, unit: float) -> np.ndarray:
    """``d * (0.5 + scale) * unit``, as IQ2 and IQ3_XXS have it."""
    return arrays["d"].astype(dtype) * (dtype.type(0.5) + scales.astype(dtype)) * dtype.type(unit)


def _dequantize_s(arrays: Arrays, out: np.ndarray) -> None:
    """``dequantize_row_iq3_s``: https://github.com/ggml-org/ggml/blob/d99724f2b/src/ggml-quants.c

    Bit j of byte b of ``qh`` is the ninth bit of index 8 b + j.
    """
    ninth = np.unpackbits(arrays["qh"], axis=1, bitorder="little").astype(np.uint16) << 8
    points = signed_points(GRIDS["IQ3_S"], arrays["q"] | ninth, arrays["signs"])
    scales = 1 + 2 * half_bytes(arrays["scales"])
    scaled(out, points, arrays["d"].astype(out.dtype) * scales)


def _dequantize_xxs(arrays: Arrays, out: np.ndarray) -> None:
    """``dequantize_row_iq3_xxs``: https://github.com/ggml-org/ggml/blob/d99724f2b/src/ggml-quants.c"""
    points = signed_points(GRIDS["IQ3_XXS"], arrays["q"], shared_signs(arrays["signs"]))
    scaled(out, points, odd_halves(arrays, arrays["signs"] >> 28, out.dtype, 0.5))


IQ3_S = Format(
    GGMLType.IQ3_S,
    BlockFormat(
        SUPERBLOCK,
        110,
        {
            "d": Field(0, 1, "<f2"),
            "q": Field(2, 64, "u1"),
            "qh": Field(66, 8, "u1"),
            "signs": Field(74, 32, "u1"),
            "scales": Field(106, 4, "u1"),
        },
    ),
    {
        "q": ArrayFormat("uint8", 4),
        "qh": ArrayFormat("uint8", 32),
        "signs": ArrayFormat("uint8", 8),
        "scales": ArrayFormat("uint8", 64),
        "d": _SCALE,
    },
    _dequantize_s,
    subblock=32,
)
IQ3_XXS = Format(
    GGMLType.IQ3_XXS,
    BlockFormat(
        SUPERBLOCK,
        98,
        {
            "d": Field(0, 1, "<f2"),
            "q": Field(2, 64, "u1"),
            "signs": Field(66, 8, "<u4"),  # four times seven signs, and four bits of scale
        },
    ),
    {"q": ArrayFormat("uint8", 4), "signs": ArrayFormat("uint32", 32), "d": _SCALE},
    _dequantize_xxs,
    subblock=32,
)
