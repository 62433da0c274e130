"""The KV cache: a pytree of fixed shape, written in place when its buffers are donated."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from convert.config import Qwen3MoeConfig


@struct.dataclass
class KVCache:
    """Keys and values of every layer.

    A layer's arrays stand alone, so that a step updates each in place and reads
    it without slicing a stack.

    Attributes:
      k: one array [B, S, K, H] a layer, keys after their norm and RoPE.
      v: one array [B, S, K, H] a layer.
    """

    k: tuple[jax.Array, ...]
    v: tuple[jax.Array, ...]

    @classmethod
    def create(cls, config: Qwen3MoeConfig, batch: int, length: int, dtype: Any = jnp.float32) -> "KVCache":
        """An empty cache of ``length`` positions for ``batch`` sequences."""
        shape = (batch, length, config.num_key_value_heads, config.head_dim)
        layers = range(config.num_hidden_layers)
        return cls(
            tuple(jnp.zeros(shape, dtype) for _ in layers), tuple(jnp.zeros(shape, dtype) for _ in layers)
        )

    @property
    def length(self) -> int:
        """Positions S that the cache holds."""
        return self.k[0].shape[1]


def write_positions(cache: jax.Array, new: jax.Array, start: jax.Array) -> jax.Array:
    """Writes new [B, T, K, H] into cache [B, S, K, H] from position start [B] on.

    The caller keeps ``start + T <= S``: XLA would move a write that does not fit.
    """
    write = lambda c, n, s: jax.lax.dynamic_update_slice(c, n, (s, 0, 0))  # noqa: E731
    if cache.shape[0] == 1:  # a batched write becomes a scatter, which the CPU runs row by row
        return write(cache[0], new[0].astype(cache.dtype), start[0])[None]
    return jax.vmap(write)(cache, new.astype(cache.dtype), start)
