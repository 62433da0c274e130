"""Who uses which expert, for products of all rows with every expert in use."""

import jax
import jax.numpy as jnp
import numpy as np

from qwen3_moe_jax.kernels_pallas.gpu.activations import SWIGLU_SCALE, WEIGHT_SCALE


def expert_factors(
    expert_ids: jax.Array, weights: jax.Array, experts: int, rows: int
) -> tuple[jax.Array, jax.Array]:
    """Of each expert and row, the last (token, choice) pair or -1, and a factor.

    Args:
      expert_ids: int32 [T, X].
      weights: float32 [T, X].
      experts: E.
      rows: T or more.

    Returns:
      int32 [E, rows], and float32 [E, rows]: the weight without the scales of SwiGLU's results and weights.
    """
    T, X = expert_ids.shape
    ids = jnp.pad(expert_ids, ((0, rows - T), (0, 0)), constant_values=-1)
    weights = jnp.pad(weights, ((0, rows - T), (0, 0)))
    weights = weights / (SWIGLU_SCALE * WEIGHT_SCALE)
    destination, weight = jnp.full((experts, rows), -1, jnp.int32), jnp.zeros((experts, rows), jnp.float32)
    for choice in range(X):  # not a reduction, so that XLA makes one kernel of it
        chosen = ids[:, choice] == np.arange(experts)[:, None]
        destination = jnp.where(chosen, np.arange(rows) * X + choice, destination)
        weight = weight + jnp.where(chosen, weights[:, choice], 0.0)
    return destination, weight
