"""Loops over experts that touch only the packed rows of experts in use.

Two forms, chosen by the static number of rows:

- :func:`for_each_row` (decode): one iteration per (token, expert) pair, reading that expert's packed rows.
- :func:`for_each_expert` (prefill): rows sorted by expert on the device, a loop over experts
  that have rows, each dequantized once and applied to padded tiles of its rows.

Neither ever holds more than one expert in float. Few rows on layout "lanes16"
take neither: ``lanes.matvec`` multiplies the packed words.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qwen3_moe_jax.kernels_pallas.packed import lanes16 as lanes
from qwen3_moe_jax.kernels_pallas.packed.dots import DenseMatrix, dense
from qwen3_moe_jax.kernels_pallas.packed.stacks import Matrices

ROW_TILE = 32
"""Rows of one expert that are multiplied at a time in the sorted form."""

MAX_UNSORTED_ROWS = 32
"""Up to this many (token, expert) pairs are looped over one by one."""

MAX_MATVEC_ROWS = 128
"""Up to this many (token, expert) pairs, stacks of layout "lanes16" are multiplied in packed form ..."""

MAX_MATVEC_ROWS_PER_EXPERT = 8
"""... and up to this many times the number of experts."""

TileFunction = Callable[[list[DenseMatrix], list[jax.Array]], list[jax.Array]]
"""(dense matrices of one expert, tiles [rows, ...]) -> results [rows, ...]."""


def multiplies_packed(stacks: Sequence[Matrices], num_rows: int) -> bool:
    """Whether ``lanes.matvec`` is the way for this many (token, expert) pairs."""
    num_experts = stacks[0].shape[0]
    few = num_rows <= min(MAX_MATVEC_ROWS, MAX_MATVEC_ROWS_PER_EXPERT * num_experts)
    return few and all(lanes.multiplies(w.stack) for w in stacks)


def matvec(rows: jax.Array, w: Matrices, ids: jax.Array) -> jax.Array:
    """Every row [R, K] times the matrix of its expert, in packed form."""
    stack, offset = w.one_per_row()
    return lanes.matvec(rows, stack, ids + offset)


def over_rows(
    stacks: Sequence[Matrices],
    ids: jax.Array,
    rows: Sequence[jax.Array],
    f: TileFunction,
    compute_dtype: np.dtype,
) -> list[jax.Array]:
    """Applies ``f`` to every row with its expert's matrices; chooses the form by the number of rows.

    Args:
      stacks: packed [E, N, K] each.
      ids: int32 [R], the expert of each row.
      rows: arrays [R, ...].
      f: applied to ([N, K] each, tiles [r, ...] each).
      compute_dtype: of the dequantized matrices.

    Returns:
      float32 arrays [R, ...], one per result of ``f``.
    """
    form = for_each_row if ids.shape[0] <= MAX_UNSORTED_ROWS else for_each_expert
    return form(stacks, ids, rows, f, compute_dtype)


def _results(
    matrices: Callable[[jax.Array], list[DenseMatrix]], rows: Sequence[jax.Array], tile: int, f: TileFunction
) -> list[jax.ShapeDtypeStruct]:
    """Shapes of what ``f`` gives for a tile."""
    tiles = [jax.ShapeDtypeStruct((tile, *r.shape[1:]), r.dtype) for r in rows]
    return jax.eval_shape(lambda tiles: f(matrices(jnp.int32(0)), tiles), tiles)


def _write(outputs: list[jax.Array], parts: list[jax.Array], start: jax.Array) -> list[jax.Array]:
    return [lax.dynamic_update_slice_in_dim(o, p, start, axis=0) for o, p in zip(outputs, parts, strict=True)]


def for_each_row(
    stacks: Sequence[Matrices],
    ids: jax.Array,
    rows: Sequence[jax.Array],
    f: TileFunction,
    compute_dtype: np.dtype,
) -> list[jax.Array]:
    """Row by row: reads the packed matrices of that row's expert. Arguments as :func:`over_rows`."""
    count = ids.shape[0]

    def matrices(e: jax.Array) -> list[DenseMatrix]:
        return [dense(w.matrix(e), compute_dtype) for w in stacks]

    def one_row(i: jax.Array, outputs: list[jax.Array]) -> list[jax.Array]:
        parts = f(matrices(ids[i]), [lax.dynamic_slice_in_dim(r, i, 1) for r in rows])
        return _write(outputs, parts, i)

    start = [jnp.zeros((count, *s.shape[1:]), s.dtype) for s in _results(matrices, rows, 1, f)]
    return lax.fori_loop(0, count, one_row, start)


def for_each_expert(
    stacks: Sequence[Matrices],
    ids: jax.Array,
    rows: Sequence[jax.Array],
    f: TileFunction,
    compute_dtype: np.dtype,
) -> list[jax.Array]:
    """Sorted form: each expert in use is dequantized once. Arguments as :func:`over_rows`.

    A tile's padding holds rows of later experts; what they give is overwritten
    when their own expert's turn comes, and the end is cut off.
    """
    num_experts, count = stacks[0].shape[0], ids.shape[0]
    order = jnp.argsort(ids, stable=True)
    counts = jnp.zeros(num_experts, jnp.int32).at[ids].add(1)
    starts = jnp.cumsum(counts) - counts
    in_use = jnp.argsort(counts == 0, stable=True)  # experts with rows first, ascending
    padding = jnp.zeros(ROW_TILE, order.dtype)
    sorted_rows = [r[jnp.concatenate([order, padding])] for r in rows]

    def matrices(e: jax.Array) -> list[DenseMatrix]:
        return [dense(w.matrix(e), compute_dtype) for w in stacks]

    def one_expert(i: jax.Array, outputs: list[jax.Array]) -> list[jax.Array]:
        e = in_use[i]
        of_expert = matrices(e)

        def one_tile(j: jax.Array, outputs: list[jax.Array]) -> list[jax.Array]:
            start = starts[e] + j * ROW_TILE
            parts = f(of_expert, [lax.dynamic_slice_in_dim(r, start, ROW_TILE) for r in sorted_rows])
            return _write(outputs, parts, start)

        return lax.fori_loop(0, (counts[e] + ROW_TILE - 1) // ROW_TILE, one_tile, outputs)

    start = [
        jnp.zeros((count + ROW_TILE, *s.shape[1:]), s.dtype) for s in _results(matrices, rows, ROW_TILE, f)
    ]
    outputs = lax.fori_loop(0, jnp.sum(counts > 0), one_expert, start)
    destination = jnp.zeros(count, jnp.int32).at[order].set(jnp.arange(count, dtype=jnp.int32))
    return [o[destination] for o in outputs]
