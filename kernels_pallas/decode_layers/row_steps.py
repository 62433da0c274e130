"""The steps of ``decode_layers`` between its products, on one row per sequence, in plain jnp.

XLA makes a few launches of each. Nothing in them depends on the other rows. The kernels of ``row_kernels``
and ``pair_kernels`` do the same in one launch each, where their sizes fit.
"""

import functools
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from qwen3_moe_jax.kernels_pallas.decode_step.exchange import DEVICE_AXES, Split
from qwen3_moe_jax.kernels_pallas.gpu.activations import SWIGLU_SCALE, WEIGHT_SCALE, float16_operand
from qwen3_moe_jax.kernels_pallas.gpu.sorting import Tiles, sort_by_expert
from qwen3_moe_jax.kernels_pallas.norm_rope.api import rms_norm, rope
from qwen3_moe_jax.kernels_pallas.router.xla import choose_experts


class Share(NamedTuple):
    """What this device has of a model that may be split over several.

    Attributes:
      mesh: how it is split.
      experts: that this device has: their number, counted from ``experts`` times its place along ``ep``.
      add: the sum of all devices' parts [R, D], the same bits on all.
    """

    mesh: Split
    experts: int
    add: Callable[[jax.Array], jax.Array] = partial(lax.psum, axis_name=DEVICE_AXES)

    def summed(self, x: jax.Array) -> jax.Array:
        """The sum of all devices' parts, the same bits on all; x itself on one device."""
        return x if self.mesh.devices == 1 else self.add(x)

    def local(self, expert_ids: jax.Array) -> jax.Array:
        """The experts' numbers on this device; ``experts`` stands for those of other devices."""
        if self.mesh.ep == 1:
            return expert_ids
        local = expert_ids - lax.axis_index(DEVICE_AXES[0]) * self.experts
        return jnp.where((local >= 0) & (local < self.experts), local, self.experts)

    def own(self, parts: jax.Array, expert_ids: jax.Array) -> jax.Array:
        """Results [R, X, D] of experts [R, X], with zeros for those of other devices, which nobody wrote."""
        if self.mesh.ep == 1:
            return parts
        return jnp.where((self.local(expert_ids) < self.experts)[..., None], parts, 0.0)


class NormedRows(NamedTuple):
    """Rows after a norm.

    Attributes:
      normed: float32 [R, D].
      operand: float16 [tile, D] in operand order, zeros after row R.
      scale: float32 [tile].
    """

    normed: jax.Array
    operand: jax.Array
    scale: jax.Array


class Routes(NamedTuple):
    """The router's choice, as the matrix kernels read it.

    Attributes:
      expert_ids: int32 [R, X], most probable first, the lower id first among equals.
      tiles: the pairs (row, choice) of experts that are here, sorted by expert: S rows.
      rows: int32 [S], the row of each.
      pairs: int32 [S], row * X + choice, or -1 where there is none.
      factors: float32 [S], what the down product of the pair is multiplied by.
    """

    expert_ids: jax.Array
    tiles: Tiles
    rows: jax.Array
    pairs: jax.Array
    factors: jax.Array


def pick(options: Sequence[jax.Array], which: jax.Array) -> jax.Array:
    """The array number ``which``; what the others hold, were it NaN, does not matter."""
    chosen = options[0]
    for number, option in enumerate(options[1:], 1):
        chosen = jnp.where(which == number, option, chosen)
    return chosen


def sum_parts(parts: jax.Array, rows: int) -> jax.Array:
    """The first rows of parts [P, tile, N], added in order."""
    return functools.reduce(jnp.add, [parts[part, :rows] for part in range(len(parts))])


def norm(x: jax.Array, weight: jax.Array, eps: float, tile: int) -> NormedRows:
    """RMS norm of rows [R, D], and the operand of ``tile`` rows that it makes."""
    normed = rms_norm(x, weight, eps)
    return NormedRows(normed, *float16_operand(normed, tile))


def rotate(x: jax.Array, weight: jax.Array, cos_sin: tuple[jax.Array, jax.Array], eps: float) -> jax.Array:
    """Heads [R, N, H] normed and rotated by rope's cos and sin [R, H / 2]."""
    cos, sin = (table[:, None] for table in cos_sin)
    return rope(rms_norm(x, weight, eps)[:, None], cos, sin)[:, 0]


def write(
    cache: jax.Array, new: jax.Array, layer: jax.Array, slots: jax.Array, positions: jax.Array
) -> jax.Array:
    """The cache [L, C, S, K, H] with ``new`` [R, K, H] at each row's slot and position of one layer."""
    return cache.at[layer, slots, positions].set(new.astype(cache.dtype), mode="clip")


def query_operand(q: jax.Array, kv_heads: int, rows: int, dtype: jnp.dtype) -> jax.Array:
    """Queries [R, N, H] as the attention kernel takes them: [R * K, rows, H], zeros after a head's own."""
    count, heads, head_dim = q.shape
    q = q.astype(dtype).reshape(count * kv_heads, heads // kv_heads, head_dim)
    return jnp.pad(q, ((0, 0), (0, rows - heads // kv_heads), (0, 0)))


def attention_operand(out: jax.Array, rows: int, heads: int, tile: int) -> tuple[jax.Array, jax.Array]:
    """The attention kernel's result [R * K, q_rows, H] as an operand: float16 [tile, N * H] and its scale."""
    group = heads * rows // len(out)
    return float16_operand(out[:, :group].reshape(rows, -1), tile)


def choose(logits: jax.Array, choices: int, tile: int, share: Share) -> Routes:
    """The X most probable experts of each row of logits [R, E], their weights, and the pairs by expert.

    A row whose logits are not finite gets weights that are NaN.
    """
    _, ids, weights = choose_experts(logits, choices, None)
    order = sort_by_expert(share.local(ids), share.experts, tile)
    source = order.source
    factors = weights.reshape(-1)[source] / (SWIGLU_SCALE * WEIGHT_SCALE)
    return Routes(ids, order.tiles, source // choices, order.pair, factors)
