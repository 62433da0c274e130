"""quantized_matmul in plain jnp.

Few tokens on layout "lanes16" multiply packed words directly. Else rows are
dequantized a tile at a time, so that a large matrix (lm_head) never exists in
float.
"""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qwen3_moe_jax.convert.packed import LANES
from qwen3_moe_jax.kernels_pallas.packed import dots
from qwen3_moe_jax.kernels_pallas.packed import lanes16 as lanes
from qwen3_moe_jax.kernels_pallas.packed.stacks import Matrices

MAX_MATVEC_ROWS = 8
"""Up to this many rows of x, layout "lanes16" is multiplied in packed form."""

MAX_MATVEC_PART = 40_960
"""Rows that are multiplied in packed form at once."""

_TILE_WEIGHTS = 1 << 22
"""Weights that one tile dequantizes: 16 MB of float32."""


@partial(jax.jit, static_argnums=2)
def quantized_matmul(x: jax.Array, w: Matrices, compute_dtype: np.dtype) -> jax.Array:
    """See ``api.quantized_matmul``."""
    return _matmul(compute_dtype, x, w)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _matmul(compute_dtype: np.dtype, x: jax.Array, w: Matrices) -> jax.Array:
    if lanes.multiplies(w.stack) and x.shape[0] <= MAX_MATVEC_ROWS:
        return _matvec(x.astype(compute_dtype), w)
    tile = _tile_rows(w)

    def one_tile(i: jax.Array, out: jax.Array) -> jax.Array:
        start = jnp.minimum(i * tile, w.rows - tile)  # the last tile may overlap: it writes the same values
        part = dots.matmul_nt(x, dots.dense(w.slice(start, tile), compute_dtype))
        return lax.dynamic_update_slice(out, part, (0, start))

    if tile == w.rows:
        return dots.matmul_nt(x, dots.dense(w.slice(0, tile), compute_dtype))
    return lax.fori_loop(0, -(-w.rows // tile), one_tile, jnp.zeros((x.shape[0], w.rows), jnp.float32))


def _matvec(x: jax.Array, w: Matrices) -> jax.Array:
    """Products in packed form; XLA's CPU code reads one matrix of a stack fastest by a gather.

    A tall matrix goes in parts: the sums of one part stay in the cache, and XLA does not spread
    its terms over many passes through memory.
    """
    tiles = w.rows // LANES
    parts = next(n for n in range(1, tiles + 1) if tiles % n == 0 and w.rows <= n * MAX_MATVEC_PART)
    if parts == 1 and w.stack.shape == w.shape:
        return lanes.matvec(x, w.stack)
    stack, offset = replace(w, shape=(w.rows // parts, w.columns)).one_per_row()
    multiply = lambda i: lanes.matvec(x, stack, jnp.full(x.shape[:1], offset + i))
    if parts == 1:
        return multiply(0)
    out = lax.map(multiply, jnp.arange(parts))
    return jnp.moveaxis(out, 0, 1).reshape(x.shape[0], -1)


def _tile_rows(w: Matrices) -> int:
    return min(w.rows, max(1, _TILE_WEIGHTS // (w.columns * w.unit)) * w.unit)


def _forward(compute_dtype: np.dtype, x: jax.Array, w: Matrices) -> tuple:
    return _matmul(compute_dtype, x, w), (x[:0], w)


def _backward(compute_dtype: np.dtype, residuals: tuple, dy: jax.Array) -> tuple:
    x, w = residuals
    tile = _tile_rows(w)
    full, rest = divmod(w.rows, tile)

    def part(start: jax.Array | int, size: int) -> jax.Array:
        dy_tile = lax.dynamic_slice_in_dim(dy, start, size, axis=1)
        return dots.matmul_nn(dy_tile, dots.dense(w.slice(start, size), compute_dtype))

    dx = part(full * tile, rest) if rest else jnp.zeros((dy.shape[0], w.columns), jnp.float32)
    dx = lax.fori_loop(0, full, lambda i, acc: acc + part(i * tile, tile), dx)
    return dx.astype(x.dtype), None


_matmul.defvjp(_forward, _backward)
