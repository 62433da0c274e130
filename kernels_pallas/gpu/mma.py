"""Matrix products by ``mma``, from Ampere on, and copies to shared memory by ``cp.async``."""

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

VECTOR_BYTES = 16


def recast(x: Any, source: Any, target: Any, shape: tuple[int, int]) -> Any:
    """The same registers as an array of another layout, whose lanes hold the same elements."""
    out = plgpu.ShapeDtypeStruct(shape, x.dtype, layout=target)

    @plgpu.inline_mgpu(arg_types=(source,), return_type=out)
    def rename(ctx, x):
        del ctx
        layout = target.to_mgpu()
        registers = x.registers.reshape(layout.registers_shape(shape))
        return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)

    return rename(x)


def zeros(columns: int, dtype: Any) -> Any:
    """float32 [64, columns], an accumulator of products of ``dtype``."""
    return plgpu.layout_cast(jnp.zeros((64, columns), jnp.float32), plgpu.Layout.MMA_ACC(dtype))


def left_operand(a: Any) -> Any:
    """An array [64, k] of layout WGMMA as the first operand."""
    return recast(a, plgpu.Layout.WGMMA, plgpu.Layout.MMA_LHS(a.dtype), a.shape)


def right_operand(ref: Any) -> Any:
    """A matrix [k, columns] in shared memory as the second operand."""
    return plgpu.load(ref, layout=plgpu.Layout.MMA_RHS(ref.dtype), optimized=False)


def product_rows(acc: Any, dtype: Any) -> Any:
    """An accumulator [64, columns] in layout WGMMA."""
    return recast(acc, plgpu.Layout.MMA_ACC(dtype), plgpu.Layout.WGMMA, acc.shape)


def join_columns(parts: Sequence[Any]) -> Any:
    """Arrays [64, n] of layout WGMMA beside one another."""
    columns = sum(part.shape[1] for part in parts)
    layout = plgpu.Layout.WGMMA
    out = plgpu.ShapeDtypeStruct((64, columns), parts[0].dtype, layout=layout)

    @plgpu.inline_mgpu(arg_types=(layout,) * len(parts), return_type=out)
    def join(ctx, *parts):
        del ctx
        registers = np.concatenate([part.registers for part in parts], axis=1)
        return mgpu.FragmentedArray(_registers=registers, _layout=layout.to_mgpu(), _is_signed=None)

    return join(*parts)


def block_barrier(warpgroups: int) -> None:
    """Waits for all warpgroups of the block."""
    _emit(lambda: mgpu.utils.inline_ptx(f"bar.sync 0, {128 * warpgroups};", has_side_effects=True))


def copy(ref: Any, source: Any, threads: int) -> None:
    """Begins to copy an array to shared memory by all threads of the block (:func:`commit_copies`).

    Args:
      ref: in shared memory; from some axis on contiguous, a multiple of 16 bytes there, as in ``source``.
      source: the same shape in global memory.
      threads: of the block.
    """
    shape, itemsize = ref.shape, jnp.dtype(ref.dtype).itemsize
    vectors = math.prod(shape) * itemsize // VECTOR_BYTES

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType()))
    def emit(ctx, ref, source):
        del ctx
        from jaxlib.mlir import ir
        from jaxlib.mlir.dialects import arith, llvm

        i8, i32 = (ir.IntegerType.get_signless(n) for n in (8, 32))
        const = lambda v: arith.constant(i32, v)
        strides = [r.type.get_strides_and_offset()[0] for r in (ref, source)]
        runs = _runs(shape, strides, itemsize)
        begins = [mgpu.utils.memref_ptr(r) for r in (ref, source)]
        thread = mgpu.utils.thread_idx()
        for first in range(0, vectors, threads):
            vector = arith.addi(thread, const(first))
            inside = arith.cmpi(arith.CmpIPredicate.ult, vector, const(vectors))
            offsets, rest = [const(0), const(0)], vector
            for count, steps in runs:  # the innermost first
                index = arith.remui(rest, const(count))
                rest = arith.divui(rest, const(count))
                offsets = [
                    arith.addi(o, arith.muli(index, const(s))) for o, s in zip(offsets, steps, strict=True)
                ]
            to, begin = (mgpu.utils.getelementptr(b, [o], i8) for b, o in zip(begins, offsets, strict=True))
            mgpu.utils.inline_ptx(
                "cp.async.cg.shared.global [$0], [$1], 16;",
                llvm.ptrtoint(i32, to),
                begin,
                predicate=inside,
                has_side_effects=True,
            )

    emit(ref, source)


def _runs(
    shape: tuple[int, ...], strides: list[list[int]], itemsize: int
) -> list[tuple[int, tuple[int, ...]]]:
    """(vectors or indices, bytes between them in each array), the innermost axis first.

    Axes that are contiguous in both arrays are one.
    """
    elements, axis = 1, len(shape)
    while axis and all(s[axis - 1] == elements for s in strides):
        axis -= 1
        elements *= shape[axis]
    nbytes = elements * itemsize
    assert nbytes % VECTOR_BYTES == 0, f"{nbytes} contiguous bytes are no vectors of {VECTOR_BYTES}"
    found = [(nbytes // VECTOR_BYTES, (VECTOR_BYTES,) * len(strides))]
    for i in range(axis - 1, -1, -1):
        found.append((shape[i], tuple(s[i] * itemsize for s in strides)))
    return found


def commit_copies() -> None:
    """Makes a group of the copies that the thread has begun since the last one."""
    _emit(lambda: mgpu.utils.inline_ptx("cp.async.commit_group;", has_side_effects=True))


def wait_for_copies(running: int) -> None:
    """Waits until at most this many of the thread's groups of copies are on their way."""
    _emit(lambda: mgpu.utils.inline_ptx(f"cp.async.wait_group {running};", has_side_effects=True))


def _emit(emit) -> None:
    @plgpu.inline_mgpu()
    def code(ctx):
        del ctx
        emit()

    code()
