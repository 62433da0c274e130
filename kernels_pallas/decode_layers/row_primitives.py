"""What the kernels between the products do that Pallas has no name for; in plain ``jnp`` for the interpreter.

All of it is run by one warpgroup.
"""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, nvvm, scf

from qwen3_moe_jax.kernels_pallas.decode_step.primitives.inline import const, lane_and_warp
from qwen3_moe_jax.kernels_pallas.decode_step.primitives.layouts import SCALAR, WARPGROUP
from qwen3_moe_jax.kernels_pallas.gpu.activations import to_operand_order
from qwen3_moe_jax.kernels_pallas.gpu.sorting import ROW_ALIGN

Array = Any
VECTOR = 4
"""Neighbouring values that a lane has of a row."""
UNIT = VECTOR * WARPGROUP
"""A row is a multiple of these values long."""
_ELEMENTS = 4
"""Pairs that are read from shared memory at a time."""
NO_EXPERT, _NOBODY = -1, -2
"""What stands for a pair that is none, and for the expert of a lane that has none."""


def row_layout(columns: int) -> Any:
    """Of one row: ``VECTOR`` neighbouring values per lane, and more of them ``UNIT`` values later."""
    return plgpu.Layout.WG_STRIDED((columns,), vec_size=VECTOR)


def store_operand(ref: Array, x: Array, *, emulate: bool) -> None:
    """Stores a row as float16 in operand order (``gpu.activations``).

    Four neighbouring columns are two pairs of neighbouring positions.

    Args:
      ref: float16 [n] in global memory.
      x: float32 [n] of ``row_layout``.
    """
    if emulate:
        ref[...] = to_operand_order(x.astype(jnp.float16))
        return
    layout = row_layout(*x.shape)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), layout))
    def store(ctx, ref, x):
        del ctx
        f16, pair = ir.F16Type.get(), ir.VectorType.get((2,), ir.F16Type.get())
        base = mgpu.utils.memref_ptr(ref)
        thread = arith.remui(mgpu.utils.thread_idx(), const(WARPGROUP))
        for number, register in enumerate(x.registers.flat):
            column = arith.muli(arith.addi(thread, const(number * WARPGROUP)), const(VECTOR))
            inside = arith.andi(column, const(255))
            group, i = arith.shrui(inside, const(6)), arith.shrui(arith.andi(inside, const(63)), const(2))
            at = arith.addi(arith.subi(column, inside), arith.shli(i, const(4)))
            at = arith.addi(at, arith.shli(group, const(1)))
            halves = [arith.truncf(f16, llvm.extractelement(register, const(n))) for n in range(VECTOR)]
            for c in range(2):
                packed = llvm.mlir_undef(pair)
                for b in range(2):
                    packed = llvm.insertelement(packed, halves[c + 2 * b], const(b))
                llvm.store(packed, mgpu.utils.getelementptr(base, [arith.addi(at, const(8 * c))], f16))

    store(ref, x)


def sort_pairs(
    ids: Array, first: Array, counts: Array, pair_of_row: Array, row_of_pair: Array, tiles: tuple,
    *, experts: int, tile: int, emulate: bool,
) -> None:  # fmt: skip
    """As ``gpu.sorting.sort_by_expert``, in shared memory: a lane looks for the pairs of every 128th expert.

    Args:
      ids: int32 [P] in shared memory, P a multiple of 32: the expert of each pair, or ``NO_EXPERT``.
      first: the first expert that is here, of ``experts``; pairs of others get no row.
      counts: int32 [4] in shared memory, scratch.
      pair_of_row: int32 [S] in shared memory, to be written: -1 for rows that hold none.
      row_of_pair: int32 [P] in shared memory, to be written: -1 for pairs that get no row.
      tiles: int32 [T], [T], [T], [1] in global memory, to be written: ``gpu.sorting.Tiles``, zeros after the
        last; or empty.
      experts: E.
      tile: rows of a tile.
    """
    if emulate:
        _emulated_sort(ids, first, pair_of_row, row_of_pair, tiles, experts, tile)
        return
    refs = (ids, counts, pair_of_row, row_of_pair, *tiles)
    pairs, rows, slots = ids.shape[0], pair_of_row.shape[0], row_of_pair.shape[0]
    lengths = [ref.shape[0] for ref in tiles]

    @plgpu.inline_mgpu(arg_types=(*[plgpu.RefType()] * len(refs), SCALAR))
    def sort(ctx, ids, counts, pair_of_row, row_of_pair, *more):
        del ctx
        *tiles, first = more
        i32 = ir.IntegerType.get_signless(32)
        four = ir.VectorType.get((_ELEMENTS,), i32)
        pointer = mgpu.utils.memref_ptr
        at = lambda base, index: mgpu.utils.getelementptr(base, [index], i32)
        ids, counts, pair_of_row, row_of_pair = map(pointer, (ids, counts, pair_of_row, row_of_pair))
        tiles = [pointer(ref) for ref in tiles]
        lane, warp = lane_and_warp()
        thread = arith.remui(mgpu.utils.thread_idx(), const(WARPGROUP))
        less = arith.CmpIPredicate.ult

        def when(condition, body):
            branch = scf.IfOp(condition)
            with ir.InsertionPoint(branch.then_block):
                body()
                scf.yield_([])

        def fill(base, length, value):
            """Lane after lane."""
            for start in range(0, length, WARPGROUP):
                index = arith.addi(thread, const(start))
                put = lambda index=index: llvm.store(const(value), at(base, index))
                whole = start + WARPGROUP <= length
                put() if whole else when(arith.cmpi(less, index, const(length)), put)

        def ptx(code, value):
            return mgpu.utils.inline_ptx(f"{code} $0, $1;", value, result_types=i32)

        def pairs_of(expert):
            """Which pairs have this expert: a bit for each, in words of 32."""
            words = []
            for start in range(0, pairs, 32):
                word = const(0)
                for vector in range(start, start + 32, _ELEMENTS):
                    found = llvm.load(four, at(ids, const(vector)))
                    for n in range(_ELEMENTS):
                        same = arith.cmpi(
                            arith.CmpIPredicate.eq, llvm.extractelement(found, const(n)), expert
                        )
                        bit = const((1 << (vector - start + n)) - (1 << 32) * (vector - start + n == 31))
                        word = arith.ori(word, arith.select(same, bit, const(0)))
                words.append(word)
            return words

        def place(words, row):
            """Writes down the pairs of words of bits as the rows from ``row`` on."""
            for number, word in enumerate(words):
                loop = scf.WhileOp([i32, i32], [word, row])
                before = loop.before.blocks.append(i32, i32)
                with ir.InsertionPoint(before):
                    rest, row = before.arguments
                    scf.condition(arith.cmpi(arith.CmpIPredicate.ne, rest, const(0)), [rest, row])
                after = loop.after.blocks.append(i32, i32)
                with ir.InsertionPoint(after):
                    rest, row = after.arguments
                    pair = arith.addi(ptx("clz.b32", ptx("brev.b32", rest)), const(32 * number))
                    llvm.store(pair, at(pair_of_row, row))
                    llvm.store(row, at(row_of_pair, pair))
                    rest = arith.andi(rest, arith.subi(rest, const(1)))
                    scf.yield_([rest, arith.addi(row, const(1))])
                row = loop.results[1]

        fill(pair_of_row, rows, -1)
        fill(row_of_pair, slots, -1)
        for base, length in zip(tiles[:3], lengths, strict=False):
            fill(base, length, 0)
        before = const(0)  # rows of the experts before, and tiles times 2^16
        for start in range(0, experts, WARPGROUP):
            local = arith.addi(thread, const(start))
            own = arith.addi(first.registers.item(), local)
            if start + WARPGROUP > experts:
                own = arith.select(arith.cmpi(less, local, const(experts)), own, const(_NOBODY))
            words, count = pairs_of(own), const(0)
            for word in words:
                count = arith.addi(count, ptx("popc.b32", word))
            mask = ROW_ALIGN - 1
            aligned = arith.andi(arith.addi(count, const(mask)), const(~mask))
            tiled = arith.divui(arith.addi(aligned, const(tile - 1)), const(tile))
            packed = arith.addi(aligned, arith.shli(tiled, const(16)))
            total = packed
            for offset in (1, 2, 4, 8, 16):
                moved = nvvm.shfl_sync(const(-1), total, const(offset), const(0), nvvm.ShflKind.up)
                has = arith.cmpi(arith.CmpIPredicate.uge, lane, const(offset))
                total = arith.addi(total, arith.select(has, moved, const(0)))
            last = arith.cmpi(arith.CmpIPredicate.eq, lane, const(31))
            mgpu.utils.warpgroup_barrier()  # the fills are done, and the last round's counts are read
            when(last, lambda total=total: llvm.store(total, at(counts, warp)))
            mgpu.utils.warpgroup_barrier()
            own_start, all_warps = arith.addi(before, arith.subi(total, packed)), const(0)
            for other in range(4):
                value = llvm.load(i32, at(counts, const(other)))
                earlier = arith.cmpi(less, const(other), warp)
                own_start = arith.addi(own_start, arith.select(earlier, value, const(0)))
                all_warps = arith.addi(all_warps, value)
            before = arith.addi(before, all_warps)
            first_row = arith.andi(own_start, const(0xFFFF))

            place(words, first_row)
            if tiles:
                first_tile = arith.shrui(own_start, const(16))
                loop = scf.ForOp(const(0), tiled, const(1), [])
                with ir.InsertionPoint(loop.body):
                    number = arith.addi(first_tile, loop.induction_variable)
                    done = arith.muli(loop.induction_variable, const(tile))
                    held = arith.minui(arith.subi(aligned, done), const(tile))
                    for base, value in zip(tiles, (local, arith.addi(first_row, done), held), strict=False):
                        llvm.store(value, at(base, number))
                    scf.yield_([])
        if tiles:
            put_count = lambda: llvm.store(arith.shrui(before, const(16)), at(tiles[3], const(0)))
            when(arith.cmpi(arith.CmpIPredicate.eq, thread, const(0)), put_count)
        mgpu.utils.warpgroup_barrier()

    sort(*refs, first)


def _emulated_sort(ids, first, pair_of_row, row_of_pair, tiles, experts: int, tile: int) -> None:
    """:func:`sort_pairs` in plain ``jnp``; as ``sort_by_expert``, whose constants a kernel may not have."""
    numbers = lambda n: lax.broadcasted_iota(jnp.int32, (n, 1), 0)
    local = ids[...] - first
    is_here = (local >= 0) & (local < experts)
    local = jnp.where(is_here, local, experts)
    before = numbers(len(local)) > numbers(len(local)).T
    rank = jnp.sum((local[:, None] == local) & before, axis=1)
    aligned = jnp.sum(local[:, None] == numbers(experts).T, axis=0)
    aligned = (aligned + ROW_ALIGN - 1) // ROW_ALIGN * ROW_ALIGN
    tiled = (aligned + tile - 1) // tile
    is_earlier = numbers(experts) > numbers(experts).T
    start, first_tile = (jnp.sum(jnp.where(is_earlier, n, 0), axis=1) for n in (aligned, tiled))
    row = jnp.where(is_here, start[jnp.minimum(local, experts - 1)] + rank, -1)
    row_of_pair[...] = jnp.pad(row, (0, row_of_pair.shape[0] - len(row)), constant_values=-1)
    found = numbers(pair_of_row.shape[0]) == row
    pair_of_row[...] = jnp.max(jnp.where(found, numbers(len(row)).T, -1), axis=1)
    if not tiles:
        return
    number = numbers(tiles[0].shape[0])
    own = (number >= first_tile) & (number < first_tile + tiled)
    done = (number - first_tile) * tile
    held = jnp.minimum(aligned - done, tile)
    for ref, value in zip(tiles, (numbers(experts).T, start + done, held), strict=False):
        ref[...] = jnp.sum(jnp.where(own, value, 0), axis=1)
    tiles[3][...] = jnp.sum(tiled).reshape(1)
