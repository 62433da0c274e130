"""moe_mlp in plain jnp, over the loops of ``expert_matmul.routing``."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from qwen3_moe_jax.kernels_pallas.expert_matmul import routing
from qwen3_moe_jax.kernels_pallas.packed import dots
from qwen3_moe_jax.kernels_pallas.packed.dots import DenseMatrix
from qwen3_moe_jax.kernels_pallas.packed.stacks import Matrices

Multiply = Callable[[jax.Array, int], jax.Array]
"""(rows, which of gate, up and down) -> products."""

Stacks = tuple[Matrices, Matrices, Matrices]


@partial(jax.jit, static_argnums=6)
def moe_mlp(
    x: jax.Array,
    gate_proj: Matrices,
    up_proj: Matrices,
    down_proj: Matrices,
    expert_ids: jax.Array,
    expert_weights: jax.Array,
    compute_dtype: np.dtype,
) -> jax.Array:
    """See ``api.moe_mlp``."""
    stacks = (gate_proj, up_proj, down_proj)
    return _moe(compute_dtype, x, expert_weights.astype(jnp.float32), stacks, expert_ids)


def _per_token(x: jax.Array, num_experts_per_tok: int) -> jax.Array:
    """[T, D] -> [T * X, D]: one row for each (token, expert) pair."""
    T, D = x.shape
    return jnp.broadcast_to(x[:, None], (T, num_experts_per_tok, D)).reshape(-1, D)


def _combine(parts: jax.Array, weights: jax.Array) -> jax.Array:
    """[T, X, D] and [T, X] -> [T, D], added in the order of X."""
    total = parts[:, 0] * weights[:, :1]
    for i in range(1, weights.shape[1]):
        total = total + parts[:, i] * weights[:, i : i + 1]
    return total


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _moe(
    compute_dtype: np.dtype,
    x: jax.Array,
    weights: jax.Array,
    stacks: Stacks,
    expert_ids: jax.Array,
) -> jax.Array:
    T, X = expert_ids.shape
    ids, rows = expert_ids.reshape(-1), _per_token(x, X)

    def swiglu_experts(multiply: Multiply, rows: jax.Array) -> list[jax.Array]:
        gate, up = multiply(rows, 0), multiply(rows, 1)
        return [multiply(jax.nn.silu(gate) * up, 2)]

    def tile(dense: list[DenseMatrix], tiles: list[jax.Array]) -> list[jax.Array]:
        return swiglu_experts(lambda rows, i: dots.matmul_nt(rows, dense[i]), tiles[0])

    if routing.multiplies_packed(stacks, T * X):
        results = swiglu_experts(
            lambda rows, i: routing.matvec(rows.astype(compute_dtype), stacks[i], ids), rows
        )
    else:
        results = routing.over_rows(stacks, ids, [rows], tile, compute_dtype)
    return _combine(results[0].reshape(T, X, -1), weights)


def _forward(compute_dtype: np.dtype, x, weights, stacks, expert_ids) -> tuple:
    return _moe(compute_dtype, x, weights, stacks, expert_ids), (x, weights, stacks, expert_ids)


def _backward(compute_dtype: np.dtype, residuals: tuple, dy: jax.Array) -> tuple:
    x, weights, stacks, expert_ids = residuals
    T, X = expert_ids.shape

    def experts(dense: list[DenseMatrix], tiles: list[jax.Array]) -> list[jax.Array]:
        x_tile, dy_tile, weight = tiles
        gate = dots.matmul_nt(x_tile, dense[0])
        up = dots.matmul_nt(x_tile, dense[1])
        swiglu, swiglu_vjp = jax.vjp(lambda g, u: jax.nn.silu(g) * u, gate, up)
        down = dots.matmul_nt(swiglu, dense[2])
        d_swiglu = dots.matmul_nn(dy_tile * weight, dense[2])
        d_gate, d_up = swiglu_vjp(d_swiglu)
        dx = dots.matmul_nn(d_gate, dense[0]) + dots.matmul_nn(d_up, dense[1])
        return [dx, jnp.sum(down * dy_tile, axis=1, keepdims=True)]

    rows = [_per_token(x, X), _per_token(dy, X), weights.reshape(T * X, 1)]
    dx, d_weights = routing.over_rows(stacks, expert_ids.reshape(-1), rows, experts, compute_dtype)
    return dx.reshape(T, X, -1).sum(axis=1).astype(x.dtype), d_weights.reshape(T, X), None, None


_moe.defvjp(_forward, _backward)
