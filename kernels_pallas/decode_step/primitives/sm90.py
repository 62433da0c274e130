"""The decode kernel's primitives on Hopper: attention multiplies with ``wgmma``, on swizzled tiles."""

# ruff: noqa: F401 - what is imported are names of the protocol ``names.Primitives`` too

from functools import partial
from typing import Any

from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir.dialects import arith

from qwen3_moe_jax.kernels_pallas.decode_step.primitives.choice import (
    rank_experts,
    sort_pairs,
    top_experts,
    weigh_experts,
)
from qwen3_moe_jax.kernels_pallas.decode_step.primitives.inline import const as _const
from qwen3_moe_jax.kernels_pallas.decode_step.primitives.loads import (
    load_clamped,
    load_pair,
    load_rows,
    to_halves,
)
from qwen3_moe_jax.kernels_pallas.decode_step.primitives.products import (
    dot_floats,
    dot_tiles,
    load_fragments,
    look_up,
    store_first_rows,
)
from qwen3_moe_jax.kernels_pallas.decode_step.primitives.sync import (
    block_barrier,
    copy_to_shared,
    exchange,
    grid_signal,
    signal_devices,
    wait_devices,
    wait_for_copies,
    warpgroup_barrier,
)
from qwen3_moe_jax.kernels_pallas.decode_step.primitives.sync import copy_rows as _copy_rows
from qwen3_moe_jax.kernels_pallas.decode_step.primitives.sync import grid_wait as _grid_wait
from qwen3_moe_jax.kernels_pallas.decode_step.primitives.warps import (
    View,
    as_new,
    store_lanes,
    store_subblocks,
    store_zeros,
    unset,
    warp_largest,
    warpgroup_reduce,
)

grid_wait = partial(_grid_wait, fence="fence.acquire.gpu;")
TILE_TRANSFORMS = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))


def tile_memory(shape: tuple[int, ...], dtype: Any) -> Any:
    """Shared memory of tiles of keys or values [..., rows, head_dim]."""
    return plgpu.SMEM(shape, dtype, transforms=TILE_TRANSFORMS)


def copy_tile(ref: Any, source: Any) -> None:
    """Begins to copy a tile of keys or values; run by a whole warpgroup (:func:`wait_for_copies`).

    Args:
      ref: [rows, head_dim] of :func:`tile_memory`.
      source: as many in global memory.
    """
    blocks = source.shape[1] // 64

    def offset_of(row, piece, stride):
        """Tiles of 8 rows of 128 bytes, in which 16 bytes lie at their number exclusive or the row's."""
        del stride
        of_tile, row = arith.divui(row, _const(8)), arith.remui(row, _const(8))
        block, piece = arith.divui(piece, _const(8)), arith.xori(arith.remui(piece, _const(8)), row)
        tile = arith.addi(arith.muli(of_tile, _const(blocks)), block)
        within = arith.addi(arith.muli(row, _const(128)), arith.muli(piece, _const(16)))
        return arith.addi(arith.muli(tile, _const(1024)), within)

    _copy_rows(ref, source, offset_of, transforms=TILE_TRANSFORMS)


def publish_tiles() -> None:
    """Lets products see what the warpgroup's lanes have stored in tiles."""
    plgpu.commit_smem()


def load_queries(ref: Any) -> Any:
    """The first operand of :func:`matmul`, [64, head_dim] of layout WGMMA, of queries in shared memory."""
    return plgpu.load(ref, layout=plgpu.Layout.WGMMA, optimized=False)


def matmul(a: Any, ref: Any, columns: int, *, transposed: bool) -> Any:
    """float32 [64, columns]: registers a [64, k] times the matrix in shared memory.

    Args:
      ref: [k, columns], or [columns, k] where ``transposed``.
    """

    def multiply(acc):
        plgpu.wgmma(acc, a, ref.T if transposed else ref)
        return acc[...]

    return pl.run_scoped(multiply, plgpu.ACC((64, columns)))
