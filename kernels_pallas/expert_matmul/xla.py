"""expert_matmul in plain jnp: loops over rows (few tokens) or over experts (many), see ``routing``."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from qwen3_moe_jax.kernels_pallas.expert_matmul import routing
from qwen3_moe_jax.kernels_pallas.packed import dots
from qwen3_moe_jax.kernels_pallas.packed.stacks import Matrices


def expert_matmul(x: jax.Array, w: Matrices, expert_ids: jax.Array, compute_dtype: np.dtype) -> jax.Array:
    """See ``api.expert_matmul``."""
    T, X = expert_ids.shape
    if x.ndim == 2:
        x = jnp.broadcast_to(x[:, None], (T, X, x.shape[-1]))
    out = _jitted_matmul(compute_dtype, x.reshape(T * X, -1), w, expert_ids.reshape(-1))
    return out.reshape(T, X, -1)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _matmul(compute_dtype: np.dtype, rows: jax.Array, w: Matrices, ids: jax.Array) -> jax.Array:
    if routing.multiplies_packed([w], ids.shape[0]):
        return routing.matvec(rows.astype(compute_dtype), w, ids)
    return routing.over_rows([w], ids, [rows], lambda m, t: [dots.matmul_nt(t[0], m[0])], compute_dtype)[0]


def _forward(compute_dtype: np.dtype, rows: jax.Array, w: Matrices, ids: jax.Array) -> tuple:
    return _matmul(compute_dtype, rows, w, ids), (rows[:0], w, ids)


def _backward(compute_dtype: np.dtype, residuals: tuple, dy: jax.Array) -> tuple:
    rows, w, ids = residuals
    dx = routing.over_rows([w], ids, [dy], lambda m, t: [dots.matmul_nn(t[0], m[0])], compute_dtype)[0]
    return dx.astype(rows.dtype), None, None


_matmul.defvjp(_forward, _backward)

_jitted_matmul = jax.jit(_matmul, static_argnums=0)
