"""quantized_matmul: ``x @ w.T`` with w in packed form; T=1 is decode's matvec, a large T is prefill."""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from convert.packed import PackedTensor
from kernels_pallas import implementations
from kernels_pallas.implementations import Implementation
from kernels_pallas.packed_pytree import to_device
from kernels_pallas.quantized_matmul import xla


def quantized_matmul(
    x: jax.Array,
    w: PackedTensor,
    *,
    index: jax.Array | None = None,
    compute_dtype: DTypeLike = jnp.float32,
    implementation: Implementation | None = None,
) -> jax.Array:
    """Multiplies activations by a packed matrix.

    Differentiable with respect to ``x``; weights get no gradient.

    Args:
      x: float32 or bfloat16 [T, K].
      w: packed [N, K] of any supported type, or with ``index`` a stack [L, N, K].
      index: int32 scalar, which matrix of the stack; nothing of the others is read or copied.
      compute_dtype: float32 or bfloat16, what both operands are rounded to; sums are float32.
      implementation: None chooses; a named one runs or raises.

    Returns:
      float32 [T, N].

    Raises:
      ValueError: shapes do not match.
      NotImplementedError: the named implementation does not take these arguments.
    """
    matrix_ndim = 2 if index is None else 3
    if x.ndim != 2 or w.ndim != matrix_ndim or x.shape[1] != w.shape[-1]:
        raise ValueError(f"quantized_matmul: x {x.shape} and w {w.shape} do not match [T, K] and [N, K]")
    return implementations.run(
        "quantized_matmul",
        implementation,
        {"xla": xla.quantized_matmul},
        jnp.asarray(x),
        to_device(w),
        index if index is None else jnp.asarray(index, jnp.int32),
        implementations.check_compute_dtype(compute_dtype),
    )
