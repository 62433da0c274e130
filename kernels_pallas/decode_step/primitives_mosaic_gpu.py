"""Register layouts and the few instructions of the decode kernel that Pallas has no name for.

Every primitive here has two bodies: Mosaic GPU code, and plain ``jnp`` with the same
meaning (``emulate=True``), which Pallas' interpreter can run on a CPU. All other code of the
kernel is the same in both.

A weight tile is 8 rows x 256 columns. One warp reads a tile with each lane holding one row
(of 8) and 64 neighbouring columns (of 4 groups), so a 16-byte vector a lane is 512
contiguous bytes a warp. A warpgroup reads four tiles: four superblocks of the same rows, or
the same superblock of 32 rows.
"""

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, nvvm, scf

_TILED = plgpu.Layout.TILED

TILE_WORDS = _TILED(plgpu.Tiling(((4, 8, 4, 4),)), warp_dims=(-4,), lane_dims=(-3, -2), vector_dim=-1)
"""int32 [4 tiles, 8 rows, 4 column groups, 4 words]."""
TILE_LANES = TILE_WORDS.reduce(3)
"""[4 tiles, 8 rows, 4 column groups]: one value a lane."""
TILE_ROWS = TILE_WORDS.reduce((2, 3))
"""[4 tiles, 8 rows]."""
SUBBLOCKS = _TILED(
    plgpu.Tiling(((32, 1, 4, 4), (8, 1, 4, 4))), warp_dims=(-8,), lane_dims=(-4, -2), vector_dim=-1
)
"""float32 [32 subblocks, 2 halves, 4 words, 4 bytes]: 1,024 activations, 8 a lane."""
OUTPUT_ROWS = _TILED(plgpu.Tiling(((16, 8, 1), (4, 8, 1))), (-6,), (-3, -2), -1).reduce(2)
"""float32 [16 tiles, 8 rows]: one result a lane."""
HEAD_HALVES = _TILED(plgpu.Tiling(((8, 64), (2, 4))), warp_dims=(-4,), lane_dims=(-3, -2), vector_dim=-1)
"""float32 [8 heads, 64 of 128 dimensions]."""

EXPERTS = _TILED(plgpu.Tiling(((4, 128), (4,))), warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1)
"""float32 [4 sequences, 128 n experts]: a sequence a warp."""

_SCALAR = plgpu.Layout.WG_SPLAT(())

WARPGROUP = 128
MOST_POLLS = 1 << 25
"""Reads of the grid's counter before a wait gives up: ten seconds and more; a whole token takes 2 ms."""
LOG2E = 1.4426950408889634


def lanes(n: int):
    """The layout of a vector of ``n`` values, one a lane and ``n / 128`` registers."""
    return plgpu.Layout.WG_STRIDED((n,), 1)


def _const(value: int) -> ir.Value:
    """An int32."""
    return arith.constant(ir.IntegerType.get_signless(32), value)


def _equal(a: ir.Value, b: ir.Value) -> ir.Value:
    return arith.cmpi(arith.CmpIPredicate.eq, a, b)


def _lane_and_warp() -> tuple[ir.Value, ir.Value]:
    """This thread's place in its warp, and the warp's in its warpgroup."""
    thread = arith.remui(mgpu.utils.thread_idx(), _const(WARPGROUP))
    return arith.remui(thread, _const(32)), arith.divui(thread, _const(32))


def _lane_value(array: mgpu.FragmentedArray) -> ir.Value:
    """This lane's value of an array that has one a lane."""
    (register,) = array.registers.flat
    return llvm.extractelement(register, _const(0))


def _one_a_lane(shape: tuple[int, ...], layout, value: ir.Value, *, is_signed) -> mgpu.FragmentedArray:
    """The array of one value a lane, which this lane's is; ``is_signed`` as ``FragmentedArray`` has it."""
    layout = layout.to_mgpu()
    registers = np.full(layout.registers_shape(shape), None, object)
    empty = llvm.mlir_undef(ir.VectorType.get((1,), value.type))
    registers.flat[0] = llvm.insertelement(empty, value, _const(0))
    return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=is_signed)


def _run(emit) -> None:
    """Code that takes and returns nothing: ``emit()`` writes it."""

    @plgpu.inline_mgpu()
    def code(ctx):
        del ctx
        emit()

    code()


def sum_groups(value):
    """[4, 8] of layout ``TILE_ROWS``: the sum of each row's four column groups, of [4, 8, 4]."""
    return plgpu.layout_cast(jnp.sum(value, axis=2), TILE_ROWS)


def _bytes(word, signed: bool):
    parts = [(word >> (8 * i)) & 0xFF for i in range(4)]
    return [jnp.where(p > 127, p - 256, p) for p in parts] if signed else parts


def load_fragments(words, zeros, *, shared: bool, emulate: bool) -> list:
    """A lane's activations as the second operand of integer tensor-core products.

    The operand has 32 rows (the columns of weights that four lanes hold, 8 a lane) and 8
    columns. Column 2 * group + part belongs to one column group of the tile and one int8 part,
    and is zero in all rows but that group's own: so the product's element (row, 2 * group + part)
    is that group's dot product alone, and lies in the lane that holds this row and group. Three
    quarters of the multiplications are with zeros; they are cheaper than dp4a on the words all the same.

    Args:
      words: int32 [2 parts, 4 superblocks, 4 groups, 2 subblocks, 2 halves, 4] in shared memory, a
        superblock a warp; without the second axis where ``shared``.
      zeros: int32 [16] of zeros in shared memory.

    Returns:
      ``[subblock][half]``: int32 [4, 8, 4, 4] of layout ``TILE_WORDS``; lane (i, group) of a warp has
      the words of part i % 2 where i // 2 is group, and zeros elsewhere.
    """
    if emulate:
        w = words[...]
        w = jnp.broadcast_to(w[:, None], (2, 4, *w.shape[1:])) if shared else w
        column, group = jnp.arange(8)[:, None], jnp.arange(4)[None, :]
        own = (column // 2 == group)[None, :, :, None]
        spread = lambda s, h: jnp.stack([w[i % 2, :, :, s, h] for i in range(8)], axis=1)
        return [[jnp.where(own, spread(s, h), 0) for h in range(2)] for s in range(2)]

    shape = plgpu.ShapeDtypeStruct((4, 8, 4, 4), jnp.int32, layout=TILE_WORDS)

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), plgpu.RefType()), return_type=[[shape, shape], [shape, shape]]
    )
    def load(ctx, words, zeros):
        del ctx
        i32 = ir.IntegerType.get_signless(32)
        vector = ir.VectorType.get((4,), i32)
        strides, _ = words.type.get_strides_and_offset()
        lane, warp = _lane_and_warp()
        column, group = arith.divui(lane, _const(4)), arith.remui(lane, _const(4))
        at = arith.muli(arith.remui(column, _const(2)), _const(strides[0]))
        at = arith.addi(at, arith.muli(group, _const(strides[-4])))
        if not shared:
            at = arith.addi(at, arith.muli(warp, _const(strides[1])))
        own = _equal(arith.divui(column, _const(2)), group)
        here = mgpu.utils.getelementptr(mgpu.utils.memref_ptr(words), [at], i32)
        base = arith.select(own, here, mgpu.utils.memref_ptr(zeros))

        def fragment(s: int, h: int):
            offset = _const(s * strides[-3] + h * strides[-2])
            value = llvm.load(vector, mgpu.utils.getelementptr(base, [offset], i32), alignment=16)
            layout = TILE_WORDS.to_mgpu()
            registers = np.full(layout.registers_shape((4, 8, 4, 4)), None, object)
            registers.flat[0] = value
            return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=True)

        return [[fragment(s, h) for h in range(2)] for s in range(2)]

    return load(words, zeros)


def dot_tiles(tiles: list, fragments: list, *, signed: bool, emulate: bool) -> list:
    """Dot products of one or two tiles by integer tensor-core products (mma m16n8k32).

    A tile gives 8 of the 16 rows of the first operand; with one tile, the others are zeros.

    Args:
      tiles: for each tile, int32 words [4, 8, 4, 4] of the pieces of 16 weights to be summed,
        four bytes a word, unsigned unless ``signed``.
      fragments: for each piece, the activations (:func:`load_fragments`).

    Returns:
      int32 [4, 8, 4] of layout ``TILE_LANES`` for each tile: 128 * high + low.
    """
    if emulate:
        out = []
        for words in tiles:
            total = 0
            for part, factor in enumerate((128, 1)):
                for word, fragment in zip(words, fragments, strict=True):
                    x = fragment[:, part::2].sum(axis=1)  # a group's words are in one row, zeros elsewhere
                    pairs = zip(_bytes(word, signed), _bytes(x[:, None], True), strict=True)
                    total = total + factor * sum(a * b for a, b in pairs).sum(-1)
            out.append(total)
        return out

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
        element = lambda array, i: llvm.extractelement(array.registers.flat[0], _const(i))
        sums = [_const(0)] * 4
        for piece, fragment in enumerate(fragments):
            for first in (0, 2):
                rows = []
                for word in (first, first + 1):
                    rows += [element(tile[piece], word) for tile in tiles]
                    rows += [_const(0)] * (2 - len(tiles))
                columns = [element(fragment, first), element(fragment, first + 1)]
                out = llvm.inline_asm(
                    result, [*rows, *columns, *sums], operation, "=r,=r,=r,=r," + ",".join(["r"] * 10)
                )
                sums = [llvm.extractvalue(i32, out, [i]) for i in range(4)]
        totals = [
            arith.addi(arith.shli(high, _const(7)), low)
            for high, low in zip(sums[::2], sums[1::2], strict=True)
        ]
        return [_one_a_lane((4, 8, 4), TILE_LANES, total, is_signed=True) for total in totals[: len(tiles)]]

    return dot(tiles, fragments)


def as_new(value, *, emulate: bool):
    """The int32 ``value``, of which the compiler does not know that it is what it was before."""
    if emulate:
        return value

    @plgpu.inline_mgpu(
        arg_types=(_SCALAR,), return_type=plgpu.ShapeDtypeStruct((), jnp.int32, layout=_SCALAR)
    )
    def copy(ctx, value):
        del ctx
        i32 = ir.IntegerType.get_signless(32)
        result = mgpu.utils.inline_ptx(
            "mov.b32 $0, $1;", value.registers.item(), result_types=i32, has_side_effects=True
        )
        return mgpu.FragmentedArray.splat(result, (), is_signed=True)

    return copy(value)


def warpgroup_barrier(*, emulate: bool) -> None:
    """Makes a warpgroup's memory accesses visible to all its lanes (one thread when emulated)."""
    if emulate:
        return

    _run(mgpu.utils.warpgroup_barrier)


def block_barrier(barrier, *, emulate: bool) -> None:
    """Waits for both warpgroups of the block; ``barrier`` is a Pallas barrier of two arrivals."""
    if emulate:
        plgpu.barrier_arrive(barrier)
        plgpu.barrier_wait(barrier)
        return

    _run(lambda: mgpu.utils.inline_ptx("bar.sync 0, 256;", has_side_effects=True))


def top_experts(logits, scale, ids, routing, count: int, *, emulate: bool) -> None:
    """The ``count`` largest of each row of logits times its scale, and their softmax, a row a warp.

    Equal logits are ordered by index. The exponentials are of differences to the largest and
    their sum runs from the largest down, so a row's result depends on that row alone.

    Args:
      logits: float32 [4, n] of layout ``EXPERTS``.
      scale: float32 [4], above zero, of that layout without its second axis.
      ids, routing: int32 and float32 [4, count] in shared memory, to be written.
    """
    if emulate:
        best, index = lax.top_k(logits * scale[:, None], count)
        p = jnp.exp2((best - best[:, :1]) * LOG2E)
        ids[...] = index
        routing[...] = p / jnp.sum(p, axis=1, keepdims=True)
        return

    @plgpu.inline_mgpu(arg_types=(EXPERTS, EXPERTS.reduce(1), plgpu.RefType(), plgpu.RefType()))
    def choose(ctx, logits, scale, ids, routing):
        del ctx
        i32, f32 = ir.IntegerType.get_signless(32), ir.F32Type.get()
        lowest = _const(-(2**31))

        def over_warp(value, operation):
            text = f"redux.sync.{operation}.u32 $0, $1, 0xffffffff;"
            return llvm.inline_asm(i32, [value], text, "=r,r", has_side_effects=True)

        def flip(bits):
            """Maps float bits to unsigned integers of the same order; ``unflip`` is the way back."""
            return arith.xori(bits, arith.ori(arith.shrsi(bits, _const(31)), lowest))

        def unflip(key):
            return arith.xori(key, arith.ori(arith.shrsi(arith.xori(key, _const(-1)), _const(31)), lowest))

        lane, warp = _lane_and_warp()
        keys, indices = [], []
        for r, register in enumerate(logits.registers.flat):
            for i in range(4):
                logit = arith.mulf(llvm.extractelement(register, _const(i)), _lane_value(scale))
                keys.append(flip(arith.bitcast(i32, logit)))
                indices.append(arith.addi(arith.muli(lane, _const(4)), _const(r * 128 + i)))

        def tree(join, values):
            while len(values) > 1:
                paired = [join(a, b) for a, b in zip(values[::2], values[1::2], strict=False)]
                values = paired + values[len(values) // 2 * 2 :]
            return values[0]

        best, chosen = [], []
        for _ in range(count):
            key = over_warp(tree(arith.maxui, keys), "max")
            equal = [_equal(k, key) for k in keys]
            places = [arith.select(e, i, _const(-1)) for e, i in zip(equal, indices, strict=True)]
            winner = over_warp(tree(arith.minui, places), "min")
            same = [_equal(i, winner) for i in indices]
            keys = [arith.select(e, _const(0), k) for e, k in zip(same, keys, strict=True)]
            best.append(arith.bitcast(f32, unflip(key)))
            chosen.append(winner)
        log2e = arith.constant(f32, LOG2E)
        powers = []
        for value in best:
            shifted = arith.mulf(arith.subf(value, best[0]), log2e)
            powers.append(llvm.inline_asm(f32, [shifted], "ex2.approx.ftz.f32 $0, $1;", "=f,f"))
        total = powers[0]
        for power in powers[1:]:
            total = arith.addf(total, power)
        id_base, routing_base = mgpu.utils.memref_ptr(ids), mgpu.utils.memref_ptr(routing)
        branch = scf.IfOp(_equal(lane, _const(0)))
        with ir.InsertionPoint(branch.then_block):
            for i, (winner, power) in enumerate(zip(chosen, powers, strict=True)):
                at = arith.addi(arith.muli(warp, _const(count)), _const(i))
                llvm.store(winner, mgpu.utils.getelementptr(id_base, [at], i32))
                weight = arith.divf(power, total)
                llvm.store(weight, mgpu.utils.getelementptr(routing_base, [at], f32))
            scf.yield_([])

    choose(logits, scale, ids, routing)


def sort_pairs(ids, order, *, emulate: bool) -> None:
    """Numbers of pairs (a sequence and one of its experts) in the order of their experts.

    Args:
      ids: int32 [sequences, experts a token] in shared memory, at least as many as pairs.
      order: int32 [pairs] in shared memory, to be written; at most 128.
    """
    (pairs,) = order.shape
    if emulate:
        order[...] = jnp.argsort(ids[...].reshape(-1)[:pairs], stable=True).astype(jnp.int32)
        return

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType()))
    def sort(ctx, ids, order):
        del ctx
        i32 = ir.IntegerType.get_signless(32)
        vector = ir.VectorType.get((4,), i32)
        base, out = mgpu.utils.memref_ptr(ids), mgpu.utils.memref_ptr(order)
        own = arith.remui(mgpu.utils.thread_idx(), _const(WARPGROUP))
        inside = arith.cmpi(arith.CmpIPredicate.ult, own, _const(pairs))
        branch = scf.IfOp(inside)
        with ir.InsertionPoint(branch.then_block):
            key = lambda expert, pair: arith.addi(arith.shli(expert, _const(7)), pair)
            mine = key(llvm.load(i32, mgpu.utils.getelementptr(base, [own], i32)), own)
            ranks = [_const(0)] * 4
            for first in range(0, pairs, 4):
                four = llvm.load(vector, mgpu.utils.getelementptr(base, [_const(first)], i32), alignment=16)
                for i in range(4):
                    other = key(llvm.extractelement(four, _const(i)), _const(first + i))
                    less = arith.cmpi(arith.CmpIPredicate.ult, other, mine)
                    ranks[i] = arith.addi(ranks[i], arith.extui(i32, less))
            rank = arith.addi(arith.addi(ranks[0], ranks[1]), arith.addi(ranks[2], ranks[3]))
            llvm.store(own, mgpu.utils.getelementptr(out, [rank], i32))
            scf.yield_([])

    sort(ids, order)


def warpgroup_reduce(arrays: list, layout, operation: str, scratch, *, emulate: bool) -> list:
    """The sum or maximum ("add", "max") of all of each array, the same in every lane; a fixed order.

    Args:
      arrays: float32 of layout ``layout``, each element held by one lane.
      scratch: float32 [most arrays, 4] in shared memory. Two uses of it need a barrier between
        them other than the one in here; callers alternate between two.
    """
    if emulate:
        return [jnp.sum(x) if operation == "add" else jnp.max(x) for x in arrays]

    @plgpu.inline_mgpu(
        arg_types=([layout] * len(arrays), plgpu.RefType()),
        return_type=[plgpu.ShapeDtypeStruct((), jnp.float32, layout=_SCALAR)] * len(arrays),
    )
    def reduce(ctx, arrays, scratch):
        del ctx
        f32 = ir.F32Type.get()
        join = arith.addf if operation == "add" else arith.maximumf

        def own(x):
            """One lane's total."""
            values = []
            for register in x.registers.flat:
                if isinstance(register.type, ir.VectorType):
                    length = ir.VectorType(register.type).shape[0]
                    values += [llvm.extractelement(register, _const(i)) for i in range(length)]
                else:
                    values.append(register)
            while len(values) > 1:
                paired = [join(a, b) for a, b in zip(values[::2], values[1::2], strict=False)]
                values = paired + values[len(values) // 2 * 2 :]
            return values[0]

        totals = [own(x) for x in arrays]
        for offset in (16, 8, 4, 2, 1):
            shift = lambda v, offset=offset: nvvm.shfl_sync(
                _const(-1), v, _const(offset), _const(31), nvvm.ShflKind.bfly
            )
            others = [shift(total) for total in totals]
            totals = [join(total, other) for total, other in zip(totals, others, strict=True)]
        base = mgpu.utils.memref_ptr(scratch)
        at = lambda i, warp: mgpu.utils.getelementptr(base, [arith.addi(_const(4 * i), warp)], f32)
        lane, warp = _lane_and_warp()
        branch = scf.IfOp(_equal(lane, _const(0)))
        with ir.InsertionPoint(branch.then_block):
            for i, total in enumerate(totals):
                llvm.store(total, at(i, warp))
            scf.yield_([])
        mgpu.utils.warpgroup_barrier()
        results = []
        for i in range(len(totals)):
            parts = [llvm.load(f32, at(i, _const(warp))) for warp in range(4)]
            total = join(join(parts[0], parts[1]), join(parts[2], parts[3]))
            results.append(mgpu.FragmentedArray.splat(total, (), is_signed=None))
        return results

    return reduce(arrays, scratch)


def store_first_rows(ref, values, *, emulate: bool) -> None:
    """Stores the first 8 (or 16) of 64 rows of a wgmma result.

    Args:
      ref: float32 [rows, n] in global memory, contiguous.
      values: float32 [64, n] of layout WGMMA.
    """
    rows, columns = ref.shape
    if emulate:
        ref[...] = values[:rows]
        return

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WGMMA))
    def store(ctx, ref, values):
        del ctx
        base = mgpu.utils.memref_ptr(ref)
        lane = arith.remui(mgpu.utils.thread_idx(), _const(WARPGROUP))
        first = arith.cmpi(arith.CmpIPredicate.ult, lane, _const(32))
        branch = scf.IfOp(first)
        with ir.InsertionPoint(branch.then_block):
            row = arith.divui(lane, _const(4))
            column = arith.muli(arith.remui(lane, _const(4)), _const(2))
            offset = arith.addi(arith.muli(row, _const(columns)), column)
            f32 = ir.F32Type.get()
            for half in range(rows // 8):
                for j in range(columns // 8):
                    (pair,) = values.registers[0, j, :, :, half].flat
                    at = arith.addi(offset, _const(half * 8 * columns + j * 8))
                    llvm.store(pair, mgpu.utils.getelementptr(base, [at], f32))
            scf.yield_([])

    store(ref, values)


def matmul(a, ref, columns: int, *, transposed: bool, emulate: bool):
    """float32 [64, columns]: registers a [64, k] times the matrix in shared memory.

    The interpreter multiplies references only.

    Args:
      ref: [k, columns], or [columns, k] where ``transposed``.
    """
    if emulate:
        b = ref[...].astype(jnp.float32)
        return jnp.dot(a.astype(jnp.float32), b.T if transposed else b, precision=lax.Precision.HIGHEST)

    def multiply(acc):
        plgpu.wgmma(acc, a, ref.T if transposed else ref)
        return acc[...]

    return pl.run_scoped(multiply, plgpu.ACC((64, columns)))


class View:
    """A global array seen in another shape; the first ``leading`` axes are the same in both.

    The interpreter knows no reshaped references: there, the whole of the other axes is read,
    reshaped and written back.
    """

    def __init__(self, ref, shape: tuple[int, ...], *, leading: int, emulate: bool):
        self.ref, self.shape, self.leading = ref, shape, leading
        self.view = None if emulate else ref.reshape(shape)

    def load(self, index: tuple, layout):
        if self.view is not None:
            return plgpu.load(self.view.at[index], layout=layout, optimized=False)
        whole, starts, sizes, kept = self._window(index)
        return lax.dynamic_slice(whole, starts, sizes).reshape(kept)

    def store(self, index: tuple, value) -> None:
        if self.view is not None:
            self.view[index] = value
            return
        whole, starts, sizes, _ = self._window(index)
        whole = lax.dynamic_update_slice(whole, value.reshape(sizes), starts)
        own = index[: self.leading] if self.leading else ...
        self.ref[own] = whole.reshape(self.ref.shape[self.leading :])

    def _window(self, index: tuple):
        """The addressed part of the array in the view's shape, and the window of it that index means."""
        own = index[: self.leading] if self.leading else ...
        shape = self.shape[self.leading :]
        starts, sizes, kept = [], [], []
        index = index[self.leading :]
        for i, size in zip((*index, *[slice(None)] * (len(shape) - len(index))), shape, strict=True):
            if isinstance(i, slice):
                i = pl.ds(0, size)
            if hasattr(i, "start"):
                starts.append(i.start)
                sizes.append(i.size)
                kept.append(i.size)
            else:
                starts.append(i)
                sizes.append(1)
        return self.ref[own].reshape(shape), starts, sizes, kept


def store_subblocks(ref, chunk, value, *, emulate: bool) -> None:
    """Stores 32 subblocks' values [32, ...] as superblocks ``4 * chunk`` to ``4 * chunk + 3`` of ref.

    Args:
      ref: [superblocks, 4, 2, ...] in shared memory, contiguous.
    """
    superblocks, _, _, *inner = ref.shape
    if emulate:
        ref[pl.ds(chunk * 4, 4)] = value.reshape(4, *ref.shape[1:])
    else:
        ref.reshape(superblocks * 8, *inner)[pl.ds(chunk * 32, 32)] = value


def copy_to_shared(ref, source, *, emulate: bool) -> None:
    """Begins to copy an array to shared memory; run by a whole warpgroup (:func:`wait_for_copies`).

    Args:
      ref: 4-byte elements in shared memory, contiguous, a multiple of 16 bytes.
      source: as many in global memory.
    """
    if emulate:
        ref[...] = source[...]
        return
    vectors = int(np.prod(ref.shape)) // 4

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType()))
    def copy(ctx, ref, source):
        del ctx
        i32 = ir.IntegerType.get_signless(32)
        to, begin = mgpu.utils.memref_ptr(ref), mgpu.utils.memref_ptr(source)
        thread = arith.remui(mgpu.utils.thread_idx(), _const(WARPGROUP))
        for first in range(0, vectors, WARPGROUP):
            vector = arith.addi(thread, _const(first))
            at = arith.muli(vector, _const(4))
            inside = arith.cmpi(arith.CmpIPredicate.ult, vector, _const(vectors))
            mgpu.utils.inline_ptx(
                "cp.async.cg.shared.global [$0], [$1], 16;",
                llvm.ptrtoint(i32, mgpu.utils.getelementptr(to, [at], i32)),
                mgpu.utils.getelementptr(begin, [at], i32),
                predicate=inside,
                has_side_effects=True,
            )

    copy(ref, source)


def wait_for_copies(*, emulate: bool) -> None:
    """Waits for this thread's copies to shared memory; other threads see them after a barrier."""
    if emulate:
        return

    _run(lambda: mgpu.utils.inline_ptx("cp.async.wait_all;", has_side_effects=True))


def warp_largest(x, layout, *, emulate: bool):
    """The largest of each warp's 32 values, in all its lanes; a NaN if one is among them.

    Args:
      x: float32, none below zero, 128 values of layout ``layout``: one a lane.
    """
    if emulate:
        return jnp.broadcast_to(x.reshape(4, 32).max(axis=1, keepdims=True), (4, 32)).reshape(x.shape)
    shape = x.shape

    @plgpu.inline_mgpu(
        arg_types=(layout,), return_type=plgpu.ShapeDtypeStruct(shape, jnp.float32, layout=layout)
    )
    def largest(ctx, x):
        del ctx
        i32, f32 = ir.IntegerType.get_signless(32), ir.F32Type.get()
        bits = arith.bitcast(i32, _lane_value(x))  # floats that are not negative are ordered as their bits
        bits = mgpu.utils.inline_ptx(
            "redux.sync.max.u32 $0, $1, 0xffffffff;", bits, result_types=i32, has_side_effects=True
        )
        return _one_a_lane(shape, layout, arith.bitcast(f32, bits), is_signed=None)

    return largest(x)


def store_lanes(refs: list, subblock, warp: int, parts: list, scale, q, layout, *, emulate: bool) -> None:
    """Stores one warp's 32 quantized values as a subblock.

    Args:
      refs: words int32 [2, superblocks, 4, 2, 2, 4], scales float32 [superblocks, 4, 2] and sums
        int32 [superblocks, 4, 2, 2] in global memory, contiguous.
      subblock: which of the ``8 * superblocks``.
      parts: high and low parts, int32 [128 values] of layout ``layout``, one a lane.
      scale, q: float32 and int32, likewise.
    """
    words, scales, sums = refs
    if emulate:
        own = slice(32 * warp, 32 * warp + 32)
        at = (subblock // 8, subblock % 8 // 2, subblock % 2)
        for i, part in enumerate(parts):
            values = (part.reshape(128)[own] & 0xFF).reshape(2, 4, 4)
            words[(i, *at)] = (values << (8 * jnp.arange(4))).sum(axis=-1).astype(jnp.int32)
        scales[at] = scale.reshape(128)[32 * warp]
        sums[at] = q.reshape(128)[own].reshape(2, 16).sum(axis=1)
        return

    @plgpu.inline_mgpu(arg_types=([plgpu.RefType()] * 3, _SCALAR, [layout] * 2, layout, layout))
    def store(ctx, refs, subblock, parts, scale, q):
        del ctx
        i8, i32, f32 = ir.IntegerType.get_signless(8), ir.IntegerType.get_signless(32), ir.F32Type.get()
        words, scales, sums = (mgpu.utils.memref_ptr(ref) for ref in refs)
        stride = refs[0].type.get_strides_and_offset()[0][0]
        lane, own_warp = _lane_and_warp()
        half = arith.divui(lane, _const(16))
        place = subblock.registers.item()
        branch = scf.IfOp(_equal(own_warp, _const(warp)))
        with ir.InsertionPoint(branch.then_block):
            for i, part in enumerate(parts):
                at = arith.addi(arith.addi(arith.muli(place, _const(32)), lane), _const(4 * stride * i))
                pointer = mgpu.utils.getelementptr(words, [at], i8)
                llvm.store(arith.trunci(i8, _lane_value(part)), pointer)
            totals = []
            for i in range(2):
                own = arith.select(_equal(half, _const(i)), _lane_value(q), _const(0))
                code = "redux.sync.add.s32 $0, $1, 0xffffffff;"
                totals.append(mgpu.utils.inline_ptx(code, own, result_types=i32, has_side_effects=True))
            first = scf.IfOp(_equal(lane, _const(0)))
            with ir.InsertionPoint(first.then_block):
                llvm.store(_lane_value(scale), mgpu.utils.getelementptr(scales, [place], f32))
                for i, total in enumerate(totals):
                    at = arith.addi(arith.muli(place, _const(2)), _const(i))
                    llvm.store(total, mgpu.utils.getelementptr(sums, [at], i32))
                scf.yield_([])
            scf.yield_([])

    store(refs, subblock, parts, scale, q)


def grid_signal(semaphore, *, emulate: bool) -> None:
    """Says that this block's writes are done. With one block (the interpreter) there is no one to tell."""
    if semaphore is None:
        return
    warpgroup_barrier(emulate=emulate)  # all four warps have written
    plgpu.semaphore_signal(semaphore, memory_scope="gpu")


def grid_wait(semaphore, target, barrier, *, emulate: bool) -> None:
    """Waits until blocks have signalled ``target`` times since the kernel began.

    It ends the program with an error after ``MOST_POLLS``: a block that is not there (fewer
    multiprocessors than blocks, or one that another kernel keeps) must not hang the device.
    """
    if semaphore is None:
        block_barrier(barrier, emulate=emulate)
        return

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), _SCALAR))
    def wait(ctx, semaphore, target):
        del ctx
        i32 = ir.IntegerType.get_signless(32)
        below = arith.CmpIPredicate.ult
        pointer, value = mgpu.utils.memref_ptr(semaphore), target.registers.item()
        ptx = lambda code, *operands, **options: mgpu.utils.inline_ptx(
            code, *operands, has_side_effects=True, **options
        )
        # An elected thread in place of a comparison of thread numbers, and a store to address 0 in place of
        # a branch to a trap: with these, ptxas spilled 3 times as much in batches of eight.
        with mgpu.utils.single_thread(scope=mgpu.utils.ThreadSubset.WARPGROUP):
            loop = scf.WhileOp([i32], [_const(0)])
            before = loop.before.blocks.append(i32)
            with ir.InsertionPoint(before):
                (polls,) = before.arguments
                seen = ptx("ld.relaxed.gpu.global.b32 $0, [$1];", pointer, result_types=i32)
                waits = arith.cmpi(below, seen, value)
                waits = arith.andi(waits, arith.cmpi(below, polls, _const(MOST_POLLS)))
                scf.condition(waits, [polls])
            after = loop.after.blocks.append(i32)
            with ir.InsertionPoint(after):
                (polls,) = after.arguments
                scf.yield_([arith.addi(polls, _const(1))])
            ptx(
                "{ .reg .pred late; .reg .u64 nowhere; setp.eq.u32 late, $0, 0; cvt.u64.u32 nowhere, $0; "
                "@late st.global.u32 [nowhere], $0; }",
                arith.subi(_const(MOST_POLLS), loop.results[0]),
            )
            ptx("fence.acquire.gpu;")
        mgpu.utils.warpgroup_barrier()

    wait(semaphore, target)


def store_zeros(ref, *, emulate: bool) -> None:
    """Zeros into the 16 words of ``ref`` in shared memory; run by a whole warpgroup."""
    if emulate:
        ref[...] = jnp.zeros(ref.shape, ref.dtype)
        return

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
    def store(ctx, ref):
        del ctx
        i32 = ir.IntegerType.get_signless(32)
        # Lanes beyond the sixteenth write the same zeros again.
        at = arith.remui(mgpu.utils.thread_idx(), _const(16))
        pointer = mgpu.utils.getelementptr(mgpu.utils.memref_ptr(ref), [at], i32)
        llvm.store(_const(0), pointer)

    store(ref)


def carried(n: int, body, carry):
    """``for i in range(n): carry = body(i, carry)``, without a loop when ``n`` is 1."""
    return body(0, carry) if n == 1 else lax.fori_loop(0, n, body, carry)


def fori(n, body) -> None:
    """``for i in range(n): body(i)``, without a loop when ``n`` is the Python number 0 or 1."""
    if isinstance(n, int) and n <= 1:
        for i in range(n):
            body(i)
        return
    lax.fori_loop(0, n, lambda i, _: (body(i), None)[1], None)


def full(shape, value, dtype, layout):
    """A constant array of a register layout."""
    return plgpu.layout_cast(jnp.full(shape, value, dtype), layout)
