"""Dot products with float32 accumulation, in one place so that every op rounds operands alike."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


def matmul_nt(x: jax.Array, w: jax.Array, compute_dtype: np.dtype) -> jax.Array:
    """``x [T, K] @ w [N, K].T`` -> float32 [T, N], operands rounded to ``compute_dtype``."""
    return _dot(x, w, (((1,), (1,)), ((), ())), compute_dtype)


def matmul_nn(x: jax.Array, w: jax.Array, compute_dtype: np.dtype) -> jax.Array:
    """``x [T, N] @ w [N, K]`` -> float32 [T, K], operands rounded to ``compute_dtype``."""
    return _dot(x, w, (((1,), (0,)), ((), ())), compute_dtype)


def _dot(x: jax.Array, w: jax.Array, dimensions: tuple, compute_dtype: np.dtype) -> jax.Array:
    return lax.dot_general(
        x.astype(compute_dtype),
        w.astype(compute_dtype),
        dimensions,
        precision=lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
