"""Attention's products in registers: tokens are rows of ``mma m16n8k16``, query heads are its columns.

Of 64 tokens each of a warpgroup's warps takes 16, with a running softmax of its own, and no warp waits for
another before :func:`put_outputs`. Keys and values come from memory as a lane multiplies them, 16 bytes at a
time: the order of a product's inner axis is free, and of the rows of its result, so that nothing is moved
between lanes.

A lane is (r, q): its number is 4 r + q. Arrays of layout WGMMA hold all warps' products: [64, columns], of
which rows 16 w to 16 w + 15 are warp w's; and [64 n, columns] of n products.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, scf

from qwen3_moe_jax.kernels_pallas.decode_step.primitives.column_operands import (
    LAYOUT,
    added,
    base_of,
    in_layout,
    place,
    signless,
    times,
    words_of,
)
from qwen3_moe_jax.kernels_pallas.decode_step.primitives.inline import const, equal, multiply_halves
from qwen3_moe_jax.kernels_pallas.decode_step.primitives.layouts import CHUNK, SCALAR, lanes
from qwen3_moe_jax.kernels_pallas.decode_step.primitives.sync import row_bytes

COLUMN = LAYOUT.reduce(0)
Array = Any


def _permute(a: ir.Value, b: ir.Value, by: int) -> ir.Value:
    code = "prmt.b32 $0, $1, $2, $3;"
    return mgpu.utils.inline_ptx(code, a, b, const(by), result_types=signless(32), has_side_effects=False)


def _halves(word: ir.Value, by: int) -> ir.Value:
    """Two int8 as float16, in one word: a byte below the upper byte of 1024 is as much more than 1024.

    Args:
      word: four int8, plus 128.
      by: which two, as the permute has it, between bytes of 1024's.
    """
    pair = ir.VectorType.get((2,), ir.F16Type.get())
    offset = arith.constant(
        pair, ir.DenseElementsAttr.get_splat(pair, ir.FloatAttr.get(ir.F16Type.get(), 1152.0))
    )
    above = mgpu.utils.bitcast(_permute(word, const(0x64646464), by), pair)
    return mgpu.utils.bitcast(arith.subf(above, offset), signless(32))


def _unsigned(word: ir.Value) -> ir.Value:
    """Four int8, plus 128."""
    return arith.xori(word, const(-0x7F7F7F80))


def _pairs(array: mgpu.FragmentedArray, m: int, g: int) -> list:
    """Of product m and columns 8 g: a lane's pair of columns 2 q, in row r and in row r + 8."""
    return [array.registers[m, g, :, :, half].flat[0] for half in range(2)]


def _pair(values: list) -> ir.Value:
    vector = llvm.mlir_undef(ir.VectorType.get((2,), values[0].type))
    for i, value in enumerate(values):
        vector = llvm.insertelement(vector, value, const(i))
    return vector


def _elements(pair: ir.Value) -> list:
    return [llvm.extractelement(pair, const(i)) for i in range(2)]


# Products


def scores(keys: Array, queries: Array, chunks: int, columns: int, dtype: Any, *, of_bytes: bool) -> list:
    """The products of 64 keys and all columns' queries, float32 [64, columns], for each chunk.

    Args:
      keys, queries: :func:`load_keys`, :func:`load_queries`.
      dtype: of the queries; int8 become it.
    """
    shape = (CHUNK, columns)

    @plgpu.inline_mgpu(
        arg_types=tuple(lanes(a.shape[0]) for a in (keys, queries)),
        return_type=[plgpu.ShapeDtypeStruct(shape, jnp.float32, layout=LAYOUT)] * chunks,
    )
    def multiply(ctx, keys, queries):
        del ctx
        keys, queries = np.array(words_of(keys), object), np.array(words_of(queries), object)
        keys, queries = keys.reshape(chunks, 2, -1), queries.reshape(columns // 8, -1, 2)
        zero = arith.constant(ir.F32Type.get(), 0.0)
        found = []
        for chunk in keys:
            rows = [list(half) for half in chunk]
            if of_bytes:
                rows = [[_halves(_unsigned(w), by) for w in half for by in (0x4140, 0x4342)] for half in rows]
            sums = [[zero] * 4 for _ in range(columns // 8)]
            for step in range(queries.shape[1]):
                a = [rows[half][2 * step + i] for i in range(2) for half in range(2)]
                for g, own in enumerate(queries):
                    sums[g] = multiply_halves(dtype, a, list(own[step]), sums[g])
            pairs = [_pair(of[2 * half : 2 * half + 2]) for of in sums for half in range(2)]
            found.append(in_layout(LAYOUT, shape, pairs))
        return found

    return multiply(keys, queries)


def warp_columns(arrays: list, operation: str) -> Array:
    """The sum or maximum of each column over each warp's 16 rows of all arrays, in all of these rows.

    Args:
      arrays: float32 [64, columns].
    """
    shape = arrays[0].shape

    @plgpu.inline_mgpu(
        arg_types=([LAYOUT] * len(arrays),),
        return_type=plgpu.ShapeDtypeStruct(shape, jnp.float32, layout=LAYOUT),
    )
    def reduce(ctx, arrays):
        del ctx
        join = arith.addf if operation == "add" else arith.maximumf
        found = []
        for g in range(shape[1] // 8):
            pairs = [pair for array in arrays for pair in _pairs(array, 0, g)]
            totals = []
            for values in zip(*(_elements(pair) for pair in pairs), strict=True):
                total = values[0]
                for value in values[1:]:
                    total = join(total, value)
                for distance in (4, 8, 16):
                    total = join(total, mgpu.utils.shfl_bfly(total, distance))
                totals.append(total)
            found += [_pair(totals)] * 2
        return in_layout(LAYOUT, shape, found)

    return reduce(list(arrays))


def as_rounded(x: Array) -> Array:
    """A product, which a sum with it does not take in without rounding it first.

    XLA on a CPU does that in some programs and not in others, so that the interpreter's bits would depend on
    what stands around: there it is held apart. Of GPUs ``scripts.profile_decode --check`` compares the bits.
    """
    return x


def _value_rows(words: np.ndarray, m: int, *, of_bytes: bool) -> list:
    """Product m's words of the first operand: each two tokens of one of the head's values.

    Args:
      words: [4 tokens, words of a token].
    """
    if not of_bytes:
        by = (0x5410, 0x7632)
        return [_permute(words[t, m], words[t + 1, m], by[half]) for t in (0, 2) for half in range(2)]
    found = []
    for t in (0, 2):
        word, upper = divmod(m, 2)
        both = _permute(words[t, word], words[t + 1, word], 0x7632 if upper else 0x5410)
        found += [_halves(_unsigned(both), by) for by in (0x4240, 0x4341)]
    return found


def weigh(values: Array, weights: list, out: Array, decay: Array, dtype: Any, *, of_bytes: bool) -> Array:
    """``out`` times ``decay``, plus the sum of each warp's values, weighted: float32 [4 head_dim, columns].

    Where a head's value lies: :func:`_first_value`.

    Args:
      values: :func:`load_values`.
      weights: float32 [64, columns] for each chunk, 0 to 1; rounded to ``dtype``, to which int8 are turned.
      decay: float32 [64, columns], the same in all of a warp's rows.
    """
    chunks, (rows, columns) = len(weights), out.shape

    @plgpu.inline_mgpu(
        arg_types=(lanes(values.shape[0]), [LAYOUT] * chunks, LAYOUT, LAYOUT),
        return_type=plgpu.ShapeDtypeStruct(out.shape, jnp.float32, layout=LAYOUT),
    )
    def multiply(ctx, values, weights, out, decay):
        del ctx
        half = ir.VectorType.get((2,), ir.BF16Type.get() if dtype == jnp.bfloat16 else ir.F16Type.get())
        words = np.array(words_of(values), object).reshape(chunks, 4, -1)
        transposed = lambda pair: mgpu.utils.inline_ptx(
            "movmatrix.sync.aligned.m8n8.trans.b16 $0, $1;",
            mgpu.utils.bitcast(arith.truncf(half, pair), signless(32)),
            result_types=signless(32),
            has_side_effects=True,
        )
        turned = [
            [[transposed(pair) for pair in _pairs(array, 0, g)] for g in range(columns // 8)]
            for array in weights
        ]
        found = []
        for m in range(rows // 64):
            sums = []
            for g in range(columns // 8):
                by = _pairs(decay, 0, g)[0]
                sums.append([x for pair in _pairs(out, m, g) for x in _elements(arith.mulf(pair, by))])
            for chunk in range(chunks):
                a = _value_rows(words[chunk], m, of_bytes=of_bytes)
                sums = [multiply_halves(dtype, a, turned[chunk][g], of) for g, of in enumerate(sums)]
            found += [_pair(of[2 * i : 2 * i + 2]) for of in sums for i in range(2)]
        return in_layout(LAYOUT, out.shape, found)

    return multiply(values, list(weights), out, decay)


# Where an attention begins and ends


def _first_value(m: int, size: int, *, of_bytes: bool) -> tuple[int, int]:
    """(first, step): rows r and r + 8 of product m are values ``first + step * r`` and the next one."""
    return (2 * m, size // 8) if of_bytes else (64 * (m // 4) + 2 * (m % 4), 8)


def start_outputs(ref: Any, wanted: Array, columns: int, *, of_bytes: bool) -> Array:
    """float32 [4 head_dim, columns]: the first warp's columns are a value, if it is wanted; all else is zero.

    Args:
      ref: float32 [head_dim] in shared memory.
      wanted: whether, bool.
    """
    (size,) = ref.shape
    shape = (4 * size, columns)

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), SCALAR),
        return_type=plgpu.ShapeDtypeStruct(shape, jnp.float32, layout=LAYOUT),
    )
    def start(ctx, ref, wanted):
        del ctx
        f32 = ir.F32Type.get()
        vector, zero = ir.VectorType.get((2,), f32), arith.constant(f32, 0.0)
        r, _, warp = place()
        takes = arith.andi(equal(warp, const(0)), equal(wanted.registers.item(), const(1)))
        found = []
        for m in range(size // 16):
            first, step = _first_value(m, size, of_bytes=of_bytes)
            at = mgpu.utils.getelementptr(base_of(ref), [added(times(r, step), const(first))], f32)
            rows = _elements(llvm.load(vector, at, alignment=8))
            pairs = [_pair([arith.select(takes, value, zero)] * 2) for value in rows]
            found += pairs * (columns // 8)
        return in_layout(LAYOUT, shape, found)

    return start(ref, wanted.astype(jnp.int32))


def put_columns(ref: Any, values: Array) -> None:
    """Each warp's value of each column, [4, columns] of float32 in shared memory.

    Args:
      values: float32 [64, columns], the same in all of a warp's rows.
    """

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), LAYOUT))
    def put(ctx, ref, values):
        del ctx
        r, q, warp = place()
        base, columns = mgpu.utils.memref_ptr(ref), values.shape[1]
        branch = scf.IfOp(equal(r, const(0)))
        with ir.InsertionPoint(branch.then_block):
            for g in range(columns // 8):
                at = added(times(warp, columns), times(q, 2), const(8 * g))
                pointer = mgpu.utils.getelementptr(base, [at], ir.F32Type.get())
                llvm.store(_pairs(values, 0, g)[0], pointer, alignment=8)
            scf.yield_([])

    put(ref, values)


def put_outputs(ref: Any, out: Array, factor: Array, group: int, *, of_bytes: bool) -> None:
    """Each warp's outputs of columns ``8 * group`` on, times ``factor``: [4, 8, head_dim] in shared memory.

    Args:
      ref: of float32, contiguous.
      out, factor: as of :func:`weigh`, ``decay``.
    """
    _, columns, size = ref.shape

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), LAYOUT, LAYOUT))
    def put(ctx, ref, out, factor):
        del ctx
        r, q, warp = place()
        base, by = mgpu.utils.memref_ptr(ref), _pairs(factor, 0, group)[0]
        own = times(added(times(warp, columns), times(q, 2)), size)
        for m in range(size // 16):
            first, step = _first_value(m, size, of_bytes=of_bytes)
            at = added(own, times(r, step), const(first))
            rows = [_elements(arith.mulf(pair, by)) for pair in _pairs(out, m, group)]
            for i, values in enumerate(zip(*rows, strict=True)):
                pointer = mgpu.utils.getelementptr(base, [added(at, const(i * size))], ir.F32Type.get())
                llvm.store(_pair(list(values)), pointer, alignment=8)

    put(ref, out, factor)


def store_columns(ref: Any, values: Array) -> None:
    """Stores the first columns, as many as ``ref`` has places; run by a whole warpgroup.

    Args:
      ref: float32 [n] in global memory, at any distance.
      values: float32 [columns] of layout WGMMA without its first axis.
    """
    (count,) = ref.shape

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), COLUMN))
    def store(ctx, ref, values):
        del ctx
        r, q, warp = place()
        base, stride = mgpu.utils.memref_ptr(ref), row_bytes(ref)
        pairs = list(values.registers.flat)[: -(-count // 8)]
        owner = scf.IfOp(arith.andi(equal(warp, const(0)), equal(r, const(0))))
        with ir.InsertionPoint(owner.then_block):
            for g, pair in enumerate(pairs):
                for i, value in enumerate(_elements(pair)):
                    column = added(times(q, 2), const(8 * g + i))
                    inside = scf.IfOp(arith.cmpi(arith.CmpIPredicate.ult, column, const(count)))
                    with ir.InsertionPoint(inside.then_block):
                        pointer = mgpu.utils.getelementptr(base, [times(column, stride)], signless(8))
                        llvm.store(value, pointer, alignment=4)
                        scf.yield_([])
            scf.yield_([])

    store(ref, values)
