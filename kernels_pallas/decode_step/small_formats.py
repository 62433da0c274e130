"""How the decode kernel reads and multiplies tiles of types of 2 to 5 bits, beside Q4_K and Q5_K.

As ``tile_formats``, whose functions these classes have. What a lane multiplies with its subblocks' scales is
exact in int32 for Q2_K and Q3_K, so that a lane converts two sums to float32, not each scale and product.
"""

from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np

from qwen3_moe_jax.convert.formats.iq4 import VALUES
from qwen3_moe_jax.convert.formats.mxfp4 import FP4_VALUES
from qwen3_moe_jax.kernels_pallas.decode_step.primitives.layouts import TILE_LANES, TILE_ROWS, TILE_WORDS
from qwen3_moe_jax.kernels_pallas.decode_step.row_formats import MXFP4, Q40, Q41
from qwen3_moe_jax.kernels_pallas.decode_step.tile_formats import (
    FourTiles,
    LaneActivations,
    row_scale,
    signed_byte_of,
    upper_bits,
)

Array = Any


def _two_bits(word: Array, s: int, half: int) -> Array:
    return (word >> (2 * (2 * half + s))) & 0x03030303


def _vectors(stack: dict, place: FourTiles, count: int) -> list:
    return [place.load(stack["q"], TILE_WORDS, i) for i in range(count)]


def _words(stack: dict, place: FourTiles, name: str, count: int) -> list:
    return [place.load(stack[name], TILE_LANES, i) for i in range(count)]


def _pair(stack: dict, place: FourTiles, name: str) -> list:
    """A number of each subblock."""
    return [place.load(stack[f"{name}{s}"], TILE_LANES) for s in range(2)]


def _two_bytes(stack: dict, place: FourTiles, name: str) -> Array:
    return place.load(stack[name], TILE_LANES).astype(jnp.int32)


class TiledQ2K:
    """``q`` [.., 1, 8, 4, 4], ``scales`` [.., 8, 4]: two nibbles of bytes 2 s + h; ``d``, ``dmin``."""

    kinds = ("words", "word", "row_half", "row_half")
    ahead = 16

    @staticmethod
    def load(stack: dict, place: FourTiles) -> tuple:
        scales = place.load(stack["scales"], TILE_LANES)
        return (*_vectors(stack, place, 1), scales, *(place.load(stack[n], TILE_ROWS) for n in ("d", "dmin")))

    @classmethod
    def multiply(cls, tiles: list, x: LaneActivations) -> list:
        """Bits stay where they lie in their bytes: products are 4, 16 or 64 times as large.

        Of a subblock's halves the second lies four bits higher, so the first one's scale is taken 16 fold.
        Sums are exact in int32: at most 2 halves x 16 weights x 3 x 64 x scale 15 x 16,256 = 1.5e9.
        """
        scales = [((weights[1] << 4) & -0x0F0F0F10, weights[1] & 0x0F0F0F0F) for weights in tiles]
        minima = [(weights[1] >> 4) & 0x0F0F0F0F for weights in tiles]
        values, below = [0.0] * len(tiles), [0.0] * len(tiles)
        for s in range(2):
            of_scales: list[Array] = [0] * len(tiles)
            of_minima: list[Array] = [0] * len(tiles)
            for half in range(2):
                mask = int(np.uint32(0x03030303 << (2 * (2 * half + s))).view(np.int32))
                words = [[weights[0] & mask] for weights in tiles]
                sums, right = x.spread(x.sums[s][half]), 8 * (2 * s + half)
                for i, dot in enumerate(x.dot(words, s, (half,), signed=False)):
                    of_scales[i] += dot * ((scales[i][half] >> right) & 0xFF)
                    of_minima[i] += sums * ((minima[i] >> right) & 0xFF)
            scale, unit = x.spread(x.scale[s]), 1 / (16 << (2 * s))
            for i in range(len(tiles)):
                values[i] += of_scales[i].astype(jnp.float32) * (scale * unit)
                below[i] += of_minima[i].astype(jnp.float32) * scale
        return [
            value * row_scale(weights[2]) - minimum * row_scale(weights[3])
            for value, minimum, weights in zip(values, below, tiles, strict=True)
        ]


class TiledQ3K:
    """``q`` as Q2_K, ``qh`` [.., 2, 8, 4] as Q5_K, ``scales`` [.., 8, 4]: int8 bytes 2 s + h; ``d``."""

    kinds = ("words", "word", "word", "word", "row_half")
    ahead = 16

    @staticmethod
    def load(stack: dict, place: FourTiles) -> tuple:
        scales, d = place.load(stack["scales"], TILE_LANES), place.load(stack["d"], TILE_ROWS)
        return (*_vectors(stack, place, 1), *_words(stack, place, "qh", 2), scales, d)

    @classmethod
    def multiply(cls, tiles: list, x: LaneActivations) -> list:
        values = [0.0] * len(tiles)
        for s in range(2):
            totals: list[Array] = [0] * len(tiles)
            for half in range(2):
                words = [[_two_bits(w[0], s, half) | upper_bits(w[1 + half], s, 2)] for w in tiles]
                above = x.spread(x.sums[s][half]) * -4  # the stored weight is 4 above the true one
                for i, dot in enumerate(x.dot(words, s, (half,), signed=False)):
                    totals[i] += (dot + above) * signed_byte_of(tiles[i][3], 2 * s + half)
            for i, total in enumerate(totals):
                values[i] += total.astype(jnp.float32) * x.spread(x.scale[s])
        return [value * row_scale(weights[4]) for value, weights in zip(values, tiles, strict=True)]


class TiledQ40(Q40):
    """``q`` [.., 2, 8, 4, 4]: a vector for each subblock; ``d0``, ``d1`` [.., 8, 4]."""

    kinds = ("words", "words", "half", "half")
    ahead = 16

    @classmethod
    def load(cls, stack: dict, place: FourTiles) -> tuple:
        return (*_vectors(stack, place, 2), *_pair(stack, place, "d"))


class TiledQ41(Q41):
    """As Q4_0, and ``m0``, ``m1`` [.., 8, 4]."""

    kinds = (*TiledQ40.kinds, "half", "half")
    ahead = 16

    @classmethod
    def load(cls, stack: dict, place: FourTiles) -> tuple:
        return (*TiledQ40.load(stack, place), *_pair(stack, place, "m"))


class TiledQ50(TiledQ40):
    """As Q4_0, and ``qh`` [.., 2, 8, 4] as Q5_K."""

    kinds = (*TiledQ40.kinds, "word", "word")
    offset = -16

    @classmethod
    def load(cls, stack: dict, place: FourTiles) -> tuple:
        return (*TiledQ40.load(stack, place), *_words(stack, place, "qh", 2))

    @classmethod
    def words(cls, weights: tuple, s: int, halves: tuple[int, ...], prim: Any) -> list:
        low = super().words(weights, s, halves, prim)
        return [of | upper_bits(weights[-2 + half], s, 4) for of, half in zip(low, halves, strict=True)]


class TiledQ51(TiledQ41):
    """As Q4_1, and ``qh`` as Q5_0."""

    kinds = (*TiledQ41.kinds, "word", "word")

    @classmethod
    def load(cls, stack: dict, place: FourTiles) -> tuple:
        return (*TiledQ41.load(stack, place), *_words(stack, place, "qh", 2))

    @classmethod
    def words(cls, weights: tuple, s: int, halves: tuple[int, ...], prim: Any) -> list:
        return TiledQ50.words(weights, s, halves, prim)


class TiledIQ4NL(TiledQ40):
    """As Q4_0, and nibbles in the order of columns choose one of 16 integers."""

    kinds = TiledQ40.kinds
    offset, signed = 0, True
    table: ClassVar[tuple[int, ...]] = VALUES

    @classmethod
    def words(cls, weights: tuple, s: int, halves: tuple[int, ...], prim: Any) -> list:
        return prim.look_up(weights[s], cls.table, in_order=True)


class TiledMXFP4(TiledIQ4NL):
    """As IQ4_NL, and ``e`` [.., 8, 4], bytes s: the scales are powers of two."""

    kinds = ("words", "words", "word")
    table = FP4_VALUES

    @classmethod
    def load(cls, stack: dict, place: FourTiles) -> tuple:
        return (*_vectors(stack, place, 2), _two_bytes(stack, place, "e"))

    @classmethod
    def scale(cls, weights: tuple, s: int, half: int) -> Array:
        return MXFP4.scale(weights, s, half)


class TiledIQ4XS(TiledIQ4NL):
    """As IQ4_NL, and ``scales`` [.., 8, 4]: int8 bytes s, under ``d`` [.., 8]."""

    kinds = ("words", "words", "word", "row_half")

    @classmethod
    def load(cls, stack: dict, place: FourTiles) -> tuple:
        scales, d = _two_bytes(stack, place, "scales"), place.load(stack["d"], TILE_ROWS)
        return (*_vectors(stack, place, 2), scales, d)

    @classmethod
    def scale(cls, weights: tuple, s: int, half: int) -> Array:
        return signed_byte_of(weights[2], s).astype(jnp.float32)

    @classmethod
    def multiply(cls, tiles: list, x: LaneActivations) -> list:
        values = super().multiply(tiles, x)
        return [value * row_scale(weights[3]) for value, weights in zip(values, tiles, strict=True)]
