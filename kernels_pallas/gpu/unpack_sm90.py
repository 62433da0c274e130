"""Packed weight tiles to tensor-core operands, in registers.

A warp's 16 rows of a wgmma operand are two tiles of 8 rows. Each lane unpacks the 16-byte
vectors of its own row and column group (``convert.layouts.gpu_tiles``) into the four float16 pairs
that one wgmma instruction wants of it: no lane needs another's data, and a tile's nibbles become
float16 integers by a mask and one fused multiply-add per pair. See
``gpu.activations`` for the order of columns that follows.

:func:`piece_operand` has two bodies: Mosaic GPU code, and ``jnp`` of the same meaning and the
same roundings, which Pallas' interpreter runs on a CPU.
"""

import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

from qwen3_moe_jax.convert.ggml_types import GGMLType
from qwen3_moe_jax.kernels_pallas.gpu.activations import WEIGHT_SCALE
from qwen3_moe_jax.kernels_pallas.gpu.tile_arrays import (
    CENTERS,
    EXPONENT,
    LANES,
    MAX_EXPONENT,
    NIBBLE_OF_HALF,
    PIECE,
    SLAB_ROWS,
    TABLES,
    TILE_ARRAYS,
    TWO_BITS,
    WarpTiles,
)
from qwen3_moe_jax.kernels_pallas.gpu.unpack_emulated import emulated_operand


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
        return emulated_operand(type, refs, tiles, quarter, group)
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
        if self.type in TABLES:
            return self.chosen(self.words("q", tile, self.subblock))
        place, words = self.lower_bits(tile)
        width = 2 if self.type in TWO_BITS else 4
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
                factor, offset = 2.0**-place, -1024 * 2.0**-place - CENTERS.get(self.type, 0)
                pairs.append(self.multiply_add(value, self.pair(factor), self.pair(offset)))
            out.append(pairs)
        return out

    def lower_bits(self, tile) -> tuple:
        """Where in a byte, and the four words, of the lower bits."""
        if self.type in TWO_BITS:
            return 2 * (2 * self.half + self.subblock), self.words("q", tile, 0)
        name = "ql" if self.type is GGMLType.Q6_K else "q"
        of_half = self.type in NIBBLE_OF_HALF
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

        raised = (np.array(TABLES[self.type], np.int32) + 128).astype(np.uint8)
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
        e = arith.minui(arith.andi(e, self.const(0xFF)), self.const(MAX_EXPONENT))
        bits = arith.shli(arith.addi(e, self.const(EXPONENT)), self.const(23))
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
