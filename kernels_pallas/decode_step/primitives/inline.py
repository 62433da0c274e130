"""Small pieces of MLIR of which the primitives are made."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from qwen3_moe_jax.kernels_pallas.decode_step.primitives.layouts import WARPGROUP


def const(value: int) -> ir.Value:
    """An int32."""
    return arith.constant(ir.IntegerType.get_signless(32), value)


def equal(a: ir.Value, b: ir.Value) -> ir.Value:
    return arith.cmpi(arith.CmpIPredicate.eq, a, b)


def lane_and_warp() -> tuple[ir.Value, ir.Value]:
    """This thread's number in its warp, and the warp's in its warpgroup."""
    thread = arith.remui(mgpu.utils.thread_idx(), const(WARPGROUP))
    return arith.remui(thread, const(32)), arith.divui(thread, const(32))


def lane_value(array: mgpu.FragmentedArray) -> ir.Value:
    """This lane's value of an array that has one per lane."""
    (register,) = array.registers.flat
    return llvm.extractelement(register, const(0))


def one_per_lane(shape: tuple[int, ...], layout, value: ir.Value, *, is_signed) -> mgpu.FragmentedArray:
    """The array of one value per lane, which this lane's is; ``is_signed`` as ``FragmentedArray`` has it."""
    layout = layout.to_mgpu()
    registers = np.full(layout.registers_shape(shape), None, object)
    empty = llvm.mlir_undef(ir.VectorType.get((1,), value.type))
    registers.flat[0] = llvm.insertelement(empty, value, const(0))
    return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=is_signed)


def emit_code(emit: Callable[[], None]) -> None:
    """Code that takes and returns nothing: ``emit()`` writes it."""

    @plgpu.inline_mgpu()
    def code(ctx):
        del ctx
        emit()

    code()


def multiply_halves(dtype: Any, rows: list, columns: list, sums: list) -> list:
    """One ``mma m16n8k16`` of float16 or bfloat16: sums and the product's, float32.

    Args:
      rows, columns: four words of the first operand, two of the second.
      sums: four.
    """
    f32, kind = ir.F32Type.get(), "bf16" if dtype == jnp.bfloat16 else "f16"
    code = f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 "
    code += "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};"
    out = llvm.inline_asm(
        llvm.StructType.get_literal([f32] * 4),
        [*rows, *columns, *sums],
        code,
        "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f",
    )
    return [llvm.extractvalue(f32, out, [i]) for i in range(4)]
