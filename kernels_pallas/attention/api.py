"""attention: causal grouped-query attention of T queries over a cache of S slots."""

import jax
import jax.numpy as jnp

from kernels_pallas import implementations
from kernels_pallas.attention import xla
from kernels_pallas.implementations import Implementation


def attention(
    q: jax.Array,
    k_cache: jax.Array,
    v_cache: jax.Array,
    positions: jax.Array,
    *,
    implementation: Implementation | None = None,
) -> jax.Array:
    """Attends every query to the cache slots at or before its position.

    Differentiable with respect to ``q``, ``k_cache`` and ``v_cache``.

    Args:
      q: float32 or bfloat16 [B, T, N, H].
      k_cache: float32 or bfloat16 [B, S, K, H]; slot s holds the key of position s.
      v_cache: as k_cache.
      positions: int32 [B, T]; the query at position p sees slots 0..p. A negative position sees
        nothing and gives zeros (padding).
      implementation: None chooses; a named one runs or raises.

    Returns:
      float32 [B, T, N, H]: head h reads KV head h // (N / K), scale 1/sqrt(H), softmax in float32.

    Raises:
      ValueError: shapes do not match.
    """
    B, T, N, H = q.shape
    K = k_cache.shape[2]
    cache_shape = (B, k_cache.shape[1], K, H)
    if k_cache.shape != cache_shape or v_cache.shape != cache_shape or N % K or positions.shape != (B, T):
        raise ValueError(
            f"attention: shapes do not match: q {q.shape}, k_cache {k_cache.shape}, v_cache {v_cache.shape}, "
            f"positions {positions.shape}"
        )
    arrays = (jnp.asarray(a) for a in (q, k_cache, v_cache, positions))
    return implementations.run("attention", implementation, {"xla": xla.attention}, *arrays)
