"""The KV cache: a pytree of fixed shape, written in place when its buffers are donated.

A cache has one row of S positions for each sequence; ``Span`` says which rows and
positions the tokens of a batch belong to.
"""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Sharding

from qwen3_moe_jax.convert.config import Qwen3MoeConfig
from qwen3_moe_jax.jax_backend.device import Device
from qwen3_moe_jax.jax_backend.trees import static_field, tree_dataclass
from qwen3_moe_jax.kernels_pallas import CACHE_TILE

MAX_SLICES = 8
"""Sequences that are written one by one; a scatter for more. XLA's CPU runs a scatter row by row,
and a GPU launches a kernel for each slice."""


def whole_tiles(positions: int) -> int:
    """Positions of a cache for this many: whole tiles of the attention kernels."""
    return -(-positions // CACHE_TILE) * CACHE_TILE


@tree_dataclass
class KVCache:
    """Keys and values of every layer.

    Attributes:
      k: [L, B, S, K, H], keys after their norm and RoPE; float, or int8 with scales.
      v: [L, B, S, K, H].
      k_scale, v_scale: float32 [L, B, S, K], what each int8 vector of H is multiplied by; or None.
    """

    k: jax.Array
    v: jax.Array
    k_scale: jax.Array | None = None
    v_scale: jax.Array | None = None

    @classmethod
    def create(
        cls,
        config: Qwen3MoeConfig,
        batch: int,
        length: int,
        dtype: Any = jnp.float32,
        device: Device | Sharding | None = None,
        heads: int | None = None,
    ) -> "KVCache":
        """An empty cache of ``length`` positions for ``batch`` sequences.

        With the weights' ``device`` it is bound to that place as every later cache is, so that the first
        chunk of a prompt shares a compiled program with the others. ``heads``: of all devices together; None
        is the model's.
        """
        c = config
        shape = (c.num_hidden_layers, batch, length, heads or c.num_key_value_heads, c.head_dim)
        values = [jnp.zeros(shape, dtype, device=device) for _ in "kv"]
        if dtype != jnp.int8:
            return cls(*values)
        return cls(*values, *(jnp.zeros(shape[:-1], jnp.float32, device=device) for _ in "kv"))

    @property
    def length(self) -> int:
        """Positions S that the cache holds."""
        return self.k.shape[2]

    @property
    def scales(self) -> tuple[jax.Array, jax.Array] | None:
        """Scales of keys and values, or None where the cache holds floats."""
        return None if self.k_scale is None or self.v_scale is None else (self.k_scale, self.v_scale)

    def cleared(self, row: jax.Array) -> "KVCache":
        """The cache with zeros in one sequence's row: NaN there would outlive its sequence."""

        def clear(stack: jax.Array) -> jax.Array:
            zeros = jnp.zeros((stack.shape[0], 1, *stack.shape[2:]), stack.dtype)
            corner = [jnp.int32(i) for i in (0, row, *(0 for _ in stack.shape[2:]))]
            return jax.lax.dynamic_update_slice(stack, zeros, corner)

        return jax.tree.map(clear, self)


@tree_dataclass
class Span:
    """Consecutive tokens of some sequences, T of each: rows of a batch, sequence after sequence.

    Attributes:
      start: int32 [B], the position of each sequence's first token.
      length: T; static.
      slots: int32 [B], the cache's row of each sequence; None is row b for sequence b.
      ends: int32 [B], the position after each sequence's last token; what is from there on is padding, whose
        results may be anything. None: there is none.
    """

    start: jax.Array
    length: int = static_field()
    slots: jax.Array | None = None
    ends: jax.Array | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(B, T)."""
        return len(self.start), self.length

    @property
    def positions(self) -> jax.Array:
        """int32 [B, T]."""
        return self.start[:, None] + jnp.arange(self.length, dtype=self.start.dtype)

    @property
    def real_positions(self) -> jax.Array:
        """int32 [B, T], -1 where a token is padding."""
        positions = self.positions
        return positions if self.ends is None else jnp.where(positions < self.ends[:, None], positions, -1)

    @property
    def rows(self) -> jax.Array:
        """int32 [B * T], the cache's row of each token."""
        rows = jnp.arange(len(self.start), dtype=jnp.int32) if self.slots is None else self.slots
        return jnp.repeat(rows, self.length, total_repeat_length=len(self.start) * self.length)


def write_positions(cache: KVCache, k: jax.Array, v: jax.Array, span: Span, layer: jax.Array) -> KVCache:
    """Writes k and v [B, T, K, H] of one layer at the span's places.

    The caller keeps ``start + T <= S``: XLA would move a write that does not fit.
    """
    if cache.scales is None:
        return replace(cache, k=_write(cache.k, k, span, layer), v=_write(cache.v, v, span, layer))
    values = dict(zip(("k", "k_scale", "v", "v_scale"), (*_to_int8(k), *_to_int8(v)), strict=True))
    return replace(cache, **{n: _write(getattr(cache, n), x, span, layer) for n, x in values.items()})


def _to_int8(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Each vector as int8 [..., H] and float32 [...]. What is not finite leaves a scale that is not."""
    scale = jnp.max(jnp.abs(x), axis=-1) / 127
    values = jnp.round(x / jnp.where(scale == 0, 1.0, scale)[..., None])
    return values.astype(jnp.int8), scale


def _write(stack: jax.Array, new: jax.Array, span: Span, layer: jax.Array) -> jax.Array:
    """One stack [L, B, S, ...] with ``new`` [B, T, ...] at the span's places."""
    new, batch = new.astype(stack.dtype), len(new)
    if batch <= MAX_SLICES:
        for b in range(batch):
            row = b if span.slots is None else span.slots[b]
            corner = [jnp.int32(i) for i in (layer, row, span.start[b], *(0 for _ in stack.shape[3:]))]
            stack = jax.lax.dynamic_update_slice(stack, new[None, b : b + 1], corner)
        return stack
    rows = jnp.arange(batch, dtype=span.start.dtype) if span.slots is None else span.slots
    corners = jnp.stack([jnp.broadcast_to(layer, rows.shape), rows, span.start], axis=1)
    numbers = jax.lax.ScatterDimensionNumbers(
        update_window_dims=tuple(range(1, new.ndim)),
        inserted_window_dims=(0, 1),
        scatter_dims_to_operand_dims=(0, 1, 2),
    )
    return jax.lax.scatter(stack, corners, new, numbers, mode=jax.lax.GatherScatterMode.CLIP)
