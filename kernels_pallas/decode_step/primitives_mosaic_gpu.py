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
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

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

WARPGROUP = 128


def lanes(n: int):
    """The layout of a vector of ``n`` values, one a lane and ``n / 128`` registers."""
    return plgpu.Layout.WG_STRIDED((n,), 1)


def _bytes(word, signed: bool):
    parts = [(word >> (8 * i)) & 0xFF for i in range(4)]
    return [jnp.where(p > 127, p - 256, p) for p in parts] if signed else parts


def dot16(words, x, start, x_layout, *, signed: bool, emulate: bool):
    """Adds to ``start`` the dot product of 16 weights and 16 activations a lane.

    Args:
      words: int32 [4, 8, 4, 4], four bytes a word, unsigned unless ``signed``.
      x: int32 words of four int8 activations, [4, 4, 4] (tile, column group, word) or
        [4, 4] (the same for all four tiles); its layout is ``x_layout``.
      start: int32 [4, 8, 4].
    """
    if emulate:
        if x.ndim == 2:
            x = x[None]
        pairs = zip(_bytes(words, signed), _bytes(x[:, None], True), strict=True)
        return start + sum(a * b for a, b in pairs).sum(-1)

    operation = "dp4a.s32.s32 $0, $1, $2, $3;" if signed else "dp4a.u32.s32 $0, $1, $2, $3;"

    @plgpu.inline_mgpu(
        arg_types=(TILE_WORDS, x_layout, TILE_LANES),
        return_type=plgpu.ShapeDtypeStruct((4, 8, 4), jnp.int32, layout=TILE_LANES),
    )
    def dot(ctx, words, x, start):
        del ctx
        from jaxlib.mlir import ir
        from jaxlib.mlir.dialects import arith, llvm

        i32 = ir.IntegerType.get_signless(32)
        element = lambda v, i: llvm.extractelement(v, arith.constant(i32, i))
        w, v, s = (a.registers.flat[0] for a in (words, x, start))
        total = element(s, 0)
        for i in range(4):
            total = llvm.inline_asm(i32, [element(w, i), element(v, i), total], operation, "=r,r,r,r")
        out = np.empty_like(start.registers)
        out.flat[0] = llvm.insertelement(llvm.mlir_undef(s.type), total, arith.constant(i32, 0))
        return mgpu.FragmentedArray(_registers=out, _layout=start.layout, _is_signed=True)

    return dot(words, x, start)


def warpgroup_barrier(*, emulate: bool) -> None:
    """Makes a warpgroup's memory accesses visible to all its lanes (one thread when emulated)."""
    if emulate:
        return

    @plgpu.inline_mgpu()
    def barrier(ctx):
        del ctx
        mgpu.utils.warpgroup_barrier()

    barrier()


def block_barrier(barrier, *, emulate: bool) -> None:
    """Waits for both warpgroups of the block; ``barrier`` is a Pallas barrier of two arrivals."""
    if emulate:
        plgpu.barrier_arrive(barrier)
        plgpu.barrier_wait(barrier)
        return

    @plgpu.inline_mgpu()
    def sync(ctx):
        del ctx
        mgpu.utils.inline_ptx("bar.sync 0, 256;", has_side_effects=True)

    sync()


def scatter(ref, index, values, layout, *, emulate: bool) -> None:
    """``ref[index[i]] = values[i]`` where ``index[i] < ref.shape[0]``; indices are distinct there.

    Args:
      ref: int32 or float32 [n] in shared memory.
      index: int32 [m] of layout ``layout``; ``values``: [m].
    """
    size = ref.shape[0]
    if emulate:
        ref[...] = jnp.zeros(ref.shape, ref.dtype).at[index].set(values, mode="drop")
        return

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), layout, layout))
    def store(ctx, ref, index, values):
        del ctx
        from jaxlib.mlir import ir
        from jaxlib.mlir.dialects import arith, llvm, scf

        i32 = ir.IntegerType.get_signless(32)
        base = mgpu.utils.memref_ptr(ref)
        zero = arith.constant(i32, 0)
        for i, v in zip(index.registers.flat, values.registers.flat, strict=True):
            i, v = llvm.extractelement(i, zero), llvm.extractelement(v, zero)
            inside = arith.cmpi(arith.CmpIPredicate.ult, i, arith.constant(i32, size))
            branch = scf.IfOp(inside)
            with ir.InsertionPoint(branch.then_block):
                llvm.store(v, mgpu.utils.getelementptr(base, [i], v.type))
                scf.yield_([])

    store(ref, index, values)


def warpgroup_reduce(x, layout, operation: str, scratch, *, emulate: bool):
    """The sum or maximum ("add", "max") of all of ``x``, the same in every lane; a fixed order.

    Args:
      x: float32 of layout ``layout``, each element held by one lane.
      scratch: float32 [4] in shared memory. Two uses of it need a barrier between them other
        than the one in here; callers alternate between two.
    """
    if emulate:
        return jnp.sum(x) if operation == "add" else jnp.max(x)

    @plgpu.inline_mgpu(
        arg_types=(layout, plgpu.RefType()),
        return_type=plgpu.ShapeDtypeStruct((), jnp.float32, layout=plgpu.Layout.WG_SPLAT(())),
    )
    def reduce(ctx, x, scratch):
        del ctx
        from jaxlib.mlir import ir
        from jaxlib.mlir.dialects import arith, llvm, nvvm, scf

        i32, f32 = ir.IntegerType.get_signless(32), ir.F32Type.get()
        const = lambda v: arith.constant(i32, v)
        join = arith.addf if operation == "add" else arith.maximumf
        values = []
        for register in x.registers.flat:
            if isinstance(register.type, ir.VectorType):
                length = ir.VectorType(register.type).shape[0]
                values += [llvm.extractelement(register, const(i)) for i in range(length)]
            else:
                values.append(register)
        while len(values) > 1:
            paired = [join(a, b) for a, b in zip(values[::2], values[1::2], strict=False)]
            values = paired + values[len(values) // 2 * 2 :]
        (total,) = values
        for offset in (16, 8, 4, 2, 1):
            other = nvvm.shfl_sync(const(-1), total, const(offset), const(31), nvvm.ShflKind.bfly)
            total = join(total, other)
        base = mgpu.utils.memref_ptr(scratch)
        thread = arith.remui(mgpu.utils.thread_idx(), const(WARPGROUP))
        first = arith.cmpi(arith.CmpIPredicate.eq, arith.remui(thread, const(32)), const(0))
        branch = scf.IfOp(first)
        with ir.InsertionPoint(branch.then_block):
            warp = arith.divui(thread, const(32))
            llvm.store(total, mgpu.utils.getelementptr(base, [warp], f32))
            scf.yield_([])
        mgpu.utils.warpgroup_barrier()
        parts = [llvm.load(f32, mgpu.utils.getelementptr(base, [const(i)], f32)) for i in range(4)]
        total = join(join(parts[0], parts[1]), join(parts[2], parts[3]))
        return mgpu.FragmentedArray.splat(total, (), is_signed=None)

    return reduce(x, scratch)


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
        from jaxlib.mlir import ir
        from jaxlib.mlir.dialects import arith, llvm, scf

        i32 = ir.IntegerType.get_signless(32)
        const = lambda v: arith.constant(i32, v)
        base = mgpu.utils.memref_ptr(ref)
        lane = arith.remui(mgpu.utils.thread_idx(), const(WARPGROUP))
        first = arith.cmpi(arith.CmpIPredicate.ult, lane, const(32))
        branch = scf.IfOp(first)
        with ir.InsertionPoint(branch.then_block):
            row = arith.divui(lane, const(4))
            column = arith.muli(arith.remui(lane, const(4)), const(2))
            offset = arith.addi(arith.muli(row, const(columns)), column)
            f32 = ir.F32Type.get()
            for half in range(rows // 8):
                for j in range(columns // 8):
                    (pair,) = values.registers[0, j, :, :, half].flat
                    at = arith.addi(offset, const(half * 8 * columns + j * 8))
                    llvm.store(pair, mgpu.utils.getelementptr(base, [at], f32))
            scf.yield_([])

    store(ref, values)


def grid_signal(semaphore, *, emulate: bool) -> None:
    """Says that this warpgroup's writes are done. With one block (the interpreter) there is no one to tell."""
    if semaphore is None:
        return
    warpgroup_barrier(emulate=emulate)
    plgpu.semaphore_signal(semaphore, memory_scope="gpu")


def grid_wait(semaphore, target, barrier, *, emulate: bool) -> None:
    """Waits until ``target`` warpgroups have signalled since the kernel began."""
    if semaphore is None:
        block_barrier(barrier, emulate=emulate)
        return
    plgpu.semaphore_wait(semaphore, target, decrement=False, memory_scope="gpu")


def fori(n, body, *, unroll_one: bool = True) -> None:
    """``for i in range(n): body(i)``, without a loop when ``n`` is the Python number 1."""
    if unroll_one and isinstance(n, int) and n == 1:
        body(0)
        return
    lax.fori_loop(0, n, lambda i, _: (body(i), None)[1], None)


def full(shape, value, dtype, layout):
    """A constant array of a register layout."""
    return plgpu.layout_cast(jnp.full(shape, value, dtype), layout)


