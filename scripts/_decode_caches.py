"""Caches for scripts that call the decode kernel by itself: keys and values, and of int8 their scales."""

import jax
import jax.numpy as jnp
from jax import lax

from qwen3_moe_jax.jax_backend.kv_cache import KVCache, whole_tiles
from qwen3_moe_jax.kernels_pallas.decode_step import api


def random_cache(config, batch, length, dtype, seed=3) -> tuple[jax.Array, ...]:
    """Keys and values; of int8 their scales too."""
    shape = jax.eval_shape(lambda: KVCache.create(config, batch, whole_tiles(length), dtype)).k.shape
    keys = [jax.random.fold_in(jax.random.key(seed), k) for k in range(4)]
    if dtype != jnp.int8:
        return tuple(jax.random.normal(key, shape, dtype) for key in keys[:2])
    whole = [lax.bitcast_convert_type(jax.random.bits(key, shape, jnp.uint8), jnp.int8) for key in keys[:2]]
    scales = [jax.random.uniform(key, shape[:-1], jnp.float32, 0.005, 0.03) for key in keys[2:]]
    return (*whole, *scales)


def real_values(cache: tuple[jax.Array, ...]) -> list[jax.Array]:
    """Keys and values as attention has them."""
    keys_and_values, scales = cache[:2], cache[2:]
    if not scales:
        return list(keys_and_values)
    return [a * s[..., None] for a, s in zip(keys_and_values, scales, strict=True)]


def step(w, config, tokens, positions, cache, **options) -> api.StepOutput:
    """``decode_step`` with keys, values and, of int8, their scales."""
    k, v, *scales = cache
    return api.decode_step(w, config, tokens, positions, k, v, scales=tuple(scales) or None, **options)


def after(out: api.StepOutput) -> tuple[jax.Array, ...]:
    """The cache after a step."""
    return (out.k, out.v, *(out.scales or ()))
