"""Dot products with float32 accumulation, in one place so that every op rounds operands alike."""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qwen3_moe_jax.convert.packed import PackedTensor
from qwen3_moe_jax.kernels_pallas.packed import lanes16 as lanes
from qwen3_moe_jax.kernels_pallas.packed.dequantize import dequantize


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DenseMatrix:
    """One dequantized matrix [N, K], in whichever order its layout gives without a transposition.

    Attributes:
      values: [N, K], or [K, N] with ``columns_first``.
      columns_first: the order of ``values``.
    """

    values: jax.Array
    columns_first: bool = field(metadata={"static": True})


def dense(w: PackedTensor, compute_dtype: np.dtype) -> DenseMatrix:
    """A packed [N, K] as an operand of products in ``compute_dtype``."""
    if lanes.multiplies(w):
        return DenseMatrix(lanes.dequantize_columns(w, compute_dtype), True)
    return DenseMatrix(dequantize(w, compute_dtype), False)


def matmul_nt(x: jax.Array, w: DenseMatrix) -> jax.Array:
    """``x [T, K]`` times the transpose of ``w [N, K]`` -> float32 [T, N], x rounded to w's dtype."""
    return _dot(x, w.values, 0 if w.columns_first else 1)


def matmul_nn(x: jax.Array, w: DenseMatrix) -> jax.Array:
    """``x [T, N]`` times ``w [N, K]`` -> float32 [T, K], x rounded to w's dtype."""
    return _dot(x, w.values, 1 if w.columns_first else 0)


def _dot(x: jax.Array, w: jax.Array, contracted: int) -> jax.Array:
    return lax.dot_general(
        x.astype(w.dtype),
        w,
        (((1,), (contracted,)), ((), ())),
        precision=lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
