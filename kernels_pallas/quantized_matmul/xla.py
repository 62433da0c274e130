"""quantized_matmul in plain jnp.

Few tokens on layout "lanes16" multiply packed words directly. Else rows are
dequantized a tile at a time, so that a large matrix (lm_head) never exists in
float.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from convert.packed import LANES, LANES16, PackedTensor
from kernels_pallas import dots, lanes
from kernels_pallas.dequantize import dequantize

MAX_MATVEC_ROWS = 8
"""Up to this many rows of x, layout "lanes16" is multiplied in packed form."""

_TILE_WEIGHTS = 1 << 22
"""Weights that one tile dequantizes: 16 MB of float32."""


@partial(jax.jit, static_argnums=3)
def quantized_matmul(
    x: jax.Array, w: PackedTensor, index: jax.Array | None, compute_dtype: np.dtype
) -> jax.Array:
    """See ``api.quantized_matmul``."""
    return _matmul(compute_dtype, x, w, index)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _matmul(compute_dtype: np.dtype, x: jax.Array, w: PackedTensor, index: jax.Array | None) -> jax.Array:
    if w.layout == LANES16 and x.shape[0] <= MAX_MATVEC_ROWS:
        ids = None if index is None else jnp.full(x.shape[:1], index)
        return lanes.matvec(x.astype(compute_dtype), w, ids)
    rows = w.shape[-2]
    tile = _tile_rows(w)
    w, first = _in_one_piece(w, index)

    def step(i: jax.Array, out: jax.Array) -> jax.Array:
        start = jnp.minimum(i * tile, rows - tile)  # the last tile may overlap: it writes the same values
        part = dots.matmul_nt(x, dequantize(_row_tile(w, first + start, tile)), compute_dtype)
        return lax.dynamic_update_slice(out, part, (0, start))

    if tile == rows:
        return dots.matmul_nt(x, dequantize(_row_tile(w, first, rows)), compute_dtype)
    return lax.fori_loop(0, -(-rows // tile), step, jnp.zeros((x.shape[0], rows), jnp.float32))


def _in_one_piece(w: PackedTensor, index: jax.Array | None) -> tuple[PackedTensor, jax.Array | int]:
    """A stack [L, N, K] as [L * N, K], and the first row of matrix ``index``."""
    if index is None:
        return w, 0
    flat = jax.tree_util.tree_map(lambda a: a.reshape(-1, *a.shape[2:]), w)
    return flat, index * w.shape[-2]


def _unit(w: PackedTensor) -> int:
    """Rows that one index of the arrays' first axis stands for."""
    return LANES if w.layout == LANES16 else 1


def _tile_rows(w: PackedTensor) -> int:
    rows, columns = w.shape[-2:]
    unit = _unit(w)
    return min(rows, max(1, _TILE_WEIGHTS // (columns * unit)) * unit)


def _row_tile(w: PackedTensor, start: jax.Array | int, rows: int) -> PackedTensor:
    """Rows ``start`` to ``start + rows``, both whole units."""
    unit = _unit(w)
    return jax.tree_util.tree_map(lambda a: lax.dynamic_slice_in_dim(a, start // unit, rows // unit), w)


def _forward(compute_dtype: np.dtype, x: jax.Array, w: PackedTensor, index: jax.Array | None) -> tuple:
    return _matmul(compute_dtype, x, w, index), (x[:0], w, index)


def _backward(compute_dtype: np.dtype, residuals: tuple, dy: jax.Array) -> tuple:
    x, w, index = residuals
    rows, columns = w.shape[-2:]
    tile = _tile_rows(w)
    full, rest = divmod(rows, tile)
    w, first = _in_one_piece(w, index)

    def part(start: jax.Array | int, size: int) -> jax.Array:
        dy_tile = lax.dynamic_slice_in_dim(dy, start, size, axis=1)
        return dots.matmul_nn(dy_tile, dequantize(_row_tile(w, first + start, size)), compute_dtype)

    dx = part(full * tile, rest) if rest else jnp.zeros((dy.shape[0], columns), jnp.float32)
    dx = lax.fori_loop(0, full, lambda i, acc: acc + part(i * tile, tile), dx)
    return dx.astype(x.dtype), None, None


_matmul.defvjp(_forward, _backward)
