"""The decode kernel's primitives from Ampere on: attention multiplies with ``mma``, tiles lie as they are."""

# ruff: noqa: F401 - what is imported are names of the protocol ``names.Primitives`` too

from functools import partial
from typing import Any

import jax.numpy as jnp
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
from qwen3_moe_jax.kernels_pallas.gpu.mma import recast as _recast

grid_wait = partial(_grid_wait, fence="fence.acq_rel.gpu;")


def tile_memory(shape: tuple[int, ...], dtype: Any) -> Any:
    """Shared memory of tiles of keys or values [..., rows, head_dim]."""
    return plgpu.SMEM(shape, dtype)


def copy_tile(ref: Any, source: Any) -> None:
    """Begins to copy a tile of keys or values; run by a whole warpgroup (:func:`wait_for_copies`).

    Args:
      ref: [rows, head_dim] of :func:`tile_memory`, without the padding of its rows.
      source: as many in global memory.
    """

    def offset_of(row, piece, stride):
        return arith.addi(arith.muli(row, _const(stride)), arith.muli(piece, _const(16)))

    _copy_rows(ref, source, offset_of)


def publish_tiles() -> None:
    """Lets products see what the warpgroup's lanes have stored in tiles."""
    warpgroup_barrier()


def load_queries(ref: Any) -> Any:
    """The first operand of :func:`matmul`, [64, head_dim] of layout WGMMA, of 16 queries in shared memory.

    Each warp holds the same 16 rows, of which the first warp's results are used.
    """
    layout = plgpu.Layout.MMA_LHS(ref.dtype, m_warps=1)
    rows, columns = ref.shape
    assert rows == 16, "a KV head has at most 16 query heads"
    queries = plgpu.load(ref, layout=layout, optimized=False)
    return _recast(queries, layout, plgpu.Layout.WGMMA, (64, columns))


def matmul(a: Any, ref: Any, columns: int, *, transposed: bool) -> Any:
    """float32 [64, columns] of layout WGMMA: registers a [64, k] times the matrix in shared memory.

    Args:
      ref: [k, columns], or [columns, k] where ``transposed``.
    """
    layout = plgpu.Layout
    left, right, out = layout.MMA_LHS(a.dtype), layout.MMA_RHS(a.dtype), layout.MMA_ACC(a.dtype)
    b = plgpu.load(ref.T if transposed else ref, layout=right, optimized=False)
    acc = plgpu.layout_cast(jnp.full((64, columns), 0.0, jnp.float32), out)
    a = _recast(a, layout.WGMMA, left, a.shape)
    return _recast(plgpu.mma(acc, a, b), out, layout.WGMMA, (64, columns))
