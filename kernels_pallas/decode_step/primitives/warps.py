"""Work of a warp or warpgroup: reductions, stores of quantized values, references of another shape."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, nvvm, scf

from qwen3_moe_jax.kernels_pallas.decode_step.primitives.inline import (
    const,
    equal,
    lane_and_warp,
    lane_value,
    one_per_lane,
)
from qwen3_moe_jax.kernels_pallas.decode_step.primitives.layouts import SCALAR


def as_new(value):
    """The int32 ``value``, of which the compiler does not know that it is what it was before."""

    @plgpu.inline_mgpu(arg_types=(SCALAR,), return_type=plgpu.ShapeDtypeStruct((), jnp.int32, layout=SCALAR))
    def copy(ctx, value):
        del ctx
        i32 = ir.IntegerType.get_signless(32)
        result = mgpu.utils.inline_ptx(
            "mov.b32 $0, $1;", value.registers.item(), result_types=i32, has_side_effects=True
        )
        return mgpu.FragmentedArray.splat(result, (), is_signed=True)

    return copy(value)


def unset(shape: tuple[int, ...], dtype, layout):
    """An array of anything, for whose registers nothing is done: it is set before it is read."""

    @plgpu.inline_mgpu(arg_types=(), return_type=plgpu.ShapeDtypeStruct(shape, dtype, layout=layout))
    def make(ctx):
        del ctx
        lanes, element = layout.to_mgpu(), mgpu.utils.dtype_to_ir_type(dtype)
        registers = np.full(lanes.registers_shape(shape), None, object)
        registers[...] = llvm.mlir_undef(lanes.registers_element_type(element))
        return mgpu.FragmentedArray(_registers=registers, _layout=lanes, _is_signed=None)

    return make()


def warpgroup_reduce(arrays: list, layout, operation: str, scratch) -> list:
    """The sum or maximum ("add", "max") of all of each array, the same in every lane; a fixed order.

    Args:
      arrays: float32 of layout ``layout``, each element held by one lane.
      scratch: float32 [most arrays, 4] in shared memory. Two uses of it need a barrier between
        them other than the one in here; callers alternate between two.
    """

    @plgpu.inline_mgpu(
        arg_types=([layout] * len(arrays), plgpu.RefType()),
        return_type=[plgpu.ShapeDtypeStruct((), jnp.float32, layout=SCALAR)] * len(arrays),
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
                    values += [llvm.extractelement(register, const(i)) for i in range(length)]
                else:
                    values.append(register)
            while len(values) > 1:
                paired = [join(a, b) for a, b in zip(values[::2], values[1::2], strict=False)]
                values = paired + values[len(values) // 2 * 2 :]
            return values[0]

        totals = [own(x) for x in arrays]
        for offset in (16, 8, 4, 2, 1):
            shift = lambda v, offset=offset: nvvm.shfl_sync(
                const(-1), v, const(offset), const(31), nvvm.ShflKind.bfly
            )
            others = [shift(total) for total in totals]
            totals = [join(total, other) for total, other in zip(totals, others, strict=True)]
        base = mgpu.utils.memref_ptr(scratch)
        at = lambda i, warp: mgpu.utils.getelementptr(base, [arith.addi(const(4 * i), warp)], f32)
        lane, warp = lane_and_warp()
        branch = scf.IfOp(equal(lane, const(0)))
        with ir.InsertionPoint(branch.then_block):
            for i, total in enumerate(totals):
                llvm.store(total, at(i, warp))
            scf.yield_([])
        mgpu.utils.warpgroup_barrier()
        results = []
        for i in range(len(totals)):
            parts = [llvm.load(f32, at(i, const(warp))) for warp in range(4)]
            total = join(join(parts[0], parts[1]), join(parts[2], parts[3]))
            results.append(mgpu.FragmentedArray.splat(total, (), is_signed=None))
        return results

    return reduce(arrays, scratch)


def warp_largest(x, layout):
    """The largest of each warp's 32 values, in all its lanes; a NaN if one is among them.

    Args:
      x: float32, none below zero, 128 values of layout ``layout``: one per lane.
    """
    shape = x.shape

    @plgpu.inline_mgpu(
        arg_types=(layout,), return_type=plgpu.ShapeDtypeStruct(shape, jnp.float32, layout=layout)
    )
    def largest(ctx, x):
        del ctx
        i32, f32 = ir.IntegerType.get_signless(32), ir.F32Type.get()
        bits = arith.bitcast(i32, lane_value(x))  # floats that are not negative are ordered as their bits
        bits = mgpu.utils.inline_ptx(
            "redux.sync.max.u32 $0, $1, 0xffffffff;", bits, result_types=i32, has_side_effects=True
        )
        return one_per_lane(shape, layout, arith.bitcast(f32, bits), is_signed=None)

    return largest(x)


def store_lanes(refs: list, subblock, warp: int, parts: list, scale, q, layout) -> None:
    """Stores one warp's 32 quantized values as a subblock.

    Args:
      refs: words int32 [2, superblocks, 4, 2, 2, 4], scales float32 [superblocks, 4, 2] and sums
        int32 [superblocks, 4, 2, 2] in global memory, contiguous.
      subblock: which of the ``8 * superblocks``.
      parts: high and low parts, int32 [128 values] of layout ``layout``, one per lane.
      scale, q: float32 and int32, likewise.
    """

    @plgpu.inline_mgpu(arg_types=([plgpu.RefType()] * 3, SCALAR, [layout] * 2, layout, layout))
    def store(ctx, refs, subblock, parts, scale, q):
        del ctx
        i8, i32, f32 = ir.IntegerType.get_signless(8), ir.IntegerType.get_signless(32), ir.F32Type.get()
        words, scales, sums = (mgpu.utils.memref_ptr(ref) for ref in refs)
        stride = refs[0].type.get_strides_and_offset()[0][0]
        lane, own_warp = lane_and_warp()
        half = arith.divui(lane, const(16))
        index = subblock.registers.item()
        branch = scf.IfOp(equal(own_warp, const(warp)))
        with ir.InsertionPoint(branch.then_block):
            for i, part in enumerate(parts):
                at = arith.addi(arith.addi(arith.muli(index, const(32)), lane), const(4 * stride * i))
                pointer = mgpu.utils.getelementptr(words, [at], i8)
                llvm.store(arith.trunci(i8, lane_value(part)), pointer)
            totals = []
            for i in range(2):
                own = arith.select(equal(half, const(i)), lane_value(q), const(0))
                code = "redux.sync.add.s32 $0, $1, 0xffffffff;"
                totals.append(mgpu.utils.inline_ptx(code, own, result_types=i32, has_side_effects=True))
            first = scf.IfOp(equal(lane, const(0)))
            with ir.InsertionPoint(first.then_block):
                llvm.store(lane_value(scale), mgpu.utils.getelementptr(scales, [index], f32))
                for i, total in enumerate(totals):
                    at = arith.addi(arith.muli(index, const(2)), const(i))
                    llvm.store(total, mgpu.utils.getelementptr(sums, [at], i32))
                scf.yield_([])
            scf.yield_([])

    store(list(refs), subblock, parts, scale, q)


def store_subblocks(ref, piece, value) -> None:
    """Stores 32 subblocks' values [32, ...] as superblocks ``4 * piece`` to ``4 * piece + 3`` of ref.

    Args:
      ref: [superblocks, 4, 2, ...] in shared memory, contiguous.
    """
    superblocks, _, _, *inner = ref.shape
    ref.reshape(superblocks * 8, *inner)[pl.ds(piece * 32, 32)] = value


def store_zeros(ref) -> None:
    """Zeros into the 16 words of ``ref`` in shared memory; run by a whole warpgroup."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
    def store(ctx, ref):
        del ctx
        i32 = ir.IntegerType.get_signless(32)
        # Lanes beyond the sixteenth write the same zeros again.
        at = arith.remui(mgpu.utils.thread_idx(), const(16))
        pointer = mgpu.utils.getelementptr(mgpu.utils.memref_ptr(ref), [at], i32)
        llvm.store(const(0), pointer)

    store(ref)


class View:
    """A global array seen in another shape; the first ``leading`` axes are the same in both."""

    def __init__(self, ref: Any, shape: tuple[int, ...], *, leading: int):
        del leading
        self.ref = ref.reshape(shape)

    def load(self, index: tuple, layout: Any) -> Any:
        return plgpu.load(self.ref.at[index], layout=layout, optimized=False)

    def store(self, index: tuple, value: Any) -> None:
        self.ref[index] = value

    def send(self, index: tuple, value: Any, devices: int) -> None:
        """Stores into the same array of every device of the mesh, by number."""
        for device in range(devices):
            number = jnp.int32(device)
            plgpu.remote_ref(self.ref, number, device_id_type=pl.DeviceIdType.LOGICAL)[index] = value
