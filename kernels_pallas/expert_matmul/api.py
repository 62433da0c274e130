"""expert_matmul: each token times the packed matrices of its experts, the expert layer's building block."""

from functools import partial

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from qwen3_moe_jax.convert.packed import PackedTensor
from qwen3_moe_jax.kernels_pallas import implementations
from qwen3_moe_jax.kernels_pallas.expert_matmul import xla
from qwen3_moe_jax.kernels_pallas.gpu.device import FromAmpereOn, OnHopper
from qwen3_moe_jax.kernels_pallas.implementations import Implementation
from qwen3_moe_jax.kernels_pallas.packed.stacks import Matrices, OneOf, as_matrices, switch_types


def expert_matmul(
    x: jax.Array,
    w: PackedTensor | Matrices | OneOf,
    expert_ids: jax.Array,
    *,
    compute_dtype: DTypeLike = jnp.float32,
    implementation: Implementation | None = None,
) -> jax.Array:
    """Multiplies every token by its experts' packed matrices.

    Differentiable with respect to ``x``; weights get no gradient.

    Args:
      x: float32 or bfloat16 [T, K] (one row for all experts of a token) or [T, X, K].
      w: packed [E, N, K], alone, inside a stack, or of one of several types.
      expert_ids: int32 [T, X], each in [0, E).
      compute_dtype: float32 or bfloat16, what both operands are rounded to; sums are float32.
      implementation: None chooses; a named one runs or raises.

    Returns:
      float32 [T, X, N].

    Raises:
      ValueError: shapes do not match.
      NotImplementedError: the named implementation does not take these arguments.
    """
    T, X = expert_ids.shape
    if w.ndim != 3 or x.shape not in ((T, w.shape[-1]), (T, X, w.shape[-1])):
        raise ValueError(
            f"expert_matmul: x {x.shape}, w {w.shape} and expert_ids {expert_ids.shape} do not match"
        )
    return implementations.run(
        "expert_matmul",
        implementation,
        {
            "hopper": OnHopper("expert_matmul"),
            "portable": FromAmpereOn("expert_matmul"),
            "xla": partial(switch_types, xla.expert_matmul),
        },
        jnp.asarray(x),
        as_matrices(w),
        jnp.asarray(expert_ids),
        implementations.check_compute_dtype(compute_dtype),
    )
