"""Barriers of a warpgroup, a block and the grid, and copies to shared memory."""

import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, scf

from qwen3_moe_jax.kernels_pallas.decode_step.primitives.inline import const, emit_code
from qwen3_moe_jax.kernels_pallas.decode_step.primitives.layouts import SCALAR, WARPGROUP

MAX_POLLS = 1 << 25
"""Reads of the grid's counter before a wait gives up: ten seconds and more; a whole token takes 2 ms."""


def warpgroup_barrier() -> None:
    """Makes a warpgroup's memory accesses visible to all its lanes."""
    emit_code(mgpu.utils.warpgroup_barrier)


def block_barrier(barrier) -> None:
    """Waits for both warpgroups of the block; the interpreter waits at ``barrier``, of two arrivals."""
    del barrier
    emit_code(lambda: mgpu.utils.inline_ptx("bar.sync 0, 256;", has_side_effects=True))


def copy_to_shared(ref, source) -> None:
    """Begins to copy an array to shared memory; run by a whole warpgroup (:func:`wait_for_copies`).

    Args:
      ref: 4-byte elements in shared memory, contiguous, a multiple of 16 bytes.
      source: as many in global memory.
    """
    vectors = int(np.prod(ref.shape)) // 4

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType()))
    def copy(ctx, ref, source):
        del ctx
        i32 = ir.IntegerType.get_signless(32)
        to, begin = mgpu.utils.memref_ptr(ref), mgpu.utils.memref_ptr(source)
        thread = arith.remui(mgpu.utils.thread_idx(), const(WARPGROUP))
        for first in range(0, vectors, WARPGROUP):
            vector = arith.addi(thread, const(first))
            at = arith.muli(vector, const(4))
            inside = arith.cmpi(arith.CmpIPredicate.ult, vector, const(vectors))
            mgpu.utils.inline_ptx(
                "cp.async.cg.shared.global [$0], [$1], 16;",
                llvm.ptrtoint(i32, mgpu.utils.getelementptr(to, [at], i32)),
                mgpu.utils.getelementptr(begin, [at], i32),
                predicate=inside,
                has_side_effects=True,
            )

    copy(ref, source)


def row_bytes(array) -> int:
    """The bytes from one row of a memory reference to the next."""
    strides, _ = array.type.get_strides_and_offset()
    return strides[0] * mgpu.utils.bitwidth(array.type.element_type) // 8


def copy_rows(ref, source) -> None:
    """Begins to copy rows to shared memory; run by a whole warpgroup (:func:`wait_for_copies`).

    Args:
      ref: [rows, columns] in shared memory; the last axis contiguous, rows at any distance.
      source: as many in global memory; a row is 64, 128 or 256 bytes long.
    """
    rows, columns = source.shape
    pieces = columns * source.dtype.itemsize // 16

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType()))
    def copy(ctx, ref, source):
        del ctx
        i8, i32 = (ir.IntegerType.get_signless(n) for n in (8, 32))
        to, begin = mgpu.utils.memref_ptr(ref), mgpu.utils.memref_ptr(source)
        to_stride, stride = (row_bytes(array) for array in (ref, source))
        thread = arith.remui(mgpu.utils.thread_idx(), const(WARPGROUP))
        first, piece = arith.divui(thread, const(pieces)), arith.remui(thread, const(pieces))
        for more in range(0, rows, WARPGROUP // pieces):
            row = arith.addi(first, const(more))
            at = lambda stride, row=row: arith.addi(
                arith.muli(row, const(stride)), arith.muli(piece, const(16))
            )
            mgpu.utils.inline_ptx(
                "cp.async.cg.shared.global [$0], [$1], 16;",
                llvm.ptrtoint(i32, mgpu.utils.getelementptr(to, [at(to_stride)], i8)),
                mgpu.utils.getelementptr(begin, [at(stride)], i8),
                has_side_effects=True,
            )

    copy(ref, source)


def wait_for_copies() -> None:
    """Waits for this thread's copies to shared memory; other threads see them after a barrier."""
    emit_code(lambda: mgpu.utils.inline_ptx("cp.async.wait_all;", has_side_effects=True))


def grid_signal(semaphore) -> None:
    """Says that this block's writes are done; run by a whole warpgroup."""
    warpgroup_barrier()  # all four warps have written
    plgpu.semaphore_signal(semaphore, memory_scope="gpu")


def signal_devices(semaphore, devices: int) -> None:
    """Says to all devices of the mesh that this block's writes to them are done; run by a whole warpgroup."""
    warpgroup_barrier()

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
    def signal(ctx, semaphore):
        pointers = [mgpu.utils.memref_ptr(ctx.to_remote(semaphore, const(i))) for i in range(devices)]
        with mgpu.utils.single_thread(scope=mgpu.utils.ThreadSubset.WARPGROUP):
            mgpu.utils.inline_ptx("fence.acq_rel.sys;", has_side_effects=True)
            for pointer in pointers:
                code = "red.relaxed.sys.global.add.u32 [$0], $1;"
                mgpu.utils.inline_ptx(code, pointer, const(1), has_side_effects=True)

    signal(semaphore)


def wait_devices(semaphore, target) -> None:
    """As :func:`grid_wait`, for the signals of all devices."""
    grid_wait(semaphore, target, fence="fence.acq_rel.sys;", scope="sys")


def exchange(ref, device, sent: list) -> None:
    raise NotImplementedError("it is the interpreter's: a GPU's blocks send and signal")


def grid_wait(semaphore, target, *, fence: str, scope: str = "gpu") -> None:
    """Waits until blocks have signalled ``target`` times since the kernel began.

    It ends the program with an error after ``MAX_POLLS``: a block that is not there (fewer
    multiprocessors than blocks, or one that another kernel keeps) must not hang the device.

    Args:
      fence: the PTX instruction that acquires what the signals released.
      scope: "gpu", or "sys" where other devices signal too.
    """

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), SCALAR))
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
            loop = scf.WhileOp([i32], [const(0)])
            before = loop.before.blocks.append(i32)
            with ir.InsertionPoint(before):
                (polls,) = before.arguments
                seen = ptx(f"ld.relaxed.{scope}.global.b32 $0, [$1];", pointer, result_types=i32)
                waits = arith.cmpi(below, seen, value)
                waits = arith.andi(waits, arith.cmpi(below, polls, const(MAX_POLLS)))
                scf.condition(waits, [polls])
            after = loop.after.blocks.append(i32)
            with ir.InsertionPoint(after):
                (polls,) = after.arguments
                scf.yield_([arith.addi(polls, const(1))])
            ptx(
                "{ .reg .pred late; .reg .u64 nowhere; setp.eq.u32 late, $0, 0; cvt.u64.u32 nowhere, $0; "
                "@late st.global.u32 [nowhere], $0; }",
                arith.subi(const(MAX_POLLS), loop.results[0]),
            )
            ptx(fence)
        mgpu.utils.warpgroup_barrier()

    wait(semaphore, target)
