"""IQ2_S, IQ2_XS and IQ2_XXS: eight weights have one point of a grid and a sign each; 16 or 32 share a scale.

Blocks: https://github.com/ggml-org/ggml/blob/d99724f2b/src/ggml-common.h (``block_iq2_s``, ``block_iq2_xs``,
``block_iq2_xxs``).
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
from qwen3_moe_jax.convert.formats.grids import GRIDS, SIGNS
from qwen3_moe_jax.convert.formats.iq3 import half_bytes, odd_halves, scaled, shared_signs, signed_points

_SCALE = ArrayFormat("float16", 256)


def _dequantize_s(arrays: Arrays, out: np.ndarray) -> None:
    """``dequantize_row_iq2_s``: https://github.com/ggml-org/ggml/blob/d99724f2b/src/ggml-quants.c

    Two bits of byte b of ``qh`` are the upper ones of each of the indices 4 b to 4 b + 3.
    """
    high = (arrays["qh"][:, :, None] >> np.array([0, 2, 4, 6], np.uint8) & 3).astype(np.uint16) << 8
    index = arrays["q"] | high.reshape(-1, 32)
    points = signed_points(GRIDS["IQ2_S"], index, arrays["signs"])
    scaled(out, points, odd_halves(arrays, half_bytes(arrays["scales"]), out.dtype, 0.25))


def _dequantize_xs(arrays: Arrays, out: np.ndarray) -> None:
    """``dequantize_row_iq2_xs``: https://github.com/ggml-org/ggml/blob/d99724f2b/src/ggml-quants.c"""
    points = signed_points(GRIDS["IQ2_XS"], arrays["q"] & 511, SIGNS[arrays["q"] >> 9])
    scaled(out, points, odd_halves(arrays, half_bytes(arrays["scales"]), out.dtype, 0.25))


def _unpack_xxs(blocks: np.ndarray, out: Arrays) -> None:
    """The file has four bytes of indices and the word of their signs in turn."""
    pairs = IQ2_XXS.block.field(blocks, "pairs").reshape(-1, 8, 2)
    out["q"][...] = np.ascontiguousarray(pairs[:, :, 0]).view(np.uint8)
    out["signs"][...] = pairs[:, :, 1]


def _dequantize_xxs(arrays: Arrays, out: np.ndarray) -> None:
    """``dequantize_row_iq2_xxs``: https://github.com/ggml-org/ggml/blob/d99724f2b/src/ggml-quants.c"""
    points = signed_points(GRIDS["IQ2_XXS"], arrays["q"], shared_signs(arrays["signs"]))
    scaled(out, points, odd_halves(arrays, arrays["signs"] >> 28, out.dtype, 0.25))


IQ2_S = Format(
    GGMLType.IQ2_S,
    BlockFormat(
        SUPERBLOCK,
        82,
        {
            "d": Field(0, 1, "<f2"),
            "q": Field(2, 32, "u1"),
            "signs": Field(34, 32, "u1"),  # the second half of ``qs``
            "qh": Field(66, 8, "u1"),
            "scales": Field(74, 8, "u1"),
        },
    ),
    {
        "q": ArrayFormat("uint8", 8),
        "signs": ArrayFormat("uint8", 8),
        "qh": ArrayFormat("uint8", 32),
        "scales": ArrayFormat("uint8", 32),
        "d": _SCALE,
    },
    _dequantize_s,
    subblock=16,
)
IQ2_XS = Format(
    GGMLType.IQ2_XS,
    BlockFormat(
        SUPERBLOCK,
        74,
        {
            "d": Field(0, 1, "<f2"),
            "q": Field(2, 32, "<u2"),  # nine bits of index, seven of signs
            "scales": Field(66, 8, "u1"),
        },
    ),
    {"q": ArrayFormat("uint16", 8), "scales": ArrayFormat("uint8", 32), "d": _SCALE},
    _dequantize_xs,
    subblock=16,
)
IQ2_XXS = Format(
    GGMLType.IQ2_XXS,
    BlockFormat(SUPERBLOCK, 66, {"d": Field(0, 1, "<f2"), "pairs": Field(2, 16, "<u4")}),
    {"q": ArrayFormat("uint8", 8), "signs": ArrayFormat("uint32", 32), "d": _SCALE},
    _dequantize_xxs,
    _unpack_xxs,
    subblock=32,
)
