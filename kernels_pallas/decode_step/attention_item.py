"""One warpgroup's share of attention: a sequence, a KV head and a part of its context, tile by tile."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from qwen3_moe_jax.kernels_pallas.decode_step.attention_join import NO_SCORE
from qwen3_moe_jax.kernels_pallas.decode_step.config import PIECE, padded
from qwen3_moe_jax.kernels_pallas.decode_step.grid import fori
from qwen3_moe_jax.kernels_pallas.decode_step.primitives.layouts import LOG2E, full, lanes, load

Array = Any
INT8_MAX = 127
ROWS = plgpu.Layout.WGMMA
"""float32 [64, n]: query heads of a KV head in the first rows, n columns."""


def spread_rows(v: Array, columns: int) -> Array:
    """[64] of one value per row as [64, columns]."""
    return plgpu.layout_cast(lax.broadcast_in_dim(v, (64, columns), (0,)), ROWS)


def spread_columns(v: Array, columns: int) -> Array:
    """[columns] as [64, columns]."""
    return plgpu.layout_cast(lax.broadcast_in_dim(v, (64, columns), (1,)), ROWS)


@dataclass(frozen=True)
class Item:
    """What a warpgroup attends to: tiles ``start`` to ``stop`` of one sequence and KV head.

    Attributes:
      b: sequence; head: KV head; split: which of ``splits`` parts.
      position: tokens in the cache.
    """

    layer: Any
    b: Any
    head: Any
    split: Any
    splits: Any
    start: Any
    stop: Any
    position: Any


class _Kept(NamedTuple):
    """A new key or value: halves as the cache stores them and what they mean, and the scale of int8."""

    stored: list
    floats: list
    scale: Any = None


class _Scales(NamedTuple):
    """A tile's scales, float32 [tokens]: of keys; of values as shares of the largest; and that one."""

    key: Array
    value: Array
    largest: Array


class Attending:
    """One warpgroup's work on an :class:`Item`. Everything is loaded up front."""

    def __init__(self, attention: Any, item: Item, heads: list, norms: list):
        self.a, self.c, self.prim, self.i = attention, attention.c, attention.prim, item
        self.q_head, self.k_head, self.v_head = heads
        self.q_norm, self.k_norm = norms
        wg = attention.g.wg
        self.q_smem, self.k_smem, self.v_smem = (
            self.rows_of(ref.at[wg]) for ref in (attention.q_smem, attention.k_smem, attention.v_smem)
        )
        self.new_score_smem = attention.shared.new_score_smem.at[wg]
        self.new_value_smem = attention.shared.new_value_smem.at[wg]
        self.scale_smem = attention.shared.split_weight_smem.at[wg]

    @cached_property
    def copy(self) -> Any:
        """The layout in which a tile of the cache passes through registers."""
        return plgpu.Layout.SMEM_GMEM_COPY((self.c.kv_tile, self.c.head_dim), self.c.tile_dtype, 128)

    def rows_of(self, ref: Any) -> Any:
        """A warpgroup's queries, keys or values in shared memory, without the padding of their rows."""
        size = self.c.head_dim
        return ref if ref.shape[-1] == size else ref.at[:, pl.ds(0, size)]

    def run(self) -> None:
        """Attends, and stores the output or this split's part of it."""
        i = self.i
        is_last = i.split == i.splits - 1
        query, key, value = self.load_query(), *self.load_new()
        first_tile = self.first_tile()
        key, value = self.rounded(key, value)
        if self.c.prefetches:
            self.prim.wait_for_copies()
        self.a.g.sync_warpgroup()  # the last item is done with shared memory
        self.put_queries(query, key)
        for j, half in enumerate(value.floats):
            self.new_value_smem[self.at_half(j)] = half
        if not self.c.one_sequence:
            pl.when(is_last)(lambda: self.write_cache(key, value))
        self.a.g.sync_warpgroup()
        carry = lax.fori_loop(i.start, i.stop, self.tile, (*first_tile, *self.start_softmax(is_last)))
        self.store(*carry[-3:])

    def at_half(self, j: int) -> Any:
        return pl.ds(j * self.a.half, self.a.half)

    def load_query(self) -> list:
        """The new token's queries as halves of heads."""
        i, qkv = self.i, self.a.outputs.qkv_gmem
        first = self.q_head + i.head * self.c.group_heads
        return [
            [load(qkv.at[i.b, pl.ds(first + row, 8), j], self.a.halves) for j in range(2)]
            for row in self.query_rows
        ]

    def load_new(self) -> tuple[list, list]:
        """The new token's key and value as halves of heads."""
        i, qkv = self.i, self.a.outputs.qkv_gmem
        key = [load(qkv.at[i.b, self.k_head + i.head, j], self.a.one_head) for j in range(2)]
        value = [load(qkv.at[i.b, self.v_head + i.head, j], self.a.one_head) for j in range(2)]
        return key, value

    def rounded(self, key: list, value: list) -> tuple["_Kept", "_Kept"]:
        """The new key, normed and rotated, and the value, as the cache holds them."""
        return self.kept(list(self.a.rotated(self.i.b, key, self.k_norm, 1.0, None))), self.kept(value)

    def kept(self, halves: list) -> "_Kept":
        """A new key or value as the cache holds it."""
        if not self.c.has_scales:
            stored = [half.astype(self.c.cache_dtype) for half in halves]
            return _Kept(stored, [half.astype(jnp.float32) for half in stored])
        first, second = (jnp.max(jnp.abs(half), axis=0) for half in halves)
        largest = jnp.maximum(first, second)
        inverse = jnp.where(largest > 0, INT8_MAX / largest, 0.0)
        scale = largest * (1.0 / INT8_MAX)
        whole = [jnp.round(half * inverse).astype(jnp.int32) for half in halves]
        floats = [half.astype(jnp.float32) * scale for half in whole]
        return _Kept([half.astype(jnp.int8) for half in whole], floats, scale)

    def write_new(self) -> None:
        """Writes the new key and value, without attention."""
        self.write_cache(*self.rounded(*self.load_new()))

    @property
    def query_rows(self) -> list[int]:
        """The first rows of groups of 8 query heads; the last group may share rows with the one before.

        Where there are fewer than 8, the others are read and not used.
        """
        heads = self.c.group_heads
        return [max(min(row, heads - 8), 0) for row in range(0, heads, 8)]

    @property
    def cache_row(self) -> Any:
        """The cache's row of this item's sequence."""
        return self.c.first_sequence if self.c.one_sequence else self.i.b + self.c.first_sequence

    def tile_of_cache(self, i: Array) -> list:
        """Keys and values of one tile of the cache, as references."""
        c, tile = self.c, self.c.kv_tile
        i = jnp.minimum(i, c.cache_length // tile - 1)
        at = (self.i.layer, self.cache_row, pl.ds(i * tile, tile), self.i.head)
        return [ref.at[at] for ref in (self.a.inputs.k_cache_gmem, self.a.inputs.v_cache_gmem)]

    def load_tile(self, i: Array) -> tuple:
        """Keys and values of one tile, in registers; of int8 their scales as well."""
        tile = tuple(load(ref, self.copy) for ref in self.tile_of_cache(i))
        return (*tile, self.load_scales(i)) if self.c.has_scales else tile

    def load_scales(self, i: Array) -> Array:
        """float32 [128], one per lane: a tile's scales of keys, then of values; zero after the last token."""
        c, tile = self.c, self.c.kv_tile
        i = jnp.minimum(i, c.cache_length // tile - 1)
        at = (self.i.layer, self.cache_row, pl.ds(i * tile, tile), self.i.head)
        inputs, layout = self.a.inputs, lanes(128)
        scales = self.prim.load_pair([inputs.k_scale_gmem.at[at], inputs.v_scale_gmem.at[at]])
        token = plgpu.broadcasted_iota(jnp.int32, (128,), 0, layout=layout) % tile + i * tile
        return jnp.where(token < self.i.position, scales, 0.0)

    def prefetch(self) -> None:
        """Begins to copy the first tile, if there is one, to shared memory."""

        @pl.when(self.i.start < self.i.stop)
        def _():
            for to, source in zip((self.k_smem, self.v_smem), self.tile_of_cache(self.i.start), strict=True):
                self.prim.copy_tile(to, source)

    def first_tile(self) -> tuple:
        """The registers of the first tile; not set where it is in shared memory."""
        if not self.c.prefetches:
            return self.load_tile(self.i.start)
        shape = (self.c.kv_tile, self.c.head_dim)
        return tuple(self.prim.unset(shape, self.c.cache_dtype, self.copy) for _ in range(2))

    def put_queries(self, query: list, key: "_Kept") -> None:
        """Normed and rotated queries, and their scores with the new key, into shared memory."""
        c, half = self.c, self.a.half
        for row, halves in zip(self.query_rows, query, strict=True):
            halves = self.a.rotated(self.i.b, halves, self.q_norm, LOG2E * c.head_dim**-0.5, 1)
            score = 0.0
            for j in range(2):
                rounded = halves[j].astype(c.tile_dtype)
                self.q_smem[pl.ds(row, 8), self.at_half(j)] = rounded
                other = lax.broadcast_in_dim(key.floats[j], (8, half), (1,))
                other = plgpu.layout_cast(other, self.a.halves)
                score += rounded.astype(jnp.float32) * other
            score = plgpu.layout_cast(jnp.sum(score, axis=1), self.a.halves.reduce(1))
            self.new_score_smem[pl.ds(row, 8)] = score

    def write_cache(self, key: "_Kept", value: "_Kept") -> None:
        """The new token's key and value, which this token's attention does not read."""
        i, inputs = self.i, self.a.inputs
        at = (i.layer, self.cache_row, i.position, i.head)
        for j in range(2):
            inputs.k_cache_gmem[(*at, self.at_half(j))] = key.stored[j]
            inputs.v_cache_gmem[(*at, self.at_half(j))] = value.stored[j]
        if self.c.has_scales:
            inputs.k_scale_gmem[at] = key.scale
            inputs.v_scale_gmem[at] = value.scale

    def start_softmax(self, is_last: Array) -> tuple:
        """(largest score [64], sum [64], output [64, head_dim]) before the first tile.

        The last split also takes the new token, whose key and value never pass through the cache: they are
        where its running softmax starts.
        """
        size, row = self.c.head_dim, ROWS.reduce(1)
        score = load(self.new_score_smem, row)
        value = spread_columns(load(self.new_value_smem, ROWS.reduce(0)), size)
        constant = lambda shape, value, layout: full(shape, value, jnp.float32, layout)
        return (
            jnp.where(is_last, score, constant((64,), NO_SCORE, row)),
            jnp.where(is_last, constant((64,), 1.0, row), constant((64,), 0.0, row)),
            jnp.where(is_last, value, constant((64, size), 0.0, ROWS)),
        )

    def tile(self, i: Array, carry: tuple) -> tuple:
        """One tile of keys and values in the running softmax; loads the next one."""
        *loaded, largest, total, out = carry
        tile, size, dtype = self.c.kv_tile, self.c.head_dim, self.c.tile_dtype

        def put():
            self.a.g.sync_warpgroup()  # the last tile's products are done with k_smem and v_smem
            self.put_tile(loaded)

        pl.when(i > self.i.start)(put) if self.c.prefetches else put()
        self.prim.publish_tiles()
        following = lax.cond(i + 1 < self.i.stop, lambda: self.load_tile(i + 1), lambda: tuple(loaded))

        s = self.prim.matmul(self.prim.load_queries(self.q_smem), self.k_smem, tile, transposed=True)
        scales = self.column_scales() if self.c.has_scales else None
        if scales:
            s = s * spread_columns(scales.key, tile)
        column = plgpu.broadcasted_iota(jnp.int32, (64, tile), 1, layout=ROWS)
        s = jnp.where(column + i * tile < self.i.position, s, NO_SCORE)
        new = jnp.maximum(largest, jnp.max(s, axis=1))
        decay = jnp.exp2(largest - new)
        p = jnp.exp2(s - spread_rows(new, tile))
        total = total * decay + jnp.sum(p, axis=1)

        if scales:
            p = p * spread_columns(scales.value, tile)
        weighted = self.prim.matmul(p.astype(dtype), self.v_smem, size, transposed=False)
        if scales:
            weighted = weighted * scales.largest
        out = out * spread_rows(decay, size) + weighted
        return *following, new, total, out

    def put_tile(self, loaded: list) -> None:
        """A tile's keys and values into shared memory as they are multiplied."""
        k, v, *scales = loaded
        if scales:
            k, v = (self.prim.to_halves(part, self.copy) for part in (k, v))
            self.scale_smem[...] = scales[0]
        self.k_smem[...] = k
        self.v_smem[...] = v

    def column_scales(self) -> "_Scales":
        """The scales in shared memory."""
        key, value = (
            load(self.scale_smem.at[pl.ds(first, self.c.kv_tile)], ROWS.reduce(0))
            for first in (0, self.c.kv_tile)
        )
        largest = jnp.max(value, axis=0)
        return _Scales(key, value * jnp.where(largest > 0, 1.0 / largest, 0.0), largest)

    def store(self, largest: Array, total: Array, out: Array) -> None:
        """The output of a whole context, quantized in batches; or a split's part and what joins it."""
        i, outputs, rows = self.i, self.a.outputs, self.c.group_heads
        out = out * spread_rows(1.0 / total, self.c.head_dim)

        @pl.when(i.splits == 1)
        def _():
            own = outputs.attention_gmem.at[i.b, pl.ds(i.head * rows, rows)]
            self.prim.store_first_rows(own, out)
            if self.c.shares:
                self.a.g.sync_warpgroup()
                self.quantize()

        @pl.when(i.splits > 1)
        def _():
            self.prim.store_first_rows(outputs.part_gmem.at[i.b, i.head, i.split], out)
            for which, value in enumerate((largest, total)):
                stats = outputs.part_stats_gmem.at[i.b, i.head, which, :, i.split]
                self.prim.store_first_rows(stats, value)

    def quantize(self) -> None:
        """Quantizes this KV head's outputs for all blocks."""
        x, b, heads = self.a.x, self.i.b, self.c.group_heads
        pieces, rest = divmod(heads * self.c.head_dim, PIECE)
        if rest:
            whole = heads * self.c.head_dim // 128
            fori(whole, lambda n: self.quantize_lanes(self.i.head * whole + n))
            return
        for n in range(pieces):
            piece = self.i.head * pieces + n
            x.quantize(b, piece, x.attended(b, piece), self.a.outputs.attended_gmem)

    def quantize_lanes(self, number: Array) -> None:
        """Quantizes 128 of a sequence's outputs, one value per lane."""
        layout, b, out = lanes(128), self.i.b, self.a.outputs
        shape = (self.c.batch, padded(self.c.attention_width) // 128, 128)
        x = self.prim.View(out.attention_gmem, shape, leading=1).load((b, number), layout)
        self.a.x.quantize_lanes(x, layout, out.attended_gmem, lambda warp: (b, number * 4 + warp))
