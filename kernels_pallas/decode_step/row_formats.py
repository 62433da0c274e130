"""How the decode kernel reads and multiplies weights that lie as the file has them, one class per type.

A lane takes of a tile what it takes in layout "gpu_tiles" (``tile_formats``): its row and 64 neighbouring
columns, two subblocks ``s`` of two halves ``h``. Four lanes read a row's bytes side by side. The arrays are
those of layout "rows" (``convert.packed``), in which embeddings lie, and types that other kernels lack.
"""

from typing import Any, ClassVar

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from qwen3_moe_jax.convert.formats.iq4 import VALUES
from qwen3_moe_jax.convert.formats.mxfp4 import FP4_VALUES
from qwen3_moe_jax.convert.ggml_types import GGMLType
from qwen3_moe_jax.kernels_pallas.decode_step.primitives.layouts import TILE_WORDS
from qwen3_moe_jax.kernels_pallas.decode_step.primitives.loads import RowBytes
from qwen3_moe_jax.kernels_pallas.decode_step.tile_formats import (
    SHAPE,
    FourTiles,
    LaneActivations,
    signed_byte_of,
    unsigned_byte_of,
)

Array = Any
WORDS = (*SHAPE, 4)


def _vectors(superblock: int, group: int, count: int, sharing: int = 1) -> list[RowBytes]:
    """``count`` neighbouring pieces of 16 bytes."""
    return [RowBytes(superblock, group, sharing, 16 * i) for i in range(count)]


def _numbers(superblock: int, group: int, count: int, nbytes: int = 2) -> list[RowBytes]:
    """``count`` neighbouring numbers of 2 bytes, or words of 4."""
    return [RowBytes(superblock, group, 1, nbytes * i, nbytes) for i in range(count)]


def _of_each(name: str, places: list[RowBytes]) -> list[tuple[str, RowBytes]]:
    return [(name, where) for where in places]


def _own_group() -> Array:
    """int32 [4, 8, 4, 4]: which 64 columns of its superblock a lane has."""
    return plgpu.broadcasted_iota(jnp.int32, WORDS, 2, layout=TILE_WORDS)


def _float(value: Array) -> Array:
    return value.astype(jnp.float32)


class RowFormat:
    """A type whose weights are integers with scales, of which :meth:`multiply` is common.

    Attributes:
      parts: the arrays' pieces that a lane loads, in the order of ``weights``.
      halves: the halves of a subblock that share a scale.
      signed: whether the integers are.
      offset: what is added to them.
      has_minimum: whether :meth:`minimum` is subtracted from their products with the scale.
      ahead: tiles that registers have room for.
    """

    parts: ClassVar[list[tuple[str, RowBytes]]]
    halves: ClassVar[tuple[tuple[int, ...], ...]] = ((0, 1),)
    signed: ClassVar[bool] = False
    offset: ClassVar[int] = 0
    has_minimum: ClassVar[bool] = False
    ahead: ClassVar[int] = 4
    halfs: ClassVar[tuple[str, ...]] = ("d", "dmin", "m")

    @classmethod
    def _kinds(cls) -> tuple[str, ...]:
        """The kinds of register arrays, see ``tile_formats.WEIGHT_KINDS``."""
        kind = lambda name, where: "words" if where.count == 16 else "half" if name in cls.halfs else "word"
        return tuple(kind(*part) for part in cls.parts)

    def __init_subclass__(cls) -> None:
        if "parts" in vars(cls):
            cls.kinds = cls._kinds()

    kinds: ClassVar[tuple[str, ...]]

    @classmethod
    def load(cls, stack: dict, place: FourTiles) -> tuple:
        """What a lane needs of four tiles."""
        return tuple(place.rows(stack[name], where) for name, where in cls.parts)

    @classmethod
    def words(cls, weights: tuple, s: int, halves: tuple[int, ...], prim: Any) -> list:
        """For each half, int32 [4, 8, 4, 4] of four integers."""
        raise NotImplementedError

    @classmethod
    def scale(cls, weights: tuple, s: int, half: int) -> Array:
        """float32 [4, 8, 4]."""
        raise NotImplementedError

    @classmethod
    def minimum(cls, weights: tuple, s: int, half: int) -> Array:
        """float32 [4, 8, 4]."""
        raise NotImplementedError

    @classmethod
    def multiply(cls, tiles: list, x: LaneActivations) -> list:
        """float32 [4, 8, 4], a lane's products with each tile."""
        values = [0.0] * len(tiles)
        for s in range(2):
            subblocks = [0.0] * len(tiles)
            for halves in cls.halves:
                words = [cls.words(weights, s, halves, x.prim) for weights in tiles]
                dots = x.dot(words, s, halves, signed=cls.signed)
                if cls.offset or cls.has_minimum:
                    sums = x.spread(sum(x.sums[s][h] for h in halves))
                for i, (weights, dot) in enumerate(zip(tiles, dots, strict=True)):
                    dot = dot + sums * cls.offset if cls.offset else dot
                    value = _float(dot) * cls.scale(weights, s, halves[0])
                    if cls.has_minimum:
                        value -= _float(sums) * cls.minimum(weights, s, halves[0])
                    subblocks[i] += value
            for i, subblock in enumerate(subblocks):
                values[i] += subblock * x.spread(x.scale[s])
        return values


class Q40(RowFormat):
    """Low nibbles are the first half of a subblock."""

    parts = _of_each("q", _vectors(128, 32, 2)) + _of_each("d", _numbers(16, 4, 2))
    offset = -8

    @classmethod
    def words(cls, weights: tuple, s: int, halves: tuple[int, ...], prim: Any) -> list:
        return [(weights[s] >> (4 * half)) & 0x0F0F0F0F for half in halves]

    @classmethod
    def scale(cls, weights: tuple, s: int, half: int) -> Array:
        return _float(weights[2 + s])


class Q41(Q40):
    """As Q40, and a minimum that is added."""

    parts = Q40.parts + _of_each("m", _numbers(16, 4, 2))
    offset, has_minimum = 0, True

    @classmethod
    def minimum(cls, weights: tuple, s: int, half: int) -> Array:
        return -_float(weights[4 + s])


class Q50(Q40):
    """As Q40, and bit 16 h + 4 j + i of a word is the fifth bit of weight i of word j."""

    parts = Q40.parts + _of_each("qh", _numbers(32, 8, 2, 4))
    offset = -16

    @classmethod
    def words(cls, weights: tuple, s: int, halves: tuple[int, ...], prim: Any) -> list:
        shift = plgpu.broadcasted_iota(jnp.int32, WORDS, 3, layout=TILE_WORDS) * 4
        high = plgpu.layout_cast(lax.broadcast_in_dim(weights[-2 + s], WORDS, (0, 1, 2)), TILE_WORDS)
        fifth = [(((high >> (shift + 16 * half)) & 15) * 0x00204081) & 0x01010101 for half in halves]
        low = super().words(weights, s, halves, prim)
        return [word | (bit << 4) for word, bit in zip(low, fifth, strict=True)]


class Q51(Q50):
    """As Q50, and a minimum that is added."""

    parts = Q41.parts + Q50.parts[-2:]
    offset, has_minimum = 0, True

    @classmethod
    def minimum(cls, weights: tuple, s: int, half: int) -> Array:
        return Q41.minimum(weights, s, half)


class IQ4NL(Q40):
    """As Q40, and a nibble chooses one of 16 integers."""

    parts = Q40.parts
    offset, signed = 0, True
    table: ClassVar[tuple[int, ...]] = VALUES

    @classmethod
    def words(cls, weights: tuple, s: int, halves: tuple[int, ...], prim: Any) -> list:
        return prim.look_up(weights[s], cls.table, in_order=False)


class MXFP4(IQ4NL):
    """As IQ4NL, and the scale is a power of two."""

    parts = Q40.parts[:2] + _of_each("e", _numbers(8, 2, 1))
    table = FP4_VALUES

    @classmethod
    def scale(cls, weights: tuple, s: int, half: int) -> Array:
        """2^(e - 128): the two smallest are subnormal."""
        e = (weights[2] >> (8 * s)) & 0xFF
        bits = jnp.where(e < 2, (e + 1) << 21, (e - 1) << 23)
        return lax.bitcast_convert_type(bits, jnp.float32)


class IQ4XS(IQ4NL):
    """As IQ4NL, with one scale of 8 bits for a subblock under one for a superblock."""

    parts = Q40.parts[:2] + _of_each("scales", _numbers(8, 2, 1)) + _of_each("d", _numbers(2, 0, 1))

    @classmethod
    def scale(cls, weights: tuple, s: int, half: int) -> Array:
        return _float(signed_byte_of(weights[2], s)) * _float(weights[3])


class Q2K(RowFormat):
    """Bits 2 (2 (group % 2) + s) of a byte; bytes 2 s + h of ``scales``, low a scale, high a minimum."""

    parts = (
        _of_each("q", _vectors(64, 32, 2, sharing=2))
        + _of_each("scales", _numbers(16, 4, 1, 4))
        + _of_each("d", _numbers(2, 0, 1))
        + _of_each("dmin", _numbers(2, 0, 1))
    )
    halves = ((0,), (1,))
    has_minimum = True

    @classmethod
    def words(cls, weights: tuple, s: int, halves: tuple[int, ...], prim: Any) -> list:
        shift = (_own_group() & 1) * 4 + 2 * s
        return [(weights[half] >> shift) & 0x03030303 for half in halves]

    @classmethod
    def scale(cls, weights: tuple, s: int, half: int) -> Array:
        return _float((weights[2] >> (8 * (2 * s + half))) & 15) * _float(weights[3])

    @classmethod
    def minimum(cls, weights: tuple, s: int, half: int) -> Array:
        return _float((weights[2] >> (8 * (2 * s + half) + 4)) & 15) * _float(weights[4])


class Q3K(Q2K):
    """As Q2K, and bit 2 group + s of a byte of ``qh`` is the third bit; scales are signed."""

    parts = Q2K.parts[:4] + _of_each("qh", _vectors(32, 0, 2))
    offset, has_minimum = -4, False

    @classmethod
    def words(cls, weights: tuple, s: int, halves: tuple[int, ...], prim: Any) -> list:
        shift = _own_group() * 2 + s
        third = [((weights[4 + half] >> shift) & 0x01010101) << 2 for half in halves]
        return [a | b for a, b in zip(super().words(weights, s, halves, prim), third, strict=True)]

    @classmethod
    def scale(cls, weights: tuple, s: int, half: int) -> Array:
        return _float(signed_byte_of(weights[2], 2 * s + half)) * _float(weights[3])


class Q4K(RowFormat):
    """Low nibbles are the first subblock."""

    parts = (
        _of_each("q", _vectors(128, 32, 2))
        + _of_each("scales", _numbers(8, 2, 1))
        + _of_each("mins", _numbers(8, 2, 1))
        + _of_each("d", _numbers(2, 0, 1))
        + _of_each("dmin", _numbers(2, 0, 1))
    )
    has_minimum = True

    @classmethod
    def words(cls, weights: tuple, s: int, halves: tuple[int, ...], prim: Any) -> list:
        return [(weights[half] >> (4 * s)) & 0x0F0F0F0F for half in halves]

    @classmethod
    def scale(cls, weights: tuple, s: int, half: int) -> Array:
        return unsigned_byte_of(weights[2], s) * _float(weights[4])

    @classmethod
    def minimum(cls, weights: tuple, s: int, half: int) -> Array:
        return unsigned_byte_of(weights[3], s) * _float(weights[5])


class Q5K(Q4K):
    """As Q4K, and bit 2 group + s of a byte of ``qh`` is the fifth bit."""

    parts = Q4K.parts + _of_each("qh", _vectors(32, 0, 2))

    @classmethod
    def words(cls, weights: tuple, s: int, halves: tuple[int, ...], prim: Any) -> list:
        shift = _own_group() * 2 + s
        fifth = [((weights[6 + half] >> shift) & 0x01010101) << 4 for half in halves]
        return [a | b for a, b in zip(super().words(weights, s, halves, prim), fifth, strict=True)]


class Q6K(RowFormat):
    """Nibbles 4 (group % 2) of ``ql``, bits 2 (2 (group % 2) + s) of ``qh``; bytes 2 s + h of ``scales``."""

    parts = (
        _of_each("ql", _vectors(128, 64, 4, sharing=2))
        + _of_each("qh", _vectors(64, 32, 2, sharing=2))
        + _of_each("scales", _numbers(16, 4, 1, 4))
        + _of_each("d", _numbers(2, 0, 1))
    )
    halves = ((0,), (1,))
    offset = -32

    @classmethod
    def words(cls, weights: tuple, s: int, halves: tuple[int, ...], prim: Any) -> list:
        odd = (_own_group() & 1) * 4
        low = [(weights[2 * s + half] >> odd) & 0x0F0F0F0F for half in halves]
        high = [((weights[4 + half] >> (odd + 2 * s)) & 0x03030303) << 4 for half in halves]
        return [a | b for a, b in zip(low, high, strict=True)]

    @classmethod
    def scale(cls, weights: tuple, s: int, half: int) -> Array:
        return _float(signed_byte_of(weights[6], 2 * s + half)) * _float(weights[7])


class Q80(RowFormat):
    """Bytes in the order of columns."""

    parts = _of_each("q", _vectors(256, 64, 4)) + _of_each("d", _numbers(16, 4, 2))
    signed = True

    @classmethod
    def words(cls, weights: tuple, s: int, halves: tuple[int, ...], prim: Any) -> list:
        return [weights[2 * s + half] for half in halves]

    @classmethod
    def scale(cls, weights: tuple, s: int, half: int) -> Array:
        return _float(weights[4 + s])


class F16(RowFormat):
    """Numbers of 16 bits, multiplied with both parts of the activations: exact products, float32 sums."""

    parts = _of_each("w", _vectors(512, 128, 8))
    dtype: ClassVar[Any] = jnp.float16
    ahead = 2

    @classmethod
    def multiply(cls, tiles: list, x: LaneActivations) -> list:
        values = [0.0] * len(tiles)
        for s in range(2):
            pieces = [[list(weights[4 * s + 2 * h :][:2]) for h in range(2)] for weights in tiles]
            dots = x.prim.dot_floats(pieces, x.fragments[s], dtype=cls.dtype)
            for i, dot in enumerate(dots):
                values[i] += dot * x.spread(x.scale[s])
        return values


class BF16(F16):
    """As F16."""

    parts = F16.parts
    dtype = jnp.bfloat16


ROW_FORMATS: dict[GGMLType, Any] = {
    GGMLType.F16: F16,
    GGMLType.BF16: BF16,
    GGMLType.Q4_0: Q40,
    GGMLType.Q4_1: Q41,
    GGMLType.Q5_0: Q50,
    GGMLType.Q5_1: Q51,
    GGMLType.Q8_0: Q80,
    GGMLType.Q2_K: Q2K,
    GGMLType.Q3_K: Q3K,
    GGMLType.Q4_K: Q4K,
    GGMLType.Q5_K: Q5K,
    GGMLType.Q6_K: Q6K,
    GGMLType.IQ4_NL: IQ4NL,
    GGMLType.IQ4_XS: IQ4XS,
    GGMLType.MXFP4: MXFP4,
}
