"""The steps between the matrix products of a decoder layer for few rows, each one launch (Pallas:Triton).

What XLA makes of these steps is up to a dozen kernels that take longer to start than to run. Rows are few and
arrays small: a kernel's program has a row, a head or all that there is. All read a layer's own
vectors and rows of the cache out of the arrays of all layers by the layer's number on the device.

Rows after the last real one, up to the matrix kernels' tile, repeat it: nothing asks for their results.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from qwen3_moe_jax.convert.config import MIN_WEIGHT_SUM
from qwen3_moe_jax.convert.ggml_types import SUPERBLOCK
from qwen3_moe_jax.kernels_pallas.gpu.activations import SWIGLU_SCALE, WEIGHT_SCALE, operand_scale

_EXPERTS = 16
"""Experts of one program of the router's product, the least that a Triton product has."""
_SPLITS = 8
"""Parts of the router's sums, each of another program."""
_COLUMNS = 64
"""Columns of one step of the router's product."""


def _call(name: str, body, outs, grid: tuple[int, ...], warps: int, interpret: bool, aliases=None):
    body.__name__ = name  # XLA and profilers name the kernel so
    return pl.pallas_call(
        body,
        out_shape=outs,
        grid=grid,
        input_output_aliases=aliases or {},
        interpret=interpret,
        compiler_params=pltriton.CompilerParams(num_warps=warps, num_stages=1),
    )


def _positions(columns: int) -> jax.Array:
    """int32 [columns]: where ``activations.operand_order`` has each column."""
    column = lax.iota(jnp.int32, columns)
    within = column & (SUPERBLOCK - 1)
    i, b, c = (within >> 2) & 15, (within >> 1) & 1, within & 1
    return (column - within) + 16 * i + 8 * c + 2 * (within >> 6) + b


def _store_operand(values: jax.Array, row, operand, scale) -> None:
    """A row as ``activations.float16_operand`` makes it."""
    factor = operand_scale(jnp.max(jnp.abs(values)))
    # 1 / (a power of two), which Triton's division only comes near to
    inverse = np.int32(254 << 23) - lax.bitcast_convert_type(factor * WEIGHT_SCALE, jnp.int32)
    scaled = values * lax.bitcast_convert_type(inverse, jnp.float32)
    operand[row, _positions(values.shape[0])] = scaled.astype(jnp.float16)
    scale[row] = factor


class NormedRows(NamedTuple):
    """Rows after a norm.

    Attributes:
      x: float32 [R, D], the rows before the norm with ``parts`` added.
      normed: float32 [tile, D].
      operand: float16 [tile, D] in operand order.
      scale: float32 [tile].
    """

    x: jax.Array
    normed: jax.Array
    operand: jax.Array
    scale: jax.Array


@dataclass(frozen=True)
class Addends:
    """Arrays whose parts are added to rows: those of one array, by a choice on the device.

    Attributes:
      options: float32 [P, rows, D], or [R, P, D] with ``by_row``.
      which: index of the array that is meant; called in the kernel.
      by_row: parts of a row lie together.
    """

    options: tuple[jax.Array, ...]
    which: Callable[[Any, Any], Any] | None = None
    by_row: bool = False

    def added(self, refs: Sequence[Any], value: jax.Array, row, *table: Any) -> jax.Array:
        """``value`` plus the parts of its row, which are added in order first."""

        def of(ref) -> Callable[[jax.Array], jax.Array]:
            def add(value: jax.Array) -> jax.Array:
                count = ref.shape[1 if self.by_row else 0]
                parts = [ref[row, part, :] if self.by_row else ref[part, row, :] for part in range(count)]
                return value + functools.reduce(jnp.add, parts)

            return add

        if self.which is None:
            return of(refs[0])(value)
        which = self.which(*table)
        for option, ref in enumerate(refs):
            value = lax.cond(which == option, of(ref), lambda value: value, value)
        return value


def add_and_norm(
    x: jax.Array,
    addends: Addends,
    weight: jax.Array,
    layer: jax.Array,
    table: jax.Array,
    eps: float,
    tile: int,
    interpret: bool = False,
) -> NormedRows:
    """RMS norm of ``x`` plus the addends.

    Args:
      x: float32 [R, D], D a power of two.
      addends: what is added first.
      weight: float32 [L, D] of all layers.
      layer: int32 [1].
      table: int32, for ``Addends.which``.
      eps: added to the mean square.
      tile: rows of the operand, R or more.
    """
    rows, columns = x.shape
    given = len(addends.options)

    def body(layer, table, weight, x, *refs):
        row = pl.program_id(0)
        held = jnp.minimum(row, rows - 1)
        value = addends.added(refs[:given], x[held, :], held, layer, table)
        sums, normed, operand, scale = refs[given:]

        @pl.when(row < rows)
        def _():
            sums[row, :] = value

        mean_square = jnp.sum(value * value) * np.float32(1 / columns)
        out = value * lax.rsqrt(mean_square + np.float32(eps)) * weight[layer[0], :]
        normed[row, :] = out
        _store_operand(out, row, operand, scale)

    outs = (
        jax.ShapeDtypeStruct((rows, columns), jnp.float32),
        jax.ShapeDtypeStruct((tile, columns), jnp.float32),
        jax.ShapeDtypeStruct((tile, columns), jnp.float16),
        jax.ShapeDtypeStruct((tile,), jnp.float32),
    )
    operands = (layer, table, weight, x, *addends.options)
    return NormedRows(*_call("add_and_norm", body, outs, (tile,), 8, interpret)(*operands))


def finish_qkv(
    qkv: jax.Array,
    other_v: tuple[jax.Array, ...],
    v_options: frozenset[int],
    v_which: Callable[[Any, Any], Any],
    norms: tuple[jax.Array, jax.Array],
    rope: tuple[jax.Array, jax.Array],
    caches: tuple[jax.Array, jax.Array],
    layer: jax.Array,
    table: jax.Array,
    positions: jax.Array,
    slots: jax.Array,
    *,
    heads: int,
    q_rows: int,
    eps: float,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Sums the products' parts, norms and turns queries and keys, writes keys and values into the caches.

    Args:
      qkv: float32 [P, tile, (heads + K (+ K)) * H], parts of queries, keys and values.
      other_v: float32 [P', tile, K * H] each, values too.
      v_options: where the values of some layer are: 0 for ``qkv``, 1 for the first of ``other_v`` ...
      v_which: the one that is meant, called with layer and table in the kernel.
      norms: float32 [L, H] for queries and keys.
      rope: cos and sin, float32 [R, H / 2].
      caches: [L, C, S, K, H], written in place.
      layer: int32 [1].
      table: int32, for ``v_which``.
      positions: int32 [R], where keys and values go.
      slots: int32 [R], the caches' rows.
      heads: query heads.
      q_rows: rows of a KV head's queries in the result, heads / K or more; only those are written.
      eps: added to the mean square.

    Returns:
      Queries in the caches' dtype [R * K, q_rows, H], and the caches.
    """
    rows = positions.shape[0]
    _, _, length, kv_heads, head_dim = caches[0].shape
    half, group = head_dim // 2, heads // kv_heads
    dtype = caches[0].dtype

    def body(layer, table, positions, slots, cos, sin, q_norm, k_norm, qkv, *refs):
        others, (q_out, k_out, v_out) = refs[: len(other_v)], refs[-3:]
        row, head = pl.program_id(0), pl.program_id(1)
        at_layer = layer[0]
        place = (at_layer, slots[row], jnp.clip(positions[row], 0, length - 1))
        halves = [pl.ds(0, half), pl.ds(half, half)]

        def summed(parts, column) -> list[jax.Array]:
            """Both halves of the head at ``column``."""
            out = []
            for offset in (0, half):
                columns = pl.ds(column + offset, half)
                value = parts[0, row, columns]
                for part in range(1, parts.shape[0]):
                    value = value + parts[part, row, columns]
                out.append(value)
            return out

        def turned(weight) -> list[jax.Array]:
            first, second = summed(qkv, head * head_dim)
            mean_square = (jnp.sum(first * first) + jnp.sum(second * second)) * np.float32(1 / head_dim)
            factor = lax.rsqrt(mean_square + np.float32(eps))
            first = first * factor * weight[at_layer, halves[0]]
            second = second * factor * weight[at_layer, halves[1]]
            c, s = cos[row, :], sin[row, :]
            return [first * c - second * s, second * c + first * s]

        @pl.when(head < heads)
        def _():
            for part, value in zip(halves, turned(q_norm), strict=True):
                q_out[row * kv_heads + head // group, head % group, part] = value.astype(dtype)

        @pl.when((head >= heads) & (head < heads + kv_heads))
        def _():
            for part, value in zip(halves, turned(k_norm), strict=True):
                k_out[*place, head - heads, part] = value.astype(dtype)

        kv, which = head - (heads + kv_heads), v_which(layer, table)
        sources = [(qkv, (heads + kv_heads) * head_dim), *((other, 0) for other in others)]
        for option, (source, column) in enumerate(sources):
            if option not in v_options:
                continue

            @pl.when((kv >= 0) & (which == option))
            def _(source=source, column=column):
                for part, value in zip(halves, summed(source, column + kv * head_dim), strict=True):
                    v_out[*place, kv, part] = value.astype(dtype)

    operands = (layer, table, positions, slots, *rope, *norms, qkv, *other_v, *caches)
    outs = (
        jax.ShapeDtypeStruct((rows * kv_heads, q_rows, head_dim), dtype),
        *(jax.ShapeDtypeStruct(c.shape, c.dtype) for c in caches),
    )
    aliases = {len(operands) - 2: 1, len(operands) - 1: 2}
    return _call("finish_qkv", body, outs, (rows, heads + 2 * kv_heads), 1, interpret, aliases)(*operands)


def attention_operand(
    out: jax.Array, rows: int, kv_heads: int, heads: int, tile: int, interpret: bool = False
) -> tuple[jax.Array, jax.Array]:
    """The attention kernel's result [R * K, q_rows, H] as an operand: float16 [tile, N * H] and its scale."""
    head_dim, group = out.shape[2], heads // kv_heads
    columns = heads * head_dim

    def body(out, operand, scale):
        row = pl.program_id(0)
        held = jnp.minimum(row, rows - 1)
        column = lax.iota(jnp.int32, columns)
        head = column // head_dim
        values = out[held * kv_heads + head // group, head % group, column % head_dim]
        _store_operand(values.astype(jnp.float32), row, operand, scale)

    outs = (
        jax.ShapeDtypeStruct((tile, columns), jnp.float16),
        jax.ShapeDtypeStruct((tile,), jnp.float32),
    )
    return _call("attention_operand", body, outs, (tile,), 8, interpret)(out)


def router_parts(x: jax.Array, w: jax.Array, layer: jax.Array, experts: int, interpret: bool = False):
    """The router's logits in parts to be added: float32 [parts, tile, E].

    Args:
      x: float32 [tile, D], tile 16 or more and D in 512s.
      w: float32 [L * E, D].
      layer: int32 [1].
      experts: E, in 16s.
    """
    rows, columns = x.shape
    each = columns // _SPLITS

    def body(layer, x, w, out):
        first, split = pl.program_id(0) * _EXPERTS, pl.program_id(1)

        def step(i, total):
            at = pl.ds(split * each + i * _COLUMNS, _COLUMNS)
            weights = w[pl.ds(layer[0] * experts + first, _EXPERTS), at]
            return total + jnp.dot(x[:, at], weights.T, precision=lax.Precision.HIGHEST)

        start = jnp.zeros((rows, _EXPERTS), jnp.float32)
        out[split, :, pl.ds(first, _EXPERTS)] = lax.fori_loop(0, each // _COLUMNS, step, start)

    outs = jax.ShapeDtypeStruct((_SPLITS, rows, experts), jnp.float32)
    return _call("router_parts", body, outs, (experts // _EXPERTS, _SPLITS), 4, interpret)(layer, x, w)


class Routes(NamedTuple):
    """The router's choice, as the matrix kernels read it.

    Attributes:
      expert_ids: int32 [L, tile, X], most probable first, the lower id first among equals.
      used: int32 [E], the experts in use in order, then zeros.
      count: int32 [1], how many.
      places: int32 [E, tile], the (row, choice) pair row * X + choice of each expert and row, or -1.
      factors: float32 [E, tile], what the down product of the pair is multiplied by.
    """

    expert_ids: jax.Array
    used: jax.Array
    count: jax.Array
    places: jax.Array
    factors: jax.Array


def choose_experts(
    parts: jax.Array, expert_ids: jax.Array, layer: jax.Array, rows: int, interpret: bool = False
) -> Routes:
    """Softmax, the X most probable experts of each row, their weights, and who uses which expert.

    A row whose logits are not finite gets weights that are NaN.

    Args:
      parts: float32 [P, tile, E], logits in parts; tile and E powers of two.
      expert_ids: int32 [L, tile, X], of which this layer's are written in place.
      layer: int32 [1].
      rows: how many of the tile's rows count.
    """
    splits, tile, experts = parts.shape
    choices = expert_ids.shape[2]

    def body(layer, parts, _, ids, used_out, count_out, places, factors):
        logits = parts[0]
        for split in range(1, splits):
            logits = logits + parts[split]
        shape = (tile, experts)
        expert, row = lax.broadcasted_iota(jnp.int32, shape, 1), lax.broadcasted_iota(jnp.int32, shape, 0)
        power = jnp.exp(logits - jnp.max(logits, axis=1)[:, None])
        left = power / jnp.sum(power, axis=1)[:, None]
        place, weight = jnp.full(shape, -1, jnp.int32), jnp.zeros(shape, jnp.float32)
        total = jnp.zeros((tile,), jnp.float32)
        for choice in range(choices):
            best = jnp.max(left, axis=1)
            found = jnp.min(jnp.where(left == best[:, None], expert, experts - 1), axis=1)
            ids[layer[0], :, choice] = found
            chosen = expert == found[:, None]
            place = jnp.where(chosen, row * choices + choice, place)
            weight = jnp.where(chosen, best[:, None], weight)
            left = jnp.where(chosen, -1.0, left)
            total = total + best
        place = jnp.where(row < rows, place, -1)
        share = weight / jnp.maximum(total, np.float32(MIN_WEIGHT_SUM))[:, None]
        places[expert, row] = place
        factors[expert, row] = share * np.float32(1 / (SWIGLU_SCALE * WEIGHT_SCALE))
        used = jnp.max(jnp.where(place >= 0, 1, 0), axis=0)
        rank = jnp.cumsum(used) - used
        square = (experts, experts)
        first, second = lax.broadcasted_iota(jnp.int32, square, 0), lax.broadcasted_iota(jnp.int32, square, 1)
        here = (used[:, None] > 0) & (rank[:, None] == second)
        used_out[:] = jnp.sum(jnp.where(here, first, 0), axis=0)
        count_out[0] = jnp.sum(used)

    outs = (
        jax.ShapeDtypeStruct(expert_ids.shape, jnp.int32),
        jax.ShapeDtypeStruct((experts,), jnp.int32),
        jax.ShapeDtypeStruct((1,), jnp.int32),
        jax.ShapeDtypeStruct((experts, tile), jnp.int32),
        jax.ShapeDtypeStruct((experts, tile), jnp.float32),
    )
    return Routes(*_call("choose_experts", body, outs, (1,), 16, interpret, {2: 0})(layer, parts, expert_ids))
