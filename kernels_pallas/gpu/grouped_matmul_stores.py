"""Results of the grouped matrix product on their way to memory: instructions, and what emulates them."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

from qwen3_moe_jax.kernels_pallas.gpu.activations import SWIGLU_SCALE
from qwen3_moe_jax.kernels_pallas.gpu.tile_arrays import SLAB_ROWS

_FLOAT16_MAX = 65504.0


def _swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    value = gate * up / (1 + jnp.exp(-gate)) * SWIGLU_SCALE
    return jnp.clip(value, -_FLOAT16_MAX, _FLOAT16_MAX).astype(jnp.float16)


def emulated_swiglu(values: jax.Array, width: int) -> jax.Array:
    """Rows (warp, gate or up, 2 words x 4 bytes) to float16 [width, 32] in operand order."""
    v = values.reshape(4, 2, 2, 2, 2, width)  # group, gate or up, word, b, c
    out = _swiglu(v[:, 0], v[:, 1])  # group, word, b, c, row of x
    return out.transpose(4, 1, 3, 0, 2).reshape(width, SLAB_ROWS // 2)


def fence_async_copies(*, emulate: bool) -> None:
    """Orders ordinary reads of shared memory, already waited for, before later copies into it."""
    if emulate:
        plgpu.commit_smem()
        return

    @plgpu.inline_mgpu()
    def fence(ctx):
        del ctx
        from jaxlib.mlir.dialects import nvvm

        nvvm.fence_proxy(nvvm.ProxyKind.async_shared, space=nvvm.SharedSpace.shared_cta)

    fence()


def _lane_values():
    """(i32 constructor, warp of the warpgroup, row of 8, column pair of 4) of the emitting lane."""
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith

    i32 = ir.IntegerType.get_signless(32)
    const = lambda v: arith.constant(i32, v)
    thread = mgpu.utils.thread_idx()
    lane = arith.andi(thread, const(31))
    warp = arith.andi(arith.shrui(thread, const(5)), const(3))
    return const, warp, arith.shrui(lane, const(2)), arith.andi(lane, const(3))


def _float_pairs(values) -> dict:
    """{(column tile of 8, half of rows, element of pair): f32 value} of a WGMMA accumulator."""
    from jaxlib.mlir.dialects import llvm

    const = _lane_values()[0]
    rows, columns = values.shape
    registers = values.registers.reshape(columns // 8, rows // 32, -1)
    out = {}
    for (j, half, _), register in np.ndenumerate(registers):
        for e in range(2):
            out[j, half, e] = llvm.extractelement(register, const(e))
    return out


def store_transposed(target, values, held, stride: int) -> None:
    """``target[:held] = values.T[:held]`` in global memory, where rows are ``stride`` elements apart."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WGMMA, plgpu.Layout.WG_SPLAT(())))
    def emit(ctx, target, values, held):
        del ctx
        from jaxlib.mlir import ir
        from jaxlib.mlir.dialects import arith, llvm, scf

        f32, i64 = ir.F32Type.get(), ir.IntegerType.get_signless(64)
        const, warp, row, pair = _lane_values()
        (held,) = held.registers.flat
        weight_row = arith.addi(arith.muli(warp, const(16)), row)
        lane = arith.addi(weight_row, arith.muli(pair, const(2 * stride)))
        base = mgpu.utils.getelementptr(mgpu.utils.memref_ptr(target), [arith.extui(i64, lane)], f32)
        elements = _float_pairs(values)
        for j in range(values.shape[1] // 8):
            branch = scf.IfOp(arith.cmpi(arith.CmpIPredicate.sgt, held, const(8 * j)))
            with ir.InsertionPoint(branch.then_block):
                for half in range(2):
                    for e in range(2):
                        at = const((8 * j + e) * stride + 8 * half)
                        llvm.store(elements[j, half, e], mgpu.utils.getelementptr(base, [at], f32))
                scf.yield_([])

    emit(target, values, held)


def emulated_scatter(out, columns, destinations, values: jax.Array) -> None:
    for row in range(values.shape[1]):
        destination = destinations[row]

        @pl.when(destination >= 0)
        def _(row=row, destination=destination):
            out[pl.ds(destination, 1), columns] = values[:, row : row + 1].T


def store_scattered(target, values, destinations, stride: int) -> None:
    """``target[destinations[i]] = values[:, i]`` in global memory, for destinations that are not negative."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WGMMA, plgpu.RefType()))
    def emit(ctx, target, values, destinations):
        del ctx
        from jaxlib.mlir import ir
        from jaxlib.mlir.dialects import arith, llvm, scf

        f32, i32 = ir.F32Type.get(), ir.IntegerType.get_signless(32)
        const, warp, row, pair = _lane_values()
        weight_row = arith.addi(arith.muli(warp, const(16)), row)
        base = mgpu.utils.getelementptr(mgpu.utils.memref_ptr(target), [weight_row], f32)
        first = mgpu.utils.getelementptr(
            mgpu.utils.memref_ptr(destinations), [arith.muli(pair, const(2))], i32
        )
        elements = _float_pairs(values)
        for j in range(values.shape[1] // 8):
            for e in range(2):
                destination = llvm.load(i32, mgpu.utils.getelementptr(first, [const(8 * j + e)], i32))
                branch = scf.IfOp(arith.cmpi(arith.CmpIPredicate.sge, destination, const(0)))
                with ir.InsertionPoint(branch.then_block):
                    there = arith.muli(destination, const(stride))
                    for half in range(2):
                        at = arith.addi(there, const(8 * half))
                        llvm.store(elements[j, half, e], mgpu.utils.getelementptr(base, [at], f32))
                    scf.yield_([])

    emit(target, values, destinations)


def swiglu_to_shared(buffer, values) -> None:
    """SwiGLU of an accumulator's halves to float16 [columns, 32] in operand order, in shared memory."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WGMMA))
    def emit(ctx, buffer, values):
        del ctx
        _emit_swiglu(buffer, values, None, SLAB_ROWS // 2)

    emit(buffer, values)


def store_swiglu(target, values, held, stride: int) -> None:
    """The same of the first ``held`` columns, to rows in global memory ``stride`` elements apart."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WGMMA, plgpu.Layout.WG_SPLAT(())))
    def emit(ctx, target, values, held):
        del ctx
        _emit_swiglu(target, values, held, stride)

    emit(target, values, held)


def _emit_swiglu(target, values, held, stride: int) -> None:
    """Writes a lane's results; of 8 columns none unless the first is one of ``held``."""
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith, llvm, scf

    f16, f32 = ir.F16Type.get(), ir.F32Type.get()
    const, warp, row, pair = _lane_values()
    real = lambda v: arith.constant(f32, v)
    ptx = lambda code, *a: llvm.inline_asm(f32, list(a), code, ",".join(["=f"] + ["f"] * len(a)))
    # Row 4 w + c + 2 b of the tile is position 16 w + 8 c + 2 group + b.
    word = arith.muli(arith.shrui(row, const(2)), const(16))
    parity = arith.muli(arith.andi(row, const(1)), const(8))
    upper = arith.andi(arith.shrui(row, const(1)), const(1))
    position = arith.addi(arith.addi(word, parity), arith.addi(arith.muli(warp, const(2)), upper))
    lane = arith.addi(position, arith.muli(pair, const(2 * stride)))
    base = mgpu.utils.getelementptr(mgpu.utils.memref_ptr(target), [lane], f16)
    elements = _float_pairs(values)

    def store_eight(j: int) -> None:
        for e in range(2):
            gate, up = elements[j, 0, e], elements[j, 1, e]
            power = ptx("ex2.approx.ftz.f32 $0, $1;", arith.mulf(gate, real(-math.log2(math.e))))
            below = ptx("rcp.approx.ftz.f32 $0, $1;", arith.addf(power, real(1.0)))
            value = arith.mulf(arith.mulf(arith.mulf(gate, up), below), real(SWIGLU_SCALE))
            value = arith.maximumf(arith.minimumf(value, real(_FLOAT16_MAX)), real(-_FLOAT16_MAX))
            at = const((8 * j + e) * stride)
            llvm.store(arith.truncf(f16, value), mgpu.utils.getelementptr(base, [at], f16))

    for j in range(values.shape[1] // 8):
        if held is None:
            store_eight(j)
            continue
        inside = arith.cmpi(arith.CmpIPredicate.sgt, held.registers.item(), const(8 * j))
        branch = scf.IfOp(inside)
        with ir.InsertionPoint(branch.then_block):
            store_eight(j)
            scf.yield_([])
