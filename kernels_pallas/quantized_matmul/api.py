"""quantized_matmul: ``x @ w.T`` with w in packed form; T=1 is decode's matvec, a large T is prefill."""

from functools import partial

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from qwen3_moe_jax.convert.packed import PackedTensor
from qwen3_moe_jax.kernels_pallas import implementations
from qwen3_moe_jax.kernels_pallas.gpu.device import FromAmpereOn, OnHopper
from qwen3_moe_jax.kernels_pallas.implementations import Implementation
from qwen3_moe_jax.kernels_pallas.packed.stacks import Matrices, OneOf, as_matrices, switch_types
from qwen3_moe_jax.kernels_pallas.quantized_matmul import native, xla


def quantized_matmul(
    x: jax.Array,
    w: PackedTensor | Matrices | OneOf,
    *,
    compute_dtype: DTypeLike = jnp.float32,
    implementation: Implementation | None = None,
) -> jax.Array:
    """Multiplies activations by a packed matrix.

    Differentiable with respect to ``x``; weights get no gradient.

    Args:
      x: float32 or bfloat16 [T, K].
      w: packed [N, K] of any supported type, alone, inside a stack, or of one of several types.
      compute_dtype: float32 or bfloat16, what both operands are rounded to; sums are float32.
      implementation: None chooses; a named one runs or raises.

    Returns:
      float32 [T, N].

    Raises:
      ValueError: shapes do not match.
      NotImplementedError: the named implementation does not take these arguments.
    """
    if x.ndim != 2 or w.ndim != 2 or x.shape[1] != w.shape[-1]:
        raise ValueError(f"quantized_matmul: x {x.shape} and w {w.shape} do not match [T, K] and [N, K]")
    return implementations.run(
        "quantized_matmul",
        implementation,
        {
            "native": native.quantized_matmul,
            "hopper": OnHopper("quantized_matmul"),
            "portable": FromAmpereOn("quantized_matmul"),
            "xla": partial(switch_types, xla.quantized_matmul),
        },
        jnp.asarray(x),
        as_matrices(w),
        implementations.check_compute_dtype(compute_dtype),
    )
