"""Loads in which each lane works out its own address: at the end of a row, and of weights in no tiles."""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from qwen3_moe_jax.convert.layouts.gpu_tiles import TILE_ROWS
from qwen3_moe_jax.kernels_pallas.decode_step.primitives.inline import (
    const,
    lane_and_warp,
    one_per_lane,
)
from qwen3_moe_jax.kernels_pallas.decode_step.primitives.layouts import (
    SCALAR,
    TILE_LANES,
    TILE_WORDS,
)


@dataclass(frozen=True)
class RowBytes:
    """What a lane loads of an array of packed rows, in bytes.

    Attributes:
      superblock: bytes of a row for 256 columns.
      group: from one lane's to those of the lane with the next 64 columns.
      sharing: neighbouring lanes that read the same bytes.
      first: where a lane's bytes begin.
      count: 16 or 4 for words, 2 for a number without a sign, and of float16 2.
    """

    superblock: int
    group: int
    sharing: int = 1
    first: int = 0
    count: int = 16


def load_clamped(ref: Any, first: Any, count: int, layout: Any) -> Any:
    """Elements ``first`` to ``first + count`` of the first axis; after its end, the last one again.

    Args:
      ref: in global memory; all but its first axis as ``layout`` has them.
    """
    shape = (count, *ref.shape[1:])

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), SCALAR),
        return_type=plgpu.ShapeDtypeStruct(shape, ref.dtype, layout=layout),
    )
    def load(ctx, ref, first):
        del ctx
        i32, lanes = ir.IntegerType.get_signless(32), layout.to_mgpu()
        element = ref.type.element_type
        strides, _ = ref.type.get_strides_and_offset()
        base, last = mgpu.utils.memref_ptr(ref), const(ref.type.shape[0] - 1)
        vector = ir.VectorType.get((lanes.vector_length,), element)
        registers = np.full(lanes.registers_shape(shape), None, object)
        for place, index in zip(np.ndindex(registers.shape), lanes.thread_idxs(shape), strict=True):
            outer, *inner = (arith.index_castui(i32, i) for i in index)
            at = arith.muli(arith.minsi(arith.addi(outer, first.registers.item()), last), const(strides[0]))
            for i, stride in zip(inner, strides[1:], strict=True):
                at = arith.addi(at, arith.muli(i, const(stride)))
            pointer = mgpu.utils.getelementptr(base, [at], element)
            registers[place] = llvm.load(vector, pointer)
        is_signed = True if isinstance(element, ir.IntegerType) else None
        return mgpu.FragmentedArray(_registers=registers, _layout=lanes, _is_signed=is_signed)

    return load(ref, first)


def load_rows(ref: Any, tile: Any, superblock: Any, where: RowBytes, *, shared: bool) -> Any:
    """What each lane needs of one array of packed rows for its row of a tile and its 64 columns.

    Args:
      ref: the array [R, elements of a row] in global memory.
      tile: 8 rows; a tile for each warp from this on where ``shared``.
      superblock: where not ``shared``, one for each warp from this on, at most the last of a row.

    Returns:
      int32 [4, 8, 4, 4] of layout ``TILE_WORDS`` of 16 bytes; of 4 or 2 bytes, int32 [4, 8, 4] of layout
      ``TILE_LANES``, or float16 where the array has this type.
    """
    is_half, shape = ref.dtype == jnp.float16 and where.count == 2, (4, 8, 4)
    dtype = jnp.float16 if is_half else jnp.int32
    shape, layout = ((*shape, 4), TILE_WORDS) if where.count == 16 else (shape, TILE_LANES)

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), SCALAR, SCALAR),
        return_type=plgpu.ShapeDtypeStruct(shape, dtype, layout=layout),
    )
    def load(ctx, ref, tile, superblock):
        del ctx
        i8, i16, i32, i64 = (ir.IntegerType.get_signless(n) for n in (8, 16, 32, 64))
        row_nbytes = ref.type.shape[1] * mgpu.utils.bitwidth(ref.type.element_type) // 8
        lane, warp = lane_and_warp()
        row, group = arith.divui(lane, const(4)), arith.remui(lane, const(4))
        tile, superblock = tile.registers.item(), superblock.registers.item()
        if shared:
            tile = arith.addi(tile, warp)
        else:
            last = row_nbytes // where.superblock - 1
            superblock = arith.minsi(arith.addi(superblock, warp), const(last))
        row = arith.addi(arith.muli(tile, const(TILE_ROWS)), row)
        begin = arith.muli(arith.extsi(i64, row), arith.constant(i64, row_nbytes))
        at = arith.muli(arith.divui(group, const(where.sharing)), const(where.group))
        at = arith.addi(arith.addi(at, arith.muli(superblock, const(where.superblock))), const(where.first))
        base = mgpu.utils.getelementptr(mgpu.utils.memref_ptr(ref), [begin], i8)
        pointer = mgpu.utils.getelementptr(base, [at], i8)
        if where.count == 16:
            value = llvm.load(ir.VectorType.get((4,), i32), pointer, alignment=16)
            lanes = TILE_WORDS.to_mgpu()
            registers = np.full(lanes.registers_shape(shape), None, object)
            registers.flat[0] = value
            return mgpu.FragmentedArray(_registers=registers, _layout=lanes, _is_signed=True)
        if is_half:
            value = llvm.load(ir.F16Type.get(), pointer)
        elif where.count == 4:
            value = llvm.load(i32, pointer, alignment=4)
        else:
            value = arith.extui(i32, llvm.load(i16, pointer, alignment=2))
        return one_per_lane(shape, TILE_LANES, value, is_signed=None if is_half else True)

    return load(ref, tile, superblock)
