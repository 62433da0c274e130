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

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

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
    GGMLType.Q8_0: {
        "q": TileArray("int32", 2, 256),
        "d0": TileArray("float16", 1, 32),
        "d1": TileArray("float16", 1, 32),
    },
}
"""Arrays of a tile by type; a copy's innermost axis has at most 256 elements."""


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
        element = ir.F16Type.get() if array.dtype == "float16" else self.i32
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
        """A float16 of the lane's row (or of the lane) as the low half of an i32."""
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
        bits = int(np.float16(value).view(np.uint16))
        return self.const(bits | bits << 16)

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

    def scale_and_minimum(self, tile):
        """Q4_K and Q5_K: pairs (scale, scale) and (-minimum, -minimum), times ``WEIGHT_SCALE``."""
        from jaxlib.mlir.dialects import arith

        word = self.word("scales", tile)
        both = self.masked(self.shifted(word, -8 * self.subblock), 0x00FF00FF)
        both = self.multiply_add(both, self.pair(1), self.pair(-1024))  # (scale, min) integers
        d = self.half_float("d", tile, each_lane=False)
        dmin = self.half_float("dmin", tile, each_lane=False)
        whole = arith.ori(d, arith.shli(dmin, self.const(16)))
        sign = np.array([WEIGHT_SCALE, -WEIGHT_SCALE], np.float16).view(np.uint32)[0]
        product = self.multiply(both, self.multiply(whole, self.const(int(sign))))
        return self.low_twice(product), self.high_twice(product)

    def integers(self, tile) -> list:
        """``[word j][byte parity c]`` pairs (bytes c and c + 2) as whole float16 numbers."""
        name = "ql" if self.type is GGMLType.Q6_K else "q"
        if self.type is GGMLType.Q8_0:
            return self.signed_bytes(self.words(name, tile, self.quarter))
        words = self.words(name, tile, self.half)
        upper = self.upper_bits(tile)
        low_mask, high_mask = (0x000F000F, 0x00F000F0)[self.subblock], self.upper_mask()
        center = 32 if self.type is GGMLType.Q6_K else 0
        if self.subblock:
            factor, offset = self.pair(1 / 16), self.pair(-64 - center)
        else:
            factor, offset = self.pair(1), self.pair(-1024 - center)
        out = []
        for j, word in enumerate(words):
            pairs = []
            for c in range(2):
                value = self.masked(self.shifted(word, -8 * c), low_mask)
                if upper is not None:
                    above, left = upper[j]
                    value = self.masked_or(value, self.shifted(above, left - 8 * c), high_mask)
                pairs.append(self.multiply_add(value, factor, offset))
            out.append(pairs)
        return out

    def masked_or(self, value, word, mask: int):
        from jaxlib.mlir.dialects import arith

        return arith.ori(value, arith.andi(word, self.const(mask)))

    def upper_mask(self) -> int:
        if self.type is GGMLType.Q5_K:
            return (0x00100010, 0x01000100)[self.subblock]
        return (0x00300030, 0x03000300)[self.subblock]

    def upper_bits(self, tile) -> list | None:
        """Four pairs (word, left shift) that bring a byte's upper bits under ``upper_mask``."""
        if self.type is GGMLType.Q5_K:
            word = self.word("qh", tile, self.half)
            return [(word, 4 - j) for j in range(4)]
        if self.type is GGMLType.Q6_K:
            left = (4, 6)[self.subblock] - 4 * self.half
            return [(word, left) for word in self.words("qh", tile, 0)]
        return None

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
        """Q6_K and Q8_0: the pair (scale, scale), times ``WEIGHT_SCALE``."""
        from jaxlib.mlir.dialects import arith

        if self.type is GGMLType.Q8_0:
            whole = self.half_float(f"d{self.subblock}", tile, each_lane=True)
            return self.multiply(self.low_twice(whole), self.pair(WEIGHT_SCALE))
        word = self.shifted(self.word("scales", tile), -8 * (2 * self.subblock + self.half))
        bits = arith.xori(arith.andi(word, self.const(0xFF)), self.const(0x6480))
        scale = self.multiply_add(self.low_twice(bits), self.pair(1), self.pair(-1152))
        whole = self.low_twice(self.half_float("d", tile, each_lane=False))
        return self.multiply(scale, self.multiply(whole, self.pair(WEIGHT_SCALE)))

    def tile_pairs(self, tile) -> list:
        integers = self.integers(tile)
        if self.type in (GGMLType.Q4_K, GGMLType.Q5_K):
            scale, minimum = self.scale_and_minimum(tile)
            return [[self.multiply_add(v, scale, minimum) for v in pairs] for pairs in integers]
        scale = self.plain_scale(tile)
        return [[self.multiply(v, scale) for v in pairs] for pairs in integers]

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

    def word_bytes(name: str, vector: int):
        """int32 [8, 8 rows, 4 groups, 4 words, 4 bytes]."""
        words = arrays[name].reshape(8, -1, 8, 4, 4)[:, vector]
        return jnp.stack([byte(words, i) for i in range(4)], axis=-1)

    if type is GGMLType.Q8_0:
        q = word_bytes("q", quarter)
        q = jnp.where(q > 127, q - 256, q)
        scale, minimum = arrays[f"d{subblock}"].reshape(8, 8, 4) * f16(WEIGHT_SCALE), None
    else:
        q = word_bytes("ql" if type is GGMLType.Q6_K else "q", half) >> (4 * subblock) & 15
        scales = arrays["scales"].reshape(8, 8, 4)
        if type is GGMLType.Q6_K:
            q = (q | (word_bytes("qh", 0) >> (2 * (2 * half + subblock)) & 3) << 4) - 32
            small = byte(scales, 2 * subblock + half)
            small = jnp.where(small > 127, small - 256, small)
            scale, minimum = small.astype(f16) * (row("d") * f16(WEIGHT_SCALE)), None
        else:
            if type is GGMLType.Q5_K:
                word = arrays["qh"].reshape(8, 2, 8, 4)[:, half]
                bits = jnp.stack([byte(word, i) for i in range(4)], axis=-1)[:, :, :, None]
                q = q | (bits >> (jnp.arange(4)[:, None] + 4 * subblock) & 1) << 4
            scale = byte(scales, subblock).astype(f16) * (row("d") * f16(WEIGHT_SCALE))
            minimum = byte(scales, 2 + subblock).astype(f16) * (row("dmin") * f16(WEIGHT_SCALE))
    w = q.astype(f32) * scale.astype(f32)[..., None, None]
    if minimum is not None:
        w = w - minimum.astype(f32)[..., None, None]
    w = w.astype(f16).reshape(8, 8, 4, 4, 2, 2)  # tile, row, group, word, b, c
    return w.transpose(0, 1, 3, 5, 2, 4).reshape(SLAB_ROWS, PIECE)
