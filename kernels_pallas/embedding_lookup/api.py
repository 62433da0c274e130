"""embedding_lookup: the rows of token ids out of a packed table."""

import jax
import jax.numpy as jnp

from qwen3_moe_jax.convert.packed import PackedTensor
from qwen3_moe_jax.kernels_pallas import implementations
from qwen3_moe_jax.kernels_pallas.embedding_lookup import xla
from qwen3_moe_jax.kernels_pallas.implementations import Implementation
from qwen3_moe_jax.kernels_pallas.packed.pytree import to_device


def embedding_lookup(
    w: PackedTensor, token_ids: jax.Array, *, implementation: Implementation | None = None
) -> jax.Array:
    """Dequantizes only the rows that are asked for.

    Args:
      w: packed [V, D].
      token_ids: integers [T], each in [0, V).
      implementation: None chooses; a named one runs or raises.

    Returns:
      float32 [T, D], bit for bit the dequantized rows.
    """
    if w.ndim != 2:
        raise ValueError(f"embedding_lookup: w {w.shape} is not [V, D]")
    candidates = {"xla": xla.embedding_lookup}
    return implementations.run(
        "embedding_lookup", implementation, candidates, to_device(w), jnp.asarray(token_ids)
    )
