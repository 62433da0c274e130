"""router: softmax over all experts, then top-k, then renormalization, always in float32."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from qwen3_moe_jax.convert.packed import PackedTensor
from qwen3_moe_jax.kernels_pallas import implementations
from qwen3_moe_jax.kernels_pallas.implementations import Implementation
from qwen3_moe_jax.kernels_pallas.packed.stacks import Matrices
from qwen3_moe_jax.kernels_pallas.router import xla


class Routing(NamedTuple):
    """What the router says about T tokens.

    Attributes:
      logits: float32 [T, E].
      probs: float32 [T, E], softmax over all experts.
      expert_ids: int32 [T, X], most probable first, the lower id first among equals.
      weights: float32 [T, X], the chosen probabilities divided by their sum.
    """

    logits: jax.Array
    probs: jax.Array
    expert_ids: jax.Array
    weights: jax.Array


def router(
    x: jax.Array,
    w: PackedTensor | Matrices,
    num_experts_per_tok: int,
    expert_ids: jax.Array | None = None,
    *,
    implementation: Implementation | None = None,
) -> Routing:
    """Chooses experts for every token.

    Args:
      x: float32 or bfloat16 [T, D].
      w: packed [E, D].
      num_experts_per_tok: X, at most E.
      expert_ids: int32 [T, X] to force the choice (router replay); weights are still
        this router's own probabilities of those experts, renormalized.
      implementation: None chooses; a named one runs or raises.

    Returns:
      A :class:`Routing`.

    Raises:
      ValueError: shapes do not match.
    """
    if x.ndim != 2 or w.ndim != 2 or x.shape[1] != w.shape[1]:
        raise ValueError(f"router: x {x.shape} and w {w.shape} do not match [T, D] and [E, D]")
    if not 0 < num_experts_per_tok <= w.shape[0]:
        raise ValueError(f"router: {num_experts_per_tok=} is not in 1..{w.shape[0]}")
    if expert_ids is not None:
        expert_ids = jnp.asarray(expert_ids, jnp.int32)
        if expert_ids.shape != (x.shape[0], num_experts_per_tok):
            raise ValueError(
                f"router: expert_ids {expert_ids.shape} is not {(x.shape[0], num_experts_per_tok)}"
            )
    logits, probs, ids, weights = implementations.run(
        "router",
        implementation,
        {"xla": xla.router},
        jnp.asarray(x),
        Matrices.of(w),
        num_experts_per_tok,
        expert_ids,
    )
    return Routing(logits, probs, ids, weights)


def choose_experts(
    logits: jax.Array, num_experts_per_tok: int, expert_ids: jax.Array | None = None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The second half of :func:`router`, for a caller that looks at or changes the logits.

    Args:
      logits: float32 [T, E].
      num_experts_per_tok: X, at most E.
      expert_ids: int32 [T, X] to force the choice, or None.

    Returns:
      probs [T, E], expert_ids [T, X] and weights [T, X] of a :class:`Routing`.
    """
    return xla.choose_experts(logits, num_experts_per_tok, expert_ids)
