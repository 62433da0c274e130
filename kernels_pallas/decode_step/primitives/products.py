"""Integer products on tensor cores, from Ampere on, and what goes into and comes out of products."""

import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from qwen3_moe_jax.kernels_pallas.decode_step.primitives.inline import (
    const,
    equal,
    lane_and_warp,
    multiply_halves,
    one_per_lane,
)
from qwen3_moe_jax.kernels_pallas.decode_step.primitives.layouts import TILE_LANES, TILE_WORDS


def load_fragments(words, zeros, *, shared: bool) -> list:
    """A lane's activations as the second operand of integer tensor-core products.

    The operand has 32 rows (the columns of weights that four lanes hold, 8 per lane) and 8
    columns. Column 2 * group + part belongs to one column group of the tile and one int8 part,
    and is zero in all rows but that group's own: so the product's element (row, 2 * group + part)
    is that group's dot product alone, and lies in the lane that holds this row and group. Three
    quarters of the multiplications are with zeros; they are cheaper than dp4a on the words all the same.

    Args:
      words: int32 [2 parts, 4 superblocks, 4 groups, 2 subblocks, 2 halves, 4] in shared memory, a
        superblock per warp; without the second axis where ``shared``.
      zeros: int32 [16] of zeros in shared memory.

    Returns:
      ``[subblock][half]``: int32 [4, 8, 4, 4] of layout ``TILE_WORDS``; lane (i, group) of a warp has
      the words of part i % 2 where i // 2 is group, and zeros elsewhere.
    """
    shape = plgpu.ShapeDtypeStruct((4, 8, 4, 4), jnp.int32, layout=TILE_WORDS)

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), plgpu.RefType()), return_type=[[shape, shape], [shape, shape]]
    )
    def load(ctx, words, zeros):
        del ctx
        i32 = ir.IntegerType.get_signless(32)
        vector = ir.VectorType.get((4,), i32)
        strides, _ = words.type.get_strides_and_offset()
        lane, warp = lane_and_warp()
        column, group = arith.divui(lane, const(4)), arith.remui(lane, const(4))
        at = arith.muli(arith.remui(column, const(2)), const(strides[0]))
        at = arith.addi(at, arith.muli(group, const(strides[-4])))
        if not shared:
            at = arith.addi(at, arith.muli(warp, const(strides[1])))
        own = equal(arith.divui(column, const(2)), group)
        here = mgpu.utils.getelementptr(mgpu.utils.memref_ptr(words), [at], i32)
        base = arith.select(own, here, mgpu.utils.memref_ptr(zeros))

        def fragment(s: int, h: int):
            offset = const(s * strides[-3] + h * strides[-2])
            value = llvm.load(vector, mgpu.utils.getelementptr(base, [offset], i32), alignment=16)
            layout = TILE_WORDS.to_mgpu()
            registers = np.full(layout.registers_shape((4, 8, 4, 4)), None, object)
            registers.flat[0] = value
            return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=True)

        return [[fragment(s, h) for h in range(2)] for s in range(2)]

    return load(words, zeros)


def dot_tiles(tiles: list, fragments: list, *, signed: bool) -> list:
    """Dot products of one or two tiles by integer tensor-core products (mma m16n8k32).

    A tile gives 8 of the 16 rows of the first operand; with one tile, the others are zeros.

    Args:
      tiles: for each tile, int32 words [4, 8, 4, 4] of the pieces of 16 weights to be summed,
        four bytes per word, unsigned unless ``signed``.
      fragments: for each piece, the activations (:func:`load_fragments`).

    Returns:
      int32 [4, 8, 4] of layout ``TILE_LANES`` for each tile: 128 * high + low.
    """
    kind = "s8" if signed else "u8"
    operation = f"mma.sync.aligned.m16n8k32.row.col.s32.{kind}.s8.s32 "
    operation += "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};"
    shape = plgpu.ShapeDtypeStruct((4, 8, 4), jnp.int32, layout=TILE_LANES)

    @plgpu.inline_mgpu(
        arg_types=([[TILE_WORDS] * len(fragments)] * len(tiles), [TILE_WORDS] * len(fragments)),
        return_type=[shape] * len(tiles),
    )
    def dot(ctx, tiles, fragments):
        del ctx
        i32 = ir.IntegerType.get_signless(32)
        result = llvm.StructType.get_literal([i32] * 4)
        element = lambda array, i: llvm.extractelement(array.registers.flat[0], const(i))
        sums = [const(0)] * 4
        for piece, fragment in enumerate(fragments):
            for first in (0, 2):
                rows = []
                for word in (first, first + 1):
                    rows += [element(tile[piece], word) for tile in tiles]
                    rows += [const(0)] * (2 - len(tiles))
                columns = [element(fragment, first), element(fragment, first + 1)]
                out = llvm.inline_asm(
                    result, [*rows, *columns, *sums], operation, "=r,=r,=r,=r," + ",".join(["r"] * 10)
                )
                sums = [llvm.extractvalue(i32, out, [i]) for i in range(4)]
        totals = [
            arith.addi(arith.shli(high, const(7)), low)
            for high, low in zip(sums[::2], sums[1::2], strict=True)
        ]
        return [one_per_lane((4, 8, 4), TILE_LANES, total, is_signed=True) for total in totals[: len(tiles)]]

    return dot(tiles, fragments)


def dot_floats(tiles: list, fragments: list, *, dtype) -> list:
    """As :func:`dot_tiles` of one subblock, with weights of 16 bits (mma m16n8k16, float32 sums).

    Args:
      tiles: for each tile and half of the subblock, two int32 words [4, 8, 4, 4] of two weights each.
      fragments: the activations of each half (:func:`load_fragments`); their int8 are exact in both types.
      dtype: float16 or bfloat16, the weights'.

    Returns:
      float32 [4, 8, 4] of layout ``TILE_LANES`` for each tile: 128 * high + low.
    """
    shape = plgpu.ShapeDtypeStruct((4, 8, 4), jnp.float32, layout=TILE_LANES)

    @plgpu.inline_mgpu(
        arg_types=([[[TILE_WORDS] * 2] * len(fragments)] * len(tiles), [TILE_WORDS] * len(fragments)),
        return_type=[shape] * len(tiles),
    )
    def dot(ctx, tiles, fragments):
        del ctx
        i32, f32 = ir.IntegerType.get_signless(32), ir.F32Type.get()
        number = ir.F16Type.get() if dtype == jnp.float16 else ir.BF16Type.get()
        element = lambda array, i: llvm.extractelement(array.registers.flat[0], const(i))

        def two(word, first: int):
            """Bytes ``first`` and ``first + 1`` as numbers of 16 bits, in one register."""
            pair = llvm.mlir_undef(ir.VectorType.get((2,), number))
            for i in range(2):
                byte = arith.shrsi(arith.shli(word, const(24 - 8 * (first + i))), const(24))
                value = arith.truncf(number, arith.sitofp(f32, byte))
                pair = llvm.insertelement(pair, value, const(i))
            return llvm.bitcast(i32, pair)

        sums = [arith.constant(f32, 0.0)] * 4
        for half, fragment in enumerate(fragments):
            for j in range(4):
                rows = []
                for i in range(2):
                    rows += [element(tile[half][j // 2], 2 * (j % 2) + i) for tile in tiles]
                    rows += [const(0)] * (2 - len(tiles))
                word = element(fragment, j)
                sums = multiply_halves(dtype, rows, [two(word, 0), two(word, 2)], sums)
        high = arith.constant(f32, 128.0)
        totals = [arith.addf(arith.mulf(sums[i], high), sums[i + 1]) for i in (0, 2)]
        return [one_per_lane((4, 8, 4), TILE_LANES, total, is_signed=None) for total in totals[: len(tiles)]]

    return dot(tiles, fragments)


def look_up(words, table: tuple[int, ...], *, in_order: bool) -> list:
    """The int8 values of a table that nibbles choose, by byte permutes.

    Args:
      words: int32 [4, 8, 4, 4] of layout ``TILE_WORDS``.
      table: 16 values.
      in_order: the first two words' nibbles are the first result's, in their order.

    Returns:
      int32 of that shape and layout, twice: four values of the low nibbles, and of the high ones; or of the
      first two words, and of the others.
    """
    entries = [int(word) for word in np.array(table, np.int8).view(np.int32)]
    shape = plgpu.ShapeDtypeStruct((4, 8, 4, 4), jnp.int32, layout=TILE_WORDS)

    @plgpu.inline_mgpu(arg_types=(TILE_WORDS,), return_type=[shape, shape])
    def choose(ctx, words):
        del ctx
        i32 = ir.IntegerType.get_signless(32)
        permute = lambda a, b, by: mgpu.utils.inline_ptx(
            "prmt.b32 $0, $1, $2, $3;", a, b, by, result_types=i32, has_side_effects=False
        )

        def values(word) -> list:
            """The values of the first four nibbles, and of the last."""
            place = arith.andi(word, const(0x77777777))
            is_upper = arith.andi(arith.shrui(word, const(1)), const(0x44444444))
            which = arith.ori(is_upper, const(0x32103210))
            found = []
            for shift in (0, 16):  # a permute looks at 16 bits
                at, upper = (arith.shrui(by, const(shift)) if shift else by for by in (place, which))
                parts = [permute(const(entries[i]), const(entries[i + 1]), at) for i in (0, 2)]
                found.append(permute(*parts, upper))
            return found

        register = words.registers.flat[0]
        found = [values(llvm.extractelement(register, const(i))) for i in range(4)]
        if in_order:
            results = [[*found[2 * half], *found[2 * half + 1]] for half in range(2)]
        else:
            results = [[permute(*of, const(by)) for of in found] for by in (0x6420, 0x7531)]
        arrays = []
        for result in results:
            value = llvm.mlir_undef(register.type)
            for i, of in enumerate(result):
                value = llvm.insertelement(value, of, const(i))
            registers = np.full(words.registers.shape, None, object)
            registers.flat[0] = value
            arrays.append(mgpu.FragmentedArray(_registers=registers, _layout=words.layout, _is_signed=True))
        return arrays

    return choose(words)
