"""How the decode kernel reads and multiplies a weight tile, one class per quantization type.

A tile format loads what one lane needs of four tiles (its row and 64 neighbouring columns: two subblocks of
32) and multiplies it, alone or with a second tile that takes the same quantized activations. Registers have
room for ``ahead`` tiles of it. ``convert.layouts.gpu_tiles`` documents the arrays. Dot products are exact
integers by tensor cores; each is scaled once in float32.
"""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from qwen3_moe_jax.kernels_pallas.decode_step.primitives.layouts import (
    TILE_LANES,
    TILE_ROWS,
    TILE_WORDS,
    full,
    load,
)
from qwen3_moe_jax.kernels_pallas.decode_step.primitives.names import Primitives

Array = Any
SPAN_SUPERBLOCKS = 8
"""Superblocks that a block multiplies at a time."""
SHAPE = (4, 8, 4)
"""[tiles, rows, column groups] of what a warpgroup multiplies at once, one value per lane."""


WEIGHT_KINDS = {
    "words": ((4, 8, 4, 4), jnp.int32, TILE_WORDS),
    "word": (SHAPE, jnp.int32, TILE_LANES),
    "half": (SHAPE, jnp.float16, TILE_LANES),
    "row_half": ((4, 8), jnp.float16, TILE_ROWS),
}
"""Shape, dtype and layout of the register arrays that a format's ``kinds`` name, in order of ``load``."""


@dataclass(frozen=True)
class FourTiles:
    """Which four tiles a warpgroup multiplies at once, one for each warp.

    Attributes:
      tile: the tile of 8 rows, or the first of four where ``shared``.
      superblock: the first of four neighbouring superblocks, or the one of all where ``shared``.
      superblocks: of a row. Those after the last are read as the last one: their activations have scale 0.
      prim: the primitives.
    """

    tile: Any
    superblock: Any
    shared: bool
    superblocks: int
    prim: Primitives

    def load(self, ref: Any, layout: Any, *inner: int) -> Array:
        """An array of layout "gpu_tiles", at the indices ``inner`` after the tile's."""
        if self.shared:
            return load(ref.at[(pl.ds(self.tile, 4), self.superblock, *inner)], layout)
        if self.superblocks % SPAN_SUPERBLOCKS == 0:
            return load(ref.at[(self.tile, pl.ds(self.superblock, 4), *inner)], layout)
        row = ref.at[(self.tile, slice(None), *inner)]
        return self.prim.load_clamped(row, self.superblock, 4, layout)

    def rows(self, ref: Any, where: Any) -> Array:
        """An array of layout "rows", see ``load_rows``."""
        return self.prim.load_rows(ref, self.tile, self.superblock, where, shared=self.shared)


@dataclass(frozen=True)
class LaneActivations:
    """One lane's 64 activations, quantized in two int8 parts: value = scale * (128 * high + low).

    Attributes:
      fragments: ``fragments[subblock][half]``, int32 words of 4 int8 (``load_fragments``).
      scale: ``scale[subblock]``, float32.
      sums: ``sums[subblock][half]``, int32 sums of 16 integers 128 * high + low.
      dimensions: where the axes of ``scale`` and ``sums`` lie in ``SHAPE``.
      prim: the primitives.
    """

    fragments: list
    scale: list
    sums: list
    dimensions: tuple[int, ...]
    prim: Primitives

    def spread(self, value: Array) -> Array:
        """Repeats a per-subblock value for all rows."""
        return plgpu.layout_cast(lax.broadcast_in_dim(value, SHAPE, self.dimensions), TILE_LANES)

    def sum32(self, subblock: int) -> Array:
        """Float32 sum of the subblock's 32 activations."""
        first, second = self.sums[subblock]
        return (first + second).astype(jnp.float32) * self.scale[subblock]

    def dot(self, tiles: list, subblock: int, halves: tuple[int, ...], *, signed: bool) -> list:
        """Integer dot products of some halves of a subblock of one or two tiles.

        Args:
          tiles: for each tile, its words int32 [4, 8, 4, 4], one array for each of ``halves``.

        Returns:
          int32 [4, 8, 4], one per tile: the exact sum over both parts of the activations.
        """
        x = [self.fragments[subblock][half] for half in halves]
        return self.prim.dot_tiles(tiles, x, signed=signed)


def _nibbles(word: Array, subblock: int) -> Array:
    return (word & 0x0F0F0F0F) if subblock == 0 else ((word >> 4) & 0x0F0F0F0F)


def unsigned_byte_of(word: Array, index: int) -> Array:
    """Byte ``index`` of each int32 as float32."""
    return ((word >> (8 * index)) & 0xFF).astype(jnp.float32)


def signed_byte_of(word: Array, index: int) -> Array:
    """Byte ``index`` of each int32, signed."""
    return (word << (24 - 8 * index)) >> 24


def upper_bits(high: Array, subblock: int, place: int) -> Array:
    """Bits j + 4 * subblock of the bytes of int32 [4, 8, 4], for word j at ``place``: int32 [4, 8, 4, 4]."""
    left = place - 4 * subblock
    high = high << left if left >= 0 else high >> -left
    words = plgpu.layout_cast(lax.broadcast_in_dim(high, (*SHAPE, 4), (0, 1, 2)), TILE_WORDS)
    word = plgpu.broadcasted_iota(jnp.int32, (*SHAPE, 4), 3, layout=TILE_WORDS)
    mask = 0x01010101 << place
    return (words >> word) & mask


def row_scale(value: Array) -> Array:
    """A number of each row, float16 [4, 8], as float32 [4, 8, 4]."""
    return plgpu.layout_cast(lax.broadcast_in_dim(value.astype(jnp.float32), SHAPE, (0, 1)), TILE_LANES)


class Q4K:
    """``q`` [.., 2, 8, 4, 4], ``scales`` [.., 8, 4], ``d`` and ``dmin`` [.., 8]."""

    kinds = ("words", "words", "word", "row_half", "row_half")
    ahead = 16

    @staticmethod
    def load(stack: dict, place: FourTiles) -> tuple:
        q = [place.load(stack["q"], TILE_WORDS, half) for half in range(2)]
        scales = place.load(stack["scales"], TILE_LANES)
        d, dmin = (place.load(stack[n], TILE_ROWS) for n in ("d", "dmin"))
        return (*q, scales, d, dmin)

    @staticmethod
    def words(weights: tuple, subblock: int) -> list:
        return [_nibbles(weights[half], subblock) for half in range(2)]

    @classmethod
    def multiply(cls, tiles: list, x: LaneActivations) -> list:
        values, minima = [0.0] * len(tiles), [0.0] * len(tiles)
        for s in range(2):
            words = [cls.words(weights, s) for weights in tiles]
            dots = x.dot(words, s, (0, 1), signed=False)
            for i, (weights, dot) in enumerate(zip(tiles, dots, strict=True)):
                scales = weights[-3]
                values[i] += dot.astype(jnp.float32) * (unsigned_byte_of(scales, s) * x.spread(x.scale[s]))
                minima[i] += unsigned_byte_of(scales, 2 + s) * x.spread(x.sum32(s))
        return [
            value * row_scale(weights[-2]) - minimum * row_scale(weights[-1])
            for value, minimum, weights in zip(values, minima, tiles, strict=True)
        ]


class Q5K(Q4K):
    """As Q4K, and ``qh`` [.., 2, 8, 4]: bit j + 4 * subblock of a byte is the fifth bit of word j."""

    kinds = ("word", "word", *Q4K.kinds)

    @staticmethod
    def load(stack: dict, place: FourTiles) -> tuple:
        high = [place.load(stack["qh"], TILE_LANES, half) for half in range(2)]
        return (*high, *Q4K.load(stack, place))

    @staticmethod
    def words(weights: tuple, subblock: int) -> list:
        return [
            _nibbles(weights[2 + half], subblock) | upper_bits(weights[half], subblock, 4)
            for half in range(2)
        ]


class Q6K:
    """``ql`` [.., 2, 8, 4, 4], ``qh`` [.., 8, 4, 4], ``scales`` [.., 8, 4], ``d`` [.., 8].

    Bits 2 * (2 * half + subblock) of each byte of ``qh`` are the upper bits of that half's nibbles.
    Scale 2 * subblock + half is one byte of the word.
    """

    kinds = ("words", "words", "words", "word", "row_half")
    ahead = 16

    @staticmethod
    def load(stack: dict, place: FourTiles) -> tuple:
        q = [place.load(stack["ql"], TILE_WORDS, half) for half in range(2)]
        high = place.load(stack["qh"], TILE_WORDS)
        scales = place.load(stack["scales"], TILE_LANES)
        return (*q, high, scales, place.load(stack["d"], TILE_ROWS))

    @staticmethod
    def words(weights: tuple, subblock: int, half: int) -> Array:
        upper = ((weights[2] >> (2 * (2 * half + subblock))) & 0x03030303) << 4
        return _nibbles(weights[half], subblock) | upper

    @classmethod
    def multiply(cls, tiles: list, x: LaneActivations) -> list:
        values = [0.0] * len(tiles)
        for s in range(2):
            subblocks = [0.0] * len(tiles)
            for half in range(2):
                words = [[cls.words(weights, s, half)] for weights in tiles]
                above = x.spread(x.sums[s][half]) * -32  # the stored weight is 32 above the true one
                dots = x.dot(words, s, (half,), signed=False)
                for i, (weights, dot) in enumerate(zip(tiles, dots, strict=True)):
                    scale = signed_byte_of(weights[3], 2 * s + half).astype(jnp.float32)
                    subblocks[i] += (dot + above).astype(jnp.float32) * scale
            for i, subblock in enumerate(subblocks):
                values[i] += subblock * x.spread(x.scale[s])
        return [value * row_scale(weights[4]) for value, weights in zip(values, tiles, strict=True)]


class Q80:
    """``q`` [.., 4, 8, 4, 4] (2 * subblock + half); ``d0``, ``d1`` [.., 8, 4]: the subblocks' scales."""

    kinds = ("words", "words", "words", "words", "half", "half")
    ahead = 16

    @staticmethod
    def load(stack: dict, place: FourTiles) -> tuple:
        q = [place.load(stack["q"], TILE_WORDS, i) for i in range(4)]
        return (*q, *(place.load(stack[n], TILE_LANES) for n in ("d0", "d1")))

    @staticmethod
    def multiply(tiles: list, x: LaneActivations) -> list:
        values = [0.0] * len(tiles)
        for s in range(2):
            words = [list(weights[2 * s : 2 * s + 2]) for weights in tiles]
            dots = x.dot(words, s, (0, 1), signed=True)
            for i, (weights, dot) in enumerate(zip(tiles, dots, strict=True)):
                scale = weights[4 + s].astype(jnp.float32) * x.spread(x.scale[s])
                values[i] += dot.astype(jnp.float32) * scale
        return values


def weight_kinds(formats: list) -> list:
    """The kinds of register arrays that can hold a tile of any of the formats."""
    kinds = []
    for fmt in formats:
        for kind in dict.fromkeys(fmt.kinds):  # in order: the program must be the same in every process
            missing = fmt.kinds.count(kind) - kinds.count(kind)
            kinds += [kind] * max(missing, 0)
    return kinds


def pad_weights(fmt: Any, weights: tuple, kinds: list) -> tuple:
    """Puts a format's arrays where ``kinds`` has room for them, with zeros elsewhere."""
    left = list(zip(fmt.kinds, weights, strict=True))
    out = []
    for kind in kinds:
        found = next((item for item in left if item[0] == kind), None)
        if found is None:
            shape, dtype, layout = WEIGHT_KINDS[kind]
            out.append(full(shape, 0, dtype, layout))
        else:
            left = [item for item in left if item is not found]
            out.append(found[1])
    return tuple(out)


def take_weights(fmt: Any, padded: tuple) -> tuple:
    """The inverse of :func:`pad_weights`."""
    kinds, arrays = padded
    left = list(zip(kinds, arrays, strict=True))
    out = []
    for kind in fmt.kinds:
        found = next(item for item in left if item[0] == kind)
        left = [item for item in left if item is not found]
        out.append(found[1])
    return tuple(out)
