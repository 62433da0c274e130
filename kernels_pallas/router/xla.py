"""router in plain jnp."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from qwen3_moe_jax.convert.config import MIN_WEIGHT_SUM
from qwen3_moe_jax.kernels_pallas.packed.stacks import Matrices
from qwen3_moe_jax.kernels_pallas.quantized_matmul.xla import quantized_matmul


@partial(jax.jit, static_argnums=2)
def router(
    x: jax.Array, w: Matrices, num_experts_per_tok: int, expert_ids: jax.Array | None
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """See ``api.router``."""
    logits = quantized_matmul(x.astype(jnp.float32), w, jnp.dtype(jnp.float32))
    return logits, *choose_experts(logits, num_experts_per_tok, expert_ids)


def choose_experts(
    logits: jax.Array, num_experts_per_tok: int, expert_ids: jax.Array | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """See ``api.choose_experts``."""
    probs = jax.nn.softmax(logits, axis=-1)
    if expert_ids is None:
        expert_ids = lax.top_k(probs, num_experts_per_tok)[1]
    chosen = jnp.take_along_axis(probs, expert_ids, axis=-1)
    weights = chosen / jnp.maximum(jnp.sum(chosen, axis=-1, keepdims=True), MIN_WEIGHT_SUM)
    return probs, expert_ids, weights
