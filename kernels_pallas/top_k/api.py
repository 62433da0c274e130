"""top_k: the k largest of each row, as ``jax.lax.top_k``, which on a GPU sorts whole rows for k above 16."""

import jax
import jax.numpy as jnp

from qwen3_moe_jax.kernels_pallas import implementations
from qwen3_moe_jax.kernels_pallas.implementations import Implementation
from qwen3_moe_jax.kernels_pallas.top_k import xla


def top_k(
    x: jax.Array, k: int, *, implementation: Implementation | None = None
) -> tuple[jax.Array, jax.Array]:
    """Finds the largest values of each row.

    Args:
      x: float32 [B, V].
      k: at most V.
      implementation: None chooses; a named one runs or raises.

    Returns:
      Values float32 [B, k] from the largest down, and their indices int32 [B, k], the lower one first
      among equals. Rows with NaN are undefined.

    Raises:
      ValueError: x is no matrix, or k is not in 1..V.
      NotImplementedError: the named implementation does not take these arguments.
    """
    if x.ndim != 2 or not 0 < k <= x.shape[1]:
        raise ValueError(f"top_k: {k=} of x {x.shape}, which is to be [B, V]")
    return implementations.run("top_k", implementation, {"xla": xla.top_k}, jnp.asarray(x), k)
