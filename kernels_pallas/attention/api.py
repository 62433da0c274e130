"""attention: causal grouped-query attention of T queries over a cache of S slots."""

import jax
import jax.numpy as jnp

from kernels_pallas import implementations
from kernels_pallas.attention import xla
from kernels_pallas.implementations import Implementation
from kernels_pallas.prefill.device import OnHopper


def attention(
    q: jax.Array,
    k_cache: jax.Array,
    v_cache: jax.Array,
    positions: jax.Array,
    *,
    layer: jax.Array | None = None,
    implementation: Implementation | None = None,
) -> jax.Array:
    """Attends every query to the cache slots at or before its position.

    Differentiable with respect to ``q``, ``k_cache`` and ``v_cache``.

    Args:
      q: float32 or bfloat16 [B, T, N, H].
      k_cache: float32 or bfloat16 [B, S, K, H]; slot s holds the key of position s. With
        ``layer``, the caches of all layers [L, B, S, K, H].
      v_cache: as k_cache.
      positions: int32 [B, T]; the query at position p sees slots 0..p. A negative position sees
        nothing and gives zeros (padding).
      layer: int32 scalar, whose cache is meant; nothing of the others is read or copied.
      implementation: None chooses; a named one runs or raises.

    Returns:
      float32 [B, T, N, H]: head h reads KV head h // (N / K), scale 1/sqrt(H), softmax in float32.

    Raises:
      ValueError: shapes do not match.
    """
    if layer is None:
        k_cache, v_cache, layer = k_cache[None], v_cache[None], 0
    B, T, N, H = q.shape
    L, _, S, K, _ = k_cache.shape
    expected = (L, B, S, K, H)
    if k_cache.shape != expected or v_cache.shape != expected or N % K or positions.shape != (B, T):
        raise ValueError(
            f"attention: shapes do not match: q {q.shape}, k_cache {k_cache.shape}, v_cache {v_cache.shape}, "
            f"positions {positions.shape}"
        )
    arrays = (jnp.asarray(a) for a in (q, k_cache, v_cache, positions))
    candidates = {"pallas": OnHopper("attention", tokens_axis=1), "xla": xla.attention}
    return implementations.run(
        "attention", implementation, candidates, *arrays, jnp.asarray(layer, jnp.int32)
    )
