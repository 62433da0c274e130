"""The KV cache: a pytree of fixed shape, written in place when its buffers are donated."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from convert.config import Qwen3MoeConfig


@struct.dataclass
class KVCache:
    """Keys and values of every layer.

    Attributes:
      k: [L, B, S, K, H], keys after their norm and RoPE.
      v: [L, B, S, K, H].
    """

    k: jax.Array
    v: jax.Array

    @classmethod
    def create(
        cls,
        config: Qwen3MoeConfig,
        batch: int,
        length: int,
        dtype: Any = jnp.float32,
        device: jax.Device | None = None,
    ) -> "KVCache":
        """An empty cache of ``length`` positions for ``batch`` sequences.

        With the weights' ``device`` it is bound to that device as every later cache is, so that the first
        chunk of a prompt shares a compiled program with the others.
        """
        c = config
        shape = (c.num_hidden_layers, batch, length, c.num_key_value_heads, c.head_dim)
        return cls(jnp.zeros(shape, dtype, device=device), jnp.zeros(shape, dtype, device=device))

    @property
    def length(self) -> int:
        """Positions S that the cache holds."""
        return self.k.shape[2]


def write_positions(
    cache: KVCache, k: jax.Array, v: jax.Array, start: jax.Array, layer: jax.Array
) -> KVCache:
    """Writes k and v [B, T, K, H] of one layer from position start [B] on.

    The caller keeps ``start + T <= S``: XLA would move a write that does not fit.
    """

    def write(stack: jax.Array, new: jax.Array) -> jax.Array:
        # one update a sequence: a batched update would be a scatter, which the CPU runs row by row
        for b in range(new.shape[0]):
            block = new[None, b : b + 1].astype(stack.dtype)
            stack = jax.lax.dynamic_update_slice(stack, block, (layer, b, start[b], 0, 0))
        return stack

    return KVCache(write(cache.k, k), write(cache.v, v))
