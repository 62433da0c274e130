"""attention: causal grouped-query attention of T queries over a cache of S positions a sequence."""

import jax
import jax.numpy as jnp

from qwen3_moe_jax.kernels_pallas import implementations
from qwen3_moe_jax.kernels_pallas.attention import xla
from qwen3_moe_jax.kernels_pallas.gpu.device import FromAmpereOn, OnHopper
from qwen3_moe_jax.kernels_pallas.implementations import Implementation

CACHE_TILE = 64
"""Positions that the GPU's kernels read of a cache at a time: caches come in whole tiles."""


def attention(
    q: jax.Array,
    k_cache: jax.Array,
    v_cache: jax.Array,
    positions: jax.Array,
    *,
    layer: jax.Array | None = None,
    slots: jax.Array | None = None,
    scales: tuple[jax.Array, jax.Array] | None = None,
    implementation: Implementation | None = None,
) -> jax.Array:
    """Attends every query to its sequence's cached positions up to its own.

    Differentiable with respect to ``q``, ``k_cache`` and ``v_cache`` where these are floats.

    Args:
      q: float32 or bfloat16 [B, T, N, H].
      k_cache: float32, bfloat16 or float16 [C, S, K, H], the keys of C >= B sequences; or int8
        with ``scales``. With ``layer``, the caches of all layers [L, C, S, K, H].
      v_cache: as k_cache.
      positions: int32 [B, T]; the query at position p sees positions 0..p. A negative one sees
        nothing and gives zeros (padding).
      layer: int32 scalar, whose cache is meant; nothing of the others is read or copied.
      slots: int32 [B], the row of the cache that each sequence of q reads; None is row b for b.
      scales: float32, one for each int8 vector of k_cache and of v_cache: their shapes without H.
      implementation: None chooses; a named one runs or raises.

    Returns:
      float32 [B, T, N, H]: head h reads KV head h // (N / K), scale 1/sqrt(H), softmax in float32.

    Raises:
      ValueError: shapes do not match.
    """
    if layer is None:
        k_cache, v_cache = k_cache[None], v_cache[None]
        scales = scales and (scales[0][None], scales[1][None])
    _check_shapes(q, k_cache, v_cache, positions, slots, scales)
    arrays = (jnp.asarray(a) for a in (q, k_cache, v_cache, positions))
    portable = FromAmpereOn("attention", "kernel_sm80")
    candidates = {"hopper": OnHopper("attention"), "portable": portable, "xla": xla.attention}
    layer = jnp.asarray(0 if layer is None else layer, jnp.int32)
    return implementations.run("attention", implementation, candidates, *arrays, layer, slots, scales)


def _check_shapes(q, k_cache, v_cache, positions, slots, scales) -> None:
    B, T, N, H = q.shape
    L, C, S, K, _ = k_cache.shape
    is_right = k_cache.shape == v_cache.shape == (L, C, S, K, H) and N % K == 0 and positions.shape == (B, T)
    is_right &= B <= C if slots is None else slots.shape == (B,)
    if not is_right or (scales is not None and any(s.shape != (L, C, S, K) for s in scales)):
        found = {"q": q, "k_cache": k_cache, "v_cache": v_cache, "positions": positions, "slots": slots}
        found |= {} if scales is None else {"k scales": scales[0], "v scales": scales[1]}
        shapes = ", ".join(f"{name} {a.shape}" for name, a in found.items() if a is not None)
        raise ValueError(f"attention: shapes do not match: {shapes}")
    if (k_cache.dtype == jnp.int8) != (scales is not None):
        raise ValueError(f"attention: a cache of {k_cache.dtype} {'needs no' if scales else 'needs'} scales")
