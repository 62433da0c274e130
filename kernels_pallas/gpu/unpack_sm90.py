"""Packed weight tiles to tensor-core operands, in registers.

A warp's 16 rows of a wgmma operand are two tiles of 8 rows. Each lane unpacks the 16-byte
vectors of its own row and column group (``convert.layouts.gpu_tiles``) into the four float16 pairs
that one wgmma instruction wants of it: no lane needs another's data, and a tile's nibbles become
float16 integers by a mask and one fused multiply-add per pair. See
``gpu.activations`` for the order of columns that follows.

:func:`piece_operand` has two bodies: Mosaic GPU code, and ``jnp`` of the same meaning and the
same roundings, which Pallas' interpreter runs on a CPU.
"""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

from qwen3_moe_jax.convert.formats.iq4 import VALUES
from qwen3_moe_jax.convert.formats.mxfp4 import FP4_VALUES
from qwen3_moe_jax.convert.ggml_types import GGMLType
from qwen3_moe_jax.kernels_pallas.gpu.activations import WEIGHT_SCALE

SLAB_ROWS = 64
"""Rows of one wgmma operand: eight tiles, two per warp."""
PIECE = 64
"""Columns of one operand, and of one piece of x: a quarter of a superblock, four wgmma instructions."""
PIECES = 4
LANES = 32


@dataclass(frozen=True)
class TileArray:
    """One array of a tile in shared memory: ``parts`` x ``inner`` elements of ``dtype``."""

    dtype: str
    parts: int
    inner: int


def _pair(name: str) -> dict[str, TileArray]:
    """A float16 of each subblock of a lane."""
    return {f"{name}{s}": TileArray("float16", 1, 32) for s in range(2)}


_SCALED = {"scales": TileArray("int32", 1, 32), "d": TileArray("float16", 1, 8)}
TILE_ARRAYS: dict[GGMLType, dict[str, TileArray]] = {
    GGMLType.Q4_K: {"q": TileArray("int32", 1, 256), **_SCALED, "dmin": TileArray("float16", 1, 8)},
    GGMLType.Q5_K: {
        "q": TileArray("int32", 1, 256),
        "qh": TileArray("int32", 1, 64),
        **_SCALED,
        "dmin": TileArray("float16", 1, 8),
    },
    GGMLType.Q6_K: {"ql": TileArray("int32", 1, 256), "qh": TileArray("int32", 1, 128), **_SCALED},
    GGMLType.Q8_0: {"q": TileArray("int32", 2, 256), **_pair("d")},
    GGMLType.Q2_K: {"q": TileArray("int32", 1, 128), **_SCALED, "dmin": TileArray("float16", 1, 8)},
    GGMLType.Q3_K: {"q": TileArray("int32", 1, 128), "qh": TileArray("int32", 1, 64), **_SCALED},
    GGMLType.Q4_0: {"q": TileArray("int32", 1, 256), **_pair("d")},
    GGMLType.Q4_1: {"q": TileArray("int32", 1, 256), **_pair("d"), **_pair("m")},
    GGMLType.Q5_0: {"q": TileArray("int32", 1, 256), "qh": TileArray("int32", 1, 64), **_pair("d")},
    GGMLType.Q5_1: {
        "q": TileArray("int32", 1, 256),
        "qh": TileArray("int32", 1, 64),
        **_pair("d"),
        **_pair("m"),
    },
    GGMLType.IQ4_NL: {"q": TileArray("int32", 1, 256), **_pair("d")},
    GGMLType.IQ4_XS: {
        "q": TileArray("int32", 1, 256),
        "scales": TileArray("int16", 1, 32),
        "d": TileArray("float16", 1, 8),
    },
    GGMLType.MXFP4: {"q": TileArray("int32", 1, 256), "e": TileArray("int16", 1, 32)},
}
"""Arrays of a tile by type; a copy's innermost axis has at most 256 elements."""
_TWO_BITS = (GGMLType.Q2_K, GGMLType.Q3_K)
_NIBBLE_OF_HALF = (GGMLType.Q4_0, GGMLType.Q4_1, GGMLType.Q5_0, GGMLType.Q5_1)
"""Types whose vectors are subblocks and nibbles halves, not the other way round."""
_CENTERS = {GGMLType.Q3_K: 4, GGMLType.Q4_0: 8, GGMLType.Q5_0: 16, GGMLType.Q6_K: 32}
_TABLES = {GGMLType.IQ4_NL: VALUES, GGMLType.IQ4_XS: VALUES, GGMLType.MXFP4: FP4_VALUES}
_EXPONENT = 127 - 128 + 4
"""What is added to MXFP4's exponent for the bits of float32 2^(e - 128) * ``WEIGHT_SCALE``."""
_MAX_EXPONENT = 255 - _EXPONENT
"""From here on that is infinite."""


@dataclass(frozen=True)
class WarpTiles:
    """Which tiles a warp reads: tile ``base + warpgroup * by_group + warp * by_warp + half * by_half``."""

    base: int
    by_group: int
    by_warp: int
    by_half: int


def piece_operand(type: GGMLType, refs: dict, tiles: WarpTiles, quarter: int, group, *, emulate: bool):
    """Float16 [64, 64] operand of a warpgroup, in layout WGMMA: weights times ``WEIGHT_SCALE``.

    Args:
      type: quantization type.
      refs: shared-memory arrays of one superblock by name, [..., parts, inner] with tiles in front.
      tiles: where the slab's tiles lie.
      quarter: number 2 s + h of the superblock's contraction order.
      group: index of the warpgroup (used when emulated).
    """
    if emulate:
        return _emulated(type, refs, tiles, quarter, group)
    names = tuple(TILE_ARRAYS[type])

    @plgpu.inline_mgpu(
        arg_types=tuple(plgpu.RefType() for _ in names),
        return_type=plgpu.ShapeDtypeStruct((SLAB_ROWS, PIECE), jnp.float16, layout=plgpu.Layout.WGMMA),
    )
    def operand(ctx, *arrays):
        del ctx
        return _Lane(type, dict(zip(names, arrays, strict=True)), tiles, quarter).operand()

    return operand(*(refs[n] for n in names))


class _Lane:
    """Emits one lane's share of an operand. All values are i32; float16 pairs travel as i32."""

    def __init__(self, type: GGMLType, arrays: dict, tiles: WarpTiles, quarter: int):
        from jaxlib.mlir import ir
        from jaxlib.mlir.dialects import arith

        self.type, self.quarter = type, quarter
        self.subblock, self.half = divmod(quarter, 2)
        self.i32 = ir.IntegerType.get_signless(32)
        self.pointers = {n: mgpu.utils.memref_ptr(a) for n, a in arrays.items()}
        thread = mgpu.utils.thread_idx()
        self.lane = arith.andi(thread, self.const(LANES - 1))
        warp = arith.andi(arith.shrui(thread, self.const(5)), self.const(3))
        group = arith.shrui(thread, self.const(7))
        first = arith.addi(
            arith.muli(group, self.const(tiles.by_group)), arith.muli(warp, self.const(tiles.by_warp))
        )
        self.tiles = [arith.addi(first, self.const(tiles.base + half * tiles.by_half)) for half in range(2)]

    def const(self, value: int):
        from jaxlib.mlir.dialects import arith

        return arith.constant(self.i32, value - (1 << 32) if value >= 1 << 31 else value)

    def load(self, name: str, tile, offset, type, alignment: int):
        """Loads ``type`` at element ``offset`` (an i32 value) of ``tile``."""
        from jaxlib.mlir import ir
        from jaxlib.mlir.dialects import arith, llvm

        array = TILE_ARRAYS[self.type][name]
        index = arith.addi(arith.muli(tile, self.const(array.parts * array.inner)), offset)
        element = self.i32 if array.dtype == "int32" else ir.IntegerType.get_signless(16)
        pointer = mgpu.utils.getelementptr(self.pointers[name], [index], element)
        return llvm.load(type, pointer, alignment=alignment)

    def words(self, name: str, tile, vector: int) -> list:
        """Four words of the lane's row and group, of vector number ``vector`` of the tile."""
        from jaxlib.mlir import ir
        from jaxlib.mlir.dialects import arith, llvm

        offset = arith.muli(arith.addi(self.lane, self.const(vector * LANES)), self.const(4))
        loaded = self.load(name, tile, offset, ir.VectorType.get((4,), self.i32), 16)
        return [llvm.extractelement(loaded, self.const(j)) for j in range(4)]

    def word(self, name: str, tile, vector: int = 0):
        from jaxlib.mlir.dialects import arith

        return self.load(name, tile, arith.addi(self.lane, self.const(vector * LANES)), self.i32, 4)

    def half_float(self, name: str, tile, *, each_lane: bool):
        """16 bits of the lane's row (or of the lane) as the low half of an i32."""
        from jaxlib.mlir import ir
        from jaxlib.mlir.dialects import arith

        at = self.lane if each_lane else arith.shrui(self.lane, self.const(2))
        i16 = ir.IntegerType.get_signless(16)
        return arith.extui(self.i32, self.load(name, tile, at, i16, 2))

    # Arithmetic on pairs

    def ptx(self, code: str, *args):
        constraints = ",".join(["=r"] + ["r"] * len(args))
        from jaxlib.mlir.dialects import llvm

        return llvm.inline_asm(self.i32, list(args), code, constraints)

    def pair(self, value: float):
        return self.two(value, value)

    def two(self, low: float, high: float):
        """A constant pair."""
        return self.const(int(np.array([low, high], np.float16).view(np.uint32)[0]))

    def multiply_add(self, a, b, c):
        return self.ptx("fma.rn.f16x2 $0, $1, $2, $3;", a, b, c)

    def multiply(self, a, b):
        return self.ptx("mul.rn.f16x2 $0, $1, $2;", a, b)

    def low_twice(self, pair):
        return self.ptx("prmt.b32 $0, $1, $1, 0x1010;", pair)

    def high_twice(self, pair):
        return self.ptx("prmt.b32 $0, $1, $1, 0x3232;", pair)

    def masked(self, word, mask: int, magic: int = 0x64006400):
        """Bits of ``word`` under ``mask``, with ``magic`` set beside them (1024 + bits as float16)."""
        from jaxlib.mlir.dialects import arith

        return arith.ori(arith.andi(word, self.const(mask)), self.const(magic))

    def shifted(self, word, left: int):
        from jaxlib.mlir.dialects import arith

        if left == 0:
            return word
        return (arith.shli if left > 0 else arith.shrui)(word, self.const(abs(left)))

    # Formats

    def whole_scales(self, tile, *, second: float):
        """The pair (d, dmin) times ``WEIGHT_SCALE``, and dmin times ``second`` too."""
        from jaxlib.mlir.dialects import arith

        d, dmin = (self.half_float(name, tile, each_lane=False) for name in ("d", "dmin"))
        whole = arith.ori(d, arith.shli(dmin, self.const(16)))
        return self.multiply(whole, self.two(WEIGHT_SCALE, second * WEIGHT_SCALE))

    def small_scales(self, tile):
        """Of Q2_K, Q4_K and Q5_K: the pair (scale, minimum) of whole numbers."""
        word = self.word("scales", tile)
        if self.type is GGMLType.Q2_K:
            number = 2 * self.subblock + self.half
            twice = self.ptx(f"prmt.b32 $0, $1, 0, 0x4{number}4{number};", word)
            both = self.masked(twice, 0x00F0000F)  # the minimum 16 times
            return self.multiply_add(both, self.two(1, 1 / 16), self.two(-1024, -64))
        both = self.masked(self.shifted(word, -8 * self.subblock), 0x00FF00FF)
        return self.multiply_add(both, self.pair(1), self.pair(-1024))

    def scale_and_minimum(self, tile):
        """Pairs (scale, scale) and (-minimum, -minimum), times ``WEIGHT_SCALE``; none of other types."""
        if "m0" in self.pointers:
            found = (self.half_float(f"{n}{self.subblock}", tile, each_lane=True) for n in "dm")
            scale, minimum = (self.multiply(self.low_twice(v), self.pair(WEIGHT_SCALE)) for v in found)
            return scale, minimum
        if "dmin" in self.pointers:
            product = self.multiply(self.small_scales(tile), self.whole_scales(tile, second=-1))
            return self.low_twice(product), self.high_twice(product)
        return self.plain_scale(tile), None

    def integers(self, tile) -> list:
        """``[word j][byte parity c]`` pairs (bytes c and c + 2) as whole float16 numbers."""
        if self.type is GGMLType.Q8_0:
            return self.signed_bytes(self.words("q", tile, self.quarter))
        if self.type in _TABLES:
            return self.chosen(self.words("q", tile, self.subblock))
        place, words = self.lower_bits(tile)
        width = 2 if self.type in _TWO_BITS else 4
        upper = self.upper_bits(tile, place + width)
        out = []
        for j, word in enumerate(words):
            pairs = []
            for c in range(2):
                value = self.masked(self.shifted(word, -8 * c), ((1 << width) - 1) * 0x00010001 << place)
                if upper is not None:
                    mask, of_word = upper
                    above, left = of_word[j]
                    value = self.masked_or(value, self.shifted(above, left - 8 * c), mask)
                factor, offset = 2.0**-place, -1024 * 2.0**-place - _CENTERS.get(self.type, 0)
                pairs.append(self.multiply_add(value, self.pair(factor), self.pair(offset)))
            out.append(pairs)
        return out

    def lower_bits(self, tile) -> tuple:
        """Where in a byte, and the four words, of the lower bits."""
        if self.type in _TWO_BITS:
            return 2 * (2 * self.half + self.subblock), self.words("q", tile, 0)
        name = "ql" if self.type is GGMLType.Q6_K else "q"
        of_half = self.type in _NIBBLE_OF_HALF
        vector, nibble = (self.subblock, self.half) if of_half else (self.half, self.subblock)
        return 4 * nibble, self.words(name, tile, vector)

    def masked_or(self, value, word, mask: int):
        from jaxlib.mlir.dialects import arith

        return arith.ori(value, arith.andi(word, self.const(mask)))

    def upper_bits(self, tile, place: int) -> tuple | None:
        """A mask at ``place``, and four pairs (word, left shift) that bring a byte's upper bits under it."""
        if self.type is GGMLType.Q6_K:
            left = place - 2 * (2 * self.half + self.subblock)
            return 0x00030003 << place, [(word, left) for word in self.words("qh", tile, 0)]
        if "qh" in self.pointers:
            word = self.word("qh", tile, self.half)
            return 0x00010001 << place, [(word, place - 4 * self.subblock - j) for j in range(4)]
        return None

    def chosen(self, words: list) -> list:
        """The table's values of the half's 16 nibbles, which lie in the order of columns in two words."""
        from jaxlib.mlir.dialects import arith

        raised = (np.array(_TABLES[self.type], np.int32) + 128).astype(np.uint8)
        entries = [self.const(int(word)) for word in raised.view(np.uint32)]
        permute = lambda *args: self.ptx("prmt.b32 $0, $1, $2, $3;", *args)
        magic, out = self.const(0x64646464), []
        for word in words[2 * self.half :][:2]:
            place = arith.andi(word, self.const(0x77777777))
            upper = arith.ori(
                arith.andi(self.shifted(word, -1), self.const(0x44444444)), self.const(0x32103210)
            )
            for right in (0, 16):
                at, which = (self.shifted(by, -right) for by in (place, upper))
                value = permute(permute(*entries[:2], at), permute(*entries[2:], at), which)
                pairs = [permute(value, magic, self.const(by)) for by in (0x4240, 0x4341)]
                out.append([self.multiply_add(v, self.pair(1), self.pair(-1152)) for v in pairs])
        return out

    def signed_bytes(self, words: list) -> list:
        from jaxlib.mlir.dialects import arith

        out = []
        for word in words:
            pairs = []
            for c in range(2):
                bits = arith.andi(self.shifted(word, -8 * c), self.const(0x00FF00FF))
                value = arith.xori(bits, self.const(0x64806480))  # 1024 + (byte + 128)
                pairs.append(self.multiply_add(value, self.pair(1), self.pair(-1152)))
            out.append(pairs)
        return out

    def plain_scale(self, tile):
        """Types without a minimum: the pair (scale, scale), times ``WEIGHT_SCALE``."""
        from jaxlib.mlir.dialects import arith

        if "e" in self.pointers:
            return self.power(tile)
        if "d0" in self.pointers:
            whole = self.half_float(f"d{self.subblock}", tile, each_lane=True)
            return self.multiply(self.low_twice(whole), self.pair(WEIGHT_SCALE))
        if self.type is GGMLType.IQ4_XS:
            word = self.shifted(self.half_float("scales", tile, each_lane=True), -8 * self.subblock)
        else:
            word = self.shifted(self.word("scales", tile), -8 * (2 * self.subblock + self.half))
        bits = arith.xori(arith.andi(word, self.const(0xFF)), self.const(0x6480))
        scale = self.multiply_add(self.low_twice(bits), self.pair(1), self.pair(-1152))
        whole = self.low_twice(self.half_float("d", tile, each_lane=False))
        return self.multiply(scale, self.multiply(whole, self.pair(WEIGHT_SCALE)))

    def power(self, tile):
        """MXFP4's 2^(e - 128) times ``WEIGHT_SCALE``, twice."""
        from jaxlib.mlir.dialects import arith

        e = self.shifted(self.half_float("e", tile, each_lane=True), -8 * self.subblock)
        e = arith.minui(arith.andi(e, self.const(0xFF)), self.const(_MAX_EXPONENT))
        bits = arith.shli(arith.addi(e, self.const(_EXPONENT)), self.const(23))
        convert = "{ .reg .b16 h; cvt.rn.f16.f32 h, $1; mov.b32 $0, {h, h}; }"
        return self.ptx(convert, bits)

    def tile_pairs(self, tile) -> list:
        integers = self.integers(tile)
        scale, minimum = self.scale_and_minimum(tile)
        if minimum is None:
            return [[self.multiply(v, scale) for v in pairs] for pairs in integers]
        return [[self.multiply_add(v, scale, minimum) for v in pairs] for pairs in integers]

    def operand(self):
        from jaxlib.mlir import ir
        from jaxlib.mlir.dialects import vector

        layout = plgpu.Layout.WGMMA.to_mgpu()
        registers = np.empty(layout.registers_shape((SLAB_ROWS, PIECE)), dtype=object)
        by_tile = registers.reshape(PIECE // 8, 2)  # column tiles of 8, halves of 8 rows
        pair = ir.VectorType.get((2,), ir.F16Type.get())
        one = ir.VectorType.get((1,), self.i32)
        for half, tile in enumerate(self.tiles):
            for j, pairs in enumerate(self.tile_pairs(tile)):
                for c, value in enumerate(pairs):
                    by_tile[2 * j + c, half] = vector.bitcast(pair, vector.broadcast(one, value))
        return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)


# The same in jnp


def _emulated(type: GGMLType, refs: dict, tiles: WarpTiles, quarter: int, group):
    subblock, half = divmod(quarter, 2)
    tile = lax.iota(jnp.int32, 8)  # in the order of rows: warp, half
    index = tiles.base + group * tiles.by_group + tile // 2 * tiles.by_warp + tile % 2 * tiles.by_half
    arrays = {}
    for name, array in TILE_ARRAYS[type].items():
        whole = refs[name][...]
        arrays[name] = whole.reshape(-1, array.parts * array.inner)[index]  # [8 tiles, elements]
    f16, f32 = jnp.float16, jnp.float32
    byte = lambda words, i: (words >> (8 * i)) & 0xFF

    def row(name: str):
        """float16 [8, 8 rows, 1 group]."""
        return arrays[name].astype(f16)[:, :, None]

    def lane(name: str):
        """[8, 8 rows, 4 groups]."""
        return arrays[name].reshape(8, 8, 4)

    def word_bytes(name: str, vector: int):
        """int32 [8, 8 rows, 4 groups, 4 words, 4 bytes]."""
        words = arrays[name].reshape(8, -1, 8, 4, 4)[:, vector]
        return jnp.stack([byte(words, i) for i in range(4)], axis=-1)

    def signed(value):
        return jnp.where(value > 127, value - 256, value)

    def quants():
        if type is GGMLType.Q8_0:
            return signed(word_bytes("q", quarter))
        if type in _TABLES:
            words = arrays["q"].reshape(8, 2, 8, 4, 2, 2)[:, subblock, :, :, half]
            nibbles = words[..., None] >> (4 * jnp.arange(8)) & 15
            values: Any = sum(jnp.where(nibbles == i, v, 0) for i, v in enumerate(_TABLES[type]))
            return values.reshape(8, 8, 4, 4, 4)
        if type in _TWO_BITS:
            q, width = word_bytes("q", 0) >> (2 * (2 * half + subblock)) & 3, 2
        else:
            of_half = type in _NIBBLE_OF_HALF
            vector, nibble = (subblock, half) if of_half else (half, subblock)
            q, width = word_bytes("ql" if type is GGMLType.Q6_K else "q", vector) >> (4 * nibble) & 15, 4
        if type is GGMLType.Q6_K:
            q = q | (word_bytes("qh", 0) >> (2 * (2 * half + subblock)) & 3) << 4
        elif "qh" in arrays:
            word = arrays["qh"].reshape(8, 2, 8, 4)[:, half]
            bits = jnp.stack([byte(word, i) for i in range(4)], axis=-1)[:, :, :, None]
            q = q | (bits >> (jnp.arange(4)[:, None] + 4 * subblock) & 1) << width
        return q - _CENTERS.get(type, 0)

    def scale_and_minimum() -> tuple:
        if "e" in arrays:
            e = jnp.minimum(byte(lane("e").astype(jnp.int32), subblock), _MAX_EXPONENT)
            return lax.bitcast_convert_type((e + _EXPONENT) << 23, f32).astype(f16), None
        if "d0" in arrays:
            minimum = -lane(f"m{subblock}") * f16(WEIGHT_SCALE) if "m0" in arrays else None
            return lane(f"d{subblock}") * f16(WEIGHT_SCALE), minimum
        whole, scales = row("d") * f16(WEIGHT_SCALE), lane("scales").astype(jnp.int32)
        if "dmin" not in arrays:
            number = subblock if type is GGMLType.IQ4_XS else 2 * subblock + half
            return signed(byte(scales, number)).astype(f16) * whole, None
        if type is GGMLType.Q2_K:
            both = byte(scales, 2 * subblock + half)
            scale, minimum = both & 15, both >> 4
        else:
            scale, minimum = byte(scales, subblock), byte(scales, 2 + subblock)
        return scale.astype(f16) * whole, minimum.astype(f16) * (row("dmin") * f16(WEIGHT_SCALE))

    scale, minimum = scale_and_minimum()
    w = quants().astype(f32) * scale.astype(f32)[..., None, None]
    if minimum is not None:
        w = w - minimum.astype(f32)[..., None, None]
    w = w.astype(f16).reshape(8, 8, 4, 4, 2, 2)  # tile, row, group, word, b, c
    return w.transpose(0, 1, 3, 5, 2, 4).reshape(SLAB_ROWS, PIECE)
