"""Q4_0, Q4_1, Q5_0 and Q5_1: 32 weights of 4 or 5 bits with a scale, and in the ``_1`` types a minimum.

``block_q4_0`` to ``block_q5_1``. Byte l of ``q`` has the low four bits of weights
l and l + 16; bit i of the word ``qh`` is the fifth bit of weight i.
"""

# NumPy leaves parts of its functions' types unknown.
# pyright: reportUnknownMemberType=false

import numpy as np

from qwen3_moe_jax.convert.formats.base import ArrayFormat, Arrays, BlockFormat, Field, Format, GGMLType

_NIBBLES = ArrayFormat("uint8", 2)
_FIFTH_BITS = ArrayFormat("uint8", 8)
_SCALE = ArrayFormat("float16", 32)


def nibbles(q: np.ndarray) -> np.ndarray:
    """uint8 [blocks, 16] to uint8 [blocks, 32]: low halves, then high ones."""
    return np.concatenate([q & 0x0F, q >> 4], axis=1)


def _five_bits(arrays: Arrays) -> np.ndarray:
    """uint8 [blocks, 32], 0 to 31."""
    return nibbles(arrays["q"]) | np.unpackbits(arrays["qh"], axis=1, bitorder="little") << 4


def _dequantize_q4_0(arrays: Arrays, out: np.ndarray) -> None:
    """``dequantize_row_q4_0``: https://github.com/ggml-org/llama.cpp/blob/0c1e57098/ggml/src/ggml-quants.c"""
    out[...] = nibbles(arrays["q"]).view(np.int8) - np.int8(8)
    out *= arrays["d"].astype(out.dtype)


def _dequantize_q5_0(arrays: Arrays, out: np.ndarray) -> None:
    """``dequantize_row_q5_0``: https://github.com/ggml-org/llama.cpp/blob/0c1e57098/ggml/src/ggml-quants.c"""
    out[...] = _five_bits(arrays).view(np.int8) - np.int8(16)
    out *= arrays["d"].astype(out.dtype)


def _scale_and_shift(arrays: Arrays, out: np.ndarray) -> None:
    """``d * q + m`` in place."""
    out *= arrays["d"].astype(out.dtype)
    out += arrays["m"].astype(out.dtype)


def _dequantize_q4_1(arrays: Arrays, out: np.ndarray) -> None:
    """``dequantize_row_q4_1``: https://github.com/ggml-org/llama.cpp/blob/0c1e57098/ggml/src/ggml-quants.c"""
    out[...] = nibbles(arrays["q"])
    _scale_and_shift(arrays, out)


def _dequantize_q5_1(arrays: Arrays, out: np.ndarray) -> None:
    """``dequantize_row_q5_1``: https://github.com/ggml-org/llama.cpp/blob/0c1e57098/ggml/src/ggml-quants.c"""
    out[...] = _five_bits(arrays)
    _scale_and_shift(arrays, out)


_D, _M = Field(0, 1, "<f2"), Field(2, 1, "<f2")

Q4_0 = Format(
    GGMLType.Q4_0,
    BlockFormat(32, 18, {"d": _D, "q": Field(2, 16, "u1")}),
    {"q": _NIBBLES, "d": _SCALE},
    _dequantize_q4_0,
    subblock=32,
    is_difference=True,
)
Q4_1 = Format(
    GGMLType.Q4_1,
    BlockFormat(32, 20, {"d": _D, "m": _M, "q": Field(4, 16, "u1")}),
    {"q": _NIBBLES, "d": _SCALE, "m": _SCALE},
    _dequantize_q4_1,
    subblock=32,
    is_difference=True,
)
Q5_0 = Format(
    GGMLType.Q5_0,
    BlockFormat(32, 22, {"d": _D, "qh": Field(2, 4, "u1"), "q": Field(6, 16, "u1")}),
    {"q": _NIBBLES, "qh": _FIFTH_BITS, "d": _SCALE},
    _dequantize_q5_0,
    subblock=32,
    is_difference=True,
)
Q5_1 = Format(
    GGMLType.Q5_1,
    BlockFormat(32, 24, {"d": _D, "m": _M, "qh": Field(4, 4, "u1"), "q": Field(8, 16, "u1")}),
    {"q": _NIBBLES, "qh": _FIFTH_BITS, "d": _SCALE, "m": _SCALE},
    _dequantize_q5_1,
    subblock=32,
    is_difference=True,
)
