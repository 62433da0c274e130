"""A second, independent reading of quantized blocks, straight from a file's bytes.

``qwen3_moe_jax.convert.unpack`` spreads a block's fields over arrays and computes from those.
Here one table says, for weight i of a block, in which byte and bits its parts
are. Two programs that share nothing agree on every bit, or one of them is wrong.

Offsets and formulas: ggml's ``dequantize_row_*`` at llama.cpp 0c1e57098,
https://github.com/ggml-org/llama.cpp/blob/0c1e57098/ggml/src/ggml-quants.c
"""

from collections.abc import Callable

import numpy as np

from qwen3_moe_jax.convert.formats.grids import GRIDS
from qwen3_moe_jax.convert.ggml_types import BLOCK_FORMATS, GGMLType

_I = np.arange(256)
_SUBBLOCK = _I // 32


def read_blocks(raw: np.ndarray, type: GGMLType) -> np.ndarray:
    """Weights float32 [blocks, weights of a block] of raw bytes uint8 [blocks * bytes of a block]."""
    blocks = raw.reshape(-1, BLOCK_FORMATS[type].nbytes)
    with np.errstate(invalid="ignore", over="ignore"):
        return _READERS[type](blocks)


def _half(blocks: np.ndarray, offset: int) -> np.ndarray:
    """The float16 at a byte offset of each block, as float32 [blocks, 1]."""
    bits = blocks[:, offset].astype(np.uint16) | blocks[:, offset + 1].astype(np.uint16) << 8
    return bits.view(np.float16).astype(np.float32)[:, None]


def _scale_and_min(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The 6-bit scale and min of every weight's subblock, out of bytes 4..15 (``get_scale_min_k4``)."""
    table = blocks[:, 4:16]
    scales, mins = [], []
    for j in range(8):
        if j < 4:
            scales.append(table[:, j] & 63)
            mins.append(table[:, j + 4] & 63)
        else:
            scales.append(table[:, j + 4] & 15 | table[:, j - 4] >> 6 << 4)
            mins.append(table[:, j + 4] >> 4 | table[:, j] >> 6 << 4)
    pick = lambda rows: np.stack(rows, axis=1)[:, _SUBBLOCK].astype(np.float32)
    return pick(scales), pick(mins)


def _nibbles(blocks: np.ndarray, offset: int) -> np.ndarray:
    """Four bits of every weight: two subblocks of 32 share 32 bytes."""
    shift = (4 * (_SUBBLOCK % 2)).astype(np.uint8)
    return blocks[:, offset + 32 * (_I // 64) + _I % 32] >> shift & 15


def _k_quant(blocks: np.ndarray, quants: np.ndarray) -> np.ndarray:
    scale, low_end = _scale_and_min(blocks)
    return _half(blocks, 0) * scale * quants.astype(np.float32) - _half(blocks, 2) * low_end


def _q4_k(blocks: np.ndarray) -> np.ndarray:
    return _k_quant(blocks, _nibbles(blocks, 16))


def _q5_k(blocks: np.ndarray) -> np.ndarray:
    fifth = blocks[:, 16 + _I % 32] >> _SUBBLOCK.astype(np.uint8) & 1
    return _k_quant(blocks, _nibbles(blocks, 48) | fifth << 4)


def _q6_k(blocks: np.ndarray) -> np.ndarray:
    half, group, lane = _I // 128, _I % 128 // 32, _I % 32
    low = blocks[:, 64 * half + 32 * (group % 2) + lane] >> (4 * (group // 2)).astype(np.uint8) & 15
    high = blocks[:, 128 + 32 * half + lane] >> (2 * group).astype(np.uint8) & 3
    scale = blocks[:, 192 + 8 * half + 2 * group + lane // 16].view(np.int8).astype(np.float32)
    return _half(blocks, 208) * scale * ((low | high << 4).astype(np.float32) - 32)


def _q8_0(blocks: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(blocks[:, 2:]).view(np.int8).astype(np.float32) * _half(blocks, 0)


def _q2_k(blocks: np.ndarray) -> np.ndarray:
    low = blocks[:, 16 + 32 * (_I // 128) + _I % 32] >> (2 * (_SUBBLOCK % 4)).astype(np.uint8) & 3
    both = blocks[:, _I // 16]
    scale, low_end = ((both & 15).astype(np.float32), (both >> 4).astype(np.float32))
    return _half(blocks, 80) * scale * low.astype(np.float32) - _half(blocks, 82) * low_end


def _q3_k(blocks: np.ndarray) -> np.ndarray:
    low = blocks[:, 32 + 32 * (_I // 128) + _I % 32] >> (2 * (_SUBBLOCK % 4)).astype(np.uint8) & 3
    third = blocks[:, _I % 32] >> _SUBBLOCK.astype(np.uint8) & 1
    j = _I // 16
    four = blocks[:, 96 + j % 8] >> (4 * (j // 8)).astype(np.uint8) & 15
    two = blocks[:, 104 + j % 4] >> (2 * (j // 4)).astype(np.uint8) & 3
    scale = four.astype(np.float32) + 16 * two.astype(np.float32) - 32
    return _half(blocks, 108) * scale * (low.astype(np.float32) + 4 * third.astype(np.float32) - 4)


_CURVE = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32)


def _iq4_xs(blocks: np.ndarray) -> np.ndarray:
    four = blocks[:, 4 + _SUBBLOCK // 2] >> (4 * (_SUBBLOCK % 2)).astype(np.uint8) & 15
    two = blocks[:, 2 + _SUBBLOCK // 4] >> (2 * (_SUBBLOCK % 4)).astype(np.uint8) & 3
    scale = four.astype(np.float32) + 16 * two.astype(np.float32) - 32
    nibble = blocks[:, 8 + 16 * _SUBBLOCK + _I % 16] >> (4 * (_I % 32 // 16)).astype(np.uint8) & 15
    return _half(blocks, 0) * scale * _CURVE[nibble]


def _legacy_quants(blocks: np.ndarray, nibbles: int, high: int | None = None) -> np.ndarray:
    """Quants [blocks, 32]: nibbles from one byte offset, fifth bits from another."""
    i = np.arange(32)
    quants = blocks[:, nibbles + i % 16] >> (4 * (i // 16)).astype(np.uint8) & 15
    if high is not None:
        quants = quants | (blocks[:, high + i // 8] >> (i % 8).astype(np.uint8) & 1) << 4
    return quants


def _iq4_nl(blocks: np.ndarray) -> np.ndarray:
    return _half(blocks, 0) * _CURVE[_legacy_quants(blocks, 2)]


def _q4_0(blocks: np.ndarray) -> np.ndarray:
    return _half(blocks, 0) * (_legacy_quants(blocks, 2).astype(np.float32) - 8)


def _q4_1(blocks: np.ndarray) -> np.ndarray:
    return _half(blocks, 0) * _legacy_quants(blocks, 4).astype(np.float32) + _half(blocks, 2)


def _q5_0(blocks: np.ndarray) -> np.ndarray:
    return _half(blocks, 0) * (_legacy_quants(blocks, 6, 2).astype(np.float32) - 16)


def _q5_1(blocks: np.ndarray) -> np.ndarray:
    return _half(blocks, 0) * _legacy_quants(blocks, 8, 4).astype(np.float32) + _half(blocks, 2)


def _mxfp4(blocks: np.ndarray) -> np.ndarray:
    values = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.float32)
    return values[_legacy_quants(blocks, 1)] * np.ldexp(np.float32(1), blocks[:, :1].astype(np.int32) - 128)


def _bits(blocks: np.ndarray, offset: int, first: np.ndarray, count: int) -> np.ndarray:
    """``count`` bits, at most 16, from bit ``first`` of the bytes at an offset: int64 [blocks, n]."""
    low = offset + first // 8
    word = sum(
        blocks[:, np.minimum(low + i, blocks.shape[1] - 1)].astype(np.int64) << (8 * i) for i in range(3)
    )
    return word >> (first % 8) & ((1 << count) - 1)


def _signs(blocks: np.ndarray, offset: int, first: np.ndarray) -> np.ndarray:
    """1 or -1: bit ``_I % 8`` of seven bits from ``first``, the eighth their parity."""
    seven = _bits(blocks, offset, first, 7)
    odd = sum(seven >> i & 1 for i in range(7)) & 1
    return 1 - 2 * ((seven | odd << 7) >> (_I % 8) & 1).astype(np.float32)


def _plain_signs(blocks: np.ndarray, offset: int) -> np.ndarray:
    return 1 - 2 * _bits(blocks, offset, _I, 1).astype(np.float32)


def _point(grid: str, index: np.ndarray) -> np.ndarray:
    """The weights' values [blocks, 256] in their points."""
    points = GRIDS[grid]
    return points[index, _I % points.shape[1]].astype(np.float32)


def _iq3_s(blocks: np.ndarray) -> np.ndarray:
    index = _bits(blocks, 2, _I // 4 * 8, 8) | _bits(blocks, 66, _I // 4, 1) << 8
    scale = 1 + 2 * _bits(blocks, 106, _SUBBLOCK * 4, 4).astype(np.float32)
    return _half(blocks, 0) * scale * _point("IQ3_S", index) * _plain_signs(blocks, 74)


def _iq3_xxs(blocks: np.ndarray) -> np.ndarray:
    scale = 0.5 + _bits(blocks, 66, _SUBBLOCK * 32 + 28, 4).astype(np.float32)
    signs = _signs(blocks, 66, _SUBBLOCK * 32 + _I % 32 // 8 * 7)
    points = _point("IQ3_XXS", _bits(blocks, 2, _I // 4 * 8, 8))
    return _half(blocks, 0) * scale * np.float32(0.5) * points * signs


def _iq2_s(blocks: np.ndarray) -> np.ndarray:
    index = _bits(blocks, 2, _I // 8 * 8, 8) | _bits(blocks, 66, _I // 8 * 2, 2) << 8
    scale = 0.5 + _bits(blocks, 74, _I // 16 * 4, 4).astype(np.float32)
    return _half(blocks, 0) * scale / 4 * _point("IQ2_S", index) * _plain_signs(blocks, 34)


def _iq2_xs(blocks: np.ndarray) -> np.ndarray:
    scale = 0.5 + _bits(blocks, 66, _I // 16 * 4, 4).astype(np.float32)
    points = _point("IQ2_XS", _bits(blocks, 2, _I // 8 * 16, 9))
    return _half(blocks, 0) * scale / 4 * points * _signs(blocks, 2, _I // 8 * 16 + 9)


def _iq2_xxs(blocks: np.ndarray) -> np.ndarray:
    scale = 0.5 + _bits(blocks, 2, _SUBBLOCK * 64 + 60, 4).astype(np.float32)
    points = _point("IQ2_XXS", _bits(blocks, 2, _SUBBLOCK * 64 + _I % 32 // 8 * 8, 8))
    signs = _signs(blocks, 2, _SUBBLOCK * 64 + 32 + _I % 32 // 8 * 7)
    return _half(blocks, 0) * scale / 4 * points * signs


def _iq1_s(blocks: np.ndarray) -> np.ndarray:
    index = _bits(blocks, 2, _I // 8 * 8, 8) | _bits(blocks, 34, _SUBBLOCK * 16 + _I % 32 // 8 * 3, 3) << 8
    scale = 1 + 2 * _bits(blocks, 34, _SUBBLOCK * 16 + 12, 3).astype(np.float32)
    delta = 0.125 - 0.25 * _bits(blocks, 34, _SUBBLOCK * 16 + 15, 1).astype(np.float32)
    return _half(blocks, 0) * scale * (_point("IQ1", index) + delta)


def _iq1_m(blocks: np.ndarray) -> np.ndarray:
    index = _bits(blocks, 0, _I // 8 * 8, 8) | _bits(blocks, 32, _I // 8 * 4, 3) << 8
    scale = 1 + 2 * _bits(blocks, 48, _I // 64 * 16 + _I % 64 // 16 * 3, 3).astype(np.float32)
    delta = 0.125 - 0.25 * _bits(blocks, 32, _I // 8 * 4 + 3, 1).astype(np.float32)
    fours = [_bits(blocks, 48, np.array([16 * i + 12]), 4) << 4 * i for i in range(4)]
    d = np.bitwise_or.reduce(fours).astype(np.uint16).view(np.float16).astype(np.float32)
    return d * scale * (_point("IQ1", index) + delta)


def _tq1_0(blocks: np.ndarray) -> np.ndarray:
    parts = ((_I % 32, _I // 32), (32 + _I % 16, (_I - 160) // 16), (48 + _I % 4, (_I - 240) // 4))
    digit_byte, digit = (
        np.where(_I < 160, a, np.where(_I < 240, b, c)) for a, b, c in zip(*parts, strict=True)
    )
    moved = blocks[:, digit_byte].astype(np.int64) * 3**digit % 256
    return _half(blocks, 52) * (moved * 3 // 256 - 1).astype(np.float32)


def _tq2_0(blocks: np.ndarray) -> np.ndarray:
    low = blocks[:, 32 * (_I // 128) + _I % 32] >> (2 * (_SUBBLOCK % 4)).astype(np.uint8) & 3
    return _half(blocks, 64) * (low.astype(np.float32) - 1)


def _bf16(blocks: np.ndarray) -> np.ndarray:
    bits = blocks[:, 0].astype(np.uint32) << 16 | blocks[:, 1].astype(np.uint32) << 24
    return bits.view(np.float32)[:, None]


def _f32(blocks: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(blocks).view("<f4").astype(np.float32)


_READERS: dict[GGMLType, Callable[[np.ndarray], np.ndarray]] = {
    GGMLType.F32: _f32,
    GGMLType.F16: lambda blocks: _half(blocks, 0),
    GGMLType.BF16: _bf16,
    GGMLType.Q8_0: _q8_0,
    GGMLType.Q4_K: _q4_k,
    GGMLType.Q5_K: _q5_k,
    GGMLType.Q6_K: _q6_k,
    GGMLType.Q2_K: _q2_k,
    GGMLType.Q3_K: _q3_k,
    GGMLType.IQ4_XS: _iq4_xs,
    GGMLType.IQ4_NL: _iq4_nl,
    GGMLType.Q4_0: _q4_0,
    GGMLType.Q4_1: _q4_1,
    GGMLType.Q5_0: _q5_0,
    GGMLType.Q5_1: _q5_1,
    GGMLType.MXFP4: _mxfp4,
    GGMLType.IQ3_S: _iq3_s,
    GGMLType.IQ3_XXS: _iq3_xxs,
    GGMLType.IQ2_S: _iq2_s,
    GGMLType.IQ2_XS: _iq2_xs,
    GGMLType.IQ2_XXS: _iq2_xxs,
    GGMLType.IQ1_S: _iq1_s,
    GGMLType.IQ1_M: _iq1_m,
    GGMLType.TQ1_0: _tq1_0,
    GGMLType.TQ2_0: _tq2_0,
}
